"""Errors that reach a user: one line that says what was wrong, what was received and what to change.

Every class survives pickling across processes: all arguments go to ``Exception.__init__``.
"""


class MetafleetError(Exception):
    """Base of every error Metafleet raises on purpose; the command line prints it as one line and exits with 2."""


class ConfigError(MetafleetError):
    """The configuration is refused: unknown key, impossible value, or a change that a resume may not make."""


class StoreError(MetafleetError):
    """An episode store is missing, foreign, truncated, altered, or of the wrong shape."""


class StoreMissingError(StoreError):
    """There is nothing at an episode store's path."""


class IngestError(MetafleetError):
    """A data source cannot be turned into an episode store."""


class SplitError(MetafleetError):
    """A split names classes that do not exist, overlaps, or has too few classes or samples for the episodes."""


class ClusterError(MetafleetError):
    """No Ray cluster at the address, or not the resources for even one worker."""


class RunDirectoryError(MetafleetError):
    """The run directory exists already, is in use by a living run, or is no run at all."""


class CheckpointError(MetafleetError):
    """A checkpoint or commit log is missing, torn or altered, or of another shape than the configuration."""


class NumericsError(MetafleetError):
    """Too many non-finite contributions, or digests that should agree and do not."""


class PoisonShardError(MetafleetError):
    """A shard failed on every worker that tried it; carries its episode ids and the worker's traceback."""


class FingerprintError(MetafleetError):
    """Workers of different hardware classes in a strict pool, or a resume on other hardware."""


class PortError(MetafleetError):
    """A port that Metafleet was told to use is taken."""
