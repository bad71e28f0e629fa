"""The metric history of a run: ``history.msgpack``, one record per commit and validation, appended as the run goes.

A record of the file (``cluster/records``) is ``[kind, field, …]``; the first one names the format. Only the tail may be
damaged, because a crash tears what was written last: then it is dropped. Damage anywhere else is refused.

A resume from version v appends a marker; what an earlier attempt had recorded of versions above v is superseded then,
and readers drop it. Versions are thereby strictly ascending for every reader. The run's result never depends on this
file: it is for people, plots and the results table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from cluster.errors import CheckpointError
from cluster.records import Count, FileKind, Number, RecordWriter, Text, scan, shown, validated

HEADER: Final = ["metafleet-history", 1]
"""The first record: format and schema version."""

BUFFER: Final = 1 << 16
"""Bytes that are gathered before they are written."""

COMMIT, VALIDATION, RESUME, GOODPUT = 0, 1, 2, 3

KIND: Final = FileKind(
    "metric history",
    "restore it, or move it away to go on without the earlier metric history (the run's result does not need it)",
    BUFFER,
)


class CommitRecord(NamedTuple):
    """One outer update."""

    version: Count
    """The version that the update made."""
    loss: Number
    """Mean query loss after adaptation over the version's episodes."""
    metric: Number
    """Mean query accuracy (fraction), or mean squared error for regression."""
    gradient_norm: Number
    """Norm of the aggregated meta-gradient before clipping."""
    episodes: Count
    """Episodes in this update."""
    seconds: Number
    """Wall time since the run started; goes on counting after a resume."""
    tasks_per_second: Number
    """Episodes per second at the time."""
    staleness: Number
    """Mean staleness of the update's contributions, versions."""
    workers: Count
    """Workers alive."""


class ValidationRecord(NamedTuple):
    """One validation of a version."""

    version: Count
    steps: tuple[Number, ...]
    """Accuracy (fraction) or mean squared error per adaptation step, the first before any."""
    ci95: tuple[Number, ...]
    """Half-widths of their 95 % confidence intervals."""


class _ResumeRecord(NamedTuple):
    version: Count


class _GoodputRecord(NamedTuple):
    version: Count
    goodput: dict[Text, Any]


_Record = CommitRecord | ValidationRecord | _ResumeRecord | _GoodputRecord
_FORMS: Final[Mapping[int, TypeAdapter[Any]]] = {
    COMMIT: TypeAdapter(CommitRecord),
    VALIDATION: TypeAdapter(ValidationRecord),
    RESUME: TypeAdapter(_ResumeRecord),
    GOODPUT: TypeAdapter(_GoodputRecord),
}


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
    goodput: tuple[tuple[int, Mapping[str, Any]], ...]
    """Versions of checkpoints, ascending, with ``Goodput.to_json`` up to then."""
    resumes: tuple[int, ...]
    """The versions that the run was resumed from, in order of time."""

    def __len__(self) -> int:
        return len(self.version)

    @staticmethod
    def of(
        commits: list[CommitRecord],
        validations: Iterable[ValidationRecord] = (),
        resumes: tuple[int, ...] = (),
        goodput: Iterable[tuple[int, Mapping[str, Any]]] = (),
    ) -> History:
        """A history of these records, which ascend in version."""
        columns = list(zip(*commits, strict=True)) or [()] * len(CommitRecord._fields)
        integers = ("version", "episodes", "workers")
        arrays = {
            name: np.array(column, dtype=np.int64 if name in integers else np.float64)
            for name, column in zip(CommitRecord._fields, columns, strict=True)
        }
        return History(**arrays, validations=tuple(validations), goodput=tuple(goodput), resumes=resumes)


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

    def goodput(self, version: int, goodput: Mapping[str, Any]) -> None:
        """Record the goodput up to ``version``."""
        self._writer.append((GOODPUT, version, goodput))

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
        CheckpointError: there is no such file, it is no history, unreadable, damaged elsewhere than at its end, or
            holds a record of another form.
    """
    try:
        records = [_record(record) for record in scan(path, HEADER, KIND)[0][1:]]
    except FileNotFoundError as error:
        raise CheckpointError(f"no metric history at {path}: the run has recorded nothing yet") from error
    except ValueError as error:
        raise CheckpointError(f"{path} holds a record of another form ({error}): {KIND.advice}") from error
    commits: list[CommitRecord] = []
    # Two validations may be under way at once, and the later version's may end first.
    validations: dict[int, ValidationRecord] = {}
    goodput: dict[int, Mapping[str, Any]] = {}
    resumes: list[int] = []
    for record in records:
        match record:
            case CommitRecord(version):
                _supersede(commits, version)
                commits.append(record)
            case ValidationRecord(version):
                validations[version] = record
            case _GoodputRecord(version, packed):
                goodput[version] = packed
            case _ResumeRecord(version):
                resumes.append(version)
                _supersede(commits, version + 1)
                validations = {v: validation for v, validation in validations.items() if v <= version}
                goodput = {v: packed for v, packed in goodput.items() if v <= version}
    ordered = [validations[version] for version in sorted(validations)]
    return History.of(commits, ordered, tuple(resumes), sorted(goodput.items(), key=lambda pair: pair[0]))


def _record(record: Any) -> _Record:
    """What a record of the file says.

    Raises:
        ValueError: its kind is unknown, or what it holds is not of its kind.
    """
    match record:
        case [kind, *fields] if type(kind) is int and kind in _FORMS:
            result: _Record = validated(_FORMS[kind], fields)
            return result
    raise ValueError(f"there is no kind {shown(record[0])}" if isinstance(record, list) and record else "it is no list")


def _supersede(commits: list[CommitRecord], version: int) -> None:
    """Drop the commits of ``version`` and later ones; each is dropped once, so a whole file costs O(n)."""
    while commits and commits[-1].version >= version:
        commits.pop()
