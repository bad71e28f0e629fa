"""The same shards in bare processes: each computes its own with a ``ShardWorker`` in a loop, no coordinator, no Ray.

A process gets new parameters to load for each version. It has the environment of a Ray worker, and its niceness, so
that other load hits both alike. They may run freely, or meet at a barrier after each version.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier

from benchmarks.machine import environment
from benchmarks.workload import initial_parameters
from cluster.config.run import RunConfig
from cluster.episodes import open_source
from cluster.messages import ShardTask
from coordinator.ray_pool import worker_environment
from metaworker.shard_worker import ShardWorker

PATIENCE = 120.0
"""Seconds after which a silent process is given up."""


@dataclass(frozen=True)
class _Command:
    """Versions ``first … first + versions − 1``."""

    first: int
    versions: int
    in_step: bool


class BareProcesses:
    """Processes that each compute ``shards`` shards of every version.

    Args:
        config: of the run.
        count: how many processes.
        shards: of each process and version.
        niceness: of the processes.
    """

    def __init__(self, config: RunConfig, count: int, shards: int, niceness: int) -> None:
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(count)
        self._per_version = count * shards * config.shard.episodes
        self._version = 0
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        for index in range(count):
            here, there = context.Pipe()
            arguments = (config, index, count, shards, niceness, there, barrier)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            with environment(worker_environment(config)):
                process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        self._answers()

    def speed(self, versions: int, in_step: bool) -> float:
        """Episodes a second until the last process is done; ``in_step`` if all meet after each version."""
        for pipe in self._pipes:
            pipe.send(_Command(self._version, versions, in_step))
        self._version += versions
        times = self._answers()
        return versions * self._per_version / (max(end for _, end in times) - min(start for start, _ in times))

    def close(self) -> None:
        """End them."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(PATIENCE)

    def _answers(self) -> list[tuple[float, float]]:
        """When each process started and finished."""
        found = []
        for pipe in self._pipes:
            if not pipe.poll(PATIENCE):
                raise TimeoutError(f"a bare process has said nothing for {PATIENCE:g} s")
            found.append(pipe.recv())
        return found


@contextmanager
def bare_processes(config: RunConfig, count: int, shards: int, niceness: int) -> Iterator[BareProcesses]:
    """Bare processes that end with the block."""
    processes = BareProcesses(config, count, shards, niceness)
    try:
        yield processes
    finally:
        processes.close()


def _serve(
    config: RunConfig, index: int, count: int, shards: int, niceness: int, pipe: Connection, barrier: Barrier
) -> None:
    """A process: answers commands until the pipe is closed."""
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    worker = ShardWorker(config, open_source(config), index)
    published, episodes = initial_parameters(worker), config.shard.episodes
    pipe.send((0.0, 0.0))
    while True:
        try:
            command: _Command = pipe.recv()
        except EOFError:
            return
        barrier.wait(PATIENCE)
        started = time.perf_counter()
        for version in range(command.first, command.first + command.versions):
            parameters = replace(published, version=version)
            first = (version * count + index) * shards
            for shard in range(first, first + shards):
                worker.compute(parameters, ShardTask(shard, shard * episodes, episodes, version))
            if command.in_step:
                barrier.wait(PATIENCE)
        pipe.send((started, time.perf_counter()))
