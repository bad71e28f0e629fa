"""What the token of a local cluster costs: training on one that answers who has it, and on one that answers anyone.

A process has one cluster at a time, so that both are started anew in every round, in turns.
"""

from __future__ import annotations

import os
from functools import partial

from benchmarks.fleet import fleet
from benchmarks.report import Cell, Floor, Result, Sheet
from benchmarks.rounds import Spread, interleave, ratios
from benchmarks.workload import calibrated_shard, config
from cluster.config.run import RunConfig
from cluster.ray_runtime import ray_cluster, usable_cpus

SHARDS, VERSIONS, ROUNDS = 8, 4, 6
"""Shards a worker and version; versions a segment; how often each cluster is started."""
FLOOR = 0.97


def measure(quick: bool) -> Result:
    """As many workers as there are cores."""
    workers, episodes = usable_cpus(), calibrated_shard()
    job = config(episodes, shards=SHARDS * workers)
    speeds = {mode: partial(_speed, job, workers, mode) for mode in ("disabled", "token")}
    found = interleave(1 if quick else ROUNDS, speeds)
    ratio = ratios(found["token"], found["disabled"])
    row: dict[str, Cell] = {"workers": workers}
    row |= {name: Spread.of(values) for name, values in found.items()} | {"token / disabled": ratio}
    note = f"tasks/s, {SHARDS} shards of {episodes} episodes a worker and version, {VERSIONS} versions a start"
    floor = Floor("training with RAY_AUTH_MODE token / disabled", ratio.median, FLOOR)
    return Result([Sheet("Token authentication of a local cluster", [row], note)], [floor])


def _speed(job: RunConfig, workers: int, mode: str) -> float:
    """Tasks a second on a fresh cluster; the token is this process's own."""
    own = {name: os.environ.pop(name, None) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")}
    if mode != "token":
        os.environ["RAY_AUTH_MODE"] = mode
    try:
        with ray_cluster("local"), fleet(job, workers) as ray:
            ray.run(1)  # warm up
            segment = ray.run(VERSIONS)
            return segment.episodes / segment.seconds
    finally:
        os.environ.pop("RAY_AUTH_MODE", None)
        os.environ.update({name: value for name, value in own.items() if value is not None})
