"""Append-only files of msgpack records that a crash may tear only at the end.

A record is one msgpack value of fixed layout, ``[crc32 of body, body]`` with the body as bin 32, and the body again
msgpack. The first record is a header that names the format. From the first record that does not check, everything is
dropped if no whole record follows (a torn tail), and the file is refused if one does (damage).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgpack

from cluster.errors import CheckpointError

FRAME: Final = struct.Struct(">2sIcI")
"""Array of two, uint 32 (the CRC), bin 32 (the body's length): a fixed prefix, so that records can be found again."""

PAIR, BIN32 = b"\x92\xce", b"\xc6"
LARGEST: Final = 1 << 30
"""Bytes of the largest record."""


class RecordWriter:
    """Appends records to a file, made with ``header`` if absent; they reach the file in whole, at the latest at ``flush``.

    Args:
        path: the file.
        header: its first record, which must match where the file exists.
        buffer: bytes gathered before they are written; 0 writes every record at once.

    Raises:
        CheckpointError: the file is damaged elsewhere than at its end, or has another header.
    """

    def __init__(self, path: Path, header: Any, buffer: int = 0) -> None:
        whole = scan(path, header)[1] if path.exists() else 0
        self._file = path.open("ab", buffering=0)
        self._file.truncate(whole)
        self._limit = buffer
        self._buffer = bytearray()
        if whole == 0:
            self.append(header)

    def append(self, record: Any) -> None:
        """Add one record of plain data."""
        body: bytes = msgpack.packb(record)
        if len(body) >= LARGEST:
            raise ValueError(f"a record holds less than {LARGEST} bytes, got {len(body)}")
        self._buffer += FRAME.pack(PAIR, zlib.crc32(body), BIN32, len(body)) + body
        if len(self._buffer) >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Hand everything recorded so far to the operating system."""
        # Whole records in single writes to a file opened for appending: should a stale writer be left, its records may
        # interleave with ours, but never tear them.
        view = memoryview(self._buffer)
        while view:
            view = view[self._file.write(view) :]
        self._buffer = bytearray()

    def sync(self) -> None:
        """Flush, and force the file to the disk."""
        self.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close; does nothing the second time."""
        if not self._file.closed:
            self.flush()
            self._file.close()


def scan(path: Path, header: Any = None) -> tuple[list[Any], int]:
    """The records of ``path`` without a torn tail, its header first, and how many bytes of it are whole.

    Args:
        path: the file.
        header: what the first record must be, or begin with if it is a list; ``None`` for anything.

    Raises:
        CheckpointError: damaged elsewhere than at its end, or another header.
    """
    data = path.read_bytes()
    records, end = [], 0
    for record, end in _frames(data):  # noqa: B007 - the last end is what counts
        records.append(record)
    if _resumes_after(data, end):
        raise CheckpointError(f"{path} is damaged at byte {end} of {len(data)}: restore it from a backup")
    if data and not records and PAIR[: len(data)] != data[:2]:
        raise CheckpointError(f"{path} is no record file: it starts with {data[:16]!r}")
    if records and header is not None and not _matches(records[0], header):
        raise CheckpointError(f"{path} is no {header[0]} file: its first record is {str(records[0])[:80]}")
    return records, end


def _matches(record: Any, header: Any) -> bool:
    return isinstance(record, list) and record[: len(header)] == list(header)


def _frames(data: bytes, start: int = 0) -> Iterator[tuple[Any, int]]:
    """The consecutive whole records of ``data`` from ``start``, each with the offset after it."""
    while start + FRAME.size <= len(data):
        pair, crc, kind, length = FRAME.unpack_from(data, start)
        body = data[start + FRAME.size : start + FRAME.size + length]
        if pair != PAIR or kind != BIN32 or len(body) < length or zlib.crc32(body) != crc:
            return
        start += FRAME.size + length
        yield msgpack.unpackb(body, strict_map_key=False), start


def _resumes_after(data: bytes, end: int) -> bool:
    """Whether a whole record starts anywhere behind the first damaged byte, ``end``."""
    at = data.find(PAIR, end)
    while at >= 0:
        if next(_frames(data, at), None) is not None:
            return True
        at = data.find(PAIR, at + 1)
    return False
