"""Which worker computes what: bounded orders in flight, reissue of lost ones, second opinions on non-finite replies.

    train loop -> submit while there is room
    train loop <- next(timeout): one ``Outcome``; what a retry settles never reaches the loop

The dispatcher knows neither Ray nor aggregation. An order goes to the ready worker with the fewest in flight, the
lowest slot first. Any error on an attempt means that this attempt failed, never that the run did; a shard whose
attempts are used up is a poison shard and ends the run with its episode ids and the worker's traceback.

A worker's queue is what it still has to do, forgotten orders too. A reply or failure of an order that is not in its
slot's queue is of a worker that was replaced since, and is ignored.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cluster.errors import ClusterError, PoisonShardError
from cluster.messages import Contribution, EvaluationPart, EvaluationTask, WorkerHello
from cluster.metrics import FailureKind
from coordinator.pool import Event, Failed, Handle, Order, Pool, Reply, WorkerReady

OrderKey = Order
"""An order as it was first submitted: one piece of work, whatever the attempt."""

START_FAILURES = 3
"""Failed starts in a row, over all slots, after which the run stops."""


@dataclass(frozen=True)
class Accepted:
    """A shard's contribution, settled: finite, or non-finite on two attempts."""

    contribution: Contribution
    finite: bool
    seconds: float
    """From submission to reply."""
    size: int


@dataclass(frozen=True)
class Evaluated:
    """An evaluation task's scores."""

    part: EvaluationPart


@dataclass(frozen=True)
class Failure:
    """Something failed and was dealt with; ``message`` says what and how, in one line."""

    kind: FailureKind
    message: str


@dataclass(frozen=True)
class Joined:
    """A worker is ready."""

    hello: WorkerHello


Outcome = Accepted | Evaluated | Failure | Joined


@dataclass
class _Work:
    """One order on its way through attempts."""

    order: Order
    handle: Handle
    submitted: float = 0.0
    failures: int = 0
    tried: set[int] = field(default_factory=set)
    """Slots whose present worker failed at it or gave a non-finite reply."""
    suspect: int | None = None
    """The one that gave the non-finite reply, or else failed last: asked again only where there is nobody else."""
    first: Contribution | None = None
    """The non-finite reply that a second opinion is awaited on."""


class Dispatcher:
    """Submits orders to a pool and settles their attempts.

    Args:
        pool: where orders are computed.
        in_flight: most orders queued on one worker.
        attempts: failed attempts after which an order is given up.
        clock: seconds, monotonic.
    """

    def __init__(self, pool: Pool, in_flight: int, attempts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._limit = in_flight
        self._attempts = attempts
        self._clock = clock
        self._ready: dict[int, list[Order]] = {}
        self._work: dict[OrderKey, _Work] = {}
        self._retries: deque[_Work] = deque()
        self._failed_starts = 0
        self._outcomes: deque[Outcome] = deque()

    @property
    def workers(self) -> int:
        """Workers ready now."""
        return len(self._ready)

    @property
    def in_flight(self) -> int:
        """Orders with workers."""
        return sum(len(queue) for queue in self._ready.values())

    @property
    def room(self) -> int:
        """Orders that may be submitted now; retries come first."""
        return self._limit * len(self._ready) - self.in_flight - len(self._retries)

    def submit(self, order: Order, handle: Handle) -> None:
        """Queue an order on the least loaded worker.

        Raises:
            ValueError: there is no room, or the order is under way already.
        """
        key = order_key(order)
        if self.room < 1 or key in self._work:
            why = "it is under way" if key in self._work else "no worker has room"
            raise ValueError(f"{describe(order)} cannot be submitted: {why}")
        self._work[key] = _Work(order, handle)
        self._send(self._work[key])

    def forget(self) -> None:
        """Wait for nothing that is in flight any more; workers are busy with it until it is done."""
        self._work.clear()
        self._retries.clear()
        self._outcomes = deque(o for o in self._outcomes if isinstance(o, Failure | Joined))

    def next(self, timeout: float) -> Outcome | None:
        """The next outcome, or ``None`` if there is none within ``timeout`` seconds.

        Raises:
            PoisonShardError: an order failed in all its attempts.
            ClusterError: workers fail to start again and again.
        """
        if not self._outcomes:
            event = self._pool.wait(timeout)
            if event is not None:
                self._handle(event)
            self._retries = deque(work for work in self._retries if not self._send(work))
        return self._outcomes.popleft() if self._outcomes else None

    def _handle(self, event: Event) -> None:
        match event:
            case WorkerReady(slot, hello):
                self._ready[slot] = []
                self._failed_starts = 0
                self._outcomes.append(Joined(hello))
            case Reply():
                self._settle(event)
            case Failed(order=None):
                self._failed_starts += 1
                if self._failed_starts >= START_FAILURES:
                    raise ClusterError(f"workers fail to start: {event.message}")
                self._outcomes.append(Failure("worker_lost", f"worker {event.slot} failed to start: {event.message}"))
                self._pool.replace(event.slot)
            case Failed():
                self._fail(event)

    def _settle(self, reply: Reply) -> None:
        queue = self._ready.get(reply.slot, [])
        if reply.order not in queue:
            return
        queue.remove(reply.order)
        key, work = order_key(reply.order), self._current(reply.order)
        if work is None:
            return
        if isinstance(reply.result, Contribution) and reply.result.content_digest() != reply.result.digest:
            self._fault(work, Failed(reply.slot, reply.order, "shard_error", "its reply was damaged on its way"))
            return
        if isinstance(reply.result, EvaluationPart):
            del self._work[key]
            self._outcomes.append(Evaluated(reply.result))
            return
        self._judge(key, work, reply.result, reply)

    def _current(self, order: Order) -> _Work | None:
        """The work that an attempt is for, unless it was forgotten."""
        work = self._work.get(order_key(order))
        return work if work is not None and work.order == order else None

    def _judge(self, key: OrderKey, work: _Work, contribution: Contribution, reply: Reply) -> None:
        """Accept a finite contribution; ask once more for a non-finite one (design, section 3)."""
        shard, first = contribution.shard, work.first
        if not contribution.finite and first is None:
            work.first = contribution
            message = f"shard {shard} from worker {reply.slot} is not finite: asked again"
            self._outcomes.append(Failure("nonfinite", message))
            work.tried.add(reply.slot)
            work.suspect = reply.slot
            self._retry(work)
            return
        # Bits are compared within one fingerprint class only.
        same_class = first is not None and contribution.fingerprint == first.fingerprint
        if first is not None and (contribution.finite or (same_class and contribution.digest != first.digest)):
            verdict = "finite there" if contribution.finite else "other bits"
            message = f"shard {shard}: worker {first.worker} and worker {contribution.worker} differ ({verdict})"
            self._outcomes.append(Failure("duplicate_mismatch", f"{message}; worker {first.worker} is suspect"))
        del self._work[key]
        seconds = self._clock() - work.submitted
        self._outcomes.append(Accepted(contribution, contribution.finite, seconds, reply.size))

    def _fail(self, failed: Failed) -> None:
        assert failed.order is not None
        queue = self._ready.get(failed.slot, [])
        if failed.order not in queue:
            return
        if failed.kind == "worker_lost":
            del self._ready[failed.slot]
            self._lose(queue, failed)
            self._pool.replace(failed.slot)
            return
        queue.remove(failed.order)
        work = self._current(failed.order)
        if work is not None:
            self._fault(work, failed)

    def _fault(self, work: _Work, failed: Failed) -> None:
        """An attempt failed on a worker that lives on."""
        self._outcomes.append(Failure("shard_error", f"{describe(work.order)} failed: {failed.message}"))
        work.tried.add(failed.slot)
        work.suspect = failed.slot if work.first is None else work.suspect
        self._blame(work, failed)

    def _lose(self, queue: list[Order], failed: Failed) -> None:
        lost = [self._current(order) for order in queue]
        count = sum(work is not None for work in lost)
        message = f"worker {failed.slot} lost ({failed.message}); replacing it, {count} order(s) reissued"
        self._outcomes.append(Failure("worker_lost", message))
        for any_work in self._work.values():
            # The slot's next worker is a new one, which nothing speaks against.
            any_work.tried.discard(failed.slot)
            any_work.suspect = None if any_work.suspect == failed.slot else any_work.suspect
        for place, work in enumerate(lost):
            # Only what the worker was computing may have killed it; what waited behind it is merely reissued.
            if work is not None and place == 0:
                self._blame(work, failed)
            elif work is not None:
                self._retry(work)

    def _blame(self, work: _Work, failed: Failed) -> None:
        work.failures += 1
        if work.failures >= self._attempts:
            raise PoisonShardError(
                f"{describe(work.order)} failed {work.failures} times, the last time on worker {failed.slot}: "
                f"{failed.message}" + (f"\n{failed.detail}" if failed.detail else "")
            )
        self._retry(work)

    def _retry(self, work: _Work) -> None:
        work.order = replace(work.order, attempt=work.order.attempt + 1)
        self._retries.append(work)

    def _send(self, work: _Work) -> bool:
        """Submit the order's current attempt; ``False`` while no worker that may take it has room."""
        slot = self._choose(work)
        if slot is None:
            return False
        self._ready[slot].append(work.order)
        work.submitted = self._clock()
        self._pool.submit(slot, work.order, work.handle)
        return True

    def _choose(self, work: _Work) -> int | None:
        """The least loaded worker that may take an order, if one of them has room.

        A retry rather waits for another worker's turn than go back to one that has tried it; the suspect is asked again
        only where there is nobody else.
        """
        fresh = [slot for slot in self._ready if slot not in work.tried]
        others = [slot for slot in self._ready if slot != work.suspect]
        free = [slot for slot in fresh or others or self._ready if len(self._ready[slot]) < self._limit]
        return min(free, key=lambda slot: (len(self._ready[slot]), slot), default=None)


def order_key(order: Order) -> OrderKey:
    """What an order is about, whatever the attempt."""
    return replace(order, attempt=0)


def describe(order: Order) -> str:
    """An order in words, with its episode ids."""
    last = order.first_episode + order.episodes - 1
    if isinstance(order, EvaluationTask):
        return f"evaluation of {order.split} episodes {order.first_episode}–{last}"
    return f"shard {order.shard} (episodes {order.first_episode}–{last})"
