"""Workers as Ray actors: one file knows how orders travel, the rest of the coordinator runs without Ray.

Actors never restart and tasks never retry by Ray's own hand (``max_restarts=0``, ``max_task_retries=0``): the
dispatcher reissues and replaces. Parameters are put once per version; an object lives as long as an order that needs
it, or the caller's handle. Nodes are looked at every few seconds: new ones get workers, up to what was asked for.

Where the cluster has an autoscaler, all workers that were asked for are started, and those without room wait: actors
that wait are what it adds nodes for. ``ray.autoscaler.sdk.request_resources`` is not used: a cluster has one such
request, so that of two runs the later one would take back what the earlier one asked for, and it outlives its driver,
so that one that was killed would keep nodes alive for ever. Waiting actors add up over all runs and end with their
driver.

A worker whose node has nothing at the store's path is sent the store (``cluster.episodes.shipping``) before it is
ready, a chunk at a time: one is put when it is wanted, and the next when it was written. Of one node's workers one
wants chunks, the others wait for it. Nodes that start together are sent the same object.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from cluster.config.run import RunConfig
from cluster.device import WORKSPACE
from cluster.episodes.shipping import read_chunk
from cluster.episodes.store_header import StoreHeader, read_header
from cluster.errors import MetafleetError, StoreMissingError
from cluster.faults import VARIABLE
from cluster.messages import Contribution, EvaluationPart, Published, WorkerHello
from coordinator.capacity import room
from coordinator.pool import (
    Event,
    Failed,
    Handle,
    NodesChanged,
    Order,
    Reply,
    Sending,
    Skipped,
    WorkerReady,
    payload_bytes,
)
from metaworker.actor import WorkerActor

LOOK_SECONDS = 2.0
"""Between two looks at the cluster's nodes."""

CHUNKS_KEPT = 2
"""Chunks of the store kept in the object store for other nodes, besides those on their way."""

KEPT = 1000
"""Versions after which a recall can no longer be for anything that is still to come."""

HELLOS = 5
"""How often a worker that could not be reached is asked once more whether it is ready."""

INLINE_BYTES = 1 << 20
"""Replies up to this size travel in the answer to a call and not through the object store: half the work for Ray."""

CONTROL = "control"
"""Concurrency group in which a worker hears of recalls while it computes."""


@dataclass(frozen=True)
class _Pending:
    """What an object reference is awaited for; ``order`` is ``None`` for a worker's hello, and what leads to it."""

    slot: int
    order: Order | None
    missing: StoreMissingError | None = None
    """Why the worker is being sent the store."""
    asked: int = 1
    """How often."""


class RayPool:
    """Worker actors on a connected Ray cluster.

    Args:
        config: the run's configuration, sent to every worker.
        workers: how many slots there are at first.
        actor: the class of the worker actors.
        grows: whether the cluster adds nodes for workers that wait for them.
    """

    def __init__(
        self, config: RunConfig, workers: int, actor: type[WorkerActor] = WorkerActor, *, grows: bool = False
    ) -> None:
        self._config = config
        self._grows = grows
        self._remote = _remote(actor)
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, _Pending] = {}
        self._done: deque[Any] = deque()
        self._chunks = _Chunks(config.execution.store)
        self._nodes = NodesChanged(frozenset(), frozenset())
        self._looked = float("-inf")
        self._size = workers
        self._transfer_seconds = 0.0
        self._ready: dict[int, str] = {}
        """Slots with a worker that has been ready, each with its node."""
        self._first = set(range(workers))
        """Slots whose first worker has not been ready yet: what one of them refuses ends the run."""
        for slot in range(workers):
            self._start(slot)

    @property
    def size(self) -> int:
        """How many slots there are."""
        return self._size

    @property
    def transfer_seconds(self) -> float:
        """Time in ``ray.get`` of what has arrived."""
        return self._transfer_seconds

    def publish(self, published: Published) -> Handle:
        """Put the parameters into the object store."""
        return ray.put(published)

    def submit(self, slot: int, order: Order, handle: Handle) -> None:
        """Queue the order on the slot's actor."""
        self._pending[self._actors[slot].compute.remote(handle, order)] = _Pending(slot, order)

    def recall(self, slot: int, order: Order) -> None:
        """Tell the actor, which hears of it while it computes."""
        self._actors[slot].recall.remote(order)

    def wait(self, timeout: float) -> Event | None:
        """The next finished attempt, in order of completion, or a change of nodes."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            changed = self._look()
            if changed is not None:
                return changed
        if not self._done:
            if not self._pending:
                time.sleep(timeout)  # nobody works; a node may come
                return None
            # Everything that has finished by then is taken at once: one call for many replies.
            ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout)
            if ready:
                more, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
                self._done.extend(more)
        return self._take(self._done.popleft()) if self._done else None

    def end(self, slot: int) -> None:
        """Kill the slot's actor."""
        self._stop(slot)

    def replace(self, slot: int, avoid: frozenset[str] = frozenset()) -> None:
        """Start a new actor in the slot."""
        self._stop(slot)
        self._start(slot, avoid)

    def close(self) -> None:
        """Kill the actors."""
        for slot in list(self._actors):
            self._stop(slot)
        self._pending.clear()
        self._done.clear()
        self._chunks.drop()

    def _start(self, slot: int, avoid: frozenset[str] = frozenset()) -> None:
        execution = self._config.execution
        where = {"label_selector": {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}} if avoid else {}
        actor = self._remote.options(
            num_cpus=execution.cpus_per_worker,
            num_gpus=execution.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": worker_environment(self._config)},
            **where,
        ).remote(self._config, slot)
        self._actors[slot] = actor
        self._pending[actor.hello.remote()] = _Pending(slot, None)

    def _stop(self, slot: int) -> None:
        actor = self._actors.pop(slot, None)
        self._ready.pop(slot, None)
        # That one which is ended before it was ready does not come says nothing of its successor.
        self._pending = {ref: p for ref, p in self._pending.items() if p.slot != slot or p.order is not None}
        if actor is not None:
            with contextlib.suppress(RayError):  # it may be dead already, which is what is wanted
                ray.kill(actor)

    @property
    def _starting(self) -> bool:
        """Whether there are workers that are not ready yet."""
        return any(pending.order is None for pending in self._pending.values())

    def _send_store(self, slot: int, missing: StoreMissingError, wanted: int = 0, *, asked: bool = False) -> Sending:
        """Send a worker whose node lacks the store its header, or, once it has ``asked``, the bytes from ``wanted`` on.

        Raises:
            StoreMissingError: the driver has nothing at that path either (any more).
            StoreError: the driver's store cannot be read.
        """
        actor, header = self._actors[slot], self._chunks.header()
        if header is None:
            raise missing from None
        reference = actor.take.remote(self._chunks.at(wanted)) if asked else actor.expect.remote(header)
        self._pending[reference] = _Pending(slot, None, missing)
        return Sending(slot, wanted, header.size)

    def _look(self) -> NodesChanged | None:
        """Look at the nodes: tell of changes, and give new room new workers."""
        self._looked = time.monotonic()
        alive = _alive()
        draining = frozenset(ray._private.state.state.get_draining_nodes()) & alive
        for slot in range(self._size, self._size + self._more(alive - draining)):
            self._size += 1
            self._start(slot, draining)
        before, self._nodes = self._nodes, NodesChanged(alive, draining)
        return self._nodes if self._nodes != before else None

    def _more(self, nodes: frozenset[str]) -> int:
        """How many slots to add: what fits on ``nodes``, or, where more of them may come, what is missing."""
        wanted = self._config.execution.workers
        if wanted is not None and (self._grows or self._size >= wanted):
            return max(0, wanted - self._size)
        if self._starting:
            return 0
        free = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
        fit = sum(room(self._config, free[node]) for node in free.keys() & nodes)
        # Slots whose worker is lost will need their share again.
        more = max(0, fit - (self._size - len(self._ready)))
        return more if wanted is None else min(more, wanted - self._size)

    def _lost(self, slot: int, order: Order | None) -> Literal["start_error", "worker_lost", "node_lost"]:
        """What has become of a slot's worker that does not answer."""
        node = self._ready.pop(slot, None)
        if order is None:
            return "start_error"
        return "worker_lost" if node is None or node in _alive() else "node_lost"

    def _take(self, reference: Any) -> Event | None:
        pending = self._pending.pop(reference, None)
        if pending is None:
            return None
        slot, order = pending.slot, pending.order
        if order is None and not self._starting:
            self._chunks.drop()
        began = time.monotonic()
        try:
            result = ray.get(reference)
            self._transfer_seconds += time.monotonic() - began
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if order is None and isinstance(cause, StoreMissingError) and pending.missing is None:
                return self._send_store(slot, cause)
            if order is None and isinstance(cause, MetafleetError) and slot in self._first:
                raise cause from None
            message = f"{type(cause).__name__}: {_one_line(cause)}"
            return Failed(slot, order, "start_error" if order is None else "shard_error", message, str(error))
        except RayError as error:
            if not isinstance(error, ActorUnavailableError):
                return Failed(slot, order, self._lost(slot, order), _why(error), str(error))
            if order is None and pending.missing is None and pending.asked < HELLOS:
                self._pending[self._actors[slot].hello.remote()] = replace(pending, asked=pending.asked + 1)
                return None
            return Failed(slot, order, "unreachable", _why(error), str(error))
        if order is None:
            if pending.missing is not None and isinstance(result, int):
                return self._send_store(slot, pending.missing, result, asked=True)
            self._ready[slot] = result.node_id
            self._first.discard(slot)
            return WorkerReady(slot, result)
        return Skipped(slot, order) if result is None else Reply(slot, order, result, payload_bytes(result))


class _Chunks:
    """The driver's store as objects, each put when it is first wanted; the last few are kept.

    Args:
        store: its path, where the run has one.
    """

    def __init__(self, store: str | None) -> None:
        self._path = None if store is None else Path(store)
        self._put: dict[int, Any] = {}
        """By offset, in the order of putting. An object lives on while a worker is yet to take it."""

    def header(self) -> StoreHeader | None:
        """What the store says about itself; ``None`` if there is none.

        Raises:
            StoreError: its header cannot be read.
        """
        try:
            return None if self._path is None else read_header(self._path)
        except StoreMissingError:
            return None

    def at(self, offset: int) -> Any:
        """Reference to the bytes from ``offset`` on.

        Raises:
            StoreError: they cannot be read.
        """
        assert self._path is not None, "only what has a header is sent"
        if offset not in self._put:
            while len(self._put) >= CHUNKS_KEPT:
                del self._put[next(iter(self._put))]
            self._put[offset] = ray.put(read_chunk(self._path, offset))
        return self._put[offset]

    def drop(self) -> None:
        """Keep none."""
        self._put.clear()


def _remote(actor: type[WorkerActor]) -> Any:
    """The actor class for Ray: it computes in one thread, and hears of recalls in another."""

    class RayWorker:
        def __init__(self, config: RunConfig, slot: int) -> None:
            self._actor = actor(config, slot)
            self._recalled: set[Order] = set()

        def hello(self) -> WorkerHello:
            hello = self._actor.hello()
            return replace(hello, node_id=ray.get_runtime_context().get_node_id())

        def expect(self, header: StoreHeader) -> WorkerHello | int:
            return self._wanted_or_hello(self._actor.expect(header))

        def take(self, chunk: bytes) -> WorkerHello | int:
            return self._wanted_or_hello(self._actor.take(chunk))

        def _wanted_or_hello(self, wanted: int | None) -> WorkerHello | int:
            return self.hello() if wanted is None else wanted

        def compute(self, published: Published, order: Order) -> Contribution | EvaluationPart | None:
            if order in self._recalled:
                self._recalled.discard(order)
                return None
            # What was recalled too late is of versions long gone. The other thread may add to the set meanwhile.
            for old in list(self._recalled):
                if old.base_version <= order.base_version - KEPT:
                    self._recalled.discard(old)
            return self._actor.compute(published, order)

        @ray.method(concurrency_group=CONTROL)
        def recall(self, order: Order) -> None:
            self._recalled.add(order)

    return ray.remote(concurrency_groups={CONTROL: 1})(RayWorker)  # type: ignore[call-overload]


def _alive() -> frozenset[str]:
    """Ids of the nodes that are there."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Environment of worker processes: threads are configuration, and CUDA's determinism is set before it starts."""
    threads = str(config.threads)
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUBLAS_WORKSPACE_CONFIG": WORKSPACE}
    environment["RAY_max_direct_call_object_size"] = str(INLINE_BYTES)
    environment["MALLOC_ARENA_MAX"] = "1"  # what `device` asks of malloc holds for the main arena only
    if VARIABLE in os.environ:  # scripted faults are for all processes of a run
        environment[VARIABLE] = os.environ[VARIABLE]
    # Ray would show workers that reserve no GPU all of them.
    return environment if config.execution.gpus_per_worker > 0 else environment | {"CUDA_VISIBLE_DEVICES": ""}


def _why(error: RayError) -> str:
    """One line on why a worker is gone."""
    if "NODE_OUT_OF_MEMORY" in str(error) or "running low on memory" in str(error):
        return "its node ran out of memory: use fewer workers a node, or train anew with a smaller shard.chunk"
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Of a failure to make the actor at all, Ray gives the traceback as text: its last line says what was wrong.
    return lines[-1 if "in its creation task" in lines[0] else 0][:200]
