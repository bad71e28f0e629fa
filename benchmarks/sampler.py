"""Episodes a second on one core: 5-way 1-shot 15-query, 28×28, from an episode store to tensors ready for the learner.

``StoreSource.sample`` on the embedded glyphs, one thread, with 90° rotations as extra classes and without, for calls of
different numbers of episodes. The floor is on the slowest call, rotations on and off.
"""

from __future__ import annotations

from functools import partial

from benchmarks.machine import THREADS
from benchmarks.report import Cell, Floor, Result, Sheet
from benchmarks.rounds import Spread, interleave, seconds
from cluster.config.run import RunConfig
from cluster.config.sections import GlyphsData
from cluster.device import prepare
from cluster.episodes import open_source
from cluster.episodes.types import EpisodeSource

WAY, SHOT, QUERY = 5, 1, 15
CALLS = (8, 32, 128)
"""Episodes a call."""
FLOOR = 10_000


def measure(quick: bool) -> Result:
    """Rotations on and off, interleaved."""
    prepare("cpu", THREADS)
    sources = {
        name: open_source(RunConfig(data=GlyphsData(rotations=rotations)))
        for name, rotations in (("off", False), ("on", True))
    }
    drawn = 1_024 if quick else 8_192
    rows: list[dict[str, Cell]] = []
    slowest = dict.fromkeys(sources, float("inf"))
    for episodes in CALLS:
        found = interleave(
            3 if quick else 7,
            {name: partial(speed, source, episodes, drawn) for name, source in sources.items()},
        )
        row: dict[str, Cell] = {"episodes a call": episodes}
        rows.append(row | {f"rotations {name}": Spread.of(speeds) for name, speeds in found.items()})
        slowest = {name: min(slowest[name], Spread.of(speeds).median) for name, speeds in found.items()}
    floors = [Floor(f"sampler, rotations {name}: episodes/s", least, FLOOR) for name, least in slowest.items()]
    title = f"Sampler: {WAY}-way {SHOT}-shot {QUERY}-query episodes a second, 28×28, one core"
    return Result([Sheet(title, rows, "median (least–most) over interleaved rounds")], floors)


def speed(source: EpisodeSource, episodes: int, drawn: int) -> float:
    """Episodes a second when ``drawn`` are drawn, ``episodes`` at a time."""

    def draw() -> None:
        for first in range(0, drawn, episodes):
            source.sample("train", first, episodes, WAY, SHOT, QUERY)

    return drawn / seconds(draw)
