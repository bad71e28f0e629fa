"""The commit log: what made each version, in order, so that a run can be recomputed from it.

One file an epoch. Its header names format, epoch, the version it starts from, and the run's digests; then one entry a
commit, appended before the commit is announced. Readers chain the epochs: an epoch's entries count up to the version
that the next one started from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cluster.durable import fsync_directory, fsync_file
from cluster.errors import CheckpointError
from cluster.faults import fail_at
from cluster.records import Count, FileKind, Integer, Number, RecordWriter, Text, scan, validated
from coordinator.aggregators.base import Counted, Dropped
from coordinator.checkpoint import list_checkpoints, version_of
from coordinator.run_dir import RunDirectory

FORMAT = "metafleet-commit-log"
SCHEMA = 1
KIND = FileKind("commit log")

HEADER_FORM: TypeAdapter[tuple[str, int, int, int, str, str]] = TypeAdapter(
    tuple[Text, Count, Count, Count, Text, Text]
)
"""Format, schema, epoch, the version it starts from, that version's run digest, digest of the configuration."""
_Counted = tuple[Integer, Integer, Number, Text, Text]
_Dropped = tuple[Integer, Integer, Text, Text]
ENTRY_FORM: TypeAdapter[Any] = TypeAdapter(tuple[Count, tuple[_Counted, ...], tuple[_Dropped, ...], Text])
"""``Entry``, its parts and theirs as lists."""


@dataclass(frozen=True)
class Entry:
    """One commit."""

    version: int
    """The version that it made."""
    counted: tuple[Counted, ...]
    """Contributions in the order in which they were applied."""
    dropped: tuple[Dropped, ...]
    """Contributions dropped since the commit before."""
    digest: str
    """Run digest of the new version."""


class CommitLog:
    """Appends entries to the log of one epoch; its header and the logs before it are on the disk when this is made.

    Args:
        run: the run directory, whose lock is held.
        epoch: the epoch this driver claimed.
        start: the version that it goes on from.
        start_digest: run digest of that version.
        config_digest: digest of the configuration's result half.

    Raises:
        CheckpointError: the logs before do not lead to ``start``; or, here and in every method, the disk is full,
            read-only or gone.
    """

    def __init__(self, run: RunDirectory, epoch: int, start: int, start_digest: str, config_digest: str) -> None:
        path = run.log(epoch)
        if start > 0:
            check_reaches(run, read_log(run), start, start_digest)
        try:
            # The header will say that versions up to `start` are in the logs before: they reach the disk before it.
            for log in [run.log(e) for e in run.epochs() if run.log(e).exists()]:
                fsync_file(log)
            self._writer = RecordWriter(path, [FORMAT, SCHEMA, epoch, start, start_digest, config_digest], kind=KIND)
            self._writer.sync()
            fsync_directory(path.parent)
        except OSError as error:
            raise CheckpointError(f"cannot force the logs of {run.path} to the disk: {error.strerror}") from error

    def append(self, entry: Entry) -> None:
        """Record a commit; it is with the operating system when this returns."""
        counted = [list(astuple(c)) for c in entry.counted]
        fail_at("append", version=entry.version)
        self._writer.append([entry.version, counted, [list(astuple(d)) for d in entry.dropped], entry.digest])
        fail_at("appended", version=entry.version)

    def sync(self) -> None:
        """Force everything appended to the disk."""
        fail_at("fsync")
        self._writer.sync()
        fail_at("fsynced")

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def read_log(run: RunDirectory) -> list[Entry]:
    """All commits of a run, versions 1, 2 … without gaps.

    Raises:
        CheckpointError: a log is damaged elsewhere than at its end, or the epochs do not join.
    """
    segments = [_read_segment(run.log(epoch), epoch) for epoch in run.epochs()]
    entries: list[Entry] = []
    for start, digest, segment in (s for s in segments if s is not None):
        if start > len(entries):
            raise CheckpointError(
                f"the commit log of {run.path} has a gap: versions {len(entries) + 1}–{start} are missing"
            )
        if start > 0 and entries[start - 1].digest != digest:
            raise CheckpointError(f"the commit logs of {run.path} do not join at version {start}: digests differ")
        del entries[start:]
        for entry in segment:
            if entry.version != len(entries) + 1:
                raise CheckpointError(
                    f"the commit log of {run.path} jumps from version {len(entries)} to {entry.version}"
                )
            entries.append(entry)
    return entries


def log_problem(run: RunDirectory, entries: Sequence[Entry]) -> str | None:
    """What is missing of a log, if it ends before the run's last checkpoint."""
    kept = list_checkpoints(run.checkpoints)
    last = version_of(kept[-1])[0] if kept else 0
    if last <= len(entries):
        return None
    return f"the commit log of {run.path} ends at version {len(entries)}, before its checkpoint of version {last}"


def check_reaches(run: RunDirectory, entries: Sequence[Entry], version: int, digest: str) -> None:
    """Refuse to go on from a version that no log leads to: nobody could read the logs after that.

    Raises:
        CheckpointError: the log ends before ``version``, or gives it another digest.
    """
    if version > len(entries):
        raise CheckpointError(
            f"the commit log of {run.path} ends at version {len(entries)}, before version {version} that the run is to "
            "go on from: restore the log from a backup, or remove the later checkpoints"
        )
    if version > 0 and entries[version - 1].digest != digest:
        raise CheckpointError(
            f"the commit log of {run.path} has another digest at version {version} than the checkpoint: restore both "
            "from one backup, or remove the checkpoint to go on from the one before"
        )


def _read_segment(path: Path, epoch: int) -> tuple[int, str, Sequence[Entry]] | None:
    """Start version, its digest, and the entries of one log; ``None`` if the driver died before its header."""
    try:
        records, _ = scan(path, [FORMAT, SCHEMA, epoch], KIND)
    except FileNotFoundError:
        return None
    if not records:
        return None
    try:
        _, _, _, start, digest, _ = validated(HEADER_FORM, records[0])
        return start, digest, [_entry(record) for record in records[1:]]
    except ValueError as error:
        raise CheckpointError(f"{path} holds a record that is no commit ({error}): {KIND.advice}") from error


def _entry(record: Any) -> Entry:
    version, counted, dropped, digest = validated(ENTRY_FORM, record)
    return Entry(version, tuple(Counted(*c) for c in counted), tuple(Dropped(*d) for d in dropped), digest)
