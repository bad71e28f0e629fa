"""Files on disk: whole or absent, whatever instant the process or the machine dies at; and where the cache lies."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$METAFLEET_CACHE`` or ``~/.cache/metafleet``.

    Raises:
        RuntimeError: a user who has no home folder.
    """
    return Path(os.environ.get("METAFLEET_CACHE") or Path.home() / ".cache" / "metafleet")


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Put at ``path`` the bytes that ``write`` produces: readers see the old file or the whole new one, never a part.

    ``write`` is given a file open for writing and reading back, in the folder of ``path``. When this returns, content
    and name are on the disk. When ``write`` or anything after it fails, ``path`` is as before and nothing is left
    beside it; after a crash a file ``.NAME.….partial`` may be left, which no reader looks at.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full.
    """
    target = Path(path)
    temporary = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        # Not tempfile: its files are private to the user, and what is written here obeys the umask like any other file.
        file = open(temporary, "x+b")  # noqa: SIM115 (closed below, before the rename)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(target.parent)


def write_bytes_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """``write_atomically`` of bytes at hand."""

    def write(file: BinaryIO) -> None:
        file.write(data)

    write_atomically(path, write)


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Force the names in the folder ``path`` to the disk: a renamed file is durable only after this.

    Raises:
        OSError: ``path`` is no folder, or the device reports an error.
    """
    _fsync(os.open(path, os.O_RDONLY | os.O_DIRECTORY))


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Force the content of the file ``path`` to the disk, whoever wrote it.

    Raises:
        OSError: there is no such file, or the device reports an error.
    """
    _fsync(os.open(path, os.O_RDONLY))


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
