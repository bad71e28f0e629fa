"""Thousands of random schedules of replies, losses, delays, duplicates, joins and stops: no promise is broken."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from cluster.config import sections
from cluster.config.sections import Aggregator
from cluster.errors import MetafleetError, NumericsError
from cluster.messages import Contribution
from coordinator import start
from coordinator.aggregators.asynchronous import AsyncAggregator
from coordinator.aggregators.base import Dropped, Update
from coordinator.aggregators.sync import SyncAggregator
from coordinator.attempts import Policy
from coordinator.commit_log import Entry
from tests.coordinator import simulation
from tests.coordinator.simulation import (
    ASYNC,
    BOUND,
    BUFFERED,
    SHARDS,
    STEPS,
    SYNC,
    Fault,
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


# ------------------------------------------------------------------------------------------ the harness can find faults


class CountsTwice(SyncAggregator):
    def _reduce(self, version: int) -> Update:
        update = super()._reduce(version)
        first = self._taken[version * SHARDS][0]
        return replace(update, gradient=update.gradient + first.gradient / np.float32(update.episodes))


class IgnoresOrder(SyncAggregator):
    def _reduce(self, version: int) -> Update:
        update = super()._reduce(version)
        finite = [c.gradient for c, finite in self._taken.values() if finite]  # in order of arrival
        total = functools.reduce(np.add, finite, np.zeros_like(update.gradient))
        return replace(update, gradient=total / np.float32(max(1, update.episodes)))


class AppliesStaleWork(AsyncAggregator):
    def __init__(self, bound: int, *rest: Any) -> None:
        super().__init__(bound + 1000, *rest)


class CountsLostWorkAgain(AsyncAggregator):
    def next_shard(self) -> int | None:
        shard = super().next_shard()
        if shard is not None and shard % 5 == 4:
            self._issued.add(shard)
            self._reissue.append(shard)
        return shard

    def add(self, contribution: Contribution, version: int, *, finite: bool = True) -> Update | Dropped | None:
        self._issued.add(contribution.shard)
        return super().add(contribution, version, finite=finite)


@pytest.mark.parametrize("broken", [CountsTwice, IgnoresOrder, AppliesStaleWork, CountsLostWorkAgain])
def test_a_broken_aggregator_is_caught(monkeypatch: pytest.MonkeyPatch, broken: type) -> None:
    def build(
        config: Aggregator,
        version: int = 0,
        next_id: int = 0,
        reissue: Sequence[int] = (),
        pending: Sequence[tuple[Contribution, bool]] = (),
    ) -> object:
        if issubclass(broken, SyncAggregator):
            return broken(SHARDS, version, pending)
        return broken(BOUND, 0.5, 1, next_id, reissue, pending)

    monkeypatch.setattr(start, "build_aggregator", build)
    with pytest.raises((AssertionError, ValueError, MetafleetError)):
        for seed in range(300):
            if issubclass(broken, SyncAggregator):
                check_sync(Schedule.draw(seed))
            else:
                check_async(Schedule.draw(10_000 + seed), ASYNC)


def test_the_schedules_contain_what_they_are_about() -> None:
    seen: Counter[str] = Counter()
    for seed in range(400):
        outcome = simulate(Schedule.draw(seed), SYNC)
        seen.update(outcome.trainer.progress.failures.keys())
        seen.update(cause for cause, count in outcome.trainer.goodput.lost.items() if count)
        seen["recovery"] += outcome.trainer.goodput.recoveries > 0
        seen["driver"] += outcome.drivers > 1
        text = " ".join(outcome.messages)
        seen.update(
            word for word in ("is replaced", "keeps failing", "being drained", "waiting for more") if word in text
        )
    expected_kinds = {"worker_lost", "shard_error", "nonfinite", "duplicate_mismatch", "deadline"}
    expected_losses = {"copy", "verification", "damaged", "worker", "late"}
    words = {"is replaced", "keeps failing", "being drained", "recovery", "driver"}
    assert {name for name in expected_kinds | expected_losses | words if seen[name] < 3} == set(), seen


# ------------------------------------------------------------------------------------------------- one thing at a time


CALM = Schedule(0, 4, Policy(), (1.0,) * 10, (), frozenset(), None, (), ())


def straggling(aggregator: Aggregator, speculation: float) -> float:
    """Commits of a shard a second, as a share of what three whole workers and a fifth of one could do at most."""
    policy = Policy(speculation=speculation)
    schedule = replace(CALM, policy=policy, speeds=(1.0, 1.0, 1.0, 0.2))
    outcome = simulate(schedule, aggregator)
    return sum(len(entry.counted) for entry in outcome.entries) / outcome.seconds / 3.2


def test_help_makes_up_for_a_straggler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "SHARDS", 32)
    monkeypatch.setattr(simulation, "STEPS", 20)
    many = sections.SyncAggregator(shards=32)
    assert straggling(many, speculation=1.5) >= 0.8 > straggling(many, speculation=0.0)


def test_an_asynchronous_run_waits_for_no_straggler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "STEPS", 600)
    assert straggling(sections.AsyncAggregator(staleness_bound=8), speculation=1.5) >= 0.9


def test_a_hung_worker_is_replaced_after_its_deadline() -> None:
    policy = Policy(deadline=4.0, deadline_floor=3.0)
    schedule = replace(CALM, policy=policy, faults=(Fault(3.0, "hang", 2),))
    outcome = simulate(schedule, SYNC)
    assert outcome.digest == expected(frozenset())
    (failure,) = [message for message in outcome.messages if "past its deadline" in message]
    assert "has taken worker 2" in failure and "the worker is taken for hung and replaced; raise" in failure
    assert outcome.trainer.goodput.lost == {"deadline": 1} and outcome.trainer.goodput.recoveries == 1


def test_verification_finds_the_worker_that_computes_wrongly() -> None:
    schedule = replace(CALM, policy=Policy(verify=1.0), liar=1)
    outcome = simulate(schedule, SYNC)
    assert outcome.digest == expected(frozenset())
    assert any("worker 1 gives other bits than 2 others; it is replaced" in message for message in outcome.messages)
    assert outcome.trainer.goodput.lost["verification"] >= STEPS * SHARDS
    without = simulate(replace(schedule, policy=Policy()), SYNC)
    assert without.digest != expected(frozenset())


def test_two_workers_that_differ_and_no_third_end_the_run() -> None:
    with pytest.raises(NumericsError, match=r"shard 0 .*: workers \[\d, \d\] give different bits, and no further one"):
        simulate(replace(CALM, workers=2, policy=Policy(verify=1.0), liar=0), SYNC)


def test_too_few_workers_are_waited_for_and_that_is_said() -> None:
    schedule = replace(CALM, workers=2, policy=Policy(min_workers=3), faults=(Fault(30.0, "join"),))
    outcome = simulate(schedule, SYNC)
    assert "2 of at least 3 workers are there: waiting for more" in outcome.messages
    assert outcome.seconds > 30 and outcome.digest == expected(frozenset())


def test_a_worker_that_joins_takes_its_share() -> None:
    schedule = replace(CALM, workers=1, faults=(Fault(1.0, "join"), Fault(1.0, "join")))
    assert simulate(schedule, SYNC).seconds < 0.6 * simulate(replace(CALM, workers=1), SYNC).seconds


def test_a_node_that_is_gone_at_once_poisons_no_shard() -> None:
    crashes = tuple(Fault(at, "crash", 1) for at in (2.0, 7.0, 12.0))
    schedule = replace(CALM, workers=6, faults=crashes, policy=Policy(attempts=1))
    assert simulate(schedule, SYNC).digest == expected(frozenset())


def test_a_node_that_keeps_failing_gets_no_new_workers_for_a_while() -> None:
    deaths = tuple(Fault(at, "die", 1) for at in (3.0, 5.0, 7.0, 9.0, 11.0))
    outcome = simulate(replace(CALM, faults=deaths, policy=Policy(node_failures=2, quarantine=60.0)), SYNC)
    assert outcome.digest == expected(frozenset())
    assert "node node 1 keeps failing: no new workers there for 60 s" in outcome.messages
