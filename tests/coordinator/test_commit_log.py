"""The commit log: round trip, torn tails, damage, and how the epochs of a run join."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import CheckpointError, RunDirectoryError
from cluster.records import RecordWriter
from coordinator.aggregators.base import Counted, Dropped
from coordinator.commit_log import FORMAT, SCHEMA, CommitLog, Entry, read_log
from coordinator.run_dir import RunDirectory
from tests.coordinator.harness import new_run


def entry(version: int, by: int = 1) -> Entry:
    counted = tuple(Counted(3 * version + k, version - 1 - k, (1 + k) ** -0.5, f"c{version}{k}", "f") for k in range(2))
    dropped = (Dropped(99, 0, "d", "staleness 9 is above the bound 8"),) if version % 2 else ()
    return Entry(version, counted, dropped, f"digest {version} by {by}")


def segment(run: RunDirectory, versions: range) -> int:
    """One driver's log, which goes on from the version before its first one."""
    epoch, start = run.claim_epoch(), versions.start - 1
    log = CommitLog(run, epoch, start, read_log(run)[start - 1].digest if start > 0 else "initial", "config")
    for version in versions:
        log.append(entry(version, epoch))
    log.close()
    return epoch


def heads(run: RunDirectory) -> list[tuple[int, str]]:
    return [(each.version, each.digest[-1]) for each in read_log(run)]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return new_run(tmp_path / "run")


def test_what_was_logged_is_read_back(run: RunDirectory) -> None:
    assert read_log(run) == []
    segment(run, range(1, 6))
    assert read_log(run) == [entry(version) for version in range(1, 6)]


def test_an_entry_is_with_the_operating_system_when_append_returns(run: RunDirectory) -> None:
    log = CommitLog(run, run.claim_epoch(), 0, "initial", "config")
    assert read_log(run) == []
    log.append(entry(1))
    assert read_log(run) == [entry(1)]
    log.append(entry(2))
    assert len(read_log(run)) == 2


def test_what_a_log_builds_on_is_on_the_disk_before_its_header_is_written(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synced are the earlier logs, then this one, then their folder; and everything appended by ``sync``."""
    segment(run, range(1, 4))
    epoch = run.claim_epoch()
    synced: list[tuple[str, int, bool]] = []
    real = os.fsync

    def spy(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.name, os.fstat(descriptor).st_size, run.log(epoch).exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    log = CommitLog(run, epoch, 3, "digest 3 by 1", "config")
    old, new = run.log(1).stat().st_size, run.log(epoch).stat().st_size
    assert [(name, size) for name, size, _ in synced[:2]] == [("0001.msgpack", old), ("0002.msgpack", new)]
    assert [there for _, _, there in synced[:2]] == [False, True]
    assert synced[2][0] == "log"
    log.append(entry(4))
    assert len(synced) == 3
    log.sync()
    assert synced[3][:2] == ("0002.msgpack", run.log(epoch).stat().st_size)


# --------------------------------------------------------------------------------------------------------------- damage


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.floats(0, 1))
def test_a_torn_tail_is_dropped(run: RunDirectory, where: float) -> None:
    path = run.log(1)
    if not path.exists():
        segment(run, range(1, 6))
        path.with_suffix(".whole").write_bytes(path.read_bytes())
    data = path.with_suffix(".whole").read_bytes()
    size = int(where * len(data))
    path.write_bytes(data[:size])
    found = read_log(run)
    assert found == [entry(version) for version in range(1, len(found) + 1)]
    assert (len(found) == 5) == (size == len(data))


def test_a_log_torn_in_its_header_is_of_a_driver_that_did_nothing(run: RunDirectory) -> None:
    segment(run, range(1, 4))
    segment(run, range(4, 6))
    run.log(2).write_bytes(run.log(2).read_bytes()[:30])
    assert heads(run) == [(1, "1"), (2, "1"), (3, "1")]
    run.log(2).write_bytes(b"")
    segment(run, range(3, 5))
    assert heads(run) == [(1, "1"), (2, "1"), (3, "3"), (4, "3")]


def test_a_driver_that_claimed_its_epoch_and_died_left_no_log(run: RunDirectory) -> None:
    segment(run, range(1, 3))
    run.claim_epoch()
    assert segment(run, range(3, 4)) == 3
    assert heads(run) == [(1, "1"), (2, "1"), (3, "3")]


def test_damage_before_the_last_entry_is_refused(run: RunDirectory) -> None:
    segment(run, range(1, 4))
    data = run.log(1).read_bytes()
    last = data.rindex(b"\x92\xce")
    for at in range(last):
        damaged = bytearray(data)
        damaged[at] ^= 0x20
        run.log(1).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"0001.msgpack is damaged at byte \d+ .*restore it from a backup"):
            read_log(run)


@pytest.mark.parametrize(
    ("header", "records", "says"),
    [
        (["metafleet-history", 1], [], "is no commit log of this version: its first record is .'metafleet-history', 1"),
        ([FORMAT, SCHEMA + 1, 1, 0, "d", "c"], [], "is no commit log of this version"),
        ([FORMAT, SCHEMA, 2, 0, "d", "c"], [], "is no commit log of this version.* 2, .* expected .* 1]"),
        ([FORMAT, SCHEMA, 1, 0], [], "holds a record that is no commit"),
        ([FORMAT, SCHEMA, 1, 0, "d", "c"], [[1, [], []]], "holds a record that is no commit"),
        ([FORMAT, SCHEMA, 1, 0, "d", "c"], [[1, [[1, 2]], [], "d"]], "holds a record that is no commit"),
        ([FORMAT, SCHEMA, 1, 0, "d", "c"], [7], "holds a record that is no commit"),
    ],
)
def test_a_log_of_another_form_is_refused(
    run: RunDirectory, header: list[object], records: list[object], says: str
) -> None:
    writer = RecordWriter(run.log(run.claim_epoch()), header)
    for record in records:
        writer.append(record)
    writer.close()
    with pytest.raises(CheckpointError, match=says):
        read_log(run)


# --------------------------------------------------------------------------------------------------------------- epochs


def test_a_later_epoch_supersedes_what_the_one_before_did_beyond_its_start(run: RunDirectory) -> None:
    segment(run, range(1, 8))
    assert len(read_log(run)) == 7
    segment(run, range(5, 7))
    assert heads(run) == [(1, "1"), (2, "1"), (3, "1"), (4, "1"), (5, "2"), (6, "2")]
    segment(run, range(6, 10))
    assert heads(run)[4:] == [(5, "2"), (6, "3"), (7, "3"), (8, "3"), (9, "3")]
    segment(run, range(1, 3))
    assert heads(run) == [(1, "4"), (2, "4")]


def test_a_resume_that_commits_nothing_supersedes_nothing_but_the_tail(run: RunDirectory) -> None:
    segment(run, range(1, 5))
    segment(run, range(5, 5))
    assert len(read_log(run)) == 4
    segment(run, range(3, 3))
    assert heads(run) == [(1, "1"), (2, "1")]


def test_what_a_superseded_driver_still_logs_is_passed_over(run: RunDirectory) -> None:
    epoch = run.claim_epoch()
    stale = CommitLog(run, epoch, 0, "initial", "config")
    for version in (1, 2, 3):
        stale.append(entry(version))
    segment(run, range(3, 5))
    for version in (4, 5, 6, 7):
        stale.append(entry(version))
    assert heads(run) == [(1, "1"), (2, "1"), (3, "2"), (4, "2")]


def test_versions_that_are_missing_between_two_epochs_are_refused(run: RunDirectory) -> None:
    segment(run, range(1, 6))
    segment(run, range(6, 8))
    data = run.log(1).read_bytes()
    run.log(1).write_bytes(data[: data.rindex(b"\x92\xce")])
    with pytest.raises(CheckpointError, match="has a gap: versions 5–5 are missing"):
        read_log(run)
    run.log(1).unlink()
    with pytest.raises(CheckpointError, match="has a gap: versions 1–5 are missing"):
        read_log(run)


def test_epochs_that_go_on_from_another_digest_are_refused(run: RunDirectory) -> None:
    segment(run, range(1, 4))
    segment(run, range(4, 6))
    run.log(1).unlink()
    log = CommitLog(run, 1, 0, "initial", "config")
    for version in (1, 2, 3):
        log.append(entry(version, by=7))
    with pytest.raises(CheckpointError, match="do not join at version 3: digests differ"):
        read_log(run)


def test_a_driver_does_not_go_on_from_where_no_log_leads(run: RunDirectory) -> None:
    segment(run, range(1, 4))
    epoch = run.claim_epoch()
    with pytest.raises(CheckpointError, match=r"ends at version 3, before version 4 that the run is to go on from"):
        CommitLog(run, epoch, 4, "digest 4 by 1", "config")
    with pytest.raises(CheckpointError, match=r"has another digest at version 3 than the checkpoint"):
        CommitLog(run, epoch, 3, "another", "config")
    assert not run.log(epoch).exists()
    CommitLog(run, epoch, 3, "digest 3 by 1", "config").close()
    assert len(read_log(run)) == 3


def test_a_version_that_is_left_out_or_logged_twice_is_refused(run: RunDirectory) -> None:
    log = CommitLog(run, run.claim_epoch(), 0, "initial", "config")
    log.append(entry(1))
    log.append(entry(3))
    with pytest.raises(CheckpointError, match="jumps from version 1 to 3"):
        read_log(run)


def test_a_disk_that_is_gone_is_an_error(run: RunDirectory) -> None:
    epoch = run.claim_epoch()
    run.log(epoch).parent.rmdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*0001.msgpack: No such file"):
        CommitLog(run, epoch, 0, "initial", "config")
    with pytest.raises(RunDirectoryError, match="has lost its epochs"):
        read_log(RunDirectory(run.path / "gone"))
