"""A run's directory: what lies where, who may write to it, and which attempt (epoch) each file is from.

config.toml               the resolved configuration
run.msgpack               identity: configuration, store and split digests, fingerprint, initial digest
lock                      held (flock) by the driver that is alive
epochs/0001 …             one empty file a driver, created exclusively: the highest epoch is the one that may write
log/0001.msgpack …        the commit log of each epoch
checkpoints/v00000200-e0001/   tensors.safetensors, manifest.msgpack
history.msgpack           metric history; learning_curve.png, adaptation_curve.png beside it
metrics.openmetrics       the Prometheus metrics as they were when the run ended or stopped
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgpack

from cluster.config.loading import RESOLVED_NAME, save_resolved
from cluster.config.run import RunConfig
from cluster.durable import fsync_directory, write_bytes_atomically
from cluster.errors import RunDirectoryError
from cluster.records import shown

FORMAT = ["metafleet-run", 1]
IDENTITY = "run.msgpack"
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
    sample_shape: Sequence[int]
    """Of one input sample, for instance 1, 28, 28."""


class RunDirectory:
    """Paths and ownership of one run's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / RESOLVED_NAME

    @property
    def history(self) -> Path:
        """The metric history."""
        return self.path / "history.msgpack"

    @property
    def metrics(self) -> Path:
        """The last state of the Prometheus metrics, in the OpenMetrics format."""
        return self.path / "metrics.openmetrics"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def log(self, epoch: int) -> Path:
        """The commit log of an epoch."""
        return self.path / "log" / f"{epoch:04d}.msgpack"

    @staticmethod
    def create(path: Path, identity: RunIdentity, config: RunConfig) -> RunDirectory:
        """Make a new run directory, whole or not at all, and own it.

        Raises:
            RunDirectoryError: it exists already, or cannot be made.
        """
        partial = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
        run = RunDirectory(partial)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir(mode=0o700)
            for folder in ("epochs", "log", "checkpoints"):
                (partial / folder).mkdir()
            save_resolved(config, run.config)
            run._write_identity(identity)
            run.acquire()
            if path.exists():
                raise RunDirectoryError(exists_already(path))
            os.rename(partial, path)
            fsync_directory(path.parent)
        except BaseException as error:
            run.release()
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                why = f"{error.strerror} ({error.filename or path})"
                raise RunDirectoryError(f"cannot make run directory {path}: {why}; choose another --run-dir") from error
            raise
        run.path = path
        return run

    @staticmethod
    def open(path: Path) -> RunDirectory:
        """An existing run directory, for reading.

        Raises:
            RunDirectoryError: it is no run directory.
        """
        if not (path / IDENTITY).is_file():
            raise RunDirectoryError(
                f"{path} is no run directory: it has no {IDENTITY}; give the folder that train made"
            )
        return RunDirectory(path)

    def acquire(self) -> None:
        """Own the run for writing until this process ends or ``release``.

        Raises:
            RunDirectoryError: a living driver owns it, or it cannot be written to.
        """
        try:
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunDirectoryError(f"cannot write to run directory {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if isinstance(error, BlockingIOError):
                raise RunDirectoryError(
                    f"run directory {self.path} is in use by a living run: wait for it, or stop it first"
                ) from error
            raise RunDirectoryError(f"cannot lock run directory {self.path}: {error.strerror}") from error
        self._lock = lock

    def release(self) -> None:
        """Give up ownership; does nothing the second time."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def epochs(self) -> list[int]:
        """The epochs claimed so far, ascending.

        Raises:
            RunDirectoryError: the directory or its folder of epochs is gone.
        """
        try:
            names = os.listdir(self.path / "epochs")
        except OSError as error:
            raise RunDirectoryError(f"run directory {self.path} has lost its epochs: {error.strerror}") from error
        return sorted(int(name) for name in names if name.isdecimal())

    def claim_epoch(self) -> int:
        """Claim the next epoch by exclusive creation: of two drivers, one gets it.

        Raises:
            RunDirectoryError: another driver claimed it at the same moment, or it cannot be written.
        """
        epoch = max(self.epochs(), default=0) + 1
        try:
            os.close(os.open(self.path / "epochs" / f"{epoch:04d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            fsync_directory(self.path / "epochs")
        except FileExistsError as error:
            raise RunDirectoryError(
                f"another driver has just claimed epoch {epoch} of {self.path}: it goes on, this one stops"
            ) from error
        except OSError as error:
            raise RunDirectoryError(f"cannot claim epoch {epoch} of {self.path}: {error.strerror}") from error
        return epoch

    def check_epoch(self, epoch: int) -> None:
        """Refuse to write as a driver that has been superseded.

        Raises:
            RunDirectoryError: a later epoch was claimed, or the directory is gone.
        """
        newest = max(self.epochs(), default=0)
        if newest != epoch:
            raise RunDirectoryError(
                f"another driver (epoch {newest}) has taken over {self.path}: this one (epoch {epoch}) stops"
            )

    def save_config(self, config: RunConfig) -> None:
        """Record the resolved configuration.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        try:
            save_resolved(config, self.config)
        except OSError as error:
            raise RunDirectoryError(f"cannot write {self.config}: {error.strerror}") from error

    def _write_identity(self, identity: RunIdentity) -> None:
        packed: bytes = msgpack.packb(asdict(identity))
        record: bytes = msgpack.packb([*FORMAT, packed, hashlib.sha256(packed).digest()])
        write_bytes_atomically(self.path / IDENTITY, record)

    def identity(self) -> RunIdentity:
        """What the run is.

        Raises:
            RunDirectoryError: the record is damaged.
        """
        path = self.path / IDENTITY
        try:
            if path.stat().st_size > LARGEST_HEADER:
                raise ValueError("it is too large")
            name, schema, packed, digest = msgpack.unpackb(path.read_bytes())
            if [name, schema] != FORMAT:
                raise ValueError(f"it is {shown(name)} {shown(schema)}, expected {FORMAT[0]!r} {FORMAT[1]}")
            if hashlib.sha256(packed).digest() != digest:
                raise ValueError("it does not match its digest")
            return RunIdentity(**msgpack.unpackb(packed))
        except (OSError, ValueError, TypeError, msgpack.UnpackException) as error:
            raise RunDirectoryError(f"{path} is damaged ({error}): restore it from a backup") from error


def exists_already(path: Path) -> str:
    """Why a new run cannot lie there."""
    return f"run directory {path} exists already: choose another --run-dir, or go on with it by --resume {path}"
