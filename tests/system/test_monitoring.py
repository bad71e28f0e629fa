"""A real Prometheus, configured as shipped, scrapes real runs: every panel and every alert has its data."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.deploy.manifests import dashboard_module
from tests.system.conftest import Pictures, free_port
from tests.system.driving import Command, wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no Prometheus: apt-get install prometheus"),
]

DEPLOY = Path(__file__).parents[2] / "deploy"
ONLY_ON_GPUS = {"GPU utilisation", "Memory of GPUs"}
"""Panels that are empty on a machine without one."""

Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def dashboard() -> ModuleType:
    """The module that makes the dashboard."""
    return dashboard_module()


@pytest.fixture
def prometheus(tmp_path: Path, cluster: str, cluster_metrics: str) -> Iterator[Ask]:
    """A server with what is shipped, but for paths, its port and shorter intervals; gives its HTTP API."""
    folder, port = tmp_path / "prometheus", free_port()
    shutil.copytree(DEPLOY / "prometheus", folder)
    config = (folder / "prometheus.yml").read_text()
    config = config.replace("/tmp/ray/prom_metrics_service_discovery.json", str(folder / "ray.json"))
    config = re.sub(r"(scrape|evaluation|refresh)_interval: \d+s", r"\1_interval: 1s", config)
    (folder / "prometheus.yml").write_text(config.replace("127.0.0.1:9090", f"127.0.0.1:{port}"))
    (folder / "ray.json").write_text(json.dumps([{"targets": [cluster_metrics]}]))
    argv = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb"]
    with (tmp_path / "prometheus.log").open("w") as log:
        server = subprocess.Popen(["prometheus", *argv, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)

    def ask(what: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{port}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            assert error.code == 503, f"{parameters}: {error.read().decode()}"
        except (ConnectionError, urllib.error.URLError):
            pass
        return None  # it is not ready yet

    try:
        wait_for(lambda: ask("status/runtimeinfo"), "a Prometheus server")
        yield ask
    finally:
        server.kill()
        server.wait()


RELAXED = {
    "MetafleetNoCommit": {"> 20 *": "> 0 *", "> 60": "> 0"},
    "MetafleetWorkersMissing": {"<": "<="},
    "MetafleetTooFewWorkers": {"<": ">="},
    "MetafleetFailureRate": {"> 0.05": ">= 0", "> 2.5": ">= 0"},
    "MetafleetDuplicateMismatch": {"> 0": ">= 0"},
    "MetafleetNonFinite": {"> 0": ">= 0"},
    "MetafleetCheckpointOld": {"> 3600": "> 0"},
    "MetafleetStaleness": {"> 0.1": ">= 0"},
    "MetafleetObjectStoreFull": {"> 0.9": ">= 0"},
}
"""Limits of alerts, and those with which each finds a healthy run: where labels do not match it never finds any."""


def expression(query: str) -> str:
    """A panel's query for all runs and workers."""
    return query.replace("$__rate_interval", "20s").replace("$run", ".*").replace("$worker", ".*")


@pytest.mark.timeout(300)
def test_every_panel_and_every_alert_reads_what_runs_serve(
    prometheus: Ask, dashboard: ModuleType, pictures: Pictures, cluster: str, command: Command, tmp_path: Path
) -> None:
    script = tmp_path / "faults.json"
    script.write_text(json.dumps([{"point": "compute", "action": "sigkill", "shard": 40}]))
    often = ("--execution.metrics_discovery", tmp_path / "prometheus" / "targets", "--address", cluster)
    lasting = ("--steps", 1_000_000, "--evaluation.every", 20, "--workers", 1, "--execution.backoff", 0.1)
    first = command.start(
        *("train", *pictures.argv, "--run-dir", "pictures", *often, *lasting), METAFLEET_FAULTS=str(script)
    )
    tiny = ("--evaluation.val_episodes", 4, "--shard.episodes", 2, "--shard.chunk", 2)
    tiny = (*tiny, "--execution.cpus_per_worker", 0.5)
    command.start("train", "sinusoid-maml", "--run-dir", "waves", *often, *lasting, *tiny)

    def empty() -> list[str]:
        found = []
        for panel in (panel for panels in dashboard.ROWS.values() for panel in panels):
            for query in panel.queries:
                if not prometheus("query", query=expression(query.expression))["result"]:
                    found.append(f"{panel.title}: {expression(query.expression)}")
        return [text for text in found if text.partition(":")[0] not in ONLY_ON_GPUS]

    def rules() -> list[dict[str, Any]]:
        return prometheus("rules")["groups"][0]["rules"]

    def answered(query: str) -> bool:
        return bool(prometheus("query", query=query)["result"])

    wait_for(lambda: not empty(), "data for every panel: see prometheus.log", 150)
    assert len(rules()) == 10
    assert {rule["health"] for rule in rules()} == {"ok"}
    for rule in rules():
        if rule["name"] in RELAXED:
            relaxed = rule["query"]
            for limit, weaker in RELAXED[rule["name"]].items():
                assert limit in relaxed, rule
                relaxed = relaxed.replace(limit, weaker)
            wait_for(partial(answered, relaxed), f"an answer to {relaxed}", 60)
    # The killed worker is more than a twentieth of the first few attempts, and of later ones no more.
    wait_for(lambda: all(rule["state"] == "inactive" for rule in rules()), "alerts that are all inactive", 60)

    first.send(signal.SIGKILL)
    down = next(rule["query"] for rule in rules() if rule["name"] == "MetafleetDown")
    (silent,) = wait_for(lambda: prometheus("query", query=down)["result"], "the alert's expression")
    assert silent["metric"]["run"] == "pictures"


def test_the_exposition_is_what_promtool_accepts(undisturbed: Any) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=undisturbed.scraped, text=True, capture_output=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
