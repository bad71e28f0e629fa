"""The metric history of a run: ``history.msgpack``, one record per commit and validation, appended as the run goes.

A record is one msgpack value of fixed layout, ``[crc32 of body, body]`` with the body as bin 16, and the body again
msgpack: ``[kind, field, …]``. The first record names the format. Only the tail may be damaged, because a crash tears
what was written last: from the first record that does not check, everything is dropped if no whole record follows, and
the file is refused if one does.

A resume from version v appends a marker; what an earlier attempt had recorded of versions above v is superseded then,
and readers drop it. Versions are thereby strictly ascending for every reader. The run's result never depends on this
file: it is for people, plots and the results table.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import msgpack
import numpy as np

from cluster.errors import CheckpointError

HEADER: Final = ["metafleet-history", 1]
"""The first record: format and schema version."""

BUFFER: Final = 1 << 16
"""Bytes that are gathered before they are written."""

COMMIT, VALIDATION, RESUME = 0, 1, 2

FRAME: Final = struct.Struct(">2sIcH")
"""Array of two, uint 32 (the CRC), bin 16 (the body's length): a fixed prefix, so that records can be found again."""

PAIR, BIN16 = b"\x92\xce", b"\xc5"


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
        whole = _scan(path, path.read_bytes())[1] if path.exists() else 0
        self._file = path.open("ab", buffering=0)
        self._file.truncate(whole)
        self._buffer = bytearray()
        if whole == 0:
            self._append(HEADER)

    def commit(self, record: CommitRecord) -> None:
        """Record an outer update."""
        self._append((COMMIT, *record))

    def validation(self, record: ValidationRecord) -> None:
        """Record a validation."""
        self._append((VALIDATION, *record))

    def resume(self, version: int) -> None:
        """Mark that the run goes on from ``version``: what was recorded of later versions is superseded."""
        self._append((RESUME, version))

    def flush(self) -> None:
        """Hand everything recorded so far to the operating system."""
        # Whole records in single writes to a file opened for appending: should a stale driver still write to the same
        # run, its records may interleave with ours, but never tear them.
        view = memoryview(self._buffer)
        while view:
            view = view[self._file.write(view) :]
        self._buffer = bytearray()

    def close(self) -> None:
        """Flush and close; does nothing the second time."""
        if not self._file.closed:
            self.flush()
            self._file.close()

    def _append(self, record: Any) -> None:
        body: bytes = msgpack.packb(record)
        if len(body) >= BUFFER:
            raise ValueError(f"a history record holds less than {BUFFER} bytes, got {len(body)}")
        self._buffer += FRAME.pack(PAIR, zlib.crc32(body), BIN16, len(body)) + body
        if len(self._buffer) >= BUFFER:
            self.flush()


def read_history(path: Path) -> History:
    """The history at ``path`` without what later attempts superseded and without a torn tail.

    Raises:
        CheckpointError: there is no such file, it is no history, or it is damaged elsewhere than at its end.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"no metric history at {path}: the run has recorded nothing yet") from error
    commits: list[CommitRecord] = []
    validations: list[ValidationRecord] = []
    resumes: list[int] = []
    for kind, *fields in _scan(path, data)[0]:
        if kind == COMMIT:
            commit = CommitRecord(*fields)
            _supersede(commits, commit.version)
            commits.append(commit)
        elif kind == VALIDATION:
            validation = ValidationRecord(fields[0], tuple(fields[1]), tuple(fields[2]))
            _supersede(validations, validation.version)
            validations.append(validation)
        else:
            resumes.append(fields[0])
            _supersede(commits, fields[0] + 1)
            _supersede(validations, fields[0] + 1)
    return History.of(commits, validations, tuple(resumes))


class _Versioned(Protocol):
    @property
    def version(self) -> int: ...


_Record = TypeVar("_Record", bound=_Versioned)


def _supersede(records: list[_Record], version: int) -> None:
    """Drop the records of ``version`` and later ones; each record is dropped once, so a whole file costs O(n)."""
    while records and records[-1].version >= version:
        records.pop()


def _scan(path: Path, data: bytes) -> tuple[list[list[Any]], int]:
    """The records in ``data`` after the header, and how many bytes of it are whole."""
    records, end = [], 0
    for record, end in _frames(data):  # noqa: B007 - the last end is what counts
        records.append(record)
    if _resumes_after(data, end):
        raise CheckpointError(
            f"{path} is damaged at byte {end} of {len(data)}: restore it, or move it away to go on without the earlier "
            "metric history (the run's result does not need it)"
        )
    if records and records[0] != HEADER:
        raise CheckpointError(f"{path} is no metric history of this version: its first record is {records[0]!r}")
    if data and not records and not _torn_header(data):
        raise CheckpointError(f"{path} is no metric history: it starts with {data[:16]!r}")
    return records[1:], end


def _frames(data: bytes, start: int = 0) -> Iterator[tuple[list[Any], int]]:
    """The consecutive whole records of ``data`` from ``start``, each with the offset after it."""
    while start + FRAME.size <= len(data):
        pair, crc, bin16, length = FRAME.unpack_from(data, start)
        body = data[start + FRAME.size : start + FRAME.size + length]
        if pair != PAIR or bin16 != BIN16 or len(body) < length or zlib.crc32(body) != crc:
            return
        start += FRAME.size + length
        yield msgpack.unpackb(body), start


def _resumes_after(data: bytes, end: int) -> bool:
    """Whether a whole record starts anywhere behind the first damaged byte, ``end``."""
    at = data.find(PAIR, end)
    while at >= 0:
        if next(_frames(data, at), None) is not None:
            return True
        at = data.find(PAIR, at + 1)
    return False


def _torn_header(data: bytes) -> bool:
    """Whether ``data``, which holds no whole record, can be the beginning of a history."""
    body: bytes = msgpack.packb(HEADER)
    return (FRAME.pack(PAIR, zlib.crc32(body), BIN16, len(body)) + body).startswith(data)
