"""Workers as Ray actors: one file knows how orders travel, the rest of the coordinator runs without Ray.

Actors never restart and tasks never retry by Ray's own hand (``max_restarts=0``, ``max_task_retries=0``): the
dispatcher reissues and replaces. Parameters are put once per version; an object lives as long as an order that needs
it, or the caller's handle. Nodes are looked at every few seconds: new ones get workers, up to what was asked for.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.config.run import RunConfig
from cluster.device import WORKSPACE
from cluster.errors import MetafleetError
from cluster.messages import Contribution, EvaluationPart, Published, WorkerHello
from coordinator.capacity import room
from coordinator.pool import Event, Failed, Handle, NodesChanged, Order, Reply, Skipped, WorkerReady, payload_bytes
from metaworker.actor import WorkerActor

LOOK_SECONDS = 2.0
"""Between two looks at the cluster's nodes."""

CONTROL = "control"
"""Concurrency group in which a worker hears of recalls while it computes."""


@dataclass(frozen=True)
class _Pending:
    """What an object reference is awaited for; ``order`` is ``None`` for a worker's hello."""

    slot: int
    order: Order | None


class RayPool:
    """Worker actors on a connected Ray cluster.

    Args:
        config: the run's configuration, sent to every worker.
        workers: how many slots there are at first.
        actor: the class of the worker actors.
    """

    def __init__(self, config: RunConfig, workers: int, actor: type[WorkerActor] = WorkerActor) -> None:
        self._config = config
        self._remote = _remote(actor)
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, _Pending] = {}
        self._done: deque[Any] = deque()
        self._nodes = NodesChanged(frozenset(), frozenset())
        self._looked = float("-inf")
        self._size = workers
        for slot in range(workers):
            self._start(slot)

    @property
    def size(self) -> int:
        """How many slots there are."""
        return self._size

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
        if actor is not None:
            with contextlib.suppress(RayError):  # it may be dead already, which is what is wanted
                ray.kill(actor)

    def _look(self) -> NodesChanged | None:
        """Look at the nodes: tell of changes, and give new room new workers."""
        self._looked = time.monotonic()
        alive = frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]
        draining = frozenset(ray._private.state.state.get_draining_nodes()) & alive
        if not any(pending.order is None for pending in self._pending.values()):
            wanted = self._config.execution.workers
            more = room(self._config, ray.available_resources())  # type: ignore[no-untyped-call]
            for slot in range(self._size, self._size + (more if wanted is None else min(more, wanted - self._size))):
                self._size += 1
                self._start(slot, draining)
        before, self._nodes = self._nodes, NodesChanged(alive, draining)
        return self._nodes if self._nodes != before else None

    def _take(self, reference: Any) -> Event | None:
        pending = self._pending.pop(reference, None)
        if pending is None:
            return None
        slot, order = pending.slot, pending.order
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if order is None and isinstance(cause, MetafleetError):
                raise cause from None
            message = f"{type(cause).__name__}: {_one_line(cause)}"
            return Failed(slot, order, "start_error" if order is None else "shard_error", message, str(error))
        except RayError as error:
            return Failed(slot, order, "start_error" if order is None else "worker_lost", _why(error), str(error))
        if order is None:
            return WorkerReady(slot, result)
        return Skipped(slot, order) if result is None else Reply(slot, order, result, payload_bytes(result))


def _remote(actor: type[WorkerActor]) -> Any:
    """The actor class for Ray: it computes in one thread, and hears of recalls in another."""

    class RayWorker:
        def __init__(self, config: RunConfig, slot: int) -> None:
            self._actor = actor(config, slot)
            self._recalled: set[Order] = set()

        def hello(self) -> WorkerHello:
            hello = self._actor.hello()
            versions = {**hello.versions, "ray": ray.__version__}
            return replace(hello, node_id=ray.get_runtime_context().get_node_id(), versions=versions)

        def compute(self, published: Published, order: Order) -> Contribution | EvaluationPart | None:
            if order in self._recalled:
                self._recalled.discard(order)
                return None
            return self._actor.compute(published, order)

        @ray.method(concurrency_group=CONTROL)
        def recall(self, order: Order) -> None:
            self._recalled.add(order)

    return ray.remote(concurrency_groups={CONTROL: 1})(RayWorker)  # type: ignore[call-overload]


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Environment of worker processes: threads are configuration, and CUDA's determinism is set before it starts."""
    threads = str(config.threads)
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUBLAS_WORKSPACE_CONFIG": WORKSPACE}
    environment["MALLOC_ARENA_MAX"] = "1"  # what `device` asks of malloc holds for the main arena only
    # Ray would show workers that reserve no GPU all of them.
    return environment if config.execution.gpus_per_worker > 0 else environment | {"CUDA_VISIBLE_DEVICES": ""}


def _why(error: RayError) -> str:
    """One line on why a worker is gone."""
    if "memory" in str(error) and any(word in str(error) for word in ("OOM", "OutOfMemory", "running low on memory")):
        return "its node ran out of memory: use fewer workers a node, or train anew with a smaller shard.chunk"
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Of a failure to make the actor at all, Ray gives the traceback as text: its last line says what was wrong.
    return lines[-1 if "in its creation task" in lines[0] else 0][:200]
