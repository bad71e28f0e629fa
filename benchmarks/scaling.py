"""1, 2 and 4 workers through Ray against the same work in as many bare processes.

Both compute the same shards, 8 a worker and version. Three segments of equal work alternate, each timed from its start
until the last worker is done; who is not measured sits idle:

    Ray      the real trainer: from the first order of a version to its commit, as often as the segment has versions
    free     bare processes that run through their shards of all the segment's versions without waiting for each other
    in step  bare processes that meet after each version, as any synchronous run has to

Of two equal processes one may be some percent faster for as long as they live (where their memory happens to lie), so
that both sides are started anew several times. The floor is on Ray / free, the stricter one.
"""

from __future__ import annotations

from collections import defaultdict

from benchmarks.bare import bare_processes
from benchmarks.fleet import Segment, fleet
from benchmarks.report import Cell, Floor, Result, Sheet
from benchmarks.rounds import Spread, interleave, ratios
from benchmarks.workload import calibrated_shard, config
from cluster.ray_runtime import ray_cluster, usable_cpus

WORKERS = (1, 2, 4)
SHARDS = 8
"""Shards a worker and version."""
FLOOR = 0.95
STARTS, ROUNDS, VERSIONS = 3, 3, 2
"""How often both sides are started; rounds after each start; versions a segment."""


def measure(quick: bool) -> Result:
    """Every number of workers that the cores allow."""
    episodes = calibrated_shard()
    rows: list[dict[str, Cell]] = []
    floors = []
    with ray_cluster("local"):
        for workers in (count for count in WORKERS if count <= usable_cpus()):
            row, ratio = _compare(workers, episodes, starts=1 if quick else STARTS)
            rows.append(row)
            floors.append(Floor(f"workers {workers}: Ray / bare processes running free", ratio.median, FLOOR))
    note = (
        f"tasks/s, median (least–most) over interleaved segments; {SHARDS} shards of {episodes} episodes a worker and "
        "version; ratios round by round"
    )
    return Result([Sheet("Scaling: MAML, second order, 5-way 1-shot 1 query 1 step", rows, note)], floors)


def _compare(workers: int, episodes: int, starts: int) -> tuple[dict[str, Cell], Spread]:
    found: dict[str, list[float]] = defaultdict(list)
    segments: list[Segment] = []
    for _ in range(starts):
        for name, speeds in _once(workers, episodes, segments).items():
            found[name] += speeds
    ratio = ratios(found["Ray"], found["free"])
    row: dict[str, Cell] = {"workers": workers}
    row |= {name: Spread.of(speeds) for name, speeds in found.items()}
    row |= {"Ray / free": ratio, "Ray / in step": ratios(found["Ray"], found["in step"])}
    row |= {"shard, ms": Spread.of([span.busy * 1e3 for segment in segments for span in segment.spans])}
    return row, ratio


def _once(workers: int, episodes: int, segments: list[Segment]) -> dict[str, list[float]]:
    """Tasks a second in each round after one start; what ran through Ray is added to ``segments``."""
    job = config(episodes, shards=SHARDS * workers)
    with fleet(job, workers) as ray, bare_processes(job, workers, SHARDS, ray.niceness) as bare:

        def through_ray() -> float:
            segments.append(ray.run(VERSIONS))
            return segments[-1].episodes / segments[-1].seconds

        ray.run(1)  # warm up
        bare.speed(1, in_step=True)
        measured = {
            "Ray": through_ray,
            "free": lambda: bare.speed(VERSIONS, in_step=False),
            "in step": lambda: bare.speed(VERSIONS, in_step=True),
        }
        return interleave(ROUNDS, measured)
