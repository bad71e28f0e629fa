"""A straggler: four workers of which one takes five times as long, by waiting; with and without help for it.

The mark is what three whole workers and a fifth of one could do: 3.2 quarters of what the same four workers do when
none waits, measured in the same run. Synchronous versions of 32 shards, and asynchronous commits of one shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.fleet import fleet
from benchmarks.report import Cell, Floor, Result, Sheet
from benchmarks.workload import calibrated_shard, config
from cluster.config.loading import with_execution
from cluster.config.run import RunConfig
from cluster.config.sections import AsyncAggregator
from cluster.faults import VARIABLE
from cluster.ray_runtime import ray_cluster, usable_cpus

WORKERS, SHARDS, FACTOR = 4, 32, 5.0
MARK = (WORKERS - 1 + 1 / FACTOR) / WORKERS
"""Of what four whole workers do."""
FLOORS = {"synchronous": 0.8, "asynchronous": 0.9}


def measure(quick: bool) -> Result:
    """Both aggregators, each whole, with the straggler, and with the straggler and no help."""
    if usable_cpus() < WORKERS:
        return Result([])
    episodes = calibrated_shard()
    versions = 2 if quick else 10
    synchronous = config(episodes, shards=SHARDS)
    asynchronous = synchronous.model_copy(update={"aggregator": AsyncAggregator(staleness_bound=8)})
    rows: list[dict[str, Cell]] = []
    floors = []
    with ray_cluster("local"):
        for name, job, count in (
            ("synchronous", synchronous, versions),
            ("asynchronous", asynchronous, versions * SHARDS),
        ):
            alone = with_execution(job, speculation=0.0)
            whole = _speed(job, count)
            with _straggler():
                helped, left = _speed(job, count), _speed(alone, count)
            for how, speed in (("none waits", whole), ("one waits", helped), ("one waits, no help", left)):
                share = speed / whole / MARK
                rows.append({"aggregator": name, "workers": how, "tasks/s": speed, "of the mark": share})
            floors.append(Floor(f"{name}: of three whole workers and a fifth", helped / whole / MARK, FLOORS[name]))
    note = f"{SHARDS} shards of {episodes} episodes a version, {versions} versions; the straggler takes {FACTOR:g}×"
    return Result([Sheet("A straggler among four workers", rows, note)], floors)


def _speed(job: RunConfig, versions: int) -> float:
    """Committed episodes a second."""
    with fleet(job, WORKERS) as ray:
        ray.run(1)  # warm up
        segment = ray.run(versions)
        return segment.episodes / segment.seconds


@contextmanager
def _straggler() -> Iterator[None]:
    """Workers that start within the block wait after each shard, if they are in slot 3."""
    with TemporaryDirectory(prefix="metafleet-straggler-") as folder:
        script = Path(folder) / "faults.json"
        fault = {"point": "computed", "action": "wait", "slot": WORKERS - 1, "factor": FACTOR, "times": 0}
        script.write_text(json.dumps([fault]), "utf-8")
        os.environ[VARIABLE] = str(script)
        try:
            yield
        finally:
            del os.environ[VARIABLE]
