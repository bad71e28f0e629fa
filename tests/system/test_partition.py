"""A host that the network cuts off, and its return: the run goes on throughout and gives the same digest."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.driving import SCRIPT, Command, Driver, entries_of, wait_for
from tests.system.namespaces import Hosts, NoNamespacesError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PORT = 6379
VERSIONS = 800
"""More than are committed while a host is cut off, found dead, healed, joined again and given a worker."""

MEANWHILE = 50
"""Versions to be committed while it is cut off."""

TRAIN = (
    *("train", "sinusoid-maml", "--steps", VERSIONS, "--aggregator.shards", 12, "--execution.cpus_per_worker", 1),
    *("--evaluation.every", 0, "--evaluation.episodes", 20, "--execution.log_every", 0.5, "--json"),
)

HEALTH = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""Ray finds a host dead that has not answered for about four seconds."""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Three hosts; the first one is the head's."""
    made = Hosts(3)
    try:
        made.__enter__()
    except NoNamespacesError as error:
        pytest.skip(f"no network namespaces can be made here: {error}")
    try:
        yield made
    finally:
        made.__exit__(None, None, None)


@pytest.fixture
def sessions() -> Iterator[Path]:
    """Where Ray's nodes have their files: its socket paths must be short."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Nodes:
    """Ray's nodes on hosts, each of one CPU."""

    def __init__(self, hosts: Hosts, command: Command, sessions: Path) -> None:
        self._hosts = hosts
        self._command = command
        self._sessions = sessions
        self._started: list[Driver] = []

    def run(self, host: int, script: Path, *argv: object, **environment: str) -> Driver:
        """Start a process on a host."""
        first, *words = *self._hosts.inside(host), script
        return self._command.start(*words, *argv, script=Path(first), RAY_AUTH_MODE="disabled", **environment)

    def start(self, host: int) -> Driver:
        """Start a node; returns when it has come up."""
        role = (
            ("--head", f"--port={PORT}", "--include-dashboard=false")
            if not self._started
            else (f"--address={self.address}",)
        )
        flags = {
            "node-ip-address": self._hosts.address(host),
            "num-cpus": 1,
            "num-gpus": 0,
            "object-store-memory": 100_000_000,
            "temp-dir": self._sessions / str(len(self._started)),
        }
        argv = ("start", "--block", "--disable-usage-stats", *role, *(f"--{name}={it}" for name, it in flags.items()))
        node = self.run(host, Path(sys.executable).with_name("ray"), *argv, **HEALTH)
        self._started.append(node)
        node.until(lambda: "Ray runtime started" in node.out + node.err, f"a node on host {host}")
        return node

    @property
    def address(self) -> str:
        """Of the cluster."""
        return f"{self._hosts.address(0)}:{PORT}"

    def end(self) -> None:
        """End those that live, the head last, and wait until nothing of them is left."""
        for node in reversed(self._started):
            if node.alive:
                node.send(signal.SIGTERM)
            node.must_leave_nothing()


def test_a_host_is_cut_off_and_comes_back(hosts: Hosts, sessions: Path, command: Command) -> None:
    # On the machine's own network, one worker, at the same time.
    undisturbed = command.start(*TRAIN, "--workers", 1, "--address", "local", "--run-dir", "undisturbed")
    nodes, run = Nodes(hosts, command, sessions), command.folder / "run"
    _, _, lost = (nodes.start(host) for host in range(3))
    driver = nodes.run(0, SCRIPT, *TRAIN, "--workers", 3, "--address", nodes.address, "--run-dir", "run")
    driver.until(lambda: " 3 workers" in driver.err, "a worker on every host")
    cut = driver.until_version(run, 1)

    hosts.cut(2)
    driver.until(lambda: re.search(r"worker \d lost \(.*died.*\); replacing it", driver.err), "a dead host")
    driver.until_version(run, max(cut, len(entries_of(run))) + MEANWHILE)
    assert lost.alive, "it was cut off, not ended"
    assert driver.alive and len(entries_of(run)) < VERSIONS

    hosts.heal(2)
    # Ray's old node hears that it was found dead, and ends itself.
    lost.must_leave_nothing()
    before = len(driver.err)
    nodes.start(2)
    driver.until(lambda: " 3 workers" in driver.err[before:], "a worker on the host that came back")
    assert cut < len(entries_of(run)) < VERSIONS

    report = driver.finish().report
    assert (report["version"], report["workers"]) == (VERSIONS, 3)
    assert report["failures"] == {"worker_lost": 1}
    assert driver.err.count("replacing it") == 1
    calm = undisturbed.finish().report
    assert (calm["workers"], calm["failures"]) == (1, {})
    assert report["digest"] == calm["digest"]
    assert report["evaluation"] == calm["evaluation"]
    assert [entry.digest for entry in entries_of(run)] == [
        entry.digest for entry in entries_of(command.folder / "undisturbed")
    ]

    driver.must_leave_nothing()
    undisturbed.must_leave_nothing()
    nodes.end()
    wait_for(lambda: not hosts.processes(), "the end of all processes on the hosts", 30)
