"""Where orders are computed: the interface between the dispatcher and the workers, and the pool of this very process.

    dispatcher -> submit(slot, order, handle), recall(slot, order), publish(published) -> handle, replace(slot, avoid)
    dispatcher <- wait(timeout) -> WorkerReady | Reply | Skipped | Failed | NodesChanged | Sending

The Ray pool (``ray_pool``) and ``InProcessPool`` implement it; so does the scripted fake in the tests.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cluster.errors import MetafleetError
from cluster.messages import Contribution, EvaluationPart, EvaluationTask, Published, ShardTask, WorkerHello
from metaworker.shard_worker import ShardWorker

Order = ShardTask | EvaluationTask
Handle = Any
"""What a pool gives for published parameters; opaque to everyone else."""


@dataclass(frozen=True)
class WorkerReady:
    """A worker has started and may get orders."""

    slot: int
    hello: WorkerHello


@dataclass(frozen=True)
class Reply:
    """A worker's answer to an order."""

    slot: int
    order: Order
    result: Contribution | EvaluationPart
    size: int
    """Bytes of the result's arrays."""


@dataclass(frozen=True)
class Failed:
    """An attempt failed: the worker is lost, or its code raised. ``order`` is ``None`` when it failed to start."""

    slot: int
    order: Order | None
    kind: Literal["worker_lost", "node_lost", "unreachable", "shard_error", "start_error"]
    """It has ended; with its node; was not reached; its code raised; it did not start. Only the first and the fourth
    may be the order's doing."""
    message: str
    """One line."""
    detail: str = ""
    """The worker's traceback, where there is one."""


@dataclass(frozen=True)
class Skipped:
    """A worker has passed over an order that was recalled before it had begun it."""

    slot: int
    order: Order


@dataclass(frozen=True)
class NodesChanged:
    """Nodes have joined, left, or are about to leave."""

    alive: frozenset[str]
    """Ids of the nodes that are there."""
    draining: frozenset[str]
    """Of those that are about to go."""


@dataclass(frozen=True)
class Sending:
    """A starting worker's node lacks the store and is being sent it."""

    slot: int
    sent: int
    """Bytes that it has so far."""
    size: int
    """Bytes of the store."""


Event = WorkerReady | Reply | Skipped | Failed | NodesChanged | Sending


class Pool(Protocol):
    """Workers in slots 0, 1 …; each computes its orders one after another, in the order of submission."""

    @property
    def size(self) -> int:
        """How many slots there are; more after nodes have joined."""
        ...

    @property
    def transfer_seconds(self) -> float:
        """Time spent on fetching replies so far."""
        ...

    def publish(self, published: Published) -> Handle:
        """Make a version's parameters available to the workers, once."""
        ...

    def submit(self, slot: int, order: Order, handle: Handle) -> None:
        """Queue an order on a ready worker."""
        ...

    def recall(self, slot: int, order: Order) -> None:
        """Tell a worker to pass over an order; ``Skipped`` follows, or ``Reply`` if it had begun it already."""
        ...

    def wait(self, timeout: float) -> Event | None:
        """The next event, or ``None`` after ``timeout`` seconds."""
        ...

    def end(self, slot: int) -> None:
        """End the worker of a slot, whatever it does."""
        ...

    def replace(self, slot: int, avoid: frozenset[str] = frozenset()) -> None:
        """Start a new worker in the slot of one that is lost, or that this ends; ``WorkerReady`` follows, or ``Failed``
        without an order.

        Args:
            slot: whose.
            avoid: ids of nodes on which it must not be.
        """
        ...

    def close(self) -> None:
        """Stop the workers."""
        ...


class InProcessPool:
    """Workers computed by this process, one at a time, when asked for the next event: for tests and debugging.

    Of several workers the one of the highest slot is asked first: replies do not come in the order of shards.

    Args:
        workers: by slot, each with what it says when it is ready.
    """

    def __init__(self, *workers: tuple[ShardWorker, WorkerHello]) -> None:
        self._workers = [worker for worker, _ in workers]
        self._events: deque[Event] = deque(WorkerReady(slot, hello) for slot, (_, hello) in enumerate(workers))
        self._orders: list[deque[tuple[Order, Published]]] = [deque() for _ in workers]

    @property
    def size(self) -> int:
        """The workers."""
        return len(self._workers)

    @property
    def transfer_seconds(self) -> float:
        """None."""
        return 0.0

    def publish(self, published: Published) -> Handle:
        """The parameters themselves."""
        return published

    def submit(self, slot: int, order: Order, handle: Handle) -> None:
        """Queue it."""
        self._orders[slot].append((order, handle))

    def wait(self, timeout: float) -> Event | None:
        """Compute the next order."""
        if self._events:
            return self._events.popleft()
        slot = max((slot for slot, orders in enumerate(self._orders) if orders), default=None)
        if slot is None:
            return None
        order, published = self._orders[slot].popleft()
        result = self._workers[slot].answer(published, order)
        return Reply(slot, order, result, payload_bytes(result))

    def recall(self, slot: int, order: Order) -> None:
        """Nothing is computed before it is waited for: no order that is recalled is."""
        kept = deque(waiting for waiting in self._orders[slot] if waiting[0] != order)
        if len(kept) < len(self._orders[slot]):
            self._orders[slot] = kept
            self._events.append(Skipped(slot, order))

    def end(self, slot: int) -> None:
        """This process cannot end itself."""
        raise MetafleetError("the in-process pool has no worker to end")

    def replace(self, slot: int, avoid: frozenset[str] = frozenset()) -> None:
        """This process cannot replace itself."""
        raise MetafleetError("the in-process pool has no worker to replace")

    def close(self) -> None:
        """Nothing to stop."""


def payload_bytes(result: object) -> int:
    """Bytes of the arrays in a result; 0 of anything else, which the dispatcher refuses."""
    if isinstance(result, Contribution):
        return result.gradient.nbytes + sum(rows.nbytes for rows in result.proposals.values())
    if not isinstance(result, EvaluationPart):
        return 0
    arrays = (result.loss, result.confusion, result.squared_error)
    return sum(rows.nbytes for rows in arrays if rows is not None)
