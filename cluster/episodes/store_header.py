"""The sidecar header of an episode store, and the check that the data file is the one it describes.

``STORE.header`` is msgpack: ``[body, SHA-256 of body]``, body itself a msgpack map. It is written after the data file,
so a store without a valid header is an interrupted ingest or no store. Nothing here reads Arrow, and nothing reads
Arrow before `verify` has passed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import re
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgpack

from cluster.durable import cache_folder, write_bytes_atomically
from cluster.errors import StoreError, StoreMissingError

MAGIC = "metafleet episode store"
SCHEMA_VERSION = 1
HEADER_LIMIT = 1 << 20
"""Largest header that is read, bytes."""
SETTLED_SECONDS = 1.0
"""A file changed more recently than this is not stamped: its next change could carry the same time stamp."""

COLUMN_NAME = re.compile(r"[a-z][a-z0-9_]*")
INGEST_AGAIN = "restore it from a good copy, or remove it with its .header and ingest again"

FileIdentity = tuple[int, int, int, int, int]
"""Device, inode, size in bytes, mtime and ctime in ns: a file that changes changes one of them."""


@dataclass(frozen=True)
class StoreHeader:
    """What a store says about itself, readable without touching the data."""

    digest: str
    """SHA-256 of the data file, hex: the store digest."""
    size: int
    """Size of the data file, bytes."""
    sample_shape: tuple[int, ...]
    """Shape of one sample: ``(channel, height, width)`` for images, ``(features,)`` for vectors."""
    dtype: str
    """``uint8`` for images, ``float32`` for vectors."""
    samples: int
    classes: int
    class_columns: tuple[str, ...]
    """Names of the class metadata columns, sorted."""
    sample_columns: tuple[str, ...]
    """Names of the sample metadata columns, sorted."""
    description: Mapping[str, str]
    """Where the samples come from: source, polarity, resampling."""

    def problem(self) -> str | None:
        """What is impossible about this header, or ``None``."""
        for number in (self.size, self.samples, self.classes, *self.sample_shape):
            if type(number) is not int:
                return "its size, samples, classes and sample shape are not all whole numbers"
        ranks = {"uint8": 3, "float32": 1}
        if self.dtype not in ranks:
            return f"dtype {self.dtype!r} is neither uint8 (images) nor float32 (vectors)"
        if len(self.sample_shape) != ranks[self.dtype] or min(self.sample_shape) < 1:
            return f"a {self.dtype} sample cannot have the shape {self.sample_shape}"
        if math.prod(self.sample_shape) >= 1 << 31:
            return f"a sample of shape {self.sample_shape} is too large"
        if not 1 <= self.classes <= self.samples:
            return f"{self.samples} samples cannot fill {self.classes} classes"
        for columns in (self.class_columns, self.sample_columns):
            if list(columns) != sorted(set(columns)) or not all(COLUMN_NAME.fullmatch(name) for name in columns):
                return f"metadata columns {list(columns)} are not distinct lower-case names in order"
        if not re.fullmatch(r"[0-9a-f]{64}", self.digest):
            return "its digest is no SHA-256"
        return None


def header_path(path: str | os.PathLike[str]) -> Path:
    """Where the header of the store ``path`` lies."""
    path = Path(path)
    return path.with_name(path.name + ".header")


def write_header(path: Path, header: StoreHeader) -> None:
    """Write the header of the store ``path``, atomically.

    Raises:
        StoreError: the header would be larger than `HEADER_LIMIT`.
        OSError: it cannot be written.
    """
    raw = _encode(header)
    if len(raw) > HEADER_LIMIT:
        raise StoreError(f"{path}: its description takes {len(raw)} bytes, more than {HEADER_LIMIT}: shorten it")
    write_bytes_atomically(header_path(path), raw)


def read_header(path: str | os.PathLike[str]) -> StoreHeader:
    """The header of the store ``path``. The data file is looked for but not read.

    Raises:
        StoreMissingError: there is nothing at ``path``.
        StoreError: what is there is no store, or its header is missing, truncated, altered or of another version.
    """
    path = Path(path)
    try:
        folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        raise StoreMissingError(
            f"{path}: no such episode store: check the path, or make it with `metafleet ingest`"
        ) from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from None
    if folder:
        raise StoreError(f"{path}: is a folder, not an episode store: give the file that `metafleet ingest` wrote")
    try:
        with open(header_path(path), "rb") as file:
            raw = file.read(HEADER_LIMIT + 1)
    except FileNotFoundError:
        raise StoreError(
            f"{path}: has no {header_path(path).name} beside it, so it is not an episode store or its ingest was "
            "interrupted: check the path, or remove it and ingest again"
        ) from None
    except OSError as error:
        raise StoreError(f"{header_path(path)}: cannot be read ({error.strerror}): check the file") from None
    try:
        return _decode(raw)
    except Exception as error:  # whatever a damaged header makes the parser say, the user's answer is the same
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise StoreError(f"{header_path(path)}: is not a valid store header ({reason}): {INGEST_AGAIN}") from None


def _encode(header: StoreHeader) -> bytes:
    body = {"magic": MAGIC, "schema": SCHEMA_VERSION, **asdict(header)}
    body["description"] = dict(sorted(header.description.items()))
    packed = msgpack.packb(body)
    raw: bytes = msgpack.packb([packed, hashlib.sha256(packed).digest()])
    return raw


def _decode(raw: bytes) -> StoreHeader:
    if len(raw) > HEADER_LIMIT:
        raise ValueError(f"larger than {HEADER_LIMIT} bytes")
    body, digest = _unpack(raw)
    if not isinstance(body, bytes) or hashlib.sha256(body).digest() != digest:
        raise ValueError("its checksum does not match")
    values: dict[str, Any] = _unpack(body)
    if values.pop("magic") != MAGIC:
        raise ValueError("wrong magic")
    if (version := values.pop("schema")) != SCHEMA_VERSION:
        raise ValueError(f"schema version {version}, this Metafleet reads {SCHEMA_VERSION}")
    if set(values) != {field.name for field in fields(StoreHeader)}:
        raise ValueError("unknown or missing fields")
    lists = {name: tuple(values[name]) for name in ("sample_shape", "class_columns", "sample_columns")}
    header = StoreHeader(**{**values, **lists})
    if problem := header.problem():
        raise ValueError(problem)
    if _encode(header) != raw:
        raise ValueError("not in canonical form")
    return header


def _unpack(raw: bytes) -> Any:
    return msgpack.unpackb(raw, raw=False, strict_map_key=True, max_array_len=1024, max_map_len=1024, max_ext_len=0)


# ------------------------------------------------------------------------------------------------------- verification


def verify(path: Path, header: StoreHeader) -> FileIdentity:
    """Check size and SHA-256 of the data file against ``header``; the identity of the file that was checked.

    A file is hashed once per node: a stamp in the cache folder remembers the digest with the file's identity.

    Raises:
        StoreError: the file is missing, unreadable, truncated or altered.
    """
    try:
        identity = file_identity(path)
        if identity[2] != header.size:
            raise StoreError(
                f"{path}: has {identity[2]} bytes where its header says {header.size}, so it is truncated or "
                f"foreign: {INGEST_AGAIN}"
            )
        digest = _digest_once(path, identity)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from None
    if digest != header.digest:
        raise StoreError(
            f"{path}: its SHA-256 is {digest[:12]}… where its header says {header.digest[:12]}…, so it is damaged or "
            f"altered: {INGEST_AGAIN}"
        )
    return identity


def file_identity(path: Path) -> FileIdentity:
    """What tells the file ``path`` from any other, and from itself after a change."""
    now = path.stat()
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def _digest_once(path: Path, identity: FileIdentity) -> str:
    """SHA-256 of ``path``, from its stamp if that is of this very file, else computed and, when settled, stamped."""
    with _locked_stamp(path) as stamp:
        if stamp is not None and (known := _read_stamp(stamp, identity)) is not None:
            return known
        # The age before hashing counts: a change during or after it must show in the identity.
        settled = time.time() - max(identity[3:]) / 1e9 > SETTLED_SECONDS
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if stamp is not None and settled and file_identity(path) == identity:
            # Failing to remember costs the next process a hash, no more.
            with contextlib.suppress(OSError):
                write_bytes_atomically(stamp, msgpack.packb([*identity, digest]))
        return digest


@contextlib.contextmanager
def _locked_stamp(path: Path) -> Iterator[Path | None]:
    """The path of the stamp of ``path``, locked against other processes; ``None`` where there can be no stamp.

    The host is part of the key: home folders are often shared by nodes on which the same path is another file.
    """
    key = hashlib.sha256(f"{socket.gethostname()}\0{os.path.realpath(path)}".encode(errors="surrogateescape"))
    with contextlib.ExitStack() as stack:
        try:
            cache = cache_folder() / "verified"
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = stack.enter_context(open(cache / f"{key.hexdigest()}.lock", "ab"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except (OSError, RuntimeError):  # RuntimeError: a container's user who has no home
            yield None
            return
        yield cache / key.hexdigest()


def _read_stamp(stamp: Path, identity: FileIdentity) -> str | None:
    try:
        *stamped, digest = _unpack(stamp.read_bytes())
    except Exception:  # no stamp, or a damaged one: hash again
        return None
    return digest if tuple(stamped) == identity and isinstance(digest, str) else None
