"""A run's directory: what lies where, who may write to it, and which attempt (epoch) each file is from.

config.toml               the resolved configuration
run.msgpack               identity: configuration, store and split digests, fingerprint, initial digest
lock                      held (flock) by the driver that is alive
epochs/0001 …             one empty file a driver, created exclusively: the highest epoch is the one that may write
log/0001.msgpack …        the commit log of each epoch
checkpoints/v00000200-e0001/   tensors.safetensors, manifest.msgpack
history.msgpack           metric history; learning_curve.png, adaptation_curve.png, metrics.prom beside it
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgpack

from cluster.durable import fsync_directory, write_atomically
from cluster.errors import RunDirectoryError

FORMAT = ["metafleet-run", 1]
LARGEST_HEADER = 1 << 20


@dataclass(frozen=True)
class RunIdentity:
    """What a run is, fixed at its start."""

    config_digest: str
    """Digest of the result half of the configuration."""
    store_digest: str
    split_digest: str
    initial_digest: str
    """Run digest at version 0."""
    fingerprint: str
    fingerprint_detail: Mapping[str, str]


class RunDirectory:
    """Paths and ownership of one run's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def history(self) -> Path:
        """The metric history."""
        return self.path / "history.msgpack"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def log(self, epoch: int) -> Path:
        """The commit log of an epoch."""
        return self.path / "log" / f"{epoch:04d}.msgpack"

    @staticmethod
    def create(path: Path) -> RunDirectory:
        """Make a new run directory and own it.

        Raises:
            RunDirectoryError: it exists already, or cannot be made.
        """
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            raise RunDirectoryError(
                f"run directory {path} exists already: choose another --run-dir, or go on with it by --resume {path}"
            ) from error
        except OSError as error:
            raise RunDirectoryError(f"cannot make run directory {path}: {error.strerror}; choose another --run-dir") from error
        for folder in ("epochs", "log", "checkpoints"):
            (path / folder).mkdir()
        fsync_directory(path.parent)
        run = RunDirectory(path)
        run.acquire()
        return run

    @staticmethod
    def open(path: Path) -> RunDirectory:
        """An existing run directory, for reading.

        Raises:
            RunDirectoryError: it is no run directory.
        """
        if not (path / "run.msgpack").is_file():
            raise RunDirectoryError(f"{path} is no run directory: it has no run.msgpack; give the folder that train made")
        return RunDirectory(path)

    def acquire(self) -> None:
        """Own the run for writing until this process ends or ``release``.

        Raises:
            RunDirectoryError: a living driver owns it, or it cannot be written to.
        """
        try:
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunDirectoryError(f"run directory {self.path} is in use by a living run: wait for it, or stop it first") from error
        except OSError as error:
            raise RunDirectoryError(f"cannot write to run directory {self.path}: {error.strerror}") from error

    def release(self) -> None:
        """Give up ownership; does nothing the second time."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def epochs(self) -> list[int]:
        """The epochs claimed so far, ascending."""
        return sorted(int(entry.name) for entry in (self.path / "epochs").iterdir() if entry.name.isdigit())

    def claim_epoch(self) -> int:
        """Claim the next epoch by exclusive creation: of two drivers, one gets it.

        Raises:
            RunDirectoryError: another driver claimed it at the same moment.
        """
        epoch = max(self.epochs(), default=0) + 1
        try:
            os.close(os.open(self.path / "epochs" / f"{epoch:04d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError as error:
            raise RunDirectoryError(f"another driver has just claimed epoch {epoch} of {self.path}: it goes on, this one stops") from error
        fsync_directory(self.path / "epochs")
        return epoch

    def check_epoch(self, epoch: int) -> None:
        """Refuse to write as a driver that has been superseded.

        Raises:
            RunDirectoryError: a later epoch was claimed, or the directory is gone.
        """
        try:
            newest = max(self.epochs(), default=0)
        except OSError as error:
            raise RunDirectoryError(f"run directory {self.path} is gone: {error.strerror}") from error
        if newest != epoch:
            raise RunDirectoryError(f"another driver (epoch {newest}) has taken over {self.path}: this one (epoch {epoch}) stops")

    def write_identity(self, identity: RunIdentity) -> None:
        """Record what the run is; once."""
        body = msgpack.packb([*FORMAT, asdict(identity)])
        write_atomically(self.path / "run.msgpack", lambda file: file.write(body) and None)

    def identity(self) -> RunIdentity:
        """What the run is.

        Raises:
            RunDirectoryError: the record is damaged.
        """
        path = self.path / "run.msgpack"
        try:
            if path.stat().st_size > LARGEST_HEADER:
                raise ValueError("too large")
            record: Any = msgpack.unpackb(path.read_bytes())
            if record[:2] != FORMAT or set(record[2]) != {f.name for f in fields(RunIdentity)}:
                raise ValueError("another format")
            return RunIdentity(**record[2])
        except (OSError, ValueError, TypeError, KeyError, IndexError, msgpack.UnpackException) as error:
            raise RunDirectoryError(f"{path} is damaged ({error}): restore it from a backup") from error
