"""One worker on one core against a plain sequential autograd loop and against ``higher`` (``benchmarks.sequential``).

The worker is measured with all that it does for a shard: ``ShardWorker.compute`` also draws the episodes, flattens the
gradient and digests it. Its rivals get the same episodes as ready tensors. Its chunk size is the fastest of a few,
chosen before anything is compared.

Gradients must agree. In float32 five steps with α = 0.4 are chaotic, so that float32 is compared with a small α, and
the measured α in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.machine import THREADS
from benchmarks.report import Floor, Result, Sheet
from benchmarks.rounds import Spread, interleave, ratios, seconds
from benchmarks.sequential import higher_gradient, module, plain_gradient
from cluster.config.learners import MAML
from cluster.config.run import RunConfig
from cluster.config.sections import EpisodeShape, Shard
from cluster.device import prepare
from cluster.episodes import open_source
from cluster.episodes.types import EpisodeSource
from cluster.messages import Published, ShardTask
from metaworker.learners.base import Context
from metaworker.shard_worker import ShardWorker

INNER_LR = 0.4
SMALL_LR = 0.01
"""α where float32 gradients are compared."""
LARGEST_ERROR = {"float32": 1e-2, "float64": 1e-8}
"""Relative errors above these mean that the two do not compute the same thing; what float32 shows is mostly ReLUs that
rounding switches."""


@dataclass(frozen=True)
class Case:
    """What is computed, and how much faster than the plain loop it must be."""

    name: str
    query: int
    inner_steps: int
    episodes: int
    """Episodes in one measurement."""
    chunks: tuple[int, ...]
    """Chunk sizes to choose from."""
    floor: float


CASES = (
    Case("(a) 1 query, 1 step", 1, 1, 32, (1, 4, 8, 11, 16, 32), 1.3),
    Case("(b) 15 queries, 5 steps", 15, 5, 16, (1, 2, 4, 8, 16), 1.0),
)


def measure(quick: bool) -> Result:
    """Both cases in second and first order."""
    prepare("cpu", THREADS)
    source = open_source(RunConfig())
    duels = [_Duel(case, first_order, source, quick) for case in CASES for first_order in (False, True)]
    rounds = 2 if quick else 7
    speed, agreement, floors = [], [], []
    for duel in duels:
        agreement.append({"5-way 1-shot": duel.name} | duel.errors())
        row, floor = duel.compare(rounds)
        speed.append({"5-way 1-shot": duel.name} | row)
        floors.append(floor)
    return Result(
        [
            Sheet(
                "Inner loop, one core, one thread: MAML, strided Conv-4 with 64 filters, 28×28",
                speed,
                "median (least–most) over interleaved rounds; worker / x is how many times as fast as x the worker is; "
                "CPU is the worker's processor time over wall time",
            ),
            Sheet("The same meta-gradients: relative errors ‖g − g'‖ / ‖g'‖ against the plain loop", agreement),
        ],
        floors,
    )


class _Duel:
    """The worker and its rivals on the same episodes."""

    def __init__(self, case: Case, first_order: bool, source: EpisodeSource, quick: bool) -> None:
        self.name = f"{case.name}, {'first' if first_order else 'second'} order"
        self._case = case
        self._first_order = first_order
        self._source = source
        self._count = case.episodes // 2 if quick else case.episodes
        self._episodes = source.sample("train", 0, self._count, 5, 1, case.query)
        worker = self._worker(self._count, INNER_LR)
        self._theta = worker.learner.meta_parameters(0)
        self._published = Published(
            0,
            worker.layout.flatten(self._theta).numpy(),
            {name: tensor.numpy() for name, tensor in worker.learner.initial_state().items()},
        )
        self._network = module(list(self._theta.values()))

    def errors(self) -> dict[str, float]:
        """Relative errors of the gradients on four episodes.

        Raises:
            ArithmeticError: one is too large for the two to be the same computation.
        """
        found = {}
        for dtype, inner_lr in ((torch.float32, SMALL_LR), (torch.float64, INNER_LR)):
            episodes = self._episodes.chunk(0, 4).to(torch.device("cpu"), dtype)
            theta = {name: tensor.to(dtype) for name, tensor in self._theta.items()}
            worker = self._worker(2, inner_lr)
            state = {name: tensor.to(dtype) for name, tensor in worker.learner.initial_state().items()}
            ours = worker.layout.flatten(worker.learner.contribute(theta, state, episodes, Context(0, 2)).gradient)
            leaves, settings = list(theta.values()), (inner_lr, self._case.inner_steps, self._first_order)
            plain = plain_gradient(leaves, episodes, *settings)
            rival = higher_gradient(module(leaves), episodes, *settings)
            precision = str(dtype).removeprefix("torch.")
            for name, gradient in (("worker", ours), ("higher", rival)):
                error = relative_error(gradient, plain)
                if error > LARGEST_ERROR[precision]:
                    raise ArithmeticError(f"{self.name}: the {precision} gradient of {name} is off by {error:.1e}")
                found[f"{name}, {precision}, α = {inner_lr}"] = error
        return found

    def compare(self, rounds: int) -> tuple[dict[str, Spread | int | float], Floor]:
        """Speeds and their ratios."""
        chunk = self._fastest_chunk()
        worker, task = self._worker(chunk, INNER_LR), ShardTask(0, 0, self._count, 0)
        settings = (INNER_LR, self._case.inner_steps, self._first_order)
        leaves, episodes = list(self._theta.values()), self._episodes
        competitors: dict[str, Callable[[], object]] = {
            "worker": lambda: worker.compute(self._published, task),
            "plain": lambda: plain_gradient(leaves, episodes, *settings),
            "higher": lambda: higher_gradient(self._network, episodes, *settings),
        }
        for warm_up in competitors.values():
            warm_up()
        times = interleave(rounds, {name: partial(seconds, work) for name, work in competitors.items()})
        before, started = time.process_time(), time.perf_counter()
        competitors["worker"]()
        busy = (time.process_time() - before) / (time.perf_counter() - started)
        over_plain = ratios(times["plain"], times["worker"])
        speeds = {f"{name}, tasks/s": Spread.of([self._count / t for t in found]) for name, found in times.items()}
        row: dict[str, Spread | int | float] = {"chunk": chunk, **speeds}
        row |= {"worker / plain": over_plain, "worker / higher": ratios(times["higher"], times["worker"]), "CPU": busy}
        return row, Floor(f"inner loop {self.name}: worker / plain", over_plain.median, self._case.floor)

    def _fastest_chunk(self) -> int:
        task = ShardTask(0, 0, self._count, 0)
        best: dict[int, float] = {}
        for chunk in (chunk for chunk in self._case.chunks if chunk <= self._count):
            worker = self._worker(chunk, INNER_LR)
            worker.compute(self._published, task)
            best[chunk] = min(seconds(partial(worker.compute, self._published, task)) for _ in range(2))
        return min(best, key=best.__getitem__)

    def _worker(self, chunk: int, inner_lr: float) -> ShardWorker:
        config = RunConfig(
            episode=EpisodeShape(way=5, shot=1, query=self._case.query),
            shard=Shard(episodes=self._count, chunk=chunk),
            learner=MAML(inner_lr=inner_lr, inner_steps=self._case.inner_steps, first_order=self._first_order),
        )
        return ShardWorker(config, self._source)


def relative_error(gradient: Tensor, reference: Tensor) -> float:
    """``‖g − g'‖ / ‖g'‖``."""
    return float((gradient - reference).norm() / reference.norm())
