"""Workers on Ray under the real ``Trainer``, a few versions at a time, for scaling and the coordinator's share.

Everything that ``metafleet train`` does for a commit is done (digests, metrics, commit log and history in a temporary
run directory, publishing); there is no validation, and the checkpoint at a segment's end is outside its time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.timed_actor import TimedActor, TimedContribution
from cluster.config.loading import with_execution
from cluster.config.run import RunConfig
from cluster.episodes import open_source
from cluster.messages import Published, WorkerHello
from cluster.metrics import Metrics, RunInfo
from coordinator.aggregators import build_aggregator
from coordinator.attempts import Policy
from coordinator.dispatch import Dispatcher
from coordinator.meta_state import MetaState
from coordinator.outcomes import Failure, Joined
from coordinator.pool import Event, Handle, Order, Pool, Reply
from coordinator.ray_pool import RayPool
from coordinator.recorder import Recorder
from coordinator.run_dir import RunDirectory, RunIdentity
from coordinator.train import Resources, Start, StopRequest, Trainer
from coordinator.view import Snapshot
from metaworker.learners import build_learner
from metaworker.scores import MetricName

START_SECONDS = 120.0
"""How long workers may take to start."""


@dataclass(frozen=True)
class Span:
    """One shard on its worker."""

    worker: int
    version: int
    """The version that it was computed with."""
    idle: float
    """Seconds that the worker had waited for it (``ShardStatistics.idle_seconds``)."""
    busy: float
    """Seconds that sampling and adaptation took."""
    finished: float
    """Seconds on the machine's clock."""


@dataclass(frozen=True)
class Segment:
    """Some versions, one after another."""

    seconds: float
    """From the first order to the last commit, published."""
    episodes: int
    spans: tuple[Span, ...]


class Fleet:
    """A pool of workers with a run of its own; ``run`` trains it further."""

    def __init__(self, config: RunConfig, pool: Pool, folder: Path) -> None:
        self._config = config
        self._pool = _Tap(pool)
        self._dispatcher = Dispatcher(self._pool, Policy.of(config.execution))
        hello = self._all_joined()
        self.niceness = os.getpriority(os.PRIO_PROCESS, hello.pid)
        """Of the workers: Ray gives them 15 and the driver 0."""
        sample_shape = open_source(config).sample_shape
        self._learner = build_learner(config, sample_shape)
        self._state = MetaState.initial(config, self._learner)
        self._identity = RunIdentity(
            config.result_digest(),
            hello.store_digest,
            hello.split_digest,
            self._state.digest,
            hello.fingerprint,
            hello.fingerprint_detail,
            sample_shape,
        )
        run = RunDirectory.create(folder / "run", self._identity, config)
        self._recorder = Recorder(run, run.claim_epoch(), config, self._state)
        info = RunInfo(
            "benchmark", config.name, config.learner.type, config.aggregator.type, config.seed, config.result_digest()
        )
        self.metrics = Metrics(info, regression=False)

    def run(self, versions: int) -> Segment:
        """Train so many versions more."""
        start = self._state.version
        target = start + versions
        view = _Watch(target)
        resources = Resources(
            self._config.model_copy(update={"steps": target}),
            self._learner,
            self._pool,
            self._dispatcher,
            self._recorder,
            view,
            self.metrics,
            StopRequest(),
        )
        self._pool.spans.clear()
        started = time.perf_counter()  # a trainer publishes when it is made
        trainer = Trainer(
            resources, Start(self._identity, self._state, build_aggregator(self._config.aggregator, start))
        )
        self._state = trainer.run()
        return Segment(view.reached - started, trainer.progress.episodes, tuple(self._pool.spans))

    def _all_joined(self) -> WorkerHello:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            match self._dispatcher.next(1.0):
                case Joined(hello) if self._dispatcher.workers == self._pool.size:
                    return hello
                case Failure(_, message):
                    raise RuntimeError(message)
        raise TimeoutError(f"{self._dispatcher.workers} of {self._pool.size} workers came in {START_SECONDS:g} s")


@contextmanager
def fleet(config: RunConfig, workers: int) -> Iterator[Fleet]:
    """A fleet on the connected Ray cluster; its workers end with the block."""
    config = with_execution(config, workers=workers)
    with TemporaryDirectory(prefix="metafleet-benchmark-") as folder:
        pool = RayPool(config, workers, TimedActor)
        try:
            yield Fleet(config, pool, Path(folder))
        finally:
            pool.close()


class _Tap:
    """A pool that also keeps what its workers' clocks say."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.spans: list[Span] = []

    @property
    def transfer_seconds(self) -> float:
        """None."""
        return 0.0

    @property
    def size(self) -> int:
        return self._pool.size

    def publish(self, published: Published) -> Handle:
        return self._pool.publish(published)

    def submit(self, slot: int, order: Order, handle: Handle) -> None:
        self._pool.submit(slot, order, handle)

    def wait(self, timeout: float) -> Event | None:
        event = self._pool.wait(timeout)
        if isinstance(event, Reply) and isinstance(event.result, TimedContribution):
            found, spent = event.result, event.result.statistics
            busy = spent.sample_seconds + spent.adapt_seconds
            self.spans.append(Span(found.worker, found.base_version, spent.idle_seconds, busy, found.finished))
        return event

    def recall(self, slot: int, order: Order) -> None:
        self._pool.recall(slot, order)

    def end(self, slot: int) -> None:
        raise RuntimeError(f"worker {slot} was given up during a measurement: run it again")

    def replace(self, slot: int, avoid: frozenset[str] = frozenset()) -> None:
        raise RuntimeError(f"worker {slot} was lost during a measurement: run it again")

    def close(self) -> None:
        self._pool.close()


class _Watch:
    """A view that shows nothing and notes when the last version was there."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.reached = float("nan")

    def start(self, total: int, summary: str, *, metric: MetricName = "accuracy", version: int = 0) -> None:
        pass

    def update(self, snapshot: Snapshot) -> None:
        if snapshot.version >= self._target:
            self.reached = time.perf_counter()

    def message(self, text: str) -> None:
        raise RuntimeError(f"a measurement was disturbed: {text}")

    def stop(self) -> None:
        pass
