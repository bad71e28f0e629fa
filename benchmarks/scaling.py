"""1, 2 and 4 workers through Ray against the same work in as many bare processes.

Both compute the same shards, 8 a worker and version. Three segments of equal work alternate; who is not measured sits
idle:

    Ray      the real trainer: from the first order of a version to its commit, as often as the segment has versions
    free     bare processes that never wait: the sum of their own speeds, the most that so many processes can do
    in step  bare processes that meet after each version, as any synchronous run has to

The floor is on Ray / free, the stricter one.
"""

from __future__ import annotations

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


def measure(quick: bool) -> Result:
    """Every number of workers that the cores allow."""
    episodes = calibrated_shard()
    rows: list[dict[str, Cell]] = []
    floors = []
    with ray_cluster("local"):
        for workers in (count for count in WORKERS if count <= usable_cpus()):
            row, ratio = _compare(workers, episodes, rounds=2 if quick else 9, versions=1 if quick else 2)
            rows.append(row)
            floors.append(Floor(f"{workers} workers: Ray / bare processes running free", ratio.median, FLOOR))
    note = (
        f"tasks/s, median (least–most) over interleaved segments; {SHARDS} shards of {episodes} episodes a worker and "
        "version; ratios round by round"
    )
    return Result([Sheet("Scaling: MAML, second order, 5-way 1-shot 1 query 1 step", rows, note)], floors)


def _compare(workers: int, episodes: int, rounds: int, versions: int) -> tuple[dict[str, Cell], Spread]:
    job = config(episodes, shards=SHARDS * workers)
    with fleet(job, workers) as ray, bare_processes(job, workers, SHARDS, ray.niceness) as bare:
        segments: list[Segment] = []

        def through_ray() -> float:
            segments.append(ray.run(versions))
            return segments[-1].episodes / segments[-1].seconds

        measured = {
            "Ray": through_ray,
            "free": lambda: bare.free_speed(versions),
            "in step": lambda: bare.speed_in_step(versions),
        }
        interleave(1, measured)  # warm up
        segments.clear()
        found = interleave(rounds, measured)
    ratio = ratios(found["Ray"], found["free"])
    row: dict[str, Cell] = {"workers": workers}
    row |= {name: Spread.of(speeds) for name, speeds in found.items()}
    row |= {"Ray / free": ratio, "Ray / in step": ratios(found["Ray"], found["in step"])}
    row |= {"shard, ms": Spread.of([span.busy * 1e3 for segment in segments for span in segment.spans])}
    return row, ratio
