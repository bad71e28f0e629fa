"""The work of one worker, without Ray: shards in, contributions out; evaluation tasks in, scores out.

The Ray actor, the in-process pool and ``metafleet replay`` all compute through this one class, so they give the same
bits.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from cluster.config.run import RunConfig
from cluster.device import fingerprint, fingerprint_detail, prepare
from cluster.episodes.types import Episodes, EpisodeSource
from cluster.faults import Fault, fail_at
from cluster.flat import FlatSpec, Tensors, some_tensor
from cluster.messages import Contribution, EvaluationPart, EvaluationTask, Published, ShardStatistics, ShardTask
from metaworker.learners import build_learner
from metaworker.learners.base import Context, Learner, ShardResult
from metaworker.metadata import encode


class ShardWorker:
    """Computes shards and evaluation tasks of one run.

    Args:
        config: the run's configuration.
        source: where its episodes come from.
        slot: this worker's slot, reported with its contributions.
    """

    def __init__(self, config: RunConfig, source: EpisodeSource, slot: int = 0) -> None:
        self.config = config
        self.source = source
        self.slot = slot
        self.device = prepare(config.worker_device, config.threads)
        self.fingerprint_detail = fingerprint_detail(self.device)
        self.fingerprint = fingerprint(self.fingerprint_detail)
        self.learner = build_learner(config, source.sample_shape)
        self.layout = FlatSpec.of(self.learner.meta_parameters(config.seed))
        self._version: int | None = None
        self._theta: Tensors = {}
        self._state: Tensors = {}
        self._idle_since = time.perf_counter()

    def answer(self, published: Published, order: ShardTask | EvaluationTask) -> Contribution | EvaluationPart:
        """The answer to an order of either kind."""
        if isinstance(order, ShardTask):
            return self.compute(published, order)
        return self.evaluate(published, order)

    def compute(self, published: Published, task: ShardTask) -> Contribution:
        """The contribution of one shard to the version after ``published``."""
        about = {"version": task.base_version, "shard": task.shard, "attempt": task.attempt, "slot": self.slot}
        fail_at("compute", **about)
        started = time.perf_counter()
        idle = started - self._idle_since
        theta, state = self._load(published)
        shape = self.config.episode
        episodes = self.source.sample(
            "train", task.first_episode, task.episodes, shape.way, shape.shot, shape.query, shape.within
        ).to(self.device)
        sampled = time.perf_counter()
        result = self.learner.contribute(theta, state, episodes, Context(published.version, self.config.shard.chunk))
        gradient = self.layout.flatten(result.gradient).cpu().numpy()
        done = time.perf_counter()
        contribution = Contribution(
            shard=task.shard,
            base_version=published.version,
            attempt=task.attempt,
            worker=self.slot,
            gradient=gradient,
            episodes=result.episodes,
            proposals={name: rows.cpu().numpy() for name, rows in result.proposals.items()},
            statistics=_statistics(result, self.device, sampled - started, done - sampled, idle),
            fingerprint=self.fingerprint,
        )
        fault = fail_at("computed", **about)
        contribution = replace(contribution, digest=contribution.content_digest())
        if fault is not None:
            contribution = _faulty(fault, contribution, time.perf_counter() - started)
        self._idle_since = time.perf_counter()
        return contribution

    def evaluate(self, published: Published, task: EvaluationTask) -> EvaluationPart:
        """Scores of an evaluation task's episodes, before and after each adaptation step."""
        theta, state = self._load(published)
        learner = build_learner(self.config, self.source.sample_shape, task.way, task.batch_norm)
        losses, scores = [], []
        for start in range(0, task.episodes, self.config.shard.chunk):
            count = min(self.config.shard.chunk, task.episodes - start)
            episodes = self.source.sample(
                task.split, task.first_episode + start, count, task.way, task.shot, task.query, task.within
            ).to(self.device)
            loss, score = evaluate_episodes(learner, theta, state, episodes, self.config.regression)
            losses.append(loss)
            scores.append(score)
        rows = np.concatenate(scores)
        self._idle_since = time.perf_counter()
        scored = EvaluationPart(
            part=task.part,
            version=published.version,
            attempt=task.attempt,
            worker=self.slot,
            first_episode=task.first_episode,
            loss=np.concatenate(losses),
            confusion=None if self.config.regression else rows,
            squared_error=rows if self.config.regression else None,
        )
        return replace(scored, digest=scored.content_digest())

    def _load(self, published: Published) -> tuple[Tensors, Tensors]:
        """θ and learner state on the device, as copies: arrays out of the object store are read-only."""
        if published.version != self._version:
            flat = torch.from_numpy(published.theta.copy()).to(self.device)
            self._theta = self.layout.unflatten(flat)
            self._state = {
                name: torch.from_numpy(rows.copy()).to(self.device) for name, rows in published.state.items()
            }
            self._version = published.version
        return self._theta, self._state


def _faulty(fault: Fault, contribution: Contribution, seconds: float) -> Contribution:
    """What a scripted fault makes of a contribution that took so many seconds."""
    if fault.action == "wait":
        time.sleep((fault.factor - 1) * seconds)
        return contribution
    if fault.action == "garbage":
        return "garbage"  # type: ignore[return-value]
    gradient = contribution.gradient.copy()
    gradient[0] = np.nan if fault.action == "nonfinite" else gradient[0] + 1
    wrong = replace(contribution, gradient=gradient)
    return wrong if fault.action == "flip_after" else replace(wrong, digest=wrong.content_digest())


def evaluate_episodes(
    learner: Learner, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, regression: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Query losses ``[episode, step]`` and confusion counts ``[episode, step, way, way]`` or squared errors
    ``[episode, step]`` of every episode before and after each step.
    """

    def outputs(support_x: Tensor, support_y: Tensor, query_x: Tensor, metadata: Mapping[str, Tensor]) -> Tensor:
        tasks = learner.adapt(theta, state, support_x, support_y, metadata)
        return torch.stack([learner.predict(task, query_x) for task in tasks])

    with torch.no_grad():
        metadata = encode(episodes.metadata, some_tensor(theta))
        predicted = vmap(outputs)(episodes.support_x, episodes.support_y, episodes.query_x, metadata)
        targets = episodes.query_y[:, None]
        if regression:
            errors = (predicted - targets).square().mean((2, 3)).double().cpu().numpy()
            return errors, errors
        if predicted.shape[-1] != episodes.way:
            raise ValueError(
                f"the learner tells {predicted.shape[-1]} classes apart, the episodes have {episodes.way}: "
                "evaluate it with episodes of its own way"
            )
        logs = torch.log_softmax(predicted, -1)
        index = targets.expand(predicted.shape[:3])
        loss = -logs.gather(-1, index[..., None]).mean((2, 3)).double().cpu().numpy()
        pairs = index * episodes.way + predicted.argmax(-1)
        cells = torch.nn.functional.one_hot(pairs, episodes.way**2).sum(2)
        return loss, cells.view(*cells.shape[:2], episodes.way, episodes.way).cpu().numpy()


def _statistics(result: ShardResult, device: torch.device, sample: float, adapt: float, idle: float) -> ShardStatistics:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return ShardStatistics(
        loss=float(result.loss.double().mean()),
        metric=float(result.metric.double().mean()),
        sample_seconds=sample,
        adapt_seconds=adapt,
        idle_seconds=idle,
        peak_bytes=peak if sys.platform == "darwin" else peak * 1024,
        gpu_peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        gpu_utilisation=_gpu_utilisation(device),
    )


def _gpu_utilisation(device: torch.device) -> float | None:
    """Share of the last second or so in which the GPU was busy; ``None`` without one, or if its driver does not say."""
    if device.type == "cuda":
        with suppress(ImportError, RuntimeError):
            from pynvml import NVMLError

            with suppress(NVMLError):  # which is no RuntimeError: slices of a GPU (MIG) are not supported, for instance
                return torch.cuda.utilization(device) / 100
    return None
