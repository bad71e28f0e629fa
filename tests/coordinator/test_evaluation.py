"""Evaluation: orders that cover the episodes, the collector, and a whole evaluation over lossy workers."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config.learners import InternalMemory
from cluster.config.run import RunConfig
from cluster.config.sections import Conv4Strided, Evaluation, GlyphsData
from cluster.errors import ConfigError
from cluster.messages import Published
from coordinator.attempts import Policy
from coordinator.dispatch import Dispatcher
from coordinator.evaluate import check_layout
from coordinator.evaluation import PART, EvaluationCollector, EvaluationRequest, default_batch_norm, evaluate_now
from coordinator.outcomes import Failure, Joined
from metaworker.learners import build_learner
from metaworker.learners.base import Learner
from metaworker.scores import combine
from tests.coordinator.harness import TINY, FakePool, answer

PUBLISHED = Published(4, np.zeros(3, np.float32), {})


def request(episodes: int) -> EvaluationRequest:
    return EvaluationRequest("test", 1, 3, 5, episodes, "transductive")


@given(st.integers(1, 200), st.integers(0, 9))
def test_the_orders_cover_every_episode_once(episodes: int, version: int) -> None:
    orders = list(request(episodes).orders(version))
    covered = [e for order in orders for e in range(order.first_episode, order.first_episode + order.episodes)]
    assert covered == list(range(episodes))
    assert all(0 < order.episodes <= PART for order in orders)
    assert [order.part for order in orders] == list(range(len(orders)))
    shapes = {(o.split, o.way, o.shot, o.query, o.batch_norm, o.base_version, o.attempt) for o in orders}
    assert shapes == {("test", 1, 3, 5, "transductive", version, 0)}


def test_other_options_of_the_learner_leave_the_parameters_as_they_are() -> None:
    def built(**options: Any) -> Learner:
        return build_learner(RunConfig(learner=InternalMemory(**options), model=Conv4Strided(channels=4)), (1, 28, 28))

    check_layout(built(ablate=True), built(), ["ablate=true"])
    for option in ({"slots": 3}, {"carry": True}):
        with pytest.raises(ConfigError, match="that makes other parameters than the run trained"):
            check_layout(built(**option), built(), [str(option)])


def test_the_configured_evaluation() -> None:
    config = TINY.model_copy(update={"evaluation": Evaluation(shot=7, val_episodes=50)})
    assert EvaluationRequest.of(config, "val", 50) == EvaluationRequest("val", 1, 7, 3, 50, None)
    assert default_batch_norm(config) is None
    running = config.model_copy(update={"data": GlyphsData(), "model": Conv4Strided(batch_norm="running")})
    assert default_batch_norm(running) == "running"


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 70), st.randoms(use_true_random=False))
def test_the_collector_gives_its_scores_with_the_last_part_whatever_the_order(episodes: int, random: Random) -> None:
    orders = list(request(episodes).orders(4))
    parts = [answer(0, order) for order in orders]
    expected = combine(parts)  # type: ignore[arg-type]
    random.shuffle(parts)
    collector = EvaluationCollector(request(episodes))
    results = [collector.add(part) for part in parts]  # type: ignore[arg-type]
    assert results[:-1] == [None] * (len(parts) - 1)
    assert results[-1] == expected
    assert expected.episodes == episodes and expected.steps == (pytest.approx((episodes - 1) / 2),)


class Working(FakePool):
    """Workers that go on by themselves, and die or fail where ``fault`` says so."""

    def __init__(self, workers: int, fault: Callable[[int], str]) -> None:
        super().__init__(workers)
        self._fault = fault
        self._events_so_far = 0
        self.faults: list[str] = []

    def act(self) -> None:
        if self.starting:
            return self.ready()
        if self.late:
            return self.release()
        if self.busy:
            self._events_so_far += 1
            what = self._fault(self._events_so_far)
            self.faults += [what] if what else []
            {"": self.reply, "die": self.lose, "fail": self.error}[what](self.busy[0])


@pytest.mark.parametrize("workers", [1, 3])
def test_a_whole_evaluation_survives_its_workers(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Working(workers, lambda event: {2: "die", 4: "fail", 7: "die"}.get(event, ""))
    dispatcher = Dispatcher(pool, Policy(2, 3), clock=lambda: 0.0)
    pool.ready()
    for _ in range(workers):
        assert isinstance(dispatcher.next(1.0), Joined)
    wait = pool.wait

    def working(timeout: float) -> object:
        pool.act()
        return wait(timeout)

    monkeypatch.setattr(pool, "wait", working)
    noticed: list[Failure | Joined] = []
    scores = evaluate_now(dispatcher, pool, PUBLISHED, request(95), noticed.append)
    assert scores == combine([answer(0, order) for order in request(95).orders(4)])  # type: ignore[misc]
    assert pool.faults == ["die", "fail", "die"]
    assert not dispatcher._work
    assert [o.kind if isinstance(o, Failure) else "joined" for o in noticed] == [
        *("worker_lost", "joined", "shard_error", "worker_lost", "joined")
    ]
    # Another evaluation of the same version is another piece of work.
    assert evaluate_now(dispatcher, pool, PUBLISHED, request(20), noticed.append).episodes == 20
