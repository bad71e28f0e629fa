"""Hours of trouble in minutes: workers and drivers killed at random for long, and the bits and the machine compared.

`make soak`. METAFLEET_SOAK_MINUTES (30) is about how long it lasts; the undisturbed run before it takes nearly as long.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from cluster.config.sections import AsyncAggregator, SyncAggregator
from coordinator.run_dir import RunDirectory
from tests.coordinator.harness import TINY, drive, replayed
from tests.system.driving import Command, Driver, entries_of
from tests.system.test_faults import Nodes

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(4 * 3600)]

MINUTES = float(os.environ.get("METAFLEET_SOAK_MINUTES", "30"))
WORKER_EVERY, DRIVER_EVERY = 10.0, 180.0
"""Seconds between two kills."""
PACE_VERSIONS = 400
"""Versions that the speed is found with."""

RUN = (
    *("train", "sinusoid-maml", "--json", "--aggregator.shards", 8, "--shard.episodes", 40, "--shard.chunk", 40),
    *("--learner.inner_lr", 0.001, "--evaluation.every", 0, "--evaluation.episodes", 20),
    *("--execution.checkpoint_every", 200, "--execution.log_every", 5, "--execution.attempts", 20),
)


@dataclass
class Usage:
    """What processes use, sampled over time."""

    samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)

    def flat(self) -> dict[str, tuple[float, float]]:
        """The medians of the second and of the last quarter."""
        found = {}
        for name, values in self.samples.items():
            quarter = max(1, len(values) // 4)
            found[name] = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
        return found


def sample(usage: Usage, what: str, pids: list[int]) -> None:
    """Memory (MB), threads and open files of some processes together."""
    memory = threads = files = 0.0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            files += len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            continue
        values = dict(line.split(":", 1) for line in status.splitlines())
        memory += int(values.get("VmRSS", "0 kB").split()[0]) / 1000
        threads += int(values.get("Threads", "0"))
    usage.add(f"{what} memory, MB", memory)
    usage.add(f"{what} threads", threads)
    usage.add(f"{what} open files", files)


def object_store_bytes(nodes: Nodes) -> float:
    """Bytes in the object stores of all nodes, as their raylets count them."""
    from ray._private.internal_api import node_stats

    total = 0.0
    for node in nodes.cluster.list_all_nodes():
        stats = node_stats(node.node_ip_address, node.node_manager_port, include_memory_info=False)
        total += stats.store_stats.object_store_bytes_used
    return total


def test_workers_and_drivers_are_killed_for_long(command: Command) -> None:
    nodes, random, usage = Nodes(), Random(0), Usage()
    try:
        address = ("--address", nodes.address)
        paced = command.run(*RUN, "--run-dir", "paced", "--steps", PACE_VERSIONS, *address).report
        steps = int(MINUTES * 60 * 0.9 * PACE_VERSIONS / paced["wall_seconds"])
        started = time.monotonic()
        whole = command.start(*RUN, "--run-dir", "whole", "--steps", steps, *address).finish(3600).report
        undisturbed = time.monotonic() - started

        run, started, kills, drivers = command.folder / "run", time.monotonic(), 0, 0
        driver = command.start(*RUN, "--run-dir", "run", "--steps", steps, *address)
        worker_due, driver_due = time.monotonic() + WORKER_EVERY, time.monotonic() + DRIVER_EVERY
        while driver.alive:
            time.sleep(1.0)  # the pace of the killing, no synchronisation
            now = time.monotonic()
            if now - started > MINUTES * 60:
                break
            if now > worker_due and (victims := nodes.actors()):
                os.kill(random.choice(victims), signal.SIGKILL)
                kills, worker_due = kills + 1, now + WORKER_EVERY
                raylets = [p.process.pid for n in nodes.cluster.list_all_nodes() for p in n.all_processes["raylet"]]
                sample(usage, "driver", [driver.pid])
                sample(usage, "raylets", raylets)
                usage.add("object store, MB", object_store_bytes(nodes) / 1e6)
            if now > driver_due:
                driver = _kill_and_resume(command, driver, run, address)
                drivers, driver_due = drivers + 1, now + DRIVER_EVERY
        report = driver.finish(3600).report
        seconds = time.monotonic() - started
        found = {
            "minutes": seconds / 60,
            "undisturbed minutes": undisturbed / 60,
            "versions": steps,
            "workers killed": kills,
            "drivers killed": drivers,
            "goodput": report["goodput"],
            "usage, second and last quarter": usage.flat(),
        }
        print(json.dumps(found, indent=1))
        assert report["digest"] == whole["digest"]
        killing = min(seconds, MINUTES * 60)
        assert kills >= killing / WORKER_EVERY / 3 and drivers >= int(killing / DRIVER_EVERY) - 1
        assert len(RunDirectory(run).epochs()) == drivers + 1
        for name, (before, after) in usage.flat().items():
            assert after <= 1.5 * before + 20, f"{name} grew from {before} to {after}"
    finally:
        nodes.close()


def _kill_and_resume(command: Command, driver: Driver, run: Path, address: tuple[str, str]) -> Driver:
    before = len(entries_of(run))
    driver.send(signal.SIGKILL)
    driver.finish()
    again = command.start("train", "--resume", run, *address, "--json")
    again.until_version(run, before + 1)
    return again


def test_drivers_killed_at_a_hundred_random_times(tmp_path: Path) -> None:
    random, total = Random(1), 0
    whole = drive(TINY.model_copy(update={"aggregator": SyncAggregator(shards=3), "steps": 30}), tmp_path / "whole")
    for number in range(100):
        aggregator = SyncAggregator(shards=3) if number % 2 else AsyncAggregator(staleness_bound=2, buffer=2)
        config = TINY.model_copy(update={"aggregator": aggregator, "steps": 30})
        path, kills = tmp_path / str(number), 0
        while True:
            child = os.fork()
            if child == 0:
                try:
                    drive(config, path, resume=path.exists())
                finally:
                    os._exit(0)
            time.sleep(random.uniform(0.0, 0.2))  # when it is killed, no synchronisation
            os.kill(child, signal.SIGKILL)
            kills += os.waitpid(child, 0)[1] != 0
            if path.exists() and len(entries_of(path)) == 30:
                break
        resumed = drive(config, path, resume=True)
        assert replayed(config, path).state.digest == resumed.digest
        total += kills
        if number % 2:
            assert resumed.digest == whole.digest, f"run {number} after {kills} kills"
    print(f"{total} drivers killed")
