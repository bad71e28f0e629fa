"""A real autoscaler of Ray's, whose nodes are processes here: runs make the cluster grow, and let it shrink."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import Pictures, Undisturbed, free_port
from tests.system.driving import Command, Finished, wait_for

pytestmark = pytest.mark.ray

MOST_NODES = 2
"""Beside the head, which has no CPU; each has room for one worker."""

FAKE_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
"""It starts nodes as processes."""


class Autoscaled:
    """A cluster of a head alone at first."""

    def __init__(self, address: str) -> None:
        self.address = address

    def _status(self) -> Any:
        from ray.autoscaler.v2.sdk import get_cluster_status

        return get_cluster_status(self.address)

    def nodes(self) -> int:
        """How many there are beside the head."""
        status = self._status()
        return len(status.active_nodes) + len(status.idle_nodes) - 1

    def demands(self) -> int:
        """How many actors wait for nodes, and standing requests for nodes."""
        demands = self._status().resource_demands
        waiting = [entry.count for demand in demands.ray_task_actor_demand for entry in demand.bundles_by_count]
        return sum(waiting) + len(demands.placement_group_demand) + len(demands.cluster_constraint_demand)


def configuration(address: str) -> dict[str, Any]:
    """What Ray's cluster launcher would be given."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

    small = {"CPU": 1, "object_store_memory": 100_000_000}
    commands = ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray")
    return {
        **{f"{name}_commands": [] for name in commands},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
        "upscaling_speed": 1,
        "cluster_name": "growing",
        "max_workers": MOST_NODES,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": FAKE_PROVIDER,
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": {"resources": small, "node_config": {}, "min_workers": 0, "max_workers": MOST_NODES},
        },
    }


@pytest.fixture(scope="module")
def autoscaled(environment: dict[str, str]) -> Iterator[Autoscaled]:
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's socket paths must be short
    port = free_port()
    address = f"127.0.0.1:{port}"
    (folder / "autoscaling.json").write_text(json.dumps(configuration(address)))
    flags = {
        "port": port,
        "num-cpus": 0,
        "object-store-memory": 100_000_000,
        "temp-dir": folder,
        "autoscaling-config": folder / "autoscaling.json",
        "ray-client-server-port": free_port(),
        "min-worker-port": 0,
        "max-worker-port": 0,
        "include-dashboard": "false",
    }
    # What the launcher and KubeRay tell a head, but for the fake provider's own.
    told = {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
    }
    argv = ["start", "--head", "--block", "--disable-usage-stats", *(f"--{k}={v}" for k, v in flags.items())]
    with Command(folder, environment) as command:
        head = command.start(*argv, script=Path(sys.executable).with_name("ray"), **told)
        head.until(lambda: "Ray runtime started" in head.out + head.err, "a cluster")
        yield Autoscaled(address)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


def shards_by_worker(run: Path) -> dict[str, int]:
    """How many contributions came from each worker, as a run's last metrics tell."""
    text = (run / "metrics.openmetrics").read_text()
    found = re.findall(r'^metafleet_worker_shards_total{worker="(\d+)"} (\d+)', text, re.MULTILINE)
    return {worker: int(count) for worker, count in found}


def test_a_run_makes_nodes_come_and_lets_them_go(
    autoscaled: Autoscaled, undisturbed: Undisturbed, pictures: Pictures, command: Command
) -> None:
    assert autoscaled.nodes() == 0
    two = ("--workers", 2, "--execution.min_workers", 2, "--execution.cpus_per_worker", 1)
    argv = (*two, "--run-dir", "run", "--address", autoscaled.address, "--json")
    finished = command.run("train", *pictures.argv, *argv)
    assert "there is room for 0 of 2 workers now: the autoscaler is to add nodes for the rest" in finished.err
    assert finished.report["digest"] == undisturbed.report["digest"]
    shards = shards_by_worker(command.folder / "run")
    assert len(shards) == 2 and all(shards.values()), shards
    wait_for(lambda: autoscaled.nodes() == 0, "the end of nodes that nobody uses", 60)
    assert autoscaled.demands() == 0


def test_a_killed_driver_asks_for_nothing_any_more(autoscaled: Autoscaled, command: Command) -> None:
    more = ("--workers", MOST_NODES + 2, "--execution.min_workers", MOST_NODES, "--steps", 1_000_000)
    driver = command.start("train", "sinusoid-maml", *more, "--run-dir", "run", "--address", autoscaled.address)
    driver.until_version(command.folder / "run", 1)
    wait_for(lambda: autoscaled.demands() == 2, "demands for the workers that no node has come for")
    driver.send(signal.SIGKILL)
    wait_for(lambda: autoscaled.demands() == 0, "the end of what it asked for", 60)
    wait_for(lambda: autoscaled.nodes() == 0, "the end of nodes that nobody uses", 60)


def test_a_worker_for_which_no_node_comes(autoscaled: Autoscaled, here: Callable[..., Finished]) -> None:
    argv = ("--execution.cpus_per_worker", 2, "--execution.start_timeout", 2, "--address", autoscaled.address)
    finished = here("train", "sinusoid-maml", *argv, "--run-dir", "run")
    assert (finished.code, finished.out) == (2, "")
    assert "there is room for 0 of 1 workers now" in finished.err
    assert "error: no worker started within execution.start_timeout = 2 s: look at `ray status`" in finished.err
