"""The page on adding a learner, followed to the letter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "metaworker", "coordinator", "tests")


def blocks(page: Path) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(r"^```\w+\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert text.count(old) == 1, f"{old!r} in {path}"
    path.write_text(text.replace(old, new), "utf-8")


def test_a_learner_added_by_the_page_passes_what_every_learner_has_to(tmp_path: Path) -> None:
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    section, algorithm, case, recipe = blocks(ROOT / "docs" / "adding-a-learner.md")
    assert sum(block.count("\n") for block in (section, algorithm, case, recipe)) < 60

    sections, registry = tmp_path / "cluster/config/learners.py", tmp_path / "metaworker/learners/__init__.py"
    edit(sections, "\n\nLearner = ", f"\n\n{section}\n\nLearner = ")
    edit(sections, "    MAML\n", "    MAML\n    | Cosine\n")
    (tmp_path / "metaworker/learners/cosine.py").write_text(algorithm, "utf-8")
    first = "    size = encoder.output_size\n    match config.learner:\n"
    edit(registry, first, first + case)
    after = "\nfrom metaworker.learners.embedding"
    edit(registry, after, f"\nfrom metaworker.learners.cosine import CosineMeans{after}")
    (tmp_path / "cluster/recipes/glyphs-cosine.toml").write_text(recipe, "utf-8")

    lint = (sys.executable, "-m", "ruff", "check", "--no-cache", "cluster/config", "metaworker/learners")
    assert subprocess.run(lint, cwd=tmp_path, capture_output=True, text=True).stdout == "All checks passed!\n"

    tests = ("tests/metaworker/test_learners.py", "tests/coordinator/test_every_learner.py")
    argv = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "cosine")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 60
