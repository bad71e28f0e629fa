"""Thousands of random schedules of replies, losses, delays, duplicates, joins and stops: no promise is broken."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest

from cluster.config.sections import Aggregator
from coordinator.commit_log import Entry
from tests.coordinator.simulation import (
    ASYNC,
    BOUND,
    BUFFERED,
    SHARDS,
    STEPS,
    SYNC,
    Schedule,
    replayed,
    simulate,
    undisturbed,
)

expected = cache(undisturbed)


def check_sync(schedule: Schedule) -> None:
    """One digest, every shard counted once."""
    outcome = simulate(schedule, SYNC)
    assert [[c.shard for c in entry.counted] for entry in outcome.entries] == [
        list(range(version * SHARDS, (version + 1) * SHARDS)) for version in range(STEPS)
    ], schedule
    assert outcome.digest == expected(schedule.bad), schedule


def check_async(schedule: Schedule, aggregator: Aggregator) -> None:
    """Within its bound, no shard twice, and its log gives its digest."""
    outcome = simulate(schedule, aggregator)
    assert len(outcome.entries) == STEPS, schedule
    assert max(staleness(outcome.entries)) <= BOUND, schedule
    shards = [line.shard for entry in outcome.entries for line in (*entry.counted, *entry.dropped)]  # type: ignore[attr-defined]
    assert len(set(shards)) == len(shards), schedule
    assert replayed(outcome.entries, aggregator, schedule.bad) == outcome.digest, schedule


def staleness(entries: Sequence[Entry]) -> list[int]:
    return [entry.version - 1 - counted.base_version for entry in entries for counted in entry.counted]


@pytest.mark.parametrize("part", range(6))
def test_a_synchronous_run_ends_in_the_one_digest_whatever_happens(part: int) -> None:
    for seed in range(part * 1000, (part + 1) * 1000):
        check_sync(Schedule.draw(seed))


@pytest.mark.parametrize("part", range(4))
def test_an_asynchronous_run_keeps_its_promises_whatever_happens(part: int) -> None:
    for seed in range(part * 1000, (part + 1) * 1000):
        check_async(Schedule.draw(10_000 + seed), BUFFERED if part % 2 else ASYNC)
