"""The run configuration: a result half, which decides the bits, and an execution half, which does not."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.config.base import Section
from cluster.config.learners import MAML, Learner, Reptile
from cluster.config.sections import (
    MLP,
    Adam,
    Aggregator,
    AsyncAggregator,
    ConstantSchedule,
    Conv4Strided,
    CosineSchedule,
    Data,
    EpisodeShape,
    Evaluation,
    Execution,
    GlyphsData,
    Model,
    Optimizer,
    Schedule,
    Shard,
    SinusoidData,
    SyncAggregator,
)

EXECUTION_HALF = ("evaluation", "execution")
"""Sections that may change on resume; every other field is digested into the run."""


class RunConfig(Section):
    """Everything a run is told. All but ``evaluation`` and ``execution`` decides the result."""

    name: str = "custom"
    """Name of the recipe."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial parameters and of every episode."""
    steps: int = Field(default=2000, ge=1)
    """Outer updates (versions) of the whole run, which is also the horizon of the schedule."""
    dtype: Literal["float32"] = "float32"
    """Number format of parameters and gradients."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """Device of the workers; auto takes CUDA where workers reserve a GPU (execution.gpus_per_worker)."""
    threads: int = Field(default=1, ge=1)
    """Threads each worker computes with; another number gives other bits."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the aggregated meta-gradient; longer ones are scaled down to it."""
    nonfinite_share: float = Field(default=0.25, ge=0, le=1)
    """Share of a version's shards that may be non-finite (they get zero weight) before the run stops."""
    data: Data = GlyphsData()
    """Where episodes come from."""
    episode: EpisodeShape = EpisodeShape()
    """What a training episode holds."""
    shard: Shard = Shard()
    """The unit of dispatch."""
    learner: Learner = MAML()
    """The meta-learning algorithm."""
    model: Model = Conv4Strided()
    """The backbone."""
    aggregator: Aggregator = SyncAggregator()
    """How contributions become an update."""
    optimizer: Optimizer = Adam()
    """The outer optimizer."""
    schedule: Schedule = ConstantSchedule()
    """The outer step size over the run."""
    evaluation: Evaluation = Evaluation()
    """What is evaluated."""
    execution: Execution = Execution()
    """Where and how the run executes."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        regression = isinstance(self.data, SinusoidData)
        if regression and self.episode.way != 1:
            raise ValueError(f"episode.way must be 1 for regression (data.type sinusoid), got {self.episode.way}")
        if regression and not self.learner.regresses:
            raise ValueError(
                f"learner.type {self.learner.type} classifies; data.type sinusoid is regression: use maml or reptile"
            )
        if regression and not isinstance(self.model, MLP):
            raise ValueError(f"model.type must be mlp for data.type sinusoid, got {self.model.type}")
        if regression and self.evaluation.way not in (None, 1):
            raise ValueError(f"evaluation.way must be 1 for regression (data.type sinusoid), got {self.evaluation.way}")
        if isinstance(self.schedule, CosineSchedule) and self.schedule.warmup > self.steps:
            raise ValueError(f"schedule.warmup must be at most the {self.steps} steps, got {self.schedule.warmup}")
        if self.device == "cuda" and self.execution.gpus_per_worker == 0:
            raise ValueError(
                "execution.gpus_per_worker must be above 0 for device cuda (1, or 0.25 for four workers a GPU), got 0"
            )
        if isinstance(self.learner, Reptile):
            samples = self.episode.way * (self.episode.shot + self.episode.query)
            if self.learner.inner_batch > samples:
                raise ValueError(
                    f"learner.inner_batch must be at most the {samples} samples of an episode "
                    f"(way × (shot + query)), got {self.learner.inner_batch}"
                )
        return self

    def result_half(self) -> dict[str, Any]:
        """The fields that decide the result, as plain data."""
        return self.model_dump(mode="json", exclude=set(EXECUTION_HALF))

    def result_digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of the result half."""
        text = json.dumps(self.result_half(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def regression(self) -> bool:
        """Whether episodes are regression tasks."""
        return isinstance(self.data, SinusoidData)

    @property
    def worker_device(self) -> Literal["cpu", "cuda", "auto"]:
        """The device that a worker computes on: without a reserved GPU that is never a GPU."""
        return self.device if self.execution.gpus_per_worker > 0 else "cpu"

    @property
    def shards_per_version(self) -> int:
        """Contributions that make one version."""
        return self.aggregator.buffer if isinstance(self.aggregator, AsyncAggregator) else self.aggregator.shards

    @property
    def evaluation_shape(self) -> EpisodeShape:
        """The episode shape of evaluations: the training one with what ``evaluation`` overrides."""
        evaluation, episode = self.evaluation, self.episode
        return EpisodeShape(
            way=evaluation.way or episode.way,
            shot=evaluation.shot or episode.shot,
            query=evaluation.query or episode.query,
            within=(episode.within if evaluation.within is None else evaluation.within) or None,
        )
