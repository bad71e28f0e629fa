"""Workers as Ray actors: one file knows how orders travel, the rest of the coordinator runs without Ray.

Actors never restart and tasks never retry by Ray's own hand (``max_restarts=0``, ``max_task_retries=0``): the
dispatcher reissues and replaces. Parameters are put once per version; an object lives as long as an order that needs
it, or the caller's handle.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.config.run import RunConfig
from cluster.device import WORKSPACE
from cluster.errors import MetafleetError
from cluster.messages import Published
from coordinator.pool import Event, Failed, Handle, Order, Reply, WorkerReady, payload_bytes
from metaworker.actor import WorkerActor


@dataclass(frozen=True)
class _Pending:
    """What an object reference is awaited for; ``order`` is ``None`` for a worker's hello."""

    slot: int
    order: Order | None


class RayPool:
    """Worker actors on a connected Ray cluster.

    Args:
        config: the run's configuration, sent to every worker.
        workers: how many slots.
        actor: the class of the worker actors.
    """

    def __init__(self, config: RunConfig, workers: int, actor: type[WorkerActor] = WorkerActor) -> None:
        self._config = config
        self._remote: Any = ray.remote(actor)
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, _Pending] = {}
        self._done: deque[Any] = deque()
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

    def wait(self, timeout: float) -> Event | None:
        """The next finished attempt, in order of completion."""
        if not self._done:
            if not self._pending:
                return None
            # Everything that has finished by then is taken at once: one call for many replies.
            ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout)
            if ready:
                more, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
                self._done.extend(more)
        return self._take(self._done.popleft()) if self._done else None

    def replace(self, slot: int) -> None:
        """Start a new actor in the slot."""
        self._stop(slot)
        self._start(slot)

    def close(self) -> None:
        """Kill the actors."""
        for slot in list(self._actors):
            self._stop(slot)
        self._pending.clear()
        self._done.clear()

    def _start(self, slot: int) -> None:
        execution = self._config.execution
        actor = self._remote.options(
            num_cpus=execution.cpus_per_worker,
            num_gpus=execution.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": worker_environment(self._config)},
        ).remote(self._config, slot)
        self._actors[slot] = actor
        self._pending[actor.hello.remote()] = _Pending(slot, None)

    def _stop(self, slot: int) -> None:
        actor = self._actors.pop(slot, None)
        if actor is not None:
            with contextlib.suppress(RayError):  # it may be dead already, which is what is wanted
                ray.kill(actor)

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
            message = _one_line(error)
            return Failed(slot, order, "start_error" if order is None else "worker_lost", message, str(error))
        if order is None:
            return WorkerReady(slot, result)
        return Reply(slot, order, result, payload_bytes(result))


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Environment of worker processes: threads are configuration, and CUDA's determinism is set before it starts."""
    threads = str(config.threads)
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUBLAS_WORKSPACE_CONFIG": WORKSPACE}
    # Ray would show workers that reserve no GPU all of them.
    return environment if config.execution.gpus_per_worker > 0 else environment | {"CUDA_VISIBLE_DEVICES": ""}


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Of a failure to make the actor at all, Ray gives the traceback as text: its last line says what was wrong.
    return lines[-1 if "in its creation task" in lines[0] else 0][:200]
