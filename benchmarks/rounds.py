"""Interleaved measurement: A B C A B C …, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and range of some measurements."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return Spread(statistics.median(values), min(values), max(values), len(values))


def interleave(rounds: int, measured: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each of ``measured`` returned in each round; within a round they come in their order."""
    found: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, measure in measured.items():
            found[name].append(measure())
    return found


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of ``above / below``, round by round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def seconds(work: Callable[[], object]) -> float:
    """Wall time of ``work``."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
