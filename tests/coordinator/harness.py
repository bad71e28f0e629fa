"""What the coordinator's tests share: made-up contributions, a scripted pool, and whole runs in this process.

contribution   a contribution whose digest is right
FakePool       workers that do what a test says, and check what they are given
TINY           the configuration of a run of some milliseconds
Harness        such a run from its directory to its last version, by the functions that `metafleet train` uses
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.config.learners import MAML
from cluster.config.run import RunConfig
from cluster.config.sections import MLP, EpisodeShape, Evaluation, Execution, Shard, SinusoidData, SyncAggregator
from cluster.device import prepare
from cluster.episodes import open_source
from cluster.messages import (
    Contribution,
    EvaluationPart,
    EvaluationTask,
    Published,
    ShardStatistics,
    WorkerHello,
)
from cluster.metrics import Metrics, RunInfo
from coordinator.attempts import Policy
from coordinator.commit_log import read_log
from coordinator.crew import Crew
from coordinator.dispatch import Dispatcher
from coordinator.meta_state import MetaState
from coordinator.outcomes import Joined
from coordinator.pool import Event, Failed, Handle, InProcessPool, Order, Reply, Sending, Skipped, WorkerReady
from coordinator.recorder import Recorder
from coordinator.replay import Replayer
from coordinator.run_dir import RunDirectory, RunIdentity
from coordinator.start import begin, find, go_on
from coordinator.train import Resources, StopRequest, Trainer
from coordinator.view import Snapshot
from metaworker.learners import build_learner
from metaworker.scores import MetricName
from metaworker.shard_worker import ShardWorker

# ------------------------------------------------------------------------------------------------------- contributions


def contribution(
    shard: int,
    base_version: int = 0,
    gradient: object = (1.0, 2.0, 3.0),
    *,
    episodes: int = 2,
    loss: float = 0.5,
    metric: float = 0.25,
    attempt: int = 0,
    worker: int = 0,
    proposals: Mapping[str, np.ndarray] | None = None,
) -> Contribution:
    """A contribution as a worker would send it."""
    made = Contribution(
        shard=shard,
        base_version=base_version,
        attempt=attempt,
        worker=worker,
        gradient=np.array(gradient, dtype=np.float32),
        episodes=episodes,
        proposals=proposals or {},
        statistics=ShardStatistics(loss, metric, 0.001, 0.002, 0.003, 1000),
        fingerprint="f",
    )
    return replace(made, digest=made.content_digest())


def answer(slot: int, order: Order) -> Contribution | EvaluationPart:
    """What a worker in ``slot`` answers to an order: a function of the order alone, apart from who it is from."""
    if isinstance(order, EvaluationTask):
        errors = np.arange(order.first_episode, order.first_episode + order.episodes, dtype=np.float64)[:, None]
        about = (order.part, order.base_version, order.attempt, slot, order.first_episode)
        part = EvaluationPart(*about, loss=errors, confusion=None, squared_error=errors)
        return replace(part, digest=part.content_digest())
    rng = np.random.default_rng([order.shard, order.base_version])
    gradient = rng.standard_normal(5, dtype=np.float32)
    return contribution(
        order.shard,
        order.base_version,
        gradient,
        episodes=order.episodes,
        loss=float(rng.uniform()),
        attempt=order.attempt,
        worker=slot,
    )


def hello(slot: int = 0, store: str = "store", split: str = "split", fingerprint: str = "f") -> WorkerHello:
    """A worker's greeting."""
    return WorkerHello(slot, 1000 + slot, "node", store, split, fingerprint, {"cpu": fingerprint})


# ------------------------------------------------------------------------------------------------------- scripted pool


def identity(order: Order) -> Order:
    """The order, whatever the attempt."""
    return replace(order, attempt=0)


@dataclass
class _Worker:
    orders: list[Order] = field(default_factory=list)
    dead: bool = False
    """Dead, and nobody has been told yet."""


class FakePool:
    """Workers that do what the test says: nothing happens by itself, and every call is checked.

    The script methods (``ready``, ``reply``, ``lose``, ``error`` …) put events where ``wait`` finds them, in the order
    in which they are called. What it is given must obey the ``Pool`` protocol: orders go to ready workers, at most
    ``limit`` each, with the handle of their base version; attempts of an order count up from 0 one by one; only a slot
    whose loss has been told is replaced, once.

    Args:
        slots: how many there are; none is ready before the test says so.
        limit: most orders that a worker may have.
        answers: what a worker computes, from its slot and the order.
        restarts: whether a worker that does not come may be started again.
    """

    def __init__(
        self,
        slots: int,
        limit: int = 2,
        answers: Callable[[int, Order], Contribution | EvaluationPart] = answer,
        restarts: bool = False,
    ) -> None:
        self._slots = slots
        self._restarts = restarts
        self._limit = limit
        self._answers = answers
        self._workers: dict[int, _Worker] = {}
        self._starting = set(range(slots))
        self._lost: set[int] = set()
        self._events: deque[Event] = deque()
        self._attempts: dict[Order, int] = {}
        self.known: set[int] = set()
        """Slots whose worker is ready as far as anyone has been told."""
        self._nonfinite: set[Order] = set()
        self._dead_letters: dict[int, Event] = {}
        self.late: list[Event] = []
        """Events of dead workers that still have to arrive; a test moves them by ``release``."""
        self.submitted: list[tuple[int, Order]] = []
        self.replaced: list[int] = []
        self.recalled: list[tuple[int, Order]] = []
        self.suspects: dict[Order, int] = {}
        """Who gave a non-finite reply or failed at an order: another worker has to be asked, where there is one."""

    # ------------------------------------------------------------------------------------------------- the interface

    @property
    def transfer_seconds(self) -> float:
        """None."""
        return 0.0

    @property
    def size(self) -> int:
        return self._slots

    def publish(self, published: Published) -> Handle:
        return ("handle", published.version)

    def submit(self, slot: int, order: Order, handle: Handle) -> None:
        assert slot in self.known, f"worker {slot} is not ready"
        assert handle == ("handle", order.base_version), f"{handle} is not the handle of {order}"
        expected = self._attempts.get(identity(order), -1) + 1
        assert order.attempt == expected, f"attempt {order.attempt} of {order}, expected {expected}"
        suspect = self.suspects.get(identity(order))
        assert slot != suspect or self.known == {slot}, f"{order} goes back to worker {slot}, there are others"
        self._attempts[identity(order)] = order.attempt
        worker = self._workers[slot]
        assert len(worker.orders) < self._limit, f"worker {slot} has {len(worker.orders)} orders already"
        worker.orders.append(order)
        self.submitted.append((slot, order))
        if worker.dead:
            self.late.append(Failed(slot, order, "worker_lost", "the actor is dead"))

    def wait(self, timeout: float) -> Event | None:
        assert timeout > 0
        if not self._events:
            return None
        event = self._events.popleft()
        match event:
            case WorkerReady(slot):
                self.known.add(slot)
            case Failed(slot, order, "worker_lost") if order is not None:
                worker = self._workers.get(slot)
                if worker is not None and worker.dead and order in worker.orders:
                    self._bury(slot)
            case Failed(kind="unreachable"):
                pass  # nobody's fault
            case Failed(slot, order) if order is not None and identity(order) not in self._nonfinite:
                self.suspects[identity(order)] = slot
            case Reply(slot, order, Contribution() as result) if not (result.finite or id(event) in self._dead_letters):
                self.suspects[identity(order)] = slot
                self._nonfinite.add(identity(order))
            case Reply(slot, order, EvaluationPart() as part) if part.digest != part.content_digest():
                self.suspects[identity(order)] = slot
            case Reply(_, order, EvaluationPart()) if id(event) not in self._dead_letters:
                self._attempts.pop(identity(order), None)  # settled, and may be ordered again
        return event

    def recall(self, slot: int, order: Order) -> None:
        assert order in self._workers[slot].orders[1:], f"{order} was begun, or is not worker {slot}'s"
        self.recalled.append((slot, order))

    def end(self, slot: int) -> None:
        raise AssertionError("no worker hangs or lies here")

    def replace(self, slot: int, avoid: frozenset[str] = frozenset()) -> None:
        assert slot in self._lost or (self._restarts and slot in self._starting), f"worker {slot} is not lost"
        self._lost.discard(slot)
        self._starting.add(slot)
        self.replaced.append(slot)

    def close(self) -> None:
        raise AssertionError("the pool is not the dispatcher's to close")

    # ------------------------------------------------------------------------------------------------------ the script

    @property
    def starting(self) -> list[int]:
        """Slots whose worker is being started."""
        return sorted(self._starting)

    @property
    def busy(self) -> list[int]:
        """Slots of living workers that have orders."""
        return sorted(slot for slot, worker in self._workers.items() if worker.orders and not worker.dead)

    @property
    def alive(self) -> list[int]:
        """Slots of living workers."""
        return sorted(slot for slot, worker in self._workers.items() if not worker.dead)

    @property
    def quiet(self) -> bool:
        """Whether nothing is left to arrive or to be computed."""
        return not self._events and not self.late and not self.busy and not self._starting

    def orders(self, slot: int) -> list[Order]:
        """What a worker has to do."""
        return list(self._workers[slot].orders)

    def ready(self, *slots: int) -> None:
        """Workers have started; all that are starting when none is named."""
        for slot in slots or sorted(self._starting):
            self._starting.remove(slot)
            self._workers[slot] = _Worker()
            self._events.append(WorkerReady(slot, hello(slot)))

    def fail_start(self, slot: int) -> None:
        """A worker fails to start."""
        self._starting.remove(slot)
        self._lost.add(slot)
        self._events.append(Failed(slot, None, "start_error", "no such luck"))

    def reply(self, slot: int, result: Contribution | EvaluationPart | None = None) -> None:
        """A worker has computed its first order."""
        order = self._workers[slot].orders.pop(0)
        passed = (slot, order) in self.recalled
        self._events.append(Skipped(slot, order) if passed else self._computed(slot, order, result))

    def miss(self, slot: int) -> None:
        """A worker was not reached for its first order."""
        order = self._workers[slot].orders.pop(0)
        self._events.append(Failed(slot, order, "unreachable", "no route"))

    def send(self, slot: int, sent: int, size: int) -> None:
        """A starting worker's node is being sent the store."""
        self._events.append(Sending(slot, sent, size))

    def error(self, slot: int, message: str = "ValueError: scripted", detail: str = "Traceback …") -> None:
        """A worker's code has raised at its first order."""
        order = self._workers[slot].orders.pop(0)
        self._events.append(Failed(slot, order, "shard_error", message, detail))

    def lose(self, slot: int, first: int = 0, *, computed: bool = False) -> None:
        """A worker dies with orders: the failure of its ``first`` one arrives now, the others' are late.

        Args:
            slot: whose worker.
            first: which of its orders fails first.
            computed: the very first order was computed, and its reply is late instead of its failure.
        """
        worker = self._workers[slot]
        worker.dead = True
        events: list[Event] = [
            Failed(slot, order, "worker_lost", "the actor died", "Traceback …") for order in worker.orders
        ]
        if computed and first != 0:
            events[0] = self._computed(slot, worker.orders[0], None)
            self._dead_letters[id(events[0])] = events[0]
        self._events.append(events.pop(first))
        self.late += events

    def release(self, index: int = 0) -> None:
        """One of the late events arrives."""
        self._events.append(self.late.pop(index))

    def forget(self) -> None:
        """Orders may be given once more, from attempt 0."""
        self._attempts.clear()
        self.suspects.clear()

    def _computed(self, slot: int, order: Order, result: Contribution | EvaluationPart | None) -> Reply:
        return Reply(slot, order, self._answers(slot, order) if result is None else result, 20)

    def _bury(self, slot: int) -> None:
        del self._workers[slot]
        self.known.discard(slot)
        self._lost.add(slot)
        self.suspects = {order: suspect for order, suspect in self.suspects.items() if suspect != slot}


# ---------------------------------------------------------------------------------------------------------------- runs

IDENTITY = RunIdentity(
    "config", "store", "split", "initial", "fingerprint", {"cpu": "model × 3", "torch": "2.9"}, [1, 28, 28]
)
"""Of runs that only need a directory."""

TINY = RunConfig(
    name="tiny",
    steps=6,
    data=SinusoidData(),
    episode=EpisodeShape(way=1, shot=3, query=3),
    shard=Shard(episodes=2, chunk=2),
    learner=MAML(inner_lr=0.01, eval_steps=1),
    model=MLP(hidden=(8,)),
    aggregator=SyncAggregator(shards=3),
    evaluation=Evaluation(every=0, val_episodes=4, episodes=4),
    execution=Execution(checkpoint_every=2, keep=2),
)
"""A run of 6 versions, 3 shards of 2 sinusoid episodes each."""


class Killed(BaseException):
    """The driver dies here: nothing after it runs, no file is flushed."""


class RecordingView:
    """A view that keeps what it is shown."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []
        self.messages: list[str] = []

    def start(self, total: int, summary: str, *, metric: MetricName = "accuracy", version: int = 0) -> None:
        raise AssertionError("the session starts its view, not the trainer")

    def update(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def stop(self) -> None:
        raise AssertionError("the session stops its view, not the trainer")


class WatchedPool:
    """An in-process pool that tells ``watch`` how many replies there were, after each one."""

    def __init__(self, pool: InProcessPool, watch: Callable[[int], None]) -> None:
        self._pool = pool
        self._watch = watch
        self.submitted: list[Order] = []
        self.replied: list[int] = []

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
        assert isinstance(handle, Published) and handle.version == order.base_version
        self.submitted.append(order)
        self._pool.submit(slot, order, handle)

    def wait(self, timeout: float) -> Event | None:
        event = self._pool.wait(timeout)
        if isinstance(event, Reply):
            self.replied.append(event.slot)
            self._watch(len(self.replied))
        return event

    def recall(self, slot: int, order: Order) -> None:
        self._pool.recall(slot, order)

    def end(self, slot: int) -> None:
        self._pool.end(slot)

    def replace(self, slot: int, avoid: frozenset[str] = frozenset()) -> None:
        self._pool.replace(slot, avoid)

    def close(self) -> None:
        self._pool.close()


@dataclass(frozen=True)
class Driven:
    """What became of a run."""

    trainer: Trainer
    start: int
    """The version it went on from."""
    view: RecordingView
    submitted: Sequence[Order]
    replied: Sequence[int]
    """The worker of each reply, in the order of arrival."""
    metrics: Metrics

    @property
    def digest(self) -> str:
        return self.trainer.state.digest


def drive(
    config: RunConfig,
    path: Path,
    *,
    resume: bool = False,
    stop_at: int | None = None,
    kill_at: int | None = None,
    hardware: str | None = None,
    workers: int = 1,
) -> Driven:
    """Train a run, or go on with one, in this process.

    Args:
        config: its configuration.
        path: its directory.
        resume: whether an earlier driver was there.
        stop_at: replies after which a stop is requested.
        kill_at: replies after which the driver dies.
        hardware: what its first worker says that it computes on, if not the truth.
        workers: how many; the one of the highest slot is asked first.
    """
    stop, view = StopRequest(), RecordingView()

    def watch(replies: int) -> None:
        if replies == kill_at:
            raise Killed
        if replies == stop_at:
            stop.signal = 15

    prepare("cpu", threads=1)
    source = open_source(config)
    learner = build_learner(config, source.sample_shape)
    crew = [ShardWorker(config, source, slot) for slot in range(workers)]
    if hardware is not None:
        crew[0].fingerprint, crew[0].fingerprint_detail = hardware, {"cpu": hardware}
    hellos = [
        WorkerHello(slot, 0, "here", source.digest, source.split_digest, w.fingerprint, w.fingerprint_detail)
        for slot, w in enumerate(crew)
    ]
    first = hellos[0]
    pool = WatchedPool(InProcessPool(*zip(crew, hellos, strict=True)), watch)
    dispatcher = Dispatcher(pool, Policy.of(config.execution))
    for _ in hellos:
        assert isinstance(dispatcher.next(1.0), Joined)
    with ExitStack() as stack:
        if resume:
            found = find(config, path, source, learner, stack)
            run, start = found.run, go_on(config, learner, found, Crew(pool, dispatcher, first), view.message)
        else:
            run, start = begin(config, path, source, learner, first, stack)
        recorder = Recorder(run, run.claim_epoch(), config, start.state)
        metrics = Metrics(RunInfo("run", "tiny", "maml", "", 0, config.result_digest()), regression=True)
        resources = Resources(config, learner, pool, dispatcher, recorder, view, metrics, stop)
        trainer = Trainer(resources, start)
        trainer.run()
        recorder.close()
    return Driven(trainer, start.state.version, view, pool.submitted, pool.replied, metrics)


def new_run(path: Path) -> RunDirectory:
    """A run directory as a new run has it."""
    return RunDirectory.create(path, IDENTITY, TINY)


def replayed(config: RunConfig, path: Path) -> Replayer:
    """The run at ``path`` recomputed from its log, every digest compared."""
    worker = ShardWorker(config, open_source(config))
    replayer = Replayer(config, worker.learner, MetaState.initial(config, worker.learner))
    for entry in read_log(RunDirectory.open(path)):
        replayer.apply(entry, worker.compute)
    return replayer
