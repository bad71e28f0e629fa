"""How many workers the resources allow: fewer than asked for is said, none is refused, early where that is possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from cluster.config.run import RunConfig
from cluster.errors import ClusterError
from cluster.ray_runtime import usable_cpus


def affordable_workers(config: RunConfig, resources: Mapping[str, float]) -> int:
    """How many workers the free resources allow, at most as many as configured.

    Raises:
        ClusterError: not even one.
    """
    execution, workers = config.execution, room(config, resources)
    if workers < 1:
        cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        raise ClusterError(
            f"not enough for one worker: it needs {execution.cpus_per_worker:g} CPUs and "
            f"{execution.gpus_per_worker:g} GPUs, free are {cpus:g} CPUs and {gpus:g} GPUs; free some, or lower "
            "execution.cpus_per_worker or execution.gpus_per_worker (--device cpu needs no GPU)"
        )
    return min(workers, execution.workers or workers)


def room(config: RunConfig, resources: Mapping[str, float]) -> int:
    """How many workers fit into resources."""
    execution = config.execution
    workers = math.floor(resources.get("CPU", 0.0) / execution.cpus_per_worker + 1e-9)
    if execution.gpus_per_worker > 0:
        workers = min(workers, math.floor(resources.get("GPU", 0.0) / execution.gpus_per_worker + 1e-9))
    return workers


def refuse_unaffordable(config: RunConfig) -> None:
    """Refuse what this machine cannot give, before Ray is started on it.

    Raises:
        ClusterError: not even one worker.
    """
    if config.execution.address == "local":
        affordable_workers(config, {"CPU": usable_cpus(), "GPU": torch.cuda.device_count()})


def say_workers(config: RunConfig, workers: int, say: Callable[[str], None], *, grows: bool = False) -> None:
    """Say so if there are fewer workers than were asked for, or if they compute with more threads than they reserve.

    Args:
        config: the run's configuration.
        workers: how many there is room for; none only on a cluster that grows.
        say: hears it.
        grows: whether the cluster adds nodes for workers that wait for them.
    """
    asked = config.execution.workers or 1
    if workers < asked and grows:
        say(f"there is room for {workers} of {asked} workers now: the autoscaler is to add nodes for the rest")
    elif workers < asked:
        say(f"{asked} workers were asked for, the free resources allow {workers}: going on with {workers}")
    threads, cpus = config.threads, config.execution.cpus_per_worker
    if threads > max(1.0, cpus):
        say(
            f"each worker computes with {threads} threads and reserves {cpus:g} CPUs, and more threads than cores are "
            f"slow: give --execution.cpus_per_worker {threads}"
        )
