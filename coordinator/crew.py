"""The workers of one command: a cluster for the time of a block, a pool on it, and its first worker ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.config.run import RunConfig
from cluster.errors import ClusterError
from cluster.messages import WorkerHello
from cluster.ray_runtime import ClusterResources, ray_cluster
from coordinator.attempts import Policy
from coordinator.capacity import affordable_workers, room, say_workers
from coordinator.dispatch import Dispatcher
from coordinator.evaluation import PATIENCE
from coordinator.outcomes import Delay, Failure, Joined, Notice
from coordinator.pool import Pool

NONE_SECONDS, FEWER_SECONDS = 10.0, 5.0
"""How long room is waited for on a cluster that would have it: for one worker, and for all."""


@dataclass(frozen=True)
class Crew:
    """Who computes for a command."""

    pool: Pool
    dispatcher: Dispatcher
    first: WorkerHello
    """Of the worker that was ready first; the others join while the work goes on."""


@contextmanager
def ray_crew(config: RunConfig, say: Callable[[str], None]) -> Iterator[Crew]:
    """As many workers as ``config`` asks for and the cluster allows, on its cluster, for the time of the block.

    Where the cluster has an autoscaler, the rest are asked for too, and join when their nodes have come.

    Args:
        config: the run's configuration.
        say: hears of fewer workers than were asked for, and of those that fail to start.

    Raises:
        ClusterError: no cluster, not the resources for one worker, or none that starts in time.
        MetafleetError: what the first worker refuses, for instance its node's store.
    """
    with ray_cluster(config.execution.address) as resources:
        from coordinator.ray_pool import RayPool

        workers = _free_workers(config, resources)
        say_workers(config, workers, say, grows=resources.grows)
        pool = RayPool(config, max(1, workers), grows=resources.grows)
        try:
            dispatcher = Dispatcher(pool, Policy.of(config.execution))
            yield Crew(pool, dispatcher, first_worker(config, dispatcher, say))
        finally:
            pool.close()


def _free_workers(config: RunConfig, resources: ClusterResources) -> int:
    """How many workers there is room for, once what another driver has given back a moment ago counts as free.

    Raises:
        ClusterError: not even for one, on a cluster that does not grow.
    """
    most, started = room(config, resources.total()), time.monotonic()
    most = min(most, config.execution.workers or most)
    while (now := room(config, resources.free())) < most:
        if time.monotonic() - started > (FEWER_SECONDS if now else NONE_SECONDS):
            break
        time.sleep(PATIENCE)
    free = resources.free()
    return 0 if resources.grows and room(config, free) < 1 else affordable_workers(config, free)


def first_worker(config: RunConfig, dispatcher: Dispatcher, say: Callable[[str], None]) -> WorkerHello:
    """Wait for the first worker.

    Raises:
        ClusterError: none started within ``execution.start_timeout``, the sending of a store apart.
    """
    deadline, last = time.monotonic() + config.execution.start_timeout, ""
    while time.monotonic() < deadline:
        match dispatcher.next(PATIENCE):
            case Joined(hello):
                return hello
            case Delay(message):
                say(message)
                deadline = time.monotonic() + config.execution.start_timeout
            case Failure(_, message):
                say(message)
                last = f"; {message}"
            case Notice(message):
                say(message)
    raise ClusterError(
        f"no worker started within execution.start_timeout = {config.execution.start_timeout:g} s: look at "
        f"`ray status` for what is missing, or raise it{last}"
    )
