"""What crosses a process border: frozen types, with units and shapes.

coordinator -> metaworker: Published (θ and learner state of a version), ShardTask, EvaluationTask
metaworker -> coordinator: Contribution, EvaluationPart, WorkerHello
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cluster.config.sections import BatchNorm
from cluster.flat import update_digest

SplitName = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class Published:
    """The meta-parameters and learner state of one version, as put into the object store once per version."""

    version: int
    theta: np.ndarray
    """Flat meta-parameters, float32 ``[parameters]``; read-only once it has travelled."""
    state: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ShardTask:
    """An order to compute one shard: ``episodes`` consecutive episode ids from ``first_episode``."""

    shard: int
    first_episode: int
    episodes: int
    base_version: int
    attempt: int = 0


@dataclass(frozen=True)
class ShardStatistics:
    """What a worker saw of its shard. Means are over the shard's episodes; seconds are wall time on the worker."""

    loss: float
    """Mean query loss after adaptation."""
    metric: float
    """Mean query accuracy (fraction) after adaptation, or mean squared error for regression."""
    sample_seconds: float
    adapt_seconds: float
    idle_seconds: float
    """How long the worker had waited for this order since its last reply."""
    peak_bytes: int
    """Largest resident memory of the worker process so far."""
    gpu_peak_bytes: int | None = None
    """Largest memory of tensors on the worker's GPU so far."""
    gpu_utilisation: float | None = None
    """Share of time in which its GPU was busy, lately; ``None`` also where nobody tells."""


@dataclass(frozen=True)
class Contribution:
    """What a shard gives back."""

    shard: int
    base_version: int
    attempt: int
    worker: int
    """Worker slot, 0 … workers − 1."""
    gradient: np.ndarray
    """Meta-gradient summed over the shard's episodes, float32 ``[parameters]``."""
    episodes: int
    proposals: Mapping[str, np.ndarray]
    """Proposals for the learner state, each ``[episodes, …]`` in the order of episode ids."""
    statistics: ShardStatistics
    fingerprint: str
    digest: str = field(default="")

    def content_digest(self) -> str:
        """SHA-256 (hex) over all but timings, attempt and worker: equal work gives equal digests."""
        digest = hashlib.sha256(f"{self.shard}|{self.base_version}|{self.episodes}|{self.fingerprint}|".encode())
        digest.update(np.array([self.statistics.loss, self.statistics.metric], dtype=np.float64).tobytes())
        update_digest(digest, "gradient", self.gradient)
        for name in sorted(self.proposals):
            update_digest(digest, f"proposal/{name}", self.proposals[name])
        return digest.hexdigest()

    @property
    def finite(self) -> bool:
        """Whether the loss, every gradient element and every proposal is finite."""
        arrays = (self.gradient, *self.proposals.values())
        return bool(np.isfinite(self.statistics.loss)) and all(bool(np.isfinite(a).all()) for a in arrays)


@dataclass(frozen=True)
class EvaluationTask:
    """An order to evaluate episodes ``first_episode … first_episode + episodes − 1`` of a split."""

    split: SplitName
    first_episode: int
    episodes: int
    way: int
    shot: int
    query: int
    batch_norm: BatchNorm | None
    """``None`` for a net without batch-norm."""
    base_version: int
    part: int = 0
    attempt: int = 0
    within: str | None = None
    """Class metadata column whose value an episode's classes share."""


@dataclass(frozen=True)
class EvaluationPart:
    """Scores of an evaluation task, one row an episode, one column a step (the first before any adaptation).

    Classification fills ``confusion`` ``[episode, step, way, way]`` (true class, predicted class; counts of queries),
    regression fills ``squared_error`` ``[episode, step]`` (mean over the queries); the other is ``None``.
    """

    part: int
    version: int
    """Version of θ that was evaluated."""
    attempt: int
    worker: int
    first_episode: int
    loss: np.ndarray
    confusion: np.ndarray | None
    squared_error: np.ndarray | None
    digest: str = field(default="")

    def content_digest(self) -> str:
        """SHA-256 (hex) over all but attempt and worker."""
        digest = hashlib.sha256(f"{self.part}|{self.version}|{self.first_episode}|".encode())
        for name, array in (("loss", self.loss), ("confusion", self.confusion), ("squared", self.squared_error)):
            if array is not None:
                update_digest(digest, name, array)
        return digest.hexdigest()


@dataclass(frozen=True)
class WorkerHello:
    """What a worker says when it has started: the digests it must match, and what it runs on."""

    worker: int
    pid: int
    node: str
    store_digest: str
    split_digest: str
    fingerprint: str
    fingerprint_detail: Mapping[str, str]
    node_id: str = ""
    """Ray's id of its node."""
    config_digest: str = ""
    """Digest of the configuration's result half that it was given."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of Metafleet, Python, Ray and torch there."""
