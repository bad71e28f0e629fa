"""Record files: round trip, torn tails, damage, foreign files, full disks."""

from __future__ import annotations

import resource
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster.errors import CheckpointError
from cluster.records import BIN32, FRAME, PAIR, FileKind, RecordWriter, scan

HEADER = ["test-records", 1]
KIND = FileKind("test file", "throw it away", largest=1000)
RECORDS: list[Any] = [
    [1, "one", 1.5, None, True],
    b"\x92\xce" * 40,
    {"nested": {"map": [float("inf")]}, 7: "key"},
    [],
    "x" * 300,
]


def write(path: Path, records: list[Any], buffer: int = 0) -> None:
    writer = RecordWriter(path, HEADER, buffer)
    for record in records:
        writer.append(record)
    writer.close()


def whole(path: Path) -> bytes:
    write(path, RECORDS)
    return path.read_bytes()


def boundaries(data: bytes) -> list[int]:
    """Where records end, by their length fields alone."""
    ends, at = [], 0
    while at < len(data):
        at += FRAME.size + int.from_bytes(data[at + 7 : at + 11], "big")
        ends.append(at)
    return ends


@pytest.mark.parametrize("buffer", [0, 100, 1 << 20])
def test_what_was_written_is_read_back_whatever_the_buffer(tmp_path: Path, buffer: int) -> None:
    path = tmp_path / "file"
    write(path, RECORDS, buffer)
    assert scan(path, HEADER) == ([HEADER, *RECORDS], path.stat().st_size)
    write(path, ["more"], buffer)
    assert scan(path)[0] == [HEADER, *RECORDS, "more"]


def test_unbuffered_records_are_there_at_once_buffered_ones_after_a_flush(tmp_path: Path) -> None:
    at_once, later = RecordWriter(tmp_path / "a", HEADER), RecordWriter(tmp_path / "b", HEADER, buffer=100)
    for writer in (at_once, later):
        writer.append("first")
    assert scan(tmp_path / "a")[0] == [HEADER, "first"]
    assert scan(tmp_path / "b") == ([], 0)
    later.sync()
    assert scan(tmp_path / "b")[0] == [HEADER, "first"]
    later.append("x" * 100)
    assert scan(tmp_path / "b")[0] == [HEADER, "first", "x" * 100]
    later.append("last")
    later.close()
    later.close()
    assert scan(tmp_path / "b")[0] == [HEADER, "first", "x" * 100, "last"]


def test_a_header_need_only_begin_as_asked(tmp_path: Path) -> None:
    RecordWriter(tmp_path / "file", [*HEADER, "detail"]).close()
    assert scan(tmp_path / "file", HEADER)[0] == [[*HEADER, "detail"]]
    with pytest.raises(CheckpointError, match=r"no test file of this version.*test-records.*expected \['other'\]"):
        scan(tmp_path / "file", ["other"], KIND)
    with pytest.raises(CheckpointError, match="no record file of this version"):
        RecordWriter(tmp_path / "file", [*HEADER, "another detail"])
    write(tmp_path / "no list", [])
    with pytest.raises(CheckpointError, match="no record file of this version"):
        scan(tmp_path / "no list", ["test-records", 1, "longer"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(size=st.integers(0, 600))
def test_a_torn_tail_is_dropped_and_writing_goes_on_after_what_is_whole(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.unlink(missing_ok=True)
    data = whole(path)
    path.write_bytes(data[:size])
    ends = [end for end in boundaries(data) if end <= size]
    kept = [HEADER, *RECORDS][: len(ends)]
    assert scan(path, HEADER) == (kept, max(ends, default=0))
    write(path, ["more"])
    assert scan(path, HEADER)[0] == [*(kept or [HEADER]), "more"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(flips=st.dictionaries(st.integers(0, 500), st.integers(1, 255), min_size=1, max_size=4), data=st.data())
def test_flipped_bytes_never_give_a_wrong_record(tmp_path: Path, flips: dict[int, int], data: st.DataObject) -> None:
    path = tmp_path / "file"
    path.unlink(missing_ok=True)
    original = whole(path)
    size = data.draw(st.integers(1, len(original)))
    damaged = bytearray(original[:size])
    for at, flip in flips.items():
        damaged[at % size] ^= flip
    path.write_bytes(damaged)
    ends = [end for end in boundaries(original) if end <= size and damaged[:end] == original[:end]]
    try:
        records, end = scan(path, HEADER)
    except CheckpointError:
        return
    assert (records, end) == ([HEADER, *RECORDS][: len(ends)], max(ends, default=0))


def test_every_damaged_byte_before_the_last_record_is_refused_and_the_file_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = whole(path)
    for at in range(boundaries(data)[-2]):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"damaged at byte \d+ of {len(data)}: throw it away"):
            scan(path, HEADER, KIND)
        with pytest.raises(CheckpointError, match="restore it from a backup"):
            RecordWriter(path, HEADER)
        assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "foreign",
    [
        b"version,loss\n1,0.5\n",
        b"\x00" * 100,
        b"\x93",
        PAIR + b"\x00\x00\x00\x00\xc5\x00\x05hello world",
        FRAME.pack(PAIR, 0, BIN32, 5) + b"hello world",
        FRAME.pack(PAIR, zlib.crc32(b"\xc1"), BIN32, 1) + b"\xc1",
        FRAME.pack(PAIR, zlib.crc32(b""), BIN32, 0),
        FRAME.pack(PAIR, zlib.crc32(b"\x91" * 3000), BIN32, 3000) + b"\x91" * 3000,
        FRAME.pack(PAIR, zlib.crc32(b"\x81\x90\x01"), BIN32, 3) + b"\x81\x90\x01",
    ],
)
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, foreign: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(foreign)
    with pytest.raises(CheckpointError, match="no test file: it starts with"):
        scan(path, HEADER, KIND)
    with pytest.raises(CheckpointError, match="no record file"):
        RecordWriter(path, HEADER)
    assert path.read_bytes() == foreign


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(st.binary(max_size=64))
@example(FRAME.pack(PAIR, 0, BIN32, 0))
@example(PAIR + b"\0\0\0\0\xc6")
def test_any_bytes_are_records_or_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    try:
        records, end = scan(path)
    except CheckpointError:
        return
    assert records == [] and end == 0


def test_a_record_that_is_too_large_is_refused_and_nothing_of_it_written(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "file", HEADER, kind=KIND)
    with pytest.raises(ValueError, match="a test file record holds less than 1000 bytes, got 100"):
        writer.append("x" * 1000)
    writer.append("fits")
    writer.close()
    assert scan(tmp_path / "file")[0] == [HEADER, "fits"]


@pytest.mark.parametrize("then", ["room again", "still full"])
def test_a_full_disk_is_an_error_and_leaves_whole_records(tmp_path: Path, then: str) -> None:
    path = tmp_path / "file"
    records = [f"record number {number}" for number in range(100)]
    writer = RecordWriter(path, HEADER)
    written = iter(records)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(CheckpointError, match=f"cannot write {path}: File too large"):
            for record in written:
                writer.append(record)
        if then == "still full":
            with pytest.raises(CheckpointError, match="File too large"):
                writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    failed = 99 - len(list(written))
    assert 0 < failed < 99 and path.stat().st_size == 200
    assert scan(path, HEADER)[0] == [HEADER, *records[:failed]]
    if then == "room again":  # the record that was written half is completed, not written again behind its half
        writer.append("more")
        writer.close()
        assert scan(path, HEADER)[0] == [HEADER, *records[: failed + 1], "more"]


def test_an_unwritable_place_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*gone/file: No such file"):
        RecordWriter(tmp_path / "gone" / "file", HEADER)
