"""The metrics as a Prometheus server sees them: over real HTTP, through the reference parser."""

from __future__ import annotations

import json
import math
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import prometheus_client
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from cluster.discovery import announced
from cluster.errors import ConfigError, PortError
from cluster.messages import Contribution, ShardStatistics
from cluster.metrics import Metrics, RunInfo
from cluster.metrics_catalogue import CATALOGUE, LABELS, NODES, SECONDS_BUCKETS, document

INFO = RunInfo("first-try", "glyphs-maml", "maml", "sync", 7, "ab" * 32)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def contribution(worker: int = 0, episodes: int = 8, peak: int = 1000) -> Contribution:
    statistics = ShardStatistics(
        loss=0.5, metric=0.9, sample_seconds=0.25, adapt_seconds=2.0, idle_seconds=0.125, peak_bytes=peak
    )
    return Contribution(
        shard=3,
        base_version=2,
        attempt=0,
        worker=worker,
        gradient=np.zeros(10, dtype=np.float32),
        episodes=episodes,
        proposals={"memory": np.zeros((episodes, 3), dtype=np.float32)},
        statistics=statistics,
        fingerprint="cpu",
    )


@pytest.fixture(scope="module")
def metrics_and_address() -> Iterator[tuple[Metrics, str]]:
    """One served run with known events, shared because stopping a server takes half a second."""
    metrics = Metrics(INFO, clock=Clock())
    metrics.version(40, 100)
    with closing(metrics):
        host, port = metrics.serve("127.0.0.1", 0)
        yield metrics, f"{host}:{port}"


def scrape(address: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All samples at ``address``, by name and sorted labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"metafleet_{name}", labels)


def test_a_scrape_shows_what_happened(metrics_and_address: tuple[Metrics, str]) -> None:
    metrics, address = metrics_and_address
    metrics.contribution(contribution(worker=1), staleness=3, seconds=0.3, weight=0.5)
    metrics.contribution(contribution(worker=1, peak=2000), staleness=0, seconds=1.5, weight=1.0)
    metrics.commit(41, loss=0.7, metric=0.8, gradient_norm=2.5)
    metrics.validation([0.2, 0.6, 0.7, 0.75])
    metrics.in_flight(6)
    metrics.workers(3)
    metrics.failure("worker_lost")
    metrics.checkpoint(12345)
    metrics.published(400)
    seen = scrape(address)
    plain = {name: number for (name, labels), number in seen.items() if not labels}
    assert {name: plain[f"metafleet_{name}"] for name in (
        "episodes_total", "shards_total", "shard_weight_total", "commits_total", "version", "loss", "accuracy_ratio",
        "gradient_norm", "target_versions", "in_flight_shards", "workers_alive", "checkpoint_bytes",
        "published_bytes_total", "received_bytes_total", "staleness_versions_sum", "staleness_versions_count",
        "shard_latency_seconds_sum",
    )} == {
        "episodes_total": 16, "shards_total": 2, "shard_weight_total": 1.5, "commits_total": 1, "version": 41,
        "loss": 0.7, "accuracy_ratio": 0.8, "gradient_norm": 2.5, "target_versions": 100,
        "in_flight_shards": 6, "workers_alive": 3, "checkpoint_bytes": 12345, "published_bytes_total": 400,
        "received_bytes_total": 2 * (40 + 96), "staleness_versions_sum": 3, "staleness_versions_count": 2,
        "shard_latency_seconds_sum": 1.8,
    }  # fmt: skip
    worker = (("worker", "1"),)
    assert seen["metafleet_worker_shards_total", worker] == 2
    assert seen["metafleet_worker_adapt_seconds_total", worker] == 4.0
    assert seen["metafleet_worker_sample_seconds_total", worker] == 0.5
    assert seen["metafleet_worker_idle_seconds_total", worker] == 0.25
    assert seen["metafleet_worker_resident_memory_max_bytes", worker] == 2000
    assert seen["metafleet_staleness_versions_bucket", (("le", "2.0"),)] == 1
    assert seen["metafleet_staleness_versions_bucket", (("le", "4.0"),)] == 2
    assert seen["metafleet_shard_latency_seconds_bucket", (("le", "0.2"),)] == 0
    assert seen["metafleet_shard_latency_seconds_bucket", (("le", "0.5"),)] == 1
    assert seen["metafleet_failures_total", (("kind", "worker_lost"),)] == 1
    steps = {
        dict(labels)["step"]: v for (name, labels), v in seen.items() if name == "metafleet_validation_accuracy_ratio"
    }
    assert steps == {"0": 0.2, "1": 0.6, "2": 0.7, "last": 0.75}
    (info,) = [dict(labels) for name, labels in seen if name == "metafleet_run_info"]
    assert info == {
        "run": "first-try", "recipe": "glyphs-maml", "learner": "maml", "aggregator": "sync",
        "seed": "7", "config_digest": "ab" * 32,
    }  # fmt: skip


def test_names_follow_the_conventions_and_nothing_is_in_the_global_registry() -> None:
    metrics = Metrics(INFO)
    metrics.contribution(contribution(), staleness=0, seconds=1.0, weight=1.0)
    for family in metrics.registry.collect():
        if family.name.startswith("process_"):
            continue
        assert family.name.startswith("metafleet_")
        assert family.documentation.endswith(".")
        if family.type == "counter":
            assert all(s.name.endswith(("_total", "_created")) for s in family.samples)
    assert not [f.name for f in prometheus_client.REGISTRY.collect() if f.name.startswith("metafleet_")]
    Metrics(INFO)  # a second run in one process does not collide with the first


def test_what_is_not_applied_counts_for_the_worker_but_not_for_the_run() -> None:
    metrics = Metrics(INFO)
    metrics.contribution(contribution(), staleness=9, seconds=1.0, weight=0.0)
    assert value(metrics, "episodes_total") == value(metrics, "shards_total") == 0
    assert value(metrics, "staleness_versions_count") == 0
    assert value(metrics, "worker_shards_total", worker="0") == 1
    assert value(metrics, "received_bytes_total") == 136
    assert value(metrics, "shard_latency_seconds_count") == 1


def test_a_scrape_is_answered_as_text_also_where_openmetrics_is_preferred(
    metrics_and_address: tuple[Metrics, str],
) -> None:
    accept = {"Accept": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"}
    request = urllib.request.Request(f"http://{metrics_and_address[1]}/metrics", headers=accept)
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert b"# EOF" not in reply.read()


def test_labels_are_bounded() -> None:
    metrics = Metrics(INFO)
    for slot in (0, 95, 96, 97, 9999):
        metrics.contribution(contribution(worker=slot), staleness=0, seconds=0.1, weight=1.0)
    seen = {
        sample.labels["worker"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "metafleet_worker_shards_total"
    }
    assert seen == {"0": 1, "95": 1, "96+": 3}
    kinds = ("worker_lost", "shard_error", "nonfinite", "stale", "duplicate_mismatch")
    assert [value(metrics, "failures_total", kind=kind) for kind in kinds] == [0, 0, 0, 0, 0]
    with pytest.raises(KeyError):
        metrics.failure("another")  # type: ignore[arg-type]


def test_latency_buckets_ascend_from_a_millisecond_to_minutes() -> None:
    assert SECONDS_BUCKETS[0] == pytest.approx(0.001)
    assert SECONDS_BUCKETS[-1] == pytest.approx(500)
    assert all(1.99 < high / low < 2.51 for low, high in pairwise(SECONDS_BUCKETS))


def test_checkpoint_age_counts_from_the_last_checkpoint_or_the_start() -> None:
    clock = Clock()
    metrics = Metrics(INFO, clock=clock)
    clock.now += 30
    assert value(metrics, "checkpoint_age_seconds") == 30
    metrics.checkpoint(1)
    clock.now += 4.5
    assert value(metrics, "checkpoint_age_seconds") == 4.5


def test_what_does_not_exist_yet_is_nan_and_the_version_is_the_resumed_one() -> None:
    metrics = Metrics(INFO)
    metrics.version(40, 100)
    assert value(metrics, "version") == 40
    for name in ("loss", "accuracy_ratio", "gradient_norm", "checkpoint_bytes"):
        assert math.isnan(value(metrics, name))  # type: ignore[arg-type]


def test_regression_reports_mse_and_no_accuracy() -> None:
    metrics = Metrics(INFO, regression=True)
    metrics.commit(1, loss=3.0, metric=3.5, gradient_norm=1.0)
    metrics.validation([5.0, 2.5])
    assert value(metrics, "mse") == 3.5
    assert value(metrics, "validation_mse", step="last") == 2.5
    assert value(metrics, "accuracy_ratio") is None


def test_a_taken_port_is_one_line_with_the_port_and_what_to_change(metrics_and_address: tuple[Metrics, str]) -> None:
    port = int(metrics_and_address[1].split(":")[1])
    with pytest.raises(PortError) as caught:
        Metrics(INFO).serve("127.0.0.1", port)
    message = str(caught.value)
    assert f"port {port} on 127.0.0.1 is taken" in message
    assert "--execution.metrics_port" in message
    assert "\n" not in message


def test_a_foreign_host_says_which_setting_to_change() -> None:
    with pytest.raises(PortError, match="metrics_host"):
        Metrics(INFO).serve("203.0.113.1", 0)  # a documentation address, never one of this machine


def test_only_the_given_host_is_bound(metrics_and_address: tuple[Metrics, str]) -> None:
    host, port = metrics_and_address[1].split(":")
    assert host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(port)), timeout=10)


def test_close_frees_the_port_and_ends_the_thread() -> None:
    before = threading.active_count()
    metrics = Metrics(INFO)
    host, port = metrics.serve("127.0.0.1", 0)
    assert metrics._server is not None
    server, thread = metrics._server
    metrics.close()
    metrics.close()
    assert not thread.is_alive()
    assert server.socket.fileno() == -1
    assert threading.active_count() == before
    with socket.create_server((host, port)):
        pass


def test_phases_share_the_time_between_them() -> None:
    clock = Clock()
    metrics = Metrics(INFO, clock=clock)
    with metrics.phase("commit"):
        clock.now += 2.0
        with metrics.phase("transfer"):
            clock.now += 0.5
        clock.now += 1.0
    clock.now += 100.0
    with metrics.phase("wait"):
        clock.now += 4.0
        metrics.moved(1.5)
    found = {
        phase: value(metrics, "loop_seconds_total", phase=phase) for phase in ("commit", "transfer", "wait", "reduce")
    }
    assert found == {"commit": 3.0, "transfer": 2.0, "wait": 2.5, "reduce": 0.0}


def test_a_run_is_unfinished_from_its_start_to_its_last_version() -> None:
    metrics = Metrics(INFO)
    assert not metrics.unfinished
    metrics.version(1, 2)
    assert metrics.unfinished
    metrics.commit(2, 0.5, 0.9, 1.0)
    assert not metrics.unfinished


def test_time_between_commits() -> None:
    clock = Clock()
    metrics = Metrics(INFO, clock=clock)
    for seconds in (3.0, 0.5):
        clock.now += seconds
        metrics.commit(1, loss=0.5, metric=0.5, gradient_norm=1.0)
    clock.now += 7.0
    assert value(metrics, "commit_interval_seconds_sum") == 3.5
    assert value(metrics, "commit_age_seconds") == 7.0


def test_workers_wanted_is_what_was_asked_for_or_the_most_there_were() -> None:
    metrics = Metrics(INFO)
    for alive in (2, 4, 3):
        metrics.workers(alive)
    assert value(metrics, "workers_wanted") == 4 and value(metrics, "workers_alive") == 3
    metrics.workers(3, wanted=8)
    assert value(metrics, "workers_wanted") == 8
    metrics.workers(3, needed=4)
    assert value(metrics, "workers_needed") == 4


def test_workers_by_node_and_nodes_are_bounded() -> None:
    metrics = Metrics(INFO)
    metrics.workers(3, None, {"a/1": 2, "b/2": 1})
    metrics.workers(2, None, {"a/1": 2})
    assert [value(metrics, "node_workers", node=node) for node in ("a/1", "b/2")] == [2, 0]
    metrics.workers(300, None, {f"n/{number:03}": 1 for number in range(300)})
    families = {family.name: family for family in metrics.registry.collect()}
    found = {sample.labels["node"]: sample.value for sample in families["metafleet_node_workers"].samples}
    assert len(found) == NODES + 1 and found["other"] == 300 - (NODES - 2) and found["a/1"] == 0


def test_a_gpu_is_told_of_where_there_is_one() -> None:
    metrics, with_gpu = Metrics(INFO), replace(contribution().statistics, gpu_peak_bytes=5, gpu_utilisation=0.5)
    metrics.contribution(contribution(worker=0), 0, 1.0, 1.0)
    metrics.contribution(replace(contribution(worker=1), statistics=with_gpu), 0, 1.0, 1.0)
    assert value(metrics, "worker_gpu_memory_max_bytes", worker="1") == 5
    assert value(metrics, "worker_gpu_utilisation_ratio", worker="1") == 0.5
    assert value(metrics, "worker_gpu_memory_max_bytes", worker="0") is None


def test_the_last_state_is_kept_as_an_openmetrics_file(tmp_path: Path) -> None:
    metrics = Metrics(INFO)
    metrics.contribution(contribution(), 0, 1.0, 1.0)
    metrics.save(tmp_path / "metrics.openmetrics")
    families = openmetrics_families((tmp_path / "metrics.openmetrics").read_text())
    assert {f.name: f.samples[0].value for f in families if f.samples}["metafleet_episodes"] == 8


def test_the_document_is_that_of_the_catalogue_and_the_catalogue_what_is_served() -> None:
    assert Path("docs/metrics.md").read_text() == document(), (
        "run python -m cluster.metrics_catalogue > docs/metrics.md"
    )
    served = {
        family.name
        for regression in (False, True)
        for family in Metrics(INFO, regression=regression).registry.collect()
    }
    assert {f"metafleet_{metric.name}" for metric in CATALOGUE} == {n for n in served if n.startswith("metafleet_")}
    assert all(label in LABELS for metric in CATALOGUE if metric.kind != "info" for label in metric.labels)


@pytest.mark.parametrize(
    ("full", "named"), [("gpu7.lab.example", "gpu7.lab.example"), ("localhost.localdomain", "gpu7"), ("gpu7", "gpu7")]
)
def test_a_run_on_all_addresses_is_announced_by_a_name_that_others_know(
    full: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: full)
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu7")
    with announced(tmp_path / "sd", "0.0.0.0", 9401, tmp_path / "run") as path:
        assert json.loads(path.read_text())[0]["targets"] == [f"{named}:9401"]


def test_a_run_is_announced_while_it_lives(tmp_path: Path) -> None:
    run = Path("/runs/first-try")
    with announced(tmp_path / "sd", "127.0.0.1", 9400, run) as path:
        assert json.loads(path.read_text()) == [{"targets": ["127.0.0.1:9400"], "labels": {"run": "first-try"}}]
        with announced(tmp_path / "sd", "0.0.0.0", 9401, Path("/others/first-try")) as other:  # of the same name
            assert other != path and json.loads(other.read_text())[0]["targets"][0].endswith(":9401")
        assert list((tmp_path / "sd").iterdir()) == [path]
        with announced(tmp_path / "sd", "127.0.0.1", 9402, run) as resumed:
            assert resumed == path
    assert not path.exists()
    for failed in (False, True):
        with (
            suppress(ZeroDivisionError),
            announced(tmp_path / "sd", "h", 1, run, lambda failed=failed: failed),
        ):
            raise ZeroDivisionError
        assert bool(list((tmp_path / "sd").iterdir())) == failed
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="give a folder that this user may write to"),
        announced(tmp_path / "file", "h", 1, run),
    ):
        pass
