"""The coordinator's share: how much of the workers' time they spend idle because of the coordinator.

Workers report how long they waited for each shard (``ShardStatistics.idle_seconds``); a clock in the actor says when
each shard was finished, so that every wait has a place in time. For each version after a segment's first, the window
is the time from the last finished shard of the version before to its own last finished shard. In it, a worker waits

    turnaround   for its first shard, from the window's start: reply, aggregation, commit, publishing, dispatch
    gaps         between two of its shards
    imbalance    after its last shard, until the last worker has finished its own

The coordinator causes turnaround and gaps, transport by Ray included, and a whole window in which a worker got no shard
at all. Imbalance it does not: shards last unequally long, and a synchronous version needs them all. The share is the
sum of what it causes over all windows and workers, over the windows times workers. The start is in no window.

Conditions: shards of 100 ms or more, 4 a worker and version.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.fleet import Span, fleet
from benchmarks.report import Cell, Floor, Result, Sheet
from benchmarks.rounds import Spread
from benchmarks.workload import SHORTEST, calibrated_shard, config
from cluster.ray_runtime import ray_cluster, usable_cpus

WORKERS = (1, 2, 4)
SHARDS = 4
"""Shards a worker and version."""
LIMIT = 0.05


@dataclass(frozen=True)
class Window:
    """One version's window; seconds, summed over the workers."""

    worker_seconds: float
    turnaround: float
    gaps: float
    imbalance: float

    @property
    def caused(self) -> float:
        """What the coordinator caused."""
        return self.turnaround + self.gaps


def measure(quick: bool) -> Result:
    """Every number of workers that the cores allow."""
    episodes = calibrated_shard()
    versions = 6 if quick else 25
    rows, floors = [], []
    with ray_cluster("local"):
        for workers in (count for count in WORKERS if count <= usable_cpus()):
            job = config(episodes, shards=SHARDS * workers)
            with fleet(job, workers) as ray:
                ray.run(1)  # warm up
                spans = ray.run(versions).spans
            row, share = _row(workers, spans)
            rows.append(row)
            floors.append(Floor(f"workers {workers}: the coordinator's share of their time", share, LIMIT, False))
            shortest = sorted(span.busy for span in spans)[len(spans) // 2]
            floors.append(Floor(f"workers {workers}: median shard, seconds", shortest, SHORTEST))
    note = f"{SHARDS} shards of {episodes} episodes a worker and version, {versions} versions; shares of worker time"
    return Result([Sheet("The coordinator's share of the workers' time", rows, note)], floors)


def windows(spans: Iterable[Span], workers: int) -> list[Window]:
    """The windows of all versions but the first."""
    versions: dict[int, dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for span in sorted(spans, key=lambda span: span.finished):
        versions[span.version][span.worker].append(span)
    ends = {v: max(span.finished for own in by.values() for span in own) for v, by in versions.items()}
    found = []
    last: dict[int, float] = {}
    """When each worker finished its last shard before the window."""
    for before, version in pairwise(sorted(versions)):
        last |= {worker: own[-1].finished for worker, own in versions[before].items()}
        found.append(_window(versions[version], last, ends[before], ends[version], workers))
    return found


def _window(
    version: Mapping[int, list[Span]], last: Mapping[int, float], start: float, end: float, workers: int
) -> Window:
    turnaround = gaps = imbalance = 0.0
    for worker in range(workers):
        own = version.get(worker)
        if not own:
            turnaround += end - start
            continue
        # What of its wait lies before the window was imbalance, or has been counted.
        turnaround += max(0.0, last.get(worker, start) + own[0].idle - start)
        gaps += sum(span.idle for span in own[1:])
        imbalance += end - own[-1].finished
    return Window(workers * (end - start), turnaround, gaps, imbalance)


def _row(workers: int, spans: Sequence[Span]) -> tuple[dict[str, Cell], float]:
    found = windows(spans, workers)
    total = sum(window.worker_seconds for window in found)
    share = sum(window.caused for window in found) / total
    row: dict[str, Cell] = {
        "workers": workers,
        "share": share,
        "by version": Spread.of([window.caused / window.worker_seconds for window in found]),
        "turnaround, ms": Spread.of([window.turnaround / workers * 1e3 for window in found]),
        "gap, ms": Spread.of([window.gaps / (workers * (SHARDS - 1)) * 1e3 for window in found]),
        "imbalance": sum(window.imbalance for window in found) / total,
        "shard, ms": Spread.of([span.busy * 1e3 for span in spans]),
    }
    return row, share
