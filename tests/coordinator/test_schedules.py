"""Outer step size schedules at the start, in the middle, at the end, and around their corners."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.sections import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule, StepSchedule
from coordinator.schedules import factor

SCHEDULES: list[tuple[Schedule, dict[int, float]]] = [
    (ConstantSchedule(), {0: 1, 50: 1, 100: 1}),
    (LinearSchedule(), {0: 1, 25: 0.75, 50: 0.5, 100: 0}),
    (LinearSchedule(final=0.2), {0: 1, 50: 0.6, 100: 0.2}),
    (LinearSchedule(final=3), {0: 1, 50: 2, 100: 3}),
    (CosineSchedule(), {0: 1, 50: 0.5, 75: 0.5 - math.sqrt(0.125), 100: 0}),
    (CosineSchedule(final=0.1), {0: 1, 50: 0.55, 100: 0.1}),
    (CosineSchedule(warmup=20), {0: 1 / 20, 9: 0.5, 19: 1, 20: 1, 60: 0.5, 100: 0}),
    (CosineSchedule(warmup=101), {0: 1 / 101, 100: 1}),
    (StepSchedule(every=40, factor=0.5), {0: 1, 39: 1, 40: 0.5, 79: 0.5, 80: 0.25, 100: 0.25}),
]


@pytest.mark.parametrize(("schedule", "values"), SCHEDULES, ids=[str(schedule) for schedule, _ in SCHEDULES])
def test_a_schedule_has_these_values(schedule: Schedule, values: dict[int, float]) -> None:
    assert {v: factor(schedule, v, 101) for v in values} == pytest.approx(values, abs=1e-15)


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in SCHEDULES], ids=str)
def test_a_run_of_one_version_makes_its_update_at_full_size(schedule: Schedule) -> None:
    warmup = schedule.warmup if isinstance(schedule, CosineSchedule) else 0
    assert factor(schedule, 0, 1) == (1 / warmup if warmup else 1)


@given(st.integers(1, 300), st.integers(0, 300), st.floats(0, 1))
def test_cosine_rises_through_the_warmup_and_falls_after_it(horizon: int, warmup: int, final: float) -> None:
    warmup = min(warmup, horizon)
    values = [factor(CosineSchedule(final=final, warmup=warmup), version, horizon) for version in range(horizon)]
    rise, fall = values[:warmup], values[warmup:]
    assert all(0 < value <= 1 for value in rise) and rise == sorted(rise)
    assert all(final - 1e-12 <= value <= 1 + 1e-12 for value in fall)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(fall))
