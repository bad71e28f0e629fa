"""The metric history of a run: ``history.msgpack``, one record per commit and validation, appended as the run goes.

A record of the file (``cluster/records``) is ``[kind, field, …]``; the first one names the format. Only the tail may be
damaged, because a crash tears what was written last: then it is dropped. Damage anywhere else is refused.

A resume from version v appends a marker; what an earlier attempt had recorded of versions above v is superseded then,
and readers drop it. Versions are thereby strictly ascending for every reader. The run's result never depends on this
file: it is for people, plots and the results table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from cluster.errors import CheckpointError
from cluster.records import FileKind, RecordWriter, scan

HEADER: Final = ["metafleet-history", 1]
"""The first record: format and schema version."""

BUFFER: Final = 1 << 16
"""Bytes that are gathered before they are written."""

COMMIT, VALIDATION, RESUME = 0, 1, 2

KIND: Final = FileKind(
    "metric history",
    "restore it, or move it away to go on without the earlier metric history (the run's result does not need it)",
    BUFFER,
)


class CommitRecord(NamedTuple):
    """One outer update."""

    version: int
    """The version that the update made."""
    loss: float
    """Mean query loss after adaptation over the version's episodes."""
    metric: float
    """Mean query accuracy (fraction), or mean squared error for regression."""
    gradient_norm: float
    """Norm of the aggregated meta-gradient before clipping."""
    episodes: int
    """Episodes in this update."""
    seconds: float
    """Wall time since the run started; goes on counting after a resume."""
    tasks_per_second: float
    """Episodes per second at the time."""
    staleness: float
    """Mean staleness of the update's contributions, versions."""
    workers: int
    """Workers alive."""


class ValidationRecord(NamedTuple):
    """One validation of a version."""

    version: int
    steps: tuple[float, ...]
    """Accuracy (fraction) or mean squared error per adaptation step, the first before any."""
    ci95: tuple[float, ...]
    """Half-widths of their 95 % confidence intervals."""


@dataclass(frozen=True)
class History:
    """What a run recorded: one array element per commit, in strictly ascending order of versions.

    Integers are int64 ``[commit]``, the others float64 ``[commit]``; meanings and units are ``CommitRecord``'s.
    """

    version: np.ndarray
    loss: np.ndarray
    metric: np.ndarray
    gradient_norm: np.ndarray
    episodes: np.ndarray
    seconds: np.ndarray
    tasks_per_second: np.ndarray
    staleness: np.ndarray
    workers: np.ndarray
    validations: tuple[ValidationRecord, ...]
    """In strictly ascending order of versions."""
    resumes: tuple[int, ...]
    """The versions that the run was resumed from, in order of time."""

    def __len__(self) -> int:
        return len(self.version)

    @staticmethod
    def of(
        commits: list[CommitRecord], validations: list[ValidationRecord] | None = None, resumes: tuple[int, ...] = ()
    ) -> History:
        """A history of these records, which ascend in version."""
        columns = list(zip(*commits, strict=True)) or [()] * len(CommitRecord._fields)
        integers = ("version", "episodes", "workers")
        arrays = {
            name: np.array(column, dtype=np.int64 if name in integers else np.float64)
            for name, column in zip(CommitRecord._fields, columns, strict=True)
        }
        return History(**arrays, validations=tuple(validations or ()), resumes=resumes)


class HistoryWriter:
    """Appends records to a history file, made if absent; records reach the file at ``flush`` or every 64 KiB.

    Call ``flush`` before each checkpoint: then the history has no gap after a crash and a resume.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` for appending and cut off what a crash tore.

        Raises:
            CheckpointError: the file is damaged elsewhere than at its end, or is no history.
        """
        self._writer = RecordWriter(path, HEADER, BUFFER, KIND)

    def commit(self, record: CommitRecord) -> None:
        """Record an outer update."""
        self._writer.append((COMMIT, *record))

    def validation(self, record: ValidationRecord) -> None:
        """Record a validation."""
        self._writer.append((VALIDATION, *record))

    def resume(self, version: int) -> None:
        """Mark that the run goes on from ``version``: what was recorded of later versions is superseded."""
        self._writer.append((RESUME, version))

    def flush(self) -> None:
        """Hand everything recorded so far to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close; does nothing the second time."""
        self._writer.close()


def read_history(path: Path) -> History:
    """The history at ``path`` without what later attempts superseded and without a torn tail.

    Raises:
        CheckpointError: there is no such file, it is no history, or it is damaged elsewhere than at its end.
    """
    try:
        records: list[Any] = scan(path, HEADER, KIND)[0]
    except FileNotFoundError as error:
        raise CheckpointError(f"no metric history at {path}: the run has recorded nothing yet") from error
    commits: list[CommitRecord] = []
    # Two validations may be under way at once, and the later version's may end first.
    validations: dict[int, ValidationRecord] = {}
    resumes: list[int] = []
    for kind, *fields in records[1:]:
        if kind == COMMIT:
            commit = CommitRecord(*fields)
            _supersede(commits, commit.version)
            commits.append(commit)
        elif kind == VALIDATION:
            validation = ValidationRecord(fields[0], tuple(fields[1]), tuple(fields[2]))
            validations[validation.version] = validation
        else:
            resumes.append(fields[0])
            _supersede(commits, fields[0] + 1)
            validations = {v: validation for v, validation in validations.items() if v <= fields[0]}
    return History.of(commits, [validations[version] for version in sorted(validations)], tuple(resumes))


def _supersede(commits: list[CommitRecord], version: int) -> None:
    """Drop the commits of ``version`` and later ones; each is dropped once, so a whole file costs O(n)."""
    while commits and commits[-1].version >= version:
        commits.pop()
