"""Bringing an episode store to a node that lacks it: read in chunks there, kept in this node's cache here.

    read_chunk    the sending side: bytes of the store from an offset on
    Arrival       the receiving side: chunk after chunk into ``CACHE/stores/DIGEST.arrow``, then its header

A store in the cache goes by its digest and is opened like any other, with all checks. Whoever lacks it takes the lock
beside it, looks again, and only then asks for its bytes: of all workers of a node one is sent the store, and the others
wait for the lock and find it. The kernel frees the lock of a worker that dies, and the next one begins anew. The bytes
go into a ``.partial`` file and are hashed on their way; only those that the header describes get the store's name, so
no reader sees a part, nor anything that came damaged. How bytes travel is not known here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cluster.durable import cache_folder, fsync_directory
from cluster.episodes.store_header import StoreHeader, header_path, read_header, verify, write_header
from cluster.errors import StoreError

CHUNK_BYTES = 64 << 20
"""What is sent at a time."""


def read_chunk(path: Path, offset: int) -> bytes:
    """The bytes of the store ``path`` from ``offset`` on, at most `CHUNK_BYTES` of them.

    Raises:
        StoreError: it cannot be read, or ends before ``offset``.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            chunk = file.read(CHUNK_BYTES)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from None
    if not chunk:
        raise StoreError(f"{path}: ends at {offset} bytes while it is sent to a worker: do not change it during a run")
    return chunk


class Arrival:
    """A store on its way into this node's cache. Waits while another worker of the node is being sent the same one.

    Until the store is there, or an error, it holds the lock: other workers of the node wait for it.

    Args:
        header: of the store that is to come.

    Raises:
        StoreError: the cache cannot be written, or has no room for the store.
    """

    def __init__(self, header: StoreHeader) -> None:
        self._header = header
        self._sha = hashlib.sha256()
        self._written = 0
        self._open = contextlib.ExitStack()
        """Gives back the lock and removes the partial file."""
        try:
            self._folder = cache_folder() / "stores"
        except RuntimeError:
            raise StoreError("there is no home folder to keep stores in: set METAFLEET_CACHE to a folder") from None
        self.path = self._folder / f"{header.digest}.arrow"
        """Where the store lies once nothing is wanted any more."""
        self._whole = _is_whole(self.path, header)
        if not self._whole:
            self._begin()

    @property
    def wanted(self) -> int | None:
        """Offset of the bytes that are to come next; ``None`` when the store is there."""
        return None if self._whole else self._written

    def add(self, chunk: bytes) -> None:
        """Take the bytes from ``wanted`` on.

        Raises:
            StoreError: they are not those that the header describes, or the cache cannot take them.
        """
        with self._or_nothing():
            self._written += len(chunk)
            if self._written <= self._header.size:
                self._sha.update(chunk)
                self._file.write(chunk)
            if self._written < self._header.size:
                return
            if self._written > self._header.size or self._sha.hexdigest() != self._header.digest:
                raise StoreError(
                    f"{self.path}: what came is not the store {self._header.digest[:12]}… of {self._header.size} "
                    "bytes: its source was changed while it was sent; start the run again"
                )
            self._finish()

    def close(self) -> None:
        """Give up what has not come to its end; nothing of it is left."""
        self._open.close()

    def _begin(self) -> None:
        with self._or_nothing():
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.path.with_suffix(".lock"), "ab")  # noqa: SIM115 (closed with the stack)
            self._open.enter_context(lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Another worker may have been sent it while this one waited.
            self._whole = _is_whole(self.path, self._header)
            if self._whole:
                self._open.close()
                return
            self._partial = self.path.with_suffix(".partial")
            # Only its owner's under the lock: one that is there was left by a worker that was killed.
            self._open.callback(self._partial.unlink, missing_ok=True)
            self._file = open(self._partial, "wb")  # noqa: SIM115
            self._open.enter_context(self._file)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                # A disk without room says so before gigabytes have travelled.
                os.posix_fallocate(self._file.fileno(), 0, self._header.size)

    def _finish(self) -> None:
        """Name the data, then write the header, as a store is written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        header_path(self.path).unlink(missing_ok=True)  # a damaged store's
        os.replace(self._partial, self.path)
        fsync_directory(self._folder)
        write_header(self.path, self._header)
        self._whole = True
        self._open.close()

    @contextlib.contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """What fails leaves nothing behind, and a disk that refuses is a `StoreError`."""
        try:
            yield
        except OSError as error:
            self._give_up()
            raise StoreError(
                f"{self._folder}: the store of {self._header.size} bytes cannot be kept there "
                f"({error.strerror or error}): free some space, make it writable, or set METAFLEET_CACHE to another "
                "folder"
            ) from error
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        # What was refused once, closing flushes and unlinking may have refused once more: the first reason is said.
        with contextlib.suppress(OSError):
            self._open.close()


def _is_whole(path: Path, header: StoreHeader) -> bool:
    """Whether the store lies at ``path``, undamaged."""
    try:
        found = read_header(path)
        verify(path, found)
    except StoreError:
        return False
    # Of one content, the description alone may differ: it says where the samples once came from.
    return replace(found, description={}) == replace(header, description={})
