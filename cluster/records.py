"""Append-only files of msgpack records that a crash may tear only at the end.

A record is one msgpack value of fixed layout, ``[crc32 of body, body]`` with the body as bin 32, and the body again
msgpack. The first record is a header that names the format. From the first record that does not check, everything is
dropped if no whole record follows (a torn tail), and the file is refused if one does (damage).
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgpack
from pydantic import Field, Strict, TypeAdapter, ValidationError

from cluster.errors import CheckpointError

FRAME: Final = struct.Struct(">2sIcI")
"""Array of two, uint 32 (the CRC), bin 32 (the body's length): a fixed prefix, so that records can be found again."""

PAIR, BIN32 = b"\x92\xce", b"\xc6"
BEGINNING: Final = re.compile(rb"(?=\x92\xce.{4}\xc6)", re.DOTALL)
LARGEST: Final = 1 << 30
SEARCH: Final = 4
"""How often each byte behind a damage is read, on average and at most, to find a whole record there."""

Integer = Annotated[int, Field(strict=True, ge=-(1 << 63), lt=1 << 63)]
Count = Annotated[Integer, Field(ge=0)]
Number = Annotated[float, Strict()]
Text = Annotated[str, Strict()]
"""What the values of records are, none converted: whole numbers have 64 bits, and one may stand for a float."""

T = TypeVar("T")


@dataclass(frozen=True)
class FileKind:
    """What errors call a file of records, and what it may hold."""

    name: str = "record file"
    advice: str = "restore it from a backup"
    """What to do when it is damaged."""
    largest: int = LARGEST
    """Every record's body is smaller, bytes."""


ANY_KIND: Final = FileKind()


class RecordWriter:
    """Appends records to a file, made with ``header`` if absent; they reach it in whole, at the latest at ``flush``.

    Args:
        path: the file.
        header: its first record, a list, which must match where the file exists.
        buffer: bytes gathered before they are written; 0 writes every record at once.
        kind: for errors.

    Raises:
        CheckpointError: the file is damaged elsewhere than at its end, or has another header; or, here and in every
            method, the disk is full, read-only or gone.
    """

    def __init__(self, path: Path, header: list[Any], buffer: int = 0, kind: FileKind = ANY_KIND) -> None:
        try:
            whole = scan(path, header, kind)[1]
        except FileNotFoundError:
            whole = 0
        self._path = path
        self._kind = kind
        self._limit = buffer
        self._buffer = bytearray()
        try:
            self._file = path.open("ab", buffering=0)
            self._file.truncate(whole)
        except OSError as error:
            raise self._unwritable(error) from error
        if whole == 0:
            self.append(header)

    def append(self, record: Any) -> None:
        """Add one record of plain data."""
        body: bytes = msgpack.packb(record)
        if len(body) >= self._kind.largest:
            raise ValueError(f"a {self._kind.name} record holds less than {self._kind.largest} bytes, got {len(body)}")
        self._buffer += FRAME.pack(PAIR, zlib.crc32(body), BIN32, len(body)) + body
        if len(self._buffer) >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Hand everything recorded so far to the operating system."""
        # Whole records in single writes to a file opened for appending: should a stale writer be left, its records may
        # interleave with ours, but never tear them.
        try:
            while self._buffer:
                # What is written leaves the buffer at once: a flush after a failed one goes on in the middle of the
                # record instead of starting it anew behind its own torn half.
                del self._buffer[: self._file.write(self._buffer)]
        except OSError as error:
            raise self._unwritable(error) from error

    def sync(self) -> None:
        """Flush, and force the file to the disk."""
        self.flush()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Flush and close; does nothing the second time."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"cannot write {self._path}: {error.strerror}; its records so far are whole")


def scan(path: Path, header: list[Any] | None = None, kind: FileKind = ANY_KIND) -> tuple[list[Any], int]:
    """The records of ``path`` without a torn tail, its header first, and how many bytes of it are whole.

    Args:
        path: the file.
        header: what the first record, a list, must begin with; ``None`` for anything.
        kind: for errors.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: unreadable, damaged elsewhere than at its end, or another header.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read the {kind.name} {path}: {error.strerror}; {kind.advice}") from error
    records, end = [], 0
    for record, end in _frames(data, 0, kind.largest):  # noqa: B007 - the last end is what counts
        records.append(record)
    if _resumes_after(data, end, kind.largest):
        raise CheckpointError(f"{path} is damaged at byte {end} of {len(data)}: {kind.advice}")
    if not records and not _torn(data, kind.largest):
        raise CheckpointError(f"{path} is no {kind.name}: it starts with {data[:16]!r}")
    if records and header is not None and not _matches(records[0], header):
        first = f"[{', '.join(map(shown, records[0][:6]))}]" if isinstance(records[0], list) else shown(records[0])
        raise CheckpointError(
            f"{path} is no {kind.name} of this version: its first record is {first}, expected {header}"
        )
    return records, end


def shown(value: Any) -> str:
    """A value that was read, for an error: only the kind of a container, whose depth may be more than repr takes."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)[:80]
    return f"a {type(value).__name__}"


def validated(form: TypeAdapter[T], value: Any) -> T:
    """``value``, which was read, in this form.

    Raises:
        ValueError: it has another one; where and why, in one line.
    """
    try:
        return form.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = repr(".".join(map(str, first["loc"])))[1:-1][:80]
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error


def _matches(record: Any, header: list[Any]) -> bool:
    return isinstance(record, list) and record[: len(header)] == header


def _frames(data: bytes, start: int, largest: int) -> Iterator[tuple[Any, int]]:
    """The consecutive whole records of ``data`` from ``start``, each with the offset after it."""
    while (end := _end(data, start, largest)) is not None:
        _, crc, _, _ = FRAME.unpack_from(data, start)
        body = data[start + FRAME.size : end]
        if zlib.crc32(body) != crc:
            return
        try:
            record = msgpack.unpackb(body, strict_map_key=False)
        except (ValueError, TypeError, msgpack.UnpackException):
            return  # foreign bytes with a CRC that fits (nothing has the CRC 0), no record of ours
        start = end
        yield record, end


def _end(data: bytes, start: int, largest: int) -> int | None:
    """Where the record that ``start`` begins as would end; ``None`` if there can be none."""
    if start + FRAME.size > len(data):
        return None
    pair, _, kind, length = FRAME.unpack_from(data, start)
    end: int = start + FRAME.size + length
    return end if pair == PAIR and kind == BIN32 and length < largest and end <= len(data) else None


def _resumes_after(data: bytes, damage: int, largest: int) -> bool:
    """Whether a whole record starts anywhere behind the first damaged byte, ``damage``.

    Where so many seem to start that trying them all would take for ever, one is taken to: no crash leaves such a tail,
    and a file that is refused is not cut.
    """
    effort = SEARCH * (len(data) - damage)
    for match in BEGINNING.finditer(data, damage):
        start = match.start()
        end = _end(data, start, largest)
        if end is None:
            continue
        effort -= end - start
        if effort < 0 or next(_frames(data, start, largest), None) is not None:
            return True
    return False


def _torn(data: bytes, largest: int) -> bool:
    """Whether ``data``, which holds no whole record, can be the beginning of one."""
    if len(data) < FRAME.size:
        return data[:2] == PAIR[: len(data)] and data[6:7] in (b"", BIN32)
    pair, _, kind, length = FRAME.unpack_from(data)
    return bool(pair == PAIR and kind == BIN32 and length < largest and len(data) < FRAME.size + length)
