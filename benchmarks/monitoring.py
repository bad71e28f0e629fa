"""What being watched costs: one scrape, by how many workers have been heard of; and training with a scrape a second.

A scrape is a request such as Prometheus makes, from its start to the last byte of the answer. For the second, segments
of the real trainer on all cores alternate; in every other one a process of its own scrapes the run once a second.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.synchronize import Event

import numpy as np

from benchmarks.fleet import fleet
from benchmarks.report import Cell, Floor, Result, Sheet
from benchmarks.rounds import Spread, interleave, ratios, seconds
from benchmarks.workload import calibrated_shard, config
from cluster.messages import Contribution, ShardStatistics
from cluster.metrics import Metrics, RunInfo
from cluster.metrics_catalogue import NODES, SLOTS
from cluster.ray_runtime import ray_cluster, usable_cpus

WORKERS = (1, 16, 64, max(SLOTS, NODES) + 1)
"""Workers that have sent something, each on a node of its own; there are no series for more than the last."""
STEPS = 20
"""Adaptation steps of a validation."""
ACCEPT = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
"""What a Prometheus server asks for."""
LIMIT_MS = 5.0
INTERVAL = 1.0
"""Seconds between scrapes."""
SHARDS, VERSIONS, ROUNDS = 8, 4, 7
"""Shards a worker and version; versions a segment; segments of each kind."""
FLOOR = 0.98


def measure(quick: bool) -> Result:
    """Scrapes first, then training."""
    scrapes, floors = _scrapes(10 if quick else 100)
    training, floor = _training(2 if quick else ROUNDS)
    return Result([scrapes, training], [*floors, floor])


def _scrapes(rounds: int) -> tuple[Sheet, list[Floor]]:
    """Of runs with so many workers."""
    rows: list[dict[str, Cell]] = []
    floors = []
    for workers in WORKERS:
        metrics = _of_a_run(workers)
        with closing(metrics):
            url = "http://{}:{}/metrics".format(*metrics.serve("127.0.0.1", 0))
            found = Spread.of([1e3 * seconds(partial(scrape, url)) for _ in range(rounds)])
            rows.append({"workers": workers, "ms": found, "KiB": len(scrape(url)) / 1024})
        floors.append(Floor(f"a scrape, {workers} workers: ms", found.median, LIMIT_MS, False))
    return Sheet("One scrape", rows, "median (least–most)"), floors


def _training(rounds: int) -> tuple[Sheet, Floor]:
    """With a scrape a second and without."""
    workers, episodes = usable_cpus(), calibrated_shard()
    with ray_cluster("local"), fleet(config(episodes, shards=SHARDS * workers), workers) as ray:

        def speed() -> float:
            segment = ray.run(VERSIONS)
            return segment.episodes / segment.seconds

        def watched_speed() -> float:
            with _scraped_each_second(url):
                return speed()

        with closing(ray.metrics):
            url = "http://{}:{}/metrics".format(*ray.metrics.serve("127.0.0.1", 0))
            ray.run(1)  # warm up
            found = interleave(rounds, {"not scraped": speed, "a scrape a second": watched_speed})
    ratio = ratios(found["a scrape a second"], found["not scraped"])
    row: dict[str, Cell] = {"workers": workers}
    row |= {name: Spread.of(speeds) for name, speeds in found.items()} | {"ratio": ratio}
    note = f"tasks/s, {SHARDS} shards of {episodes} episodes a worker and version, {VERSIONS} versions a segment"
    floor = Floor("training with a scrape a second / without", ratio.median, FLOOR)
    return Sheet("Training that is watched", [row], note), floor


def _of_a_run(workers: int) -> Metrics:
    """The metrics of a run that has heard of so many workers."""
    metrics = Metrics(RunInfo("run", "benchmark", "maml", "sync", 0, "0" * 64))
    spent = ShardStatistics(
        loss=0.5, metric=0.9, sample_seconds=0.01, adapt_seconds=0.123, idle_seconds=0.01, peak_bytes=123_456_789
    )
    for worker in range(workers):
        metrics.contribution(
            Contribution(
                shard=worker,
                base_version=0,
                attempt=0,
                worker=worker,
                gradient=np.zeros(1, dtype=np.float32),
                episodes=8,
                proposals={},
                statistics=spent,
                fingerprint="cpu",
            ),
            staleness=0,
            seconds=0.15,
            weight=1.0,
        )
    metrics.workers(workers, workers, {f"node-{worker}": 1 for worker in range(workers)})
    metrics.validation([0.5] * (STEPS + 1))
    return metrics


def scrape(url: str) -> bytes:
    """What an endpoint answers."""
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": ACCEPT}), timeout=10) as reply:
        text: bytes = reply.read()
    return text


@contextmanager
def _scraped_each_second(url: str) -> Iterator[None]:
    """Something scrapes ``url`` during the block."""
    context = get_context("spawn")
    started, stop = context.Event(), context.Event()
    process = context.Process(target=_scrape_until, args=(url, started, stop), daemon=True)
    process.start()
    started.wait()
    try:
        yield
    finally:
        stop.set()
        process.join()


def _scrape_until(url: str, started: Event, stop: Event) -> None:
    due = time.monotonic()
    while True:
        scrape(url)
        started.set()
        due += INTERVAL
        if stop.wait(max(0.0, due - time.monotonic())):
            return
