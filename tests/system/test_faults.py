"""Faults on a real Ray cluster of three nodes on this machine: each run ends with the digest of the undisturbed one.

The head has no CPUs; two nodes have two each. Bounds on what a fault may cost are asserted as goodput: shards computed
for nothing, and how long a lost worker's place was empty.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.driving import Command, Driver, Finished, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

STEPS = 500
"""Versions of a run: some ten seconds of four workers' work."""

RUN = (
    *("train", "sinusoid-maml", "--run-dir", "run", "--json", "--steps", STEPS, "--model.hidden", "40,40"),
    *("--aggregator.shards", 8, "--shard.episodes", 40, "--shard.chunk", 40, "--learner.inner_lr", 0.001),
    *("--evaluation.every", 0, "--evaluation.episodes", 20, "--execution.checkpoint_every", 50),
    *("--execution.log_every", 0.5),
)
RECOVERY = 45.0
"""Seconds within which a lost worker's place has a worker again: detection by Ray, a process, imports, data."""
LOST = 16
"""Shards that one fault may cost: what four workers have in flight, twice."""

SMALL_STORE = 100_000_000


class Nodes:
    """A cluster of three nodes, started and ended by its own handles."""

    def __init__(self, **system: Any) -> None:
        from ray.cluster_utils import Cluster

        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(self.folder), "_system_config": system}
        self.cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": SMALL_STORE})
        self.workers = [self.add(), self.add()]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, **environment: str) -> Any:
        """One more node; its processes have these environment variables too."""
        return self.cluster.add_node(num_cpus=2, object_store_memory=SMALL_STORE, env_vars=environment)

    def drain(self, node: Any, seconds: float) -> None:
        """Tell Ray that a node is preempted and goes in so many seconds."""
        from ray._raylet import GcsClient

        preempted = 2
        ends = int((time.time() + seconds) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(node.node_id, preempted, "preempted", ends)
        assert accepted, why

    def actors(self) -> list[int]:
        """Process ids of the workers on this cluster's nodes."""
        raylets = {
            process.process.pid
            for node in self.cluster.list_all_nodes()
            for process in node.all_processes.get("raylet", [])
        }
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    name = (folder / "cmdline").read_bytes()
                except OSError:
                    continue
                if parent in raylets and name.startswith(b"ray::RayWorker"):
                    found.append(int(folder.name))
        return found

    def close(self) -> None:
        self.cluster.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest with one worker, on a cluster of its own, to which nothing happens."""
    with Command(tmp_path_factory.mktemp("undisturbed"), environment) as command:
        return str(command.run(*RUN, "--workers", 1).report["digest"])


def scripted(command: Command, *faults: dict[str, Any]) -> dict[str, str]:
    """The environment of a driver, and of its workers, whose faults are scripted."""
    path = command.folder / "faults.json"
    path.write_text(json.dumps(faults))
    return {"METAFLEET_FAULTS": str(path)}


def fired(command: Command) -> int:
    """How many scripted faults have fired."""
    return len(list((command.folder / "faults.json.fired").iterdir()))


def training(command: Command, nodes: Nodes, *more: object, **environment: str) -> Driver:
    """A driver with four workers, a fifth of the way."""
    driver = command.start(*RUN, "--address", nodes.address, *more, **environment)
    driver.until_version(command.folder / "run", STEPS // 5)
    return driver


def must_be(finished: Finished, digest: str, lost: int = LOST, recovery: float = RECOVERY) -> dict[str, Any]:
    """The undisturbed digest, within the bounds."""
    report = finished.report
    assert report["digest"] == digest
    goodput = report["goodput"]
    # Copies are made on purpose, by workers that would be idle.
    assert sum(count for cause, count in goodput["lost_shards"].items() if cause != "copy") <= lost, goodput
    assert (goodput["longest_recovery_seconds"] or 0.0) <= recovery, goodput
    return report


def test_workers_that_fail_at_shards_in_every_way(command: Command, nodes: Nodes, undisturbed: str) -> None:
    before, after = ("sigkill", "exit", "raise"), ("garbage", "flip_after", "nonfinite")
    faults = [
        {"point": "compute" if action in before else "computed", "action": action, "version": at, "shard": 8 * at + 3}
        for at, action in zip(range(50, STEPS, 50), (*before, *after), strict=False)
    ]
    finished = command.run(*RUN, "--address", nodes.address, **scripted(command, *faults))
    assert fired(command) == len(faults) == 6
    failures = must_be(finished, undisturbed)["failures"]
    assert (failures["worker_lost"], failures["shard_error"], failures["nonfinite"]) == (2, 3, 1)


def test_a_worker_that_stands_still(command: Command, nodes: Nodes, undisturbed: str) -> None:
    driver = training(command, nodes, "--execution.deadline", 5, "--execution.deadline_floor", 2)
    stopped = nodes.actors()[0]
    os.kill(stopped, signal.SIGSTOP)
    report = must_be(driver.finish(), undisturbed)
    assert report["failures"]["deadline"] == 1
    wait_for(lambda: not Path(f"/proc/{stopped}").exists(), "the end of the worker that stood still")


def test_a_node_that_is_gone_at_once(command: Command, nodes: Nodes, undisturbed: str) -> None:
    driver = training(command, nodes)
    nodes.cluster.remove_node(nodes.workers[0], allow_graceful=False)
    report = must_be(driver.finish(), undisturbed)
    # The failures count starts on the dead node besides, if Ray has not noticed yet that it is gone.
    lost = re.findall(r"worker (\d+) lost \(", driver.err)
    assert len(lost) == len(set(lost)) == 2 and report["workers"] == 2


def test_a_node_that_is_drained(command: Command, nodes: Nodes, undisturbed: str) -> None:
    driver = training(command, nodes)
    nodes.drain(nodes.workers[0], seconds=20)
    report = must_be(driver.finish(), undisturbed)
    assert "leaves" in driver.err and "which is being drained" in driver.err
    assert "worker_lost" not in report["failures"]


def test_a_node_that_joins(command: Command, nodes: Nodes, undisturbed: str) -> None:
    driver = training(command, nodes)
    nodes.add()
    report = must_be(driver.finish(), undisturbed)
    assert report["workers"] == 6
    kept = (command.folder / "run" / "metrics.openmetrics").read_text()
    assert len(re.findall(r'^metafleet_node_workers\{node="[^"]+"\} [1-9]', kept, re.MULTILINE)) == 3


def test_a_node_of_other_hardware_joins(command: Command, nodes: Nodes, undisturbed: str) -> None:
    nodes.cluster.remove_node(nodes.workers[0])
    driver = training(command, nodes)
    nodes.add(ATEN_CPU_CAPABILITY="default")  # what torch would choose on a CPU without vector instructions
    report = must_be(driver.finish(), undisturbed)
    assert report["failures"]["refused"] >= 1 and report["workers"] == 2
    assert "computes on other hardware or software than the run" in driver.err
    assert "it is not used, and the run goes on without it" in driver.err


def test_workers_that_run_out_of_memory_are_reported_as_such(command: Command) -> None:
    nodes = Nodes(memory_usage_threshold=0.01, memory_monitor_refresh_ms=100)
    try:
        finished = command.run(*RUN, "--address", nodes.address)
        assert finished.code == 2 and "its node ran out of memory: use fewer workers a node" in finished.err, (
            finished.err
        )
    finally:
        nodes.close()


def test_calls_between_processes_that_fail_and_are_slow(command: Command, undisturbed: str) -> None:
    # Ray's own switches: requests and replies of these calls are lost with these chances in percent, or are late.
    chances = {"num_failures": 20, "req_failure_prob": 10, "resp_failure_prob": 10, "in_flight_failure_prob": 10}
    system = {
        "testing_rpc_failure": json.dumps({"CoreWorkerService.grpc_client.PushTask": chances}),
        "testing_asio_delay_us": "CoreWorkerService.grpc_server.PushTask=0:20000",
    }
    nodes = Nodes(**system)
    try:
        must_be(command.run(*RUN, "--address", nodes.address), undisturbed, lost=100)
    finally:
        nodes.close()


def test_a_worker_that_lies(command: Command, nodes: Nodes, undisturbed: str) -> None:
    lie = {"point": "computed", "action": "flip_before", "version": STEPS // 2, "times": 1}
    finished = command.run(*RUN, "--address", nodes.address, "--execution.verify", 1, **scripted(command, lie))
    assert fired(command) == 1
    report = must_be(finished, undisturbed, lost=STEPS * 8 + LOST)
    assert report["failures"]["duplicate_mismatch"] == 2, "one shard in dispute, one worker that gives other bits"
    assert report["goodput"]["lost_shards"]["verification"] >= STEPS * 8


def test_a_poison_shard_ends_the_run_and_can_be_computed_alone(command: Command, nodes: Nodes) -> None:
    number = STEPS // 5 * 8 + 1
    environment = scripted(command, {"point": "compute", "action": "raise", "shard": number, "times": 9})
    finished = command.run(*RUN, "--address", nodes.address, **environment)
    assert finished.code == 2 and fired(command) >= 3  # a copy may have failed too
    message = f"shard {number} (episodes {number * 40}–{number * 40 + 39}) failed 3 times (worker "
    assert message in finished.err and "FaultError: scripted at compute" in finished.err
    line = f"metafleet replay run --shard {number} --until {STEPS // 5}"
    assert f"reproduce it alone by `{line}`" in finished.err and "metaworker/shard_worker.py" in finished.err, (
        finished.err
    )
    alone = command.run(*line.split()[1:], "--json").report
    assert (alone["shard"], alone["version"], alone["finite"]) == (number, STEPS // 5, True)
    assert alone["logged_digest"] is None
