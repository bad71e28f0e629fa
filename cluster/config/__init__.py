"""Configuration: sections (the fields), run (the whole), loading (recipes and overrides)."""
