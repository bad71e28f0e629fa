"""Whole runs against simulated clusters: the real trainer, dispatcher and aggregators, in virtual time.

Schedule   what happens to a run and when, drawn from a seed
Cluster    the pool: workers with speeds that die, hang, lie, drain and join; clock and transport are its own
simulate   one run from start to end, over as many drivers as the schedule kills
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from cluster.config.run import RunConfig
from cluster.config.sections import SGD, Aggregator, AsyncAggregator, SyncAggregator
from cluster.flat import FlatSpec
from cluster.messages import Contribution, Published, ShardStatistics, ShardTask, WorkerHello
from cluster.metrics import Metrics, RunInfo
from coordinator import aggregators, start, train
from coordinator.attempts import Policy
from coordinator.checkpoint import Checkpoint
from coordinator.commit_log import Entry
from coordinator.crew import Crew
from coordinator.dispatch import Dispatcher
from coordinator.goodput import Goodput
from coordinator.history import CommitRecord
from coordinator.meta_state import MetaState
from coordinator.outcomes import Joined
from coordinator.pool import Event, Failed, NodesChanged, Order, Reply, Skipped, WorkerReady
from coordinator.replay import Replayer
from coordinator.run_dir import RunDirectory, RunIdentity
from coordinator.start import Found
from coordinator.train import Resources, Start, StopRequest, Trainer
from tests.coordinator.harness import TINY, Killed, RecordingView

PARAMETERS = 3
LAYOUT = FlatSpec(("weight",), ((PARAMETERS,),), torch.float32)
STEPS, SHARDS, BOUND = 5, 4, 3
SECONDS = 1.0
"""That a shard takes a worker of speed 1."""
PATIENCE = 3000
"""Virtual seconds after which a run counts as hanging."""
PACKETS = 50_000
"""Calls of `wait` after which it does, too."""

SYNC = SyncAggregator(shards=SHARDS)
ASYNC = AsyncAggregator(staleness_bound=BOUND)
BUFFERED = AsyncAggregator(staleness_bound=BOUND, buffer=2)


def configuration(aggregator: Aggregator) -> RunConfig:
    """A run of a few versions; its execution half is not used."""
    return TINY.model_copy(
        update={"aggregator": aggregator, "steps": STEPS, "optimizer": SGD(lr=0.1), "nonfinite_share": 1.0}
    )


class ToyLearner:
    """As much of a learner as a commit asks for."""

    def commit_state(
        self, state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        return dict(state)


LEARNER: Any = ToyLearner()


def contribution(published: Published, task: ShardTask, worker: int, bad: frozenset[int]) -> Contribution:
    """What any honest worker gives: a function of θ and the shard alone."""
    drawn = Random(task.shard)
    scale, shift = np.float32(drawn.uniform(0.5, 1.5)), np.float32(drawn.gauss(0, 1))
    gradient = published.theta * scale + shift
    if task.shard in bad:
        gradient[1] = np.nan
    made = Contribution(
        shard=task.shard,
        base_version=published.version,
        attempt=task.attempt,
        worker=worker,
        gradient=gradient,
        episodes=task.episodes,
        proposals={},
        statistics=ShardStatistics(0.5, 0.5, 0.0, 0.0, 0.0, 0),
        fingerprint="f",
    )
    return replace(made, digest=made.content_digest())


# ------------------------------------------------------------------------------------------------------------ schedules


@dataclass(frozen=True)
class Fault:
    """Something that happens at a time, to the worker in a slot if it is about one."""

    at: float
    kind: str
    slot: int = 0


KINDS = ("die", "die", "hang", "slow", "damage", "twice", "late", "fail start", "drain", "join", "crash")
"""What may happen to a worker; deaths more often."""


@dataclass(frozen=True)
class Schedule:
    """What happens in a run."""

    seed: int
    workers: int
    policy: Policy
    speeds: tuple[float, ...]
    faults: tuple[Fault, ...]
    bad: frozenset[int]
    """Shards that are not finite, whoever computes them."""
    liar: int | None
    """Slot whose first worker gives wrong bits with a fitting digest."""
    kills: tuple[float, ...]
    """When drivers die."""
    stops: tuple[float, ...]
    """When drivers are asked to stop."""

    @staticmethod
    def draw(seed: int) -> Schedule:
        """The schedule of a seed."""
        random = Random(seed)
        workers = random.randint(1, 5)
        liar = random.randrange(workers) if workers >= 3 and random.random() < 0.2 else None
        verify = 1.0 if liar is not None else random.choice([0.0, 0.0, 0.3, 1.0])
        policy = Policy(
            in_flight=random.randint(1, 3),
            attempts=1000,
            verify=verify,
            speculation=random.choice([0.0, 1.2, 2.0]),
            copies=random.choice([0.25, 1.0]),
            deadline=6.0,
            deadline_floor=random.choice([2.0, 10.0]),
            min_workers=random.randint(1, workers),
            backoff=0.5,
            node_failures=3,
            quarantine=20.0,
        )
        times = [random.uniform(0, 25) for _ in range(random.randint(0, 6))]
        faults = [Fault(at, random.choice(KINDS), random.randrange(workers)) for at in times]
        if policy.verify and workers < 3:
            faults = [fault for fault in faults if fault.kind != "damage"]
        return Schedule(
            seed=seed,
            workers=workers,
            policy=policy,
            speeds=tuple(random.choice([1.0, 1.0, 1.0, 0.2]) for _ in range(workers + 6)),
            faults=tuple(sorted(faults, key=lambda fault: fault.at)),
            bad=frozenset(random.sample(range(STEPS * SHARDS), random.choice([0, 0, 0, 1, 3]))),
            liar=liar,
            kills=tuple(random.uniform(0, 20) for _ in range(random.choice([0, 0, 0, 1, 2]))),
            stops=tuple(random.uniform(0, 20) for _ in range(random.choice([0, 0, 0, 1]))),
        )


# -------------------------------------------------------------------------------------------------------------- cluster


@dataclass(eq=False)
class SimWorker:
    """A worker process."""

    slot: int
    node: str
    speed: float
    lies: bool = False
    queue: list[tuple[Order, Published]] = field(default_factory=list)
    recalled: set[Order] = field(default_factory=set)
    known: bool = False
    """Whether it has said that it is ready."""
    alive: bool = True
    hung: bool = False
    twice: bool = False
    damages: bool = False
    late: bool = False


class Cluster:
    """A pool in virtual time.

    Args:
        schedule: what happens.
        began: virtual time at which this driver has started.
        faults: those of the schedule that still have to happen.
    """

    def __init__(self, schedule: Schedule, began: float, faults: list[Fault]) -> None:
        self.now = began
        self.calls = 0
        self._schedule = schedule
        self._random = Random(schedule.seed + 1)
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], Event | None]]] = []
        self._workers: dict[int, SimWorker] = {}
        self._fail_start: set[int] = set()
        self._draining: frozenset[str] = frozenset()
        self._dead: frozenset[str] = frozenset()
        self._size = schedule.workers
        self.busy_seconds = 0.0
        self.stop: Callable[[], None] = lambda: None
        for fault in faults:
            self._at(fault.at, lambda fault=fault: self._happen(fault))  # type: ignore[misc]
        for kill in schedule.kills:
            if kill > began:
                self._at(kill, self._kill)
        for stop in schedule.stops:
            if stop > began:
                self._at(stop, lambda: self.stop())
        for slot in range(self._size):
            self._start(slot, lies=slot == schedule.liar and began == 0)
        self._at(began, self._nodes)

    # ------------------------------------------------------------------------------------------------- the interface

    @property
    def transfer_seconds(self) -> float:
        """None."""
        return 0.0

    @property
    def size(self) -> int:
        return self._size

    def publish(self, published: Published) -> Published:
        return published

    def submit(self, slot: int, order: Order, handle: Published) -> None:
        worker = self._workers[slot]
        assert worker.known, f"worker {slot} is not ready"
        assert len(worker.queue) < self._schedule.policy.in_flight + 1, f"worker {slot} has {len(worker.queue)} orders"
        worker.queue.append((order, handle))
        if not worker.alive:
            self._after(0.1, lambda: Failed(slot, order, "worker_lost", "the worker is dead"))
        elif len(worker.queue) == 1:
            self._begin(worker)

    def recall(self, slot: int, order: Order) -> None:
        self._workers[slot].recalled.add(order)

    def end(self, slot: int) -> None:
        self._workers[slot].alive = False

    def replace(self, slot: int, avoid: frozenset[str] = frozenset()) -> None:
        old = self._workers.pop(slot, None)
        if old is not None:
            old.alive = False
        self._start(slot)

    def close(self) -> None:
        pass

    def wait(self, timeout: float) -> Event | None:
        self.calls += 1
        assert self.calls < PACKETS and self.now < PATIENCE, f"the run hangs: {self._schedule}"
        limit = self.now + timeout
        while self._events and self._events[0][0] <= limit:
            at, _, act = heapq.heappop(self._events)
            self.now = max(self.now, at)
            event = act()
            if event is not None:
                return event
        self.now = limit
        return None

    # ---------------------------------------------------------------------------------------------- what workers do

    def _at(self, at: float, act: Callable[[], Event | None]) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), act))

    def _after(self, seconds: float, act: Callable[[], Event | None]) -> None:
        self._at(self.now + seconds, act)

    def _start(self, slot: int, *, lies: bool = False) -> None:
        worker = SimWorker(slot, f"node {slot % 2}", self._schedule.speeds[slot], lies)
        self._workers[slot] = worker
        self._after(self._random.uniform(0.1, 1.5), lambda: self._ready(worker))

    def _ready(self, worker: SimWorker) -> Event | None:
        if self._workers.get(worker.slot) is not worker:
            return None
        if worker.slot in self._fail_start:
            self._fail_start.discard(worker.slot)
            del self._workers[worker.slot]
            return Failed(worker.slot, None, "start_error", "no such luck")
        worker.known = True
        hello = WorkerHello(worker.slot, 0, worker.node, "store", "split", "f", {"cpu": "f"}, worker.node)
        return WorkerReady(worker.slot, hello)

    def _begin(self, worker: SimWorker) -> None:
        """A worker takes the first order of its queue."""
        order, published = worker.queue[0]
        if order in worker.recalled:
            self._after(0.0, lambda: self._done(worker, Skipped(worker.slot, order)))
            return
        seconds = SECONDS / worker.speed * self._random.uniform(0.8, 1.2)
        self._after(seconds, lambda: self._compute(worker, order, published, seconds))

    def _compute(self, worker: SimWorker, order: Order, published: Published, seconds: float) -> Event | None:
        if not worker.alive or worker.hung:
            return None
        assert isinstance(order, ShardTask)
        self.busy_seconds += seconds
        result = contribution(published, order, worker.slot, self._schedule.bad)
        if worker.lies:
            wrong = replace(result, gradient=result.gradient * np.float32(1 + self._random.random()))
            result = replace(wrong, digest=wrong.content_digest())
        if worker.damages:
            worker.damages = False
            result = replace(result, gradient=result.gradient + np.float32(1))
        reply = Reply(worker.slot, order, result, 12)
        if worker.twice:
            worker.twice = False
            self._after(self._random.uniform(0, 3), lambda: reply)
        if worker.late:
            worker.late = False
            self._after(self._random.uniform(0, 5), lambda: self._done(worker, reply))
            return None
        return self._done(worker, reply)

    def _done(self, worker: SimWorker, event: Event) -> Event | None:
        if not worker.alive:
            return event if isinstance(event, Reply) and self._random.random() < 0.5 else None
        if not worker.hung:
            worker.queue.pop(0)
            if worker.queue:
                self._begin(worker)
        return event

    # ------------------------------------------------------------------------------------------------ what happens

    def _happen(self, fault: Fault) -> Event | None:
        worker = self._workers.get(fault.slot)
        match fault.kind:
            case "join":
                slot, self._size = self._size, min(self._size + 1, len(self._schedule.speeds))
                if slot < self._size:
                    self._start(slot)
            case "drain":
                self._draining = frozenset({f"node {fault.slot % 2}"})
                self._after(self._random.uniform(1, 4), self._gone)
                return self._nodes()
            case "crash":
                self._after(0.3, lambda: self._crash(f"node {fault.slot % 2}"))
            case "fail start":
                self._fail_start.add(fault.slot)
            case _ if worker is None or not worker.known:
                return None
            case "die":
                return self._die(worker)
            case "hang":
                worker.hung = True
            case "slow":
                worker.speed /= 5
            case "damage":
                worker.damages = True
            case kind:
                setattr(worker, kind, True)
        return None

    def _die(self, worker: SimWorker) -> Event | None:
        worker.alive = False
        for order, _ in worker.queue:
            self._after(self._random.uniform(0, 0.5), lambda o=order: self._told(worker, o))  # type: ignore[misc]
        return None

    def _told(self, worker: SimWorker, order: Order) -> Event:
        kind: Any = "node_lost" if worker.node in self._dead else "worker_lost"
        return Failed(worker.slot, order, kind, "the worker died")

    def _gone(self) -> Event | None:
        """The draining node goes; what was still there dies. It comes back as a new one of the same name."""
        for worker in list(self._workers.values()):
            if worker.node in self._draining and worker.known and worker.alive and worker.queue:
                self._die(worker)
        self._draining = frozenset()
        return self._nodes()

    def _nodes(self) -> Event:
        return NodesChanged(frozenset({"node 0", "node 1"}) - self._dead, self._draining)

    def _crash(self, node: str) -> Event:
        """A node is gone at once, with all its workers; another one of its name comes soon."""
        self._dead |= {node}
        for worker in self._workers.values():
            if worker.node == node and worker.alive:
                self._die(worker)
        self._after(2.0, self._back)
        return self._nodes()

    def _back(self) -> Event:
        self._dead = frozenset()
        return self._nodes()

    def _kill(self) -> Event | None:
        raise Killed


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass
class MemoryRecorder:
    """What is on the disk, without one."""

    entries: list[Entry] = field(default_factory=list)
    saved: Checkpoint | None = None

    def commit(self, entry: Entry, record: CommitRecord) -> None:
        assert entry.version == len(self.entries) + 1
        self.entries.append(entry)

    def checkpoint(self, checkpoint: Checkpoint, *, renew: bool = False) -> int:
        self.saved = checkpoint
        return 0

    def goodput(self, version: int, goodput: Goodput) -> None:
        pass


IDENTITY = RunIdentity("config", "store", "split", "initial", "f", {"cpu": "f"}, [1])
INITIAL = MetaState(0, LAYOUT, torch.linspace(-1, 1, PARAMETERS), {}, {})
NOWHERE = RunDirectory(Path("/nowhere"))


@dataclass(frozen=True)
class Outcome:
    """What became of a simulated run."""

    entries: Sequence[Entry]
    digest: str
    seconds: float
    """Virtual."""
    trainer: Trainer
    drivers: int
    messages: Sequence[str]


def simulate(schedule: Schedule, aggregator: Aggregator) -> Outcome:
    """Train a run to its last version, by as many drivers as it takes."""
    config = configuration(aggregator)
    disk, faults, now = MemoryRecorder(), list(schedule.faults), 0.0
    for drivers in itertools.count(1):
        view, stop = RecordingView(), StopRequest()
        cluster = Cluster(schedule, now, [fault for fault in faults if fault.at >= now])
        cluster.stop = lambda stop=stop: setattr(stop, "signal", 15)  # type: ignore[misc]
        try:
            trainer = _drive(config, schedule, cluster, disk, view, stop)
        except Killed:
            now = cluster.now + 0.5
            continue
        if stop.signal is not None and trainer.state.version < STEPS:
            now = cluster.now + 0.5
            continue
        return Outcome(disk.entries, trainer.state.digest, cluster.now, trainer, drivers, view.messages)
    raise AssertionError("unreachable")


def _drive(
    config: RunConfig,
    schedule: Schedule,
    cluster: Cluster,
    disk: MemoryRecorder,
    view: RecordingView,
    stop: StopRequest,
) -> Trainer:
    def clock() -> float:
        return cluster.now

    dispatcher = Dispatcher(cluster, schedule.policy, clock)
    first = None
    while first is None:
        outcome = dispatcher.next(0.5)
        first = outcome.hello if isinstance(outcome, Joined) else None
    at = disk.saved or Checkpoint.of_start(INITIAL, config.result_digest())
    found = Found(NOWHERE, IDENTITY, at, disk.saved is not None, list(disk.entries), ())
    going = start.go_on(config, LEARNER, found, Crew(cluster, dispatcher, first), view.message)
    disk.entries[:] = disk.entries[: going.state.version]
    metrics = Metrics(RunInfo("run", "toy", "toy", "", 0, "config"))
    return _train(Resources(config, LEARNER, cluster, dispatcher, disk, view, metrics, stop, clock), going)  # type: ignore[arg-type]


def _train(resources: Resources, going: Start) -> Trainer:
    trainer = Trainer(resources, going)
    trainer.run()
    return trainer


def undisturbed(bad: frozenset[int]) -> str:
    """The digest of a synchronous run that nothing happens to."""
    config, state, outer = configuration(SYNC), INITIAL, train.OuterOptimizer(configuration(SYNC))
    for version in range(STEPS):
        aggregator = aggregators.build_aggregator(SYNC, version)
        update: Any = None
        for shard in range(version * SHARDS, (version + 1) * SHARDS):
            aggregator.next_shard()
            task = ShardTask(shard, shard * config.shard.episodes, config.shard.episodes, version)
            given = contribution(state.published, task, 0, bad)
            update = aggregator.add(given, version, finite=given.finite)
        state, _ = state.apply(update.gradient, update.proposals, LEARNER, outer)
    return state.digest


def replayed(entries: Iterable[Entry], aggregator: Aggregator, bad: frozenset[int]) -> str:
    """The digest that a log's own contributions give."""
    replayer = Replayer(configuration(aggregator), LEARNER, INITIAL)
    for entry in entries:
        replayer.apply(entry, lambda published, task: contribution(published, task, 0, bad))
    return replayer.state.digest
