"""Checkpoints: whole or absent, every tensor as safetensors, everything else in a msgpack manifest with digests.

A checkpoint is a folder ``v00000200-e0001`` (version 200, written by epoch 1) that is built beside its final name and
renamed. It holds θ and learner state of the last (staleness bound + 1) versions, the optimizer state, contributions
taken but not committed, and which shards come next. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from pydantic import BaseModel, StrictBool, TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from cluster.durable import fsync_directory, write_bytes_atomically
from cluster.errors import CheckpointError
from cluster.faults import fail_at
from cluster.flat import FlatSpec
from cluster.messages import Contribution, Published, ShardStatistics
from cluster.records import Count, Number, Text, shown, validated
from coordinator.aggregators.base import Dropped
from coordinator.meta_state import MetaState

FORMAT = ["metafleet-checkpoint", 2]
NAME = re.compile(r"v([0-9]{8,18})-e([0-9]{4,18})")
TENSORS, MANIFEST, BEST = "tensors.safetensors", "manifest.msgpack", "best"
PARTIALS = ".*.partial"
LARGEST_MANIFEST = 1 << 28
MARK_FORM: TypeAdapter[tuple[str, float, str]] = TypeAdapter(tuple[Text, Number, Text])
"""Of the best checkpoint: its name, its score, and what that was measured on."""


class PendingRecord(BaseModel, frozen=True, extra="forbid"):
    """What the manifest says of a contribution taken and not committed; its arrays are among the tensors."""

    shard: Count
    base_version: Count
    episodes: Count
    loss: Number
    metric: Number
    fingerprint: Text
    digest: Text
    finite: StrictBool


class GoodputRecord(BaseModel, frozen=True, extra="forbid"):
    """``Goodput.pack``; what it leaves out stays out."""

    useful: Count = 0
    lost: dict[Text, Count] = {}
    lost_seconds: dict[Text, Number] = {}
    recoveries: Count = 0
    recovery_seconds: Number = 0.0
    longest_recovery: Number = 0.0


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """All of a checkpoint but its tensors, in the order in which it is written."""

    version: Count
    epoch: Count
    run_digest: Text
    tensors_digest: Text
    """SHA-256 of the file of tensors, hex."""
    tensors_bytes: Count
    names: tuple[Text, ...]
    """Of the tensors that θ is made of, in its order."""
    shapes: tuple[tuple[Count, ...], ...]
    recent: tuple[Count, ...]
    """The versions of ``Checkpoint.recent``."""
    pending: tuple[PendingRecord, ...]
    dropped: tuple[tuple[Count, Count, Text, Text], ...]
    """The fields of each ``Dropped``."""
    next_id: Count
    config_digest: Text
    episodes: Count
    seconds: Number
    failures: dict[Text, Count]
    goodput: GoodputRecord


MANIFEST_FORM = TypeAdapter(Manifest)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on."""

    state: MetaState
    recent: tuple[Published, ...]
    """θ and learner state of the last versions before ``state``'s, oldest first (asynchronous runs)."""
    pending: tuple[tuple[Contribution, bool], ...]
    """Contributions taken and not committed, each with whether it is finite."""
    dropped: tuple[Dropped, ...]
    """Contributions dropped since the last commit, for the next log entry."""
    next_id: int
    """The lowest shard id never handed out."""
    config_digest: str
    episodes: int
    """Episodes committed so far."""
    seconds: float
    """Wall time of the run so far."""
    failures: Mapping[str, int]
    """How often each kind of failure has happened so far."""
    goodput: Mapping[str, Any]
    """``Goodput.pack`` so far."""

    @staticmethod
    def of_start(state: MetaState, config_digest: str) -> Checkpoint:
        """What a run that has none yet would have at its start."""
        return Checkpoint(state, (), (), (), 0, config_digest, 0, 0.0, {}, {})


def name_of(version: int, epoch: int) -> str:
    """The folder name of a checkpoint."""
    return f"v{version:08d}-e{epoch:04d}"


def version_of(path: Path) -> tuple[int, int]:
    """Version and epoch in the name of a checkpoint.

    Raises:
        CheckpointError: it is no checkpoint's name.
    """
    match = NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is no checkpoint: its folder is not named like {name_of(200, 1)}")
    return int(match[1]), int(match[2])


def save(folder: Path, checkpoint: Checkpoint, epoch: int, *, renew: bool = False) -> tuple[Path, int]:
    """Write a checkpoint into ``folder``; returns its path and bytes.

    One of this version that this epoch has written already stays as it is, or is replaced where ``renew`` is set: by
    then there may be more contributions taken or dropped for the next version.

    Raises:
        CheckpointError: the disk is full, read-only or gone; earlier checkpoints are untouched.
    """
    target = folder / name_of(checkpoint.state.version, epoch)
    if target.exists() and not renew:
        return target, sum(file.stat().st_size for file in target.iterdir())
    tensors = save_arrays(_arrays(checkpoint))
    manifest: bytes = msgpack.packb(_manifest(checkpoint, epoch, tensors))
    partial = _partial(target)
    try:
        partial.mkdir()
        fail_at("write", version=checkpoint.state.version)
        write_bytes_atomically(partial / TENSORS, tensors)
        write_bytes_atomically(partial / MANIFEST, manifest)
        fail_at("written", version=checkpoint.state.version)
        if target.exists():
            _remove(target)  # killed here, the run goes on from the checkpoint before and its log
        fail_at("rename", version=checkpoint.state.version)
        os.rename(partial, target)
        fail_at("renamed", version=checkpoint.state.version)
        fsync_directory(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot write checkpoint {target}: {error.strerror}; earlier checkpoints are whole"
        ) from error
    return target, len(tensors) + len(manifest)


def load(path: Path, layout: FlatSpec, config_digest: str | None = None) -> Checkpoint:
    """Read and check a checkpoint.

    Args:
        path: its folder.
        layout: layout of θ that the configuration asks for.
        config_digest: the run's, if the checkpoint must be of it.

    Raises:
        CheckpointError: missing, torn, altered, of another configuration or of other shapes.
    """
    manifest, arrays = _read(path)
    if config_digest is not None and manifest.config_digest != config_digest:
        raise CheckpointError(f"checkpoint {path} is of another configuration: use the run that wrote it")
    if (manifest.names, manifest.shapes) != (layout.names, layout.shapes):
        raise CheckpointError(
            f"checkpoint {path} has {arrays['theta'].size} parameters in {len(manifest.names)} tensors, the "
            f"configuration and store need {layout.size} in {len(layout.names)}"
            f"{_first_difference(manifest, layout)}: model, way or sample shape differ"
        )
    checkpoint = _assemble(manifest, arrays, layout)
    if checkpoint.state.digest != manifest.run_digest:
        raise CheckpointError(f"checkpoint {path} does not give its own run digest: it was altered")
    return checkpoint


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint whose tensors match it.

    Raises:
        CheckpointError: as ``load``.
    """
    return _read(path)[0]


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest version first, at the same version the lower epoch first."""
    found = [entry for entry in folder.iterdir() if NAME.fullmatch(entry.name)] if folder.is_dir() else []
    return sorted(found, key=version_of)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the last ``keep`` checkpoints and the best.

    Raises:
        CheckpointError: the disk is read-only or gone.
    """
    best = best_of(folder)
    for path in list_checkpoints(folder)[:-keep]:
        if best is None or path.name != best.name:
            try:
                _remove(path)
            except OSError as error:
                raise CheckpointError(f"cannot remove the old checkpoint {path}: {error.strerror}") from error


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed half-way, this leaves no half of one under a checkpoint's name."""
    removed = path.parent / f".{path.name}.{os.getpid()}.removed.partial"
    os.rename(path, removed)
    shutil.rmtree(removed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed drivers had begun to write or to remove. Only for the owner of the run, at its start."""
    for path in folder.glob(PARTIALS):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def mark_best(path: Path, score: float, measured: str = "") -> None:
    """Name ``path`` the best checkpoint by validation, with its score and what that was measured on.

    Raises:
        CheckpointError: the disk is full, read-only or gone.
    """
    mark = path.parent / BEST
    packed: bytes = msgpack.packb([path.name, score, measured])
    try:
        write_bytes_atomically(mark, msgpack.packb([packed, hashlib.sha256(packed).digest()]))
    except OSError as error:
        raise CheckpointError(f"cannot write {mark}: {error.strerror}") from error


def best_score(folder: Path, measured: str | None = None) -> float | None:
    """The validation score of the best checkpoint, if one is marked and there, and was measured on ``measured``."""
    mark = _best_mark(folder)
    if mark is None or not (folder / mark[0]).is_dir() or measured not in (None, mark[2]):
        return None
    return mark[1]


def best_of(folder: Path) -> Path | None:
    """The best checkpoint by validation, if one is marked and there."""
    mark = _best_mark(folder)
    return folder / mark[0] if mark is not None and (folder / mark[0]).is_dir() else None


def _best_mark(folder: Path) -> tuple[str, float, str] | None:
    path = folder / BEST
    try:
        packed, digest = msgpack.unpackb(path.read_bytes())
        if hashlib.sha256(packed).digest() != digest:
            raise ValueError("it does not match its digest")
        mark = validated(MARK_FORM, msgpack.unpackb(packed))
        if not NAME.fullmatch(mark[0]):
            raise ValueError(f"it names {shown(mark[0])}, which is no checkpoint")
        return mark
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; remove it to go on without the best checkpoint"
        ) from error
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CheckpointError(f"{path} is damaged ({error}): remove it to go on without the best checkpoint") from error


def _partial(path: Path) -> Path:
    """Where a checkpoint is while it is made or removed; no reader looks there."""
    return path.parent / f".{path.name}.{os.getpid()}.partial"


def _first_difference(manifest: Manifest, layout: FlatSpec) -> str:
    """The first tensor whose shape differs, if both have it, in words."""
    needed = dict(zip(layout.names, layout.shapes, strict=True))
    for name, shape in zip(manifest.names, manifest.shapes, strict=True):
        if name in needed and shape != needed[name]:
            return f" ({name} is {shape} there, {needed[name]} here)"
    return ""


def _arrays(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    state = checkpoint.state
    arrays: dict[str, np.ndarray] = {"theta": state.theta.numpy()}
    arrays |= {f"state/{name}": rows for name, rows in state.state.items()}
    arrays |= {f"optimizer/{name}": tensor.numpy() for name, tensor in state.optimizer.items()}
    for published in checkpoint.recent:
        arrays[f"recent/{published.version}/theta"] = published.theta
        arrays |= {f"recent/{published.version}/state/{name}": rows for name, rows in published.state.items()}
    for index, (contribution, _) in enumerate(checkpoint.pending):
        arrays[f"pending/{index}/gradient"] = contribution.gradient
        arrays |= {f"pending/{index}/proposal/{name}": rows for name, rows in contribution.proposals.items()}
    # np.ascontiguousarray would make a vector of a scalar.
    return {name: np.array(array, order="C") for name, array in arrays.items()}


def _manifest(checkpoint: Checkpoint, epoch: int, tensors: bytes) -> list[Any]:
    pending = [
        PendingRecord(
            shard=c.shard,
            base_version=c.base_version,
            episodes=c.episodes,
            loss=c.statistics.loss,
            metric=c.statistics.metric,
            fingerprint=c.fingerprint,
            digest=c.digest,
            finite=finite,
        )
        for c, finite in checkpoint.pending
    ]
    body = Manifest(
        version=checkpoint.state.version,
        epoch=epoch,
        run_digest=checkpoint.state.digest,
        tensors_digest=hashlib.sha256(tensors).hexdigest(),
        tensors_bytes=len(tensors),
        names=checkpoint.state.layout.names,
        shapes=checkpoint.state.layout.shapes,
        recent=tuple(published.version for published in checkpoint.recent),
        pending=tuple(pending),
        dropped=tuple((drop.shard, drop.base_version, drop.digest, drop.reason) for drop in checkpoint.dropped),
        next_id=checkpoint.next_id,
        config_digest=checkpoint.config_digest,
        episodes=checkpoint.episodes,
        seconds=checkpoint.seconds,
        failures=dict(checkpoint.failures),
        goodput=GoodputRecord(**checkpoint.goodput),
    )
    packed = msgpack.packb(body.model_dump(exclude_unset=True))
    return [*FORMAT, packed, hashlib.sha256(packed).digest()]


def _read(path: Path) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Manifest and arrays, checked against their digests and for their form before anything else reads them."""
    again = "restore it from a backup, or remove it to use the one before"
    try:
        manifest_path = path / MANIFEST
        if manifest_path.stat().st_size > LARGEST_MANIFEST:
            raise ValueError("its manifest is too large")
        manifest = _unsealed(manifest_path.read_bytes())
        tensors = (path / TENSORS).read_bytes()
        if hashlib.sha256(tensors).hexdigest() != manifest.tensors_digest:
            raise ValueError("its tensors do not match their digest")
        arrays = load_arrays(tensors)
        _check_vectors(manifest, arrays)
        return manifest, arrays
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is no whole checkpoint: {Path(error.filename).name} is missing; {again}"
        ) from error
    except (ValueError, TypeError, KeyError, OSError, msgpack.UnpackException, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}; {again}") from error


def _unsealed(raw: bytes) -> Manifest:
    name, schema, packed, digest = msgpack.unpackb(raw)
    if [name, schema] != FORMAT:
        found = f"{shown(name)} {shown(schema)}"
        raise ValueError(f"it is {found}, this version of Metafleet reads {FORMAT[0]!r} {FORMAT[1]}")
    if hashlib.sha256(packed).digest() != digest:
        raise ValueError("its manifest does not match its digest")
    return validated(MANIFEST_FORM, msgpack.unpackb(packed))


def _check_vectors(manifest: Manifest, arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse tensors that are not those of the manifest."""
    if len(manifest.names) != len(manifest.shapes):
        raise ValueError(f"it has {len(manifest.names)} names for {len(manifest.shapes)} shapes")
    size = sum(math.prod(shape) for shape in manifest.shapes)
    for name in ("theta", *(f"recent/{version}/theta" for version in manifest.recent)):
        if _vector(arrays, name).size != size:
            raise ValueError(f"its tensor {name} has {arrays[name].size} elements, its shapes need {size}")
    for index in range(len(manifest.pending)):
        _vector(arrays, f"pending/{index}/gradient")


def _vector(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays or arrays[name].ndim != 1 or arrays[name].dtype != np.float32:
        raise ValueError(f"its tensor {name} is missing, or is no vector of float32")
    return arrays[name]


def _assemble(manifest: Manifest, arrays: Mapping[str, np.ndarray], layout: FlatSpec) -> Checkpoint:
    def under(prefix: str) -> dict[str, np.ndarray]:
        # Copies: safetensors hands out views of read-only bytes.
        return {name[len(prefix) :]: np.array(rows) for name, rows in arrays.items() if name.startswith(prefix)}

    state = MetaState(
        version=manifest.version,
        layout=layout,
        theta=torch.from_numpy(np.array(arrays["theta"])),
        state=under("state/"),
        optimizer={name: torch.from_numpy(rows) for name, rows in under("optimizer/").items()},
    )
    recent = [Published(v, np.array(arrays[f"recent/{v}/theta"]), under(f"recent/{v}/state/")) for v in manifest.recent]
    pending = [
        (
            _contribution(record, np.array(arrays[f"pending/{i}/gradient"]), under(f"pending/{i}/proposal/")),
            record.finite,
        )
        for i, record in enumerate(manifest.pending)
    ]
    return Checkpoint(
        state=state,
        recent=tuple(recent),
        pending=tuple(pending),
        dropped=tuple(Dropped(*drop) for drop in manifest.dropped),
        next_id=manifest.next_id,
        config_digest=manifest.config_digest,
        episodes=manifest.episodes,
        seconds=manifest.seconds,
        failures=manifest.failures,
        goodput=manifest.goodput.model_dump(exclude_unset=True),
    )


def _contribution(record: PendingRecord, gradient: np.ndarray, proposals: Mapping[str, np.ndarray]) -> Contribution:
    return Contribution(
        shard=record.shard,
        base_version=record.base_version,
        attempt=0,
        worker=0,
        gradient=gradient,
        episodes=record.episodes,
        proposals=proposals,
        statistics=ShardStatistics(record.loss, record.metric, 0.0, 0.0, 0.0, 0),
        fingerprint=record.fingerprint,
        digest=record.digest,
    )
