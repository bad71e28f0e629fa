"""Which worker computes what: bounded orders in flight, reissue of lost ones, second opinions on non-finite replies.

    train loop -> submit_shard / submit_evaluation while there is room
    train loop <- next(timeout): one ``Outcome``; what a retry settles never reaches the loop

The dispatcher knows neither Ray nor aggregation. An order goes to the ready worker with the fewest in flight, the
lowest slot first. Any error on an attempt means that this attempt failed, never that the run did; a shard whose
attempts are used up is a poison shard and ends the run with its episode ids and the worker's traceback.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from cluster.errors import ClusterError, PoisonShardError
from cluster.messages import Contribution, EvaluationPart, EvaluationTask, ShardTask, WorkerHello
from coordinator.pool import Event, Failed, Handle, Order, Pool, Reply, WorkerReady

OrderKey = tuple[str, int, int]
"""("shard", shard id, base version) or ("evaluation", part, base version): one piece of work, whatever the attempt."""

START_FAILURES = 3
"""Failed starts in a row, over all slots, after which the run stops."""

FailureKind = Literal["worker_lost", "shard_error", "nonfinite", "duplicate_mismatch"]


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
    avoid: int | None = None
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
        self._ready: dict[int, list[OrderKey]] = {}
        self._work: dict[OrderKey, _Work] = {}
        self._retries: deque[OrderKey] = deque()
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

    @property
    def busy(self) -> bool:
        """Whether any order is unsettled."""
        return bool(self._work)

    def submit(self, order: Order, handle: Handle) -> None:
        """Queue an order on the least loaded worker; there must be room."""
        key = order_key(order)
        self._work[key] = _Work(order, handle)
        self._send(key)

    def forget(self) -> None:
        """Leave everything in flight: nobody waits for it any more."""
        self._work.clear()
        self._retries.clear()
        self._ready = {slot: [] for slot in self._ready}

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
        while self._retries and any(len(queue) < self._limit for queue in self._ready.values()):
            self._send(self._retries.popleft())
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
        key = order_key(reply.order)
        work = self._work.get(key)
        queue = self._ready.get(reply.slot, [])
        if key in queue:
            queue.remove(key)
        if work is None or work.order.attempt != reply.order.attempt:
            return
        if isinstance(reply.result, EvaluationPart):
            del self._work[key]
            self._outcomes.append(Evaluated(reply.result))
            return
        self._judge(key, work, reply.result, reply)

    def _judge(self, key: OrderKey, work: _Work, contribution: Contribution, reply: Reply) -> None:
        """Accept a finite contribution; ask once more for a non-finite one (design, section 3)."""
        shard, first = contribution.shard, work.first
        if not contribution.finite and first is None:
            work.first = contribution
            self._outcomes.append(Failure("nonfinite", f"shard {shard} from worker {reply.slot} is not finite: asked again"))
            self._retry(key, avoid=reply.slot)
            return
        if first is not None and contribution.digest != first.digest:
            verdict = "finite there" if contribution.finite else "other bits"
            message = f"shard {shard}: worker {first.worker} and worker {contribution.worker} differ ({verdict})"
            self._outcomes.append(Failure("duplicate_mismatch", f"{message}; worker {first.worker} is suspect"))
        del self._work[key]
        seconds = self._clock() - work.submitted
        self._outcomes.append(Accepted(contribution, contribution.finite, seconds, reply.size))

    def _fail(self, failed: Failed) -> None:
        assert failed.order is not None
        key = order_key(failed.order)
        queue, work = self._ready.get(failed.slot, []), self._work.get(key)
        if key not in queue or work is None or work.order.attempt != failed.order.attempt:
            return  # an attempt that was given up already: the slot's worker has been replaced since
        if failed.kind == "worker_lost":
            del self._ready[failed.slot]
            self._lose(queue, failed)
            self._pool.replace(failed.slot)
        else:
            queue.remove(key)
            self._outcomes.append(Failure("shard_error", f"{describe(failed.order)} failed: {failed.message}"))
            self._blame(key, failed)

    def _lose(self, queue: list[OrderKey], failed: Failed) -> None:
        message = f"worker {failed.slot} lost ({failed.message}); replacing it, {len(queue)} order(s) reissued"
        self._outcomes.append(Failure("worker_lost", message))
        # Only what the worker was computing may have killed it; what waited behind it is merely reissued.
        self._blame(queue[0], failed)
        for key in queue[1:]:
            self._retry(key, avoid=None)

    def _blame(self, key: OrderKey, failed: Failed) -> None:
        work = self._work[key]
        work.failures += 1
        if work.failures >= self._attempts:
            raise PoisonShardError(
                f"{describe(work.order)} failed {work.failures} times, the last time on worker {failed.slot}: "
                f"{failed.message}" + (f"\n{failed.detail}" if failed.detail else "")
            )
        self._retry(key, avoid=failed.slot)

    def _retry(self, key: OrderKey, avoid: int | None) -> None:
        work = self._work[key]
        work.order = replace(work.order, attempt=work.order.attempt + 1)
        work.avoid = avoid
        self._retries.append(key)

    def _send(self, key: OrderKey) -> None:
        work = self._work.get(key)
        if work is None:
            return
        free = [slot for slot, queue in self._ready.items() if len(queue) < self._limit]
        # The worker that failed at it is asked again only if there is no other.
        choice = [slot for slot in free if slot != work.avoid] or free
        slot = min(choice, key=lambda s: (len(self._ready[s]), s))
        self._ready[slot].append(key)
        work.submitted = self._clock()
        self._pool.submit(slot, work.order, work.handle)


def order_key(order: Order) -> OrderKey:
    """What an order is about, whatever the attempt."""
    if isinstance(order, ShardTask):
        return ("shard", order.shard, order.base_version)
    return ("evaluation", order.part, order.base_version)


def describe(order: Order) -> str:
    """An order in words, with its episode ids."""
    last = order.first_episode + order.episodes - 1
    if isinstance(order, EvaluationTask):
        return f"evaluation of {order.split} episodes {order.first_episode}–{last}"
    return f"shard {order.shard} (episodes {order.first_episode}–{last})"
