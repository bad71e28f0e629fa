"""The metric history: round trip, torn tails, damage, resumes, and size and time at 70,000 versions."""

from __future__ import annotations

from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import CheckpointError
from coordinator.history import CommitRecord, HistoryWriter, ValidationRecord, read_history


def commit(version: int, loss: float = 0.5) -> CommitRecord:
    return CommitRecord(version, loss, 0.8, 1.5, 32, version * 0.1, 320.0, 0.25, 4)


def write(path: Path, versions: range, *, loss: float = 0.5, resume: int | None = None) -> None:
    writer = HistoryWriter(path)
    if resume is not None:
        writer.resume(resume)
    for version in versions:
        writer.commit(commit(version, loss))
    writer.close()


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "history.msgpack"
    writer = HistoryWriter(path)
    first = CommitRecord(1, 1.25, 0.3, 7.5, 16, 0.7, 23.0, 2.5, 3)
    writer.commit(first)
    writer.validation(ValidationRecord(1, (0.2, 0.6), (0.01, 0.02)))
    writer.commit(commit(2, float("nan")))
    writer.close()
    history = read_history(path)
    assert [float(getattr(history, name)[0]) for name in CommitRecord._fields] == list(first)
    assert np.isnan(history.loss[1])
    assert history.version.dtype == history.episodes.dtype == history.workers.dtype == np.int64
    assert history.validations == (ValidationRecord(1, (0.2, 0.6), (0.01, 0.02)),)
    assert (len(history), history.resumes) == (2, ())


def test_the_file_is_plain_msgpack(tmp_path: Path) -> None:
    path = tmp_path / "history.msgpack"
    write(path, range(1, 3))
    bodies = [msgpack.unpackb(body) for _, body in msgpack.Unpacker(path.open("rb"))]
    assert bodies == [["metafleet-history", 1], [0, *commit(1)], [0, *commit(2)]]


def test_records_wait_for_a_flush_and_close_flushes(tmp_path: Path) -> None:
    path = tmp_path / "history.msgpack"
    writer = HistoryWriter(path)
    writer.commit(commit(1))
    assert len(read_history(path)) == 0
    writer.flush()
    assert len(read_history(path)) == 1
    writer.flush()
    writer.commit(commit(2))
    writer.close()
    writer.close()
    assert read_history(path).version.tolist() == [1, 2]


def test_a_torn_tail_is_dropped_wherever_it_is_torn_and_appending_goes_on_after_it(tmp_path: Path) -> None:
    whole = tmp_path / "whole.msgpack"
    write(whole, range(1, 4))
    data = whole.read_bytes()
    two = tmp_path / "two.msgpack"
    write(two, range(1, 3))
    for size in range(two.stat().st_size, len(data)):
        path = tmp_path / "torn.msgpack"
        path.write_bytes(data[:size])
        assert read_history(path).version.tolist() == [1, 2]
        write(path, range(3, 5), resume=2)
        assert read_history(path).version.tolist() == [1, 2, 3, 4]


def test_a_tail_of_zeros_is_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "history.msgpack"
    write(path, range(1, 4))
    path.write_bytes(path.read_bytes() + bytes(5000))
    assert read_history(path).version.tolist() == [1, 2, 3]


def test_every_damaged_byte_before_the_last_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "history.msgpack"
    write(path, range(1, 4))
    data = path.read_bytes()
    last = len(data) - len(data[data.rindex(b"\x92\xce") :])
    for at in range(last):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="history"):
                read_history(path)
    with pytest.raises(CheckpointError, match="move it away"):
        HistoryWriter(path)
    assert path.read_bytes() == damaged


def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "history.msgpack"
    for foreign in (b"version,loss\n1,0.5\n", b"\x00" * 100, msgpack.packb({"loss": 1})):
        path.write_bytes(foreign)
        with pytest.raises(CheckpointError, match="no metric history"):
            read_history(path)
        with pytest.raises(CheckpointError, match="no metric history"):
            HistoryWriter(path)
        assert path.read_bytes() == foreign
    with pytest.raises(CheckpointError, match="nothing yet"):
        read_history(tmp_path / "absent")


def test_a_history_of_another_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.msgpack"
    with monkeypatch.context() as context:
        context.setattr("coordinator.history.HEADER", ["metafleet-history", 2])
        write(path, range(1, 3))
    with pytest.raises(CheckpointError, match=r"no metric history of this version.*'metafleet-history', 2"):
        read_history(path)


def test_versions_that_a_stale_driver_recorded_again_count_once(tmp_path: Path) -> None:
    path = tmp_path / "history.msgpack"
    write(path, range(1, 6), loss=1.0)
    write(path, range(4, 7), loss=2.0)
    history = read_history(path)
    assert history.version.tolist() == [1, 2, 3, 4, 5, 6]
    assert history.loss.tolist() == [1.0] * 3 + [2.0] * 3


def test_a_resume_supersedes_what_the_earlier_attempt_recorded_of_later_versions(tmp_path: Path) -> None:
    path = tmp_path / "history.msgpack"
    writer = HistoryWriter(path)
    for version in range(1, 11):
        writer.commit(commit(version, loss=1.0))
    for version in (4, 8):
        writer.validation(ValidationRecord(version, (0.1,), (0.0,)))
    writer.close()
    write(path, range(5, 8), loss=2.0, resume=4)
    write(path, range(7, 9), loss=3.0, resume=6)
    history = read_history(path)
    assert history.version.tolist() == list(range(1, 9))
    assert history.loss.tolist() == [1.0] * 4 + [2.0] * 2 + [3.0] * 2
    assert [v.version for v in history.validations] == [4]
    assert history.resumes == (4, 6)


def test_of_two_validations_under_way_the_later_version_s_may_end_first(tmp_path: Path) -> None:
    path = tmp_path / "history.msgpack"
    writer = HistoryWriter(path)
    for version in (2, 6, 4):
        writer.validation(ValidationRecord(version, (0.1 * version,), (0.0,)))
    writer.close()
    assert [v.version for v in read_history(path).validations] == [2, 4, 6]
    write(path, range(0), resume=4)
    assert [v.version for v in read_history(path).validations] == [2, 4]


def test_a_resume_that_has_not_committed_yet_already_supersedes(tmp_path: Path) -> None:
    path = tmp_path / "history.msgpack"
    write(path, range(1, 6))
    write(path, range(0), resume=0)
    assert read_history(path).version.tolist() == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(attempts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6))
def test_versions_always_ascend_and_the_last_attempt_wins(tmp_path: Path, attempts: list[tuple[int, int]]) -> None:
    path = tmp_path / "history.msgpack"
    path.unlink(missing_ok=True)
    expected: dict[int, float] = {}
    for attempt, (start, commits) in enumerate([(0, 10), *attempts]):
        write(path, range(start + 1, start + 1 + commits), loss=float(attempt), resume=start if attempt else None)
        expected = {v: loss for v, loss in expected.items() if v <= start}
        expected |= {v: float(attempt) for v in range(start + 1, start + 1 + commits)}
    history = read_history(path)
    assert dict(zip(history.version.tolist(), history.loss.tolist(), strict=True)) == expected
    assert history.version.tolist() == sorted(expected)


def test_a_record_larger_than_a_record_can_be_is_refused(tmp_path: Path) -> None:
    writer = HistoryWriter(tmp_path / "history.msgpack")
    with pytest.raises(ValueError, match="less than 65536 bytes"):
        writer.validation(ValidationRecord(1, (0.5,) * 10_000, (0.5,) * 10_000))
    writer.close()


def test_seventy_thousand_versions_stay_small(tmp_path: Path) -> None:
    versions, path = 70_000, tmp_path / "history.msgpack"
    write(path, range(1, versions + 1))
    write(path, range(versions // 2, versions + 1), resume=versions // 2 - 1)
    assert len(read_history(path)) == versions
    assert path.stat().st_size < 1.5 * 80 * versions
