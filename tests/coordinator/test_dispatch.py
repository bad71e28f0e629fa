"""The dispatcher over a scripted pool: who gets what, and what becomes of lost, failed and non-finite attempts."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.config import sections
from cluster.errors import ClusterError, NumericsError, PoisonShardError
from cluster.messages import Contribution, EvaluationPart, EvaluationTask, ShardTask
from coordinator.aggregators import build_aggregator
from coordinator.aggregators.base import Counted, Dropped, Update
from coordinator.attempts import Policy, describe
from coordinator.dispatch import Dispatcher
from coordinator.outcomes import Accepted, Delay, Evaluated, Failure, Joined, Outcome
from coordinator.pool import Order
from tests.coordinator.harness import FakePool, answer, contribution

NAN = float("nan")


def still() -> float:
    """A clock that stands: nothing takes any time, and no choice depends on how fast this machine is."""
    return 0.0


def shard(number: int, version: int = 0) -> ShardTask:
    return ShardTask(number, 8 * number, 8, version)


def evaluation(part: int, version: int = 0, split: str = "val") -> EvaluationTask:
    return EvaluationTask(
        split=split,  # type: ignore[arg-type]
        first_episode=10 * part,
        episodes=10,
        way=1,
        shot=1,
        query=1,
        batch_norm="transductive",
        base_version=version,
        part=part,
    )


def drain(dispatcher: Dispatcher, pool: FakePool) -> list[Outcome]:
    """All outcomes until nothing more happens by itself."""
    outcomes: list[Outcome] = []
    while (outcome := dispatcher.next(1.0)) is not None or pool._events:
        if outcome is not None:
            outcomes.append(outcome)
    return outcomes


def started(
    slots: int, limit: int = 2, attempts: int = 3, clock: Callable[[], float] = still, **options: object
) -> tuple[Dispatcher, FakePool]:
    """A dispatcher whose workers are all ready."""
    pool = FakePool(slots, limit, **options)  # type: ignore[arg-type]
    dispatcher = Dispatcher(pool, Policy(limit, attempts, backoff=0.0), clock)
    pool.ready()
    assert [type(outcome) for outcome in drain(dispatcher, pool)] == [Joined] * slots
    return dispatcher, pool


def submit(dispatcher: Dispatcher, *orders: Order) -> None:
    for order in orders:
        dispatcher.submit(order, ("handle", order.base_version))


def kinds(outcomes: list[Outcome]) -> list[str]:
    return [outcome.kind if isinstance(outcome, Failure) else type(outcome).__name__ for outcome in outcomes]


def accepted(outcomes: list[Outcome]) -> list[int]:
    return [outcome.contribution.shard for outcome in outcomes if isinstance(outcome, Accepted)]


# -------------------------------------------------------------------------------------------------------- who gets what


def test_nobody_is_asked_before_being_ready() -> None:
    pool = FakePool(2)
    dispatcher = Dispatcher(pool, Policy(2, 3, backoff=0.0), still)
    assert (dispatcher.workers, dispatcher.room, dispatcher.next(1.0)) == (0, 0, None)
    with pytest.raises(ValueError, match=r"shard 0 \(episodes 0–7\) cannot be submitted: no worker has room"):
        submit(dispatcher, shard(0))
    pool.ready(1)
    outcome = dispatcher.next(1.0)
    assert isinstance(outcome, Joined) and outcome.hello.worker == 1
    assert (dispatcher.workers, dispatcher.room) == (1, 2)
    submit(dispatcher, shard(0))
    assert pool.submitted == [(1, shard(0))]


@pytest.mark.parametrize(
    ("workers", "verify", "least", "needed"), [(3, 0.0, 1, 1), (3, 0.5, 1, 2), (1, 0.5, 1, 1), (3, 0.5, 3, 3)]
)
def test_as_many_workers_are_needed_as_configured_and_two_to_verify(
    workers: int, verify: float, least: int, needed: int
) -> None:
    assert Dispatcher(FakePool(workers), Policy(verify=verify, min_workers=least)).needed == needed


def test_an_order_goes_to_the_least_loaded_worker_and_the_lowest_slot_among_equals() -> None:
    dispatcher, pool = started(3)
    submit(dispatcher, *map(shard, range(5)))
    assert [slot for slot, _ in pool.submitted] == [0, 1, 2, 0, 1]
    pool.reply(1)
    assert accepted(drain(dispatcher, pool)) == [1]
    submit(dispatcher, shard(5), shard(6))
    assert [slot for slot, _ in pool.submitted][5:] == [1, 2]
    assert pool.orders(1) == [shard(4), shard(5)]


@pytest.mark.parametrize(("workers", "limit"), [(1, 1), (2, 3), (3, 2)])
def test_at_most_so_many_orders_are_in_flight(workers: int, limit: int) -> None:
    dispatcher, pool = started(workers, limit)
    total = workers * limit
    for number in range(total):
        assert (dispatcher.room, dispatcher.in_flight) == (total - number, number)
        submit(dispatcher, shard(number))
    assert dispatcher.room == 0 and dispatcher._work
    with pytest.raises(ValueError, match="no worker has room"):
        submit(dispatcher, shard(99))
    pool.reply(workers - 1)
    drain(dispatcher, pool)
    assert (dispatcher.room, dispatcher.in_flight) == (1, total - 1)


def test_one_piece_of_work_is_under_way_once() -> None:
    dispatcher, _ = started(2)
    submit(dispatcher, shard(0), evaluation(0))
    for order in (shard(0), replace(shard(0), attempt=1), evaluation(0)):
        with pytest.raises(ValueError, match="it is under way"):
            submit(dispatcher, order)
    submit(dispatcher, evaluation(0, split="test"))


def test_replies_become_outcomes_in_the_order_of_completion_with_time_and_size() -> None:
    now = [100.0]
    pool = FakePool(2)
    dispatcher = Dispatcher(pool, Policy(2, 3, backoff=0.0), clock=lambda: now[0])
    pool.ready()
    drain(dispatcher, pool)
    submit(dispatcher, shard(0))
    now[0] = 101.0
    submit(dispatcher, shard(1))
    now[0] = 103.5
    pool.reply(1)
    pool.reply(0)
    outcomes = drain(dispatcher, pool)
    assert [(o.contribution.shard, o.finite, o.seconds, o.size) for o in outcomes if isinstance(o, Accepted)] == [
        (1, True, 2.5, 20),
        (0, True, 3.5, 20),
    ]
    assert not dispatcher._work


# --------------------------------------------------------------------------------------------------------- lost workers


def test_a_lost_worker_s_shards_are_reissued_and_its_slot_is_replaced_once() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, *map(shard, range(4)))
    pool.reply(1)
    pool.reply(1)
    assert accepted(drain(dispatcher, pool)) == [1, 3]
    pool.lose(0)
    outcomes = drain(dispatcher, pool)
    assert kinds(outcomes) == ["worker_lost"]
    assert isinstance(outcomes[0], Failure)
    assert outcomes[0].message == "worker 0 lost (the actor died); replacing it, 2 order(s) reissued"
    assert pool.replaced == [0] and dispatcher.workers == 1
    assert pool.orders(1) == [replace(shard(0), attempt=1), replace(shard(2), attempt=1)]
    pool.release()
    assert drain(dispatcher, pool) == []
    assert pool.replaced == [0]
    for _ in range(2):
        pool.reply(1)
    assert accepted(drain(dispatcher, pool)) == [0, 2]
    pool.ready(0)
    assert kinds(drain(dispatcher, pool)) == ["Joined"]
    assert (dispatcher.workers, dispatcher.room) == (2, 4)


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("resubmitted", [False, True])
def test_what_a_lost_worker_still_sends_is_ignored_also_when_its_slot_has_a_new_one(
    computed: bool, resubmitted: bool
) -> None:
    dispatcher, pool = started(1)
    submit(dispatcher, shard(0), shard(1))
    pool.lose(0, first=1, computed=computed)
    assert kinds(drain(dispatcher, pool)) == ["worker_lost"]
    assert dispatcher.workers == 0
    if not resubmitted:
        pool.release()
        assert drain(dispatcher, pool) == []
    pool.ready(0)
    assert kinds(drain(dispatcher, pool)) == ["Joined"]
    again = [replace(shard(0), attempt=1), replace(shard(1), attempt=1)]
    assert pool.orders(0) == again
    if resubmitted:  # the late event is about an order that the new worker in the slot has as well
        pool.release()
        assert drain(dispatcher, pool) == []
    assert (pool.replaced, dispatcher.in_flight) == ([0], 2)
    pool.error(0)
    assert kinds(drain(dispatcher, pool)) == ["shard_error"]
    assert pool.orders(0) == [again[1], replace(shard(0), attempt=2)]
    for _ in range(2):
        pool.reply(0)
    assert accepted(drain(dispatcher, pool)) == [1, 0]
    assert not dispatcher._work


def test_only_what_was_being_computed_is_blamed_for_the_death_of_a_worker() -> None:
    dispatcher, pool = started(1, attempts=2)
    submit(dispatcher, shard(0), shard(1))
    pool.lose(0, first=1)
    drain(dispatcher, pool)
    pool.ready(0)
    drain(dispatcher, pool)
    pool.reply(0)
    drain(dispatcher, pool)
    pool.lose(0)
    assert kinds(drain(dispatcher, pool)) == ["worker_lost"]
    pool.ready(0)
    drain(dispatcher, pool)
    assert pool.orders(0) == [replace(shard(1), attempt=2)]


def test_a_worker_that_dies_unnoticed_loses_what_it_is_sent_as_well() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, shard(0), shard(1))
    pool.reply(1)
    pool.lose(0)
    assert accepted([dispatcher.next(1.0)]) == [1]  # type: ignore[list-item]
    submit(dispatcher, shard(2), shard(3))
    assert pool.submitted[-1] == (0, shard(3))
    assert kinds(drain(dispatcher, pool)) == ["worker_lost"]
    pool.release()
    assert drain(dispatcher, pool) == []
    assert pool.orders(1) == [shard(2), replace(shard(0), attempt=1)]
    for _ in range(3):
        pool.reply(1)
        drain(dispatcher, pool)
    assert not dispatcher._work and pool.replaced == [0]


def test_reissued_orders_wait_for_room_and_go_before_new_ones() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, *map(shard, range(4)))
    pool.lose(0)
    drain(dispatcher, pool)
    assert (dispatcher.in_flight, dispatcher.room) == (2, -2)
    pool.reply(1)
    assert accepted(drain(dispatcher, pool)) == [1]
    assert pool.orders(1) == [shard(3), replace(shard(0), attempt=1)]
    assert dispatcher.room == -1
    pool.ready(0)
    drain(dispatcher, pool)
    assert pool.orders(0) == [replace(shard(2), attempt=1)] and dispatcher.room == 1


# -------------------------------------------------------------------------------------------------------- failed shards


def test_a_failed_shard_is_tried_on_the_other_workers_first() -> None:
    dispatcher, pool = started(3, attempts=4)
    submit(dispatcher, shard(0))
    for slot in (0, 1, 2):
        assert pool.orders(slot) == [replace(shard(0), attempt=slot)]
        pool.error(slot)
        outcomes = drain(dispatcher, pool)
        assert kinds(outcomes) == ["shard_error"]
        assert isinstance(outcomes[0], Failure)
        assert outcomes[0].message == "shard 0 (episodes 0–7) failed: ValueError: scripted"
    assert pool.orders(0) == [replace(shard(0), attempt=3)]
    assert pool.replaced == []


def test_a_failed_shard_waits_for_another_worker_s_turn() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, *map(shard, range(4)))
    pool.error(0)
    assert kinds(drain(dispatcher, pool)) == ["shard_error"]
    assert pool.orders(0) == [shard(2)] and dispatcher.room == 0
    pool.reply(0)
    drain(dispatcher, pool)
    submit(dispatcher, shard(4))
    assert dispatcher.room == 0
    pool.reply(1)
    drain(dispatcher, pool)
    assert pool.orders(1) == [shard(3), replace(shard(0), attempt=1)]


def test_a_new_worker_in_a_slot_is_one_that_has_not_tried_it() -> None:
    dispatcher, pool = started(3)
    submit(dispatcher, *map(shard, range(3)))
    pool.error(0)
    pool.reply(1)
    drain(dispatcher, pool)
    assert pool.orders(1) == [replace(shard(0), attempt=1)]
    submit(dispatcher, shard(3))
    pool.lose(0)
    drain(dispatcher, pool)
    pool.ready(0)
    drain(dispatcher, pool)
    pool.error(1)
    drain(dispatcher, pool)
    assert pool.orders(0) == [replace(shard(0), attempt=2)]


def test_a_reply_that_was_damaged_on_its_way_is_a_failed_attempt() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, shard(0))
    whole = answer(0, shard(0))
    assert isinstance(whole, Contribution)
    pool.reply(0, replace(whole, gradient=whole.gradient + 1))
    outcomes = drain(dispatcher, pool)
    assert kinds(outcomes) == ["shard_error"] and "damaged on its way" in outcomes[0].message
    pool.reply(1)
    assert accepted(drain(dispatcher, pool)) == [0]


@pytest.mark.parametrize("attempts", [1, 2, 3])
@pytest.mark.parametrize("how", ["error", "lose"])
def test_a_shard_that_fails_in_all_its_attempts_ends_the_run(attempts: int, how: str) -> None:
    dispatcher, pool = started(2, attempts=attempts, clock=itertools.count().__next__)
    submit(dispatcher, shard(7))
    with pytest.raises(PoisonShardError) as caught:
        for _ in range(attempts):
            slot = pool.busy[0]
            pool.error(slot) if how == "error" else pool.lose(slot)
            drain(dispatcher, pool)
            if pool.starting:
                pool.ready()
    message = "ValueError: scripted" if how == "error" else "the actor died"
    each = "; ".join(f"worker {number % 2} on node: {message}" for number in range(attempts))
    assert str(caught.value) == f"shard 7 (episodes 56–63) failed {attempts} times ({each})\nTraceback …"
    assert len(pool.submitted) == attempts


def test_a_worker_that_was_dead_when_it_got_a_shard_says_nothing_of_it() -> None:
    dispatcher, pool = started(3, attempts=2)
    submit(dispatcher, shard(7))
    for slot in (0, 1):
        pool.lose(slot)
        assert kinds(drain(dispatcher, pool)) == ["worker_lost"]
    pool.reply(2)
    assert accepted(drain(dispatcher, pool)) == [7]


def test_an_evaluation_that_fails_in_all_its_attempts_names_its_episodes() -> None:
    dispatcher, pool = started(1, attempts=1)
    submit(dispatcher, evaluation(2))
    pool.error(0, detail="")
    with pytest.raises(PoisonShardError, match=r"^evaluation of val episodes 20–29 failed 1 times.*scripted\)$"):
        drain(dispatcher, pool)


# --------------------------------------------------------------------------------------------------- non-finite replies


def bad(order: Order, slot: int, bits: float = NAN) -> Contribution:
    assert isinstance(order, ShardTask)
    about = {"worker": slot, "attempt": order.attempt, "episodes": order.episodes}
    return contribution(order.shard, order.base_version, [1, bits], **about)


def reply_bad(pool: FakePool, slot: int, bits: float = NAN) -> None:
    pool.reply(slot, bad(pool.orders(slot)[0], slot, bits))


def test_a_non_finite_shard_is_computed_again_elsewhere_and_the_same_bits_settle_it() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, shard(0))
    reply_bad(pool, 0)
    outcomes = drain(dispatcher, pool)
    assert outcomes == [Failure("nonfinite", "shard 0 from worker 0 is not finite: asked again")]
    assert pool.orders(1) == [replace(shard(0), attempt=1)] and dispatcher._work
    reply_bad(pool, 1)
    (outcome,) = drain(dispatcher, pool)
    assert isinstance(outcome, Accepted) and not outcome.finite and outcome.contribution.worker == 1
    assert not dispatcher._work


def test_a_finite_second_opinion_is_used_and_the_first_worker_suspected() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, shard(0))
    reply_bad(pool, 0)
    drain(dispatcher, pool)
    pool.reply(1)
    failure, outcome = drain(dispatcher, pool)
    assert failure == Failure(
        "duplicate_mismatch", "shard 0: worker 0 and worker 1 differ (finite there); worker 0 is suspect"
    )
    assert isinstance(outcome, Accepted) and outcome.finite and outcome.contribution.worker == 1


def test_other_non_finite_bits_are_reported_and_have_no_weight() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, shard(0))
    reply_bad(pool, 0)
    drain(dispatcher, pool)
    reply_bad(pool, 1, float("inf"))
    failure, outcome = drain(dispatcher, pool)
    assert isinstance(failure, Failure) and failure.kind == "duplicate_mismatch" and "other bits" in failure.message
    assert isinstance(outcome, Accepted) and not outcome.finite


def test_bits_of_other_hardware_are_no_mismatch() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, shard(0))
    reply_bad(pool, 0)
    drain(dispatcher, pool)
    other = replace(contribution(0, gradient=(NAN, 0.0, 0.0), attempt=1, worker=1, episodes=8), fingerprint="other")
    pool.reply(1, replace(other, digest=other.content_digest()))
    (outcome,) = drain(dispatcher, pool)
    assert isinstance(outcome, Accepted) and not outcome.finite


def test_the_second_opinion_waits_for_another_worker_that_is_full() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, *map(shard, range(4)))
    reply_bad(pool, 0)
    drain(dispatcher, pool)
    assert pool.orders(0) == [shard(2)] and pool.orders(1) == [shard(1), shard(3)]
    assert dispatcher.room == 0
    pool.reply(1)
    drain(dispatcher, pool)
    assert pool.orders(1) == [shard(3), replace(shard(0), attempt=1)]


def test_the_only_worker_alive_gives_the_second_opinion_itself() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, shard(0), shard(1))
    pool.lose(1)
    drain(dispatcher, pool)
    reply_bad(pool, 0)
    assert kinds(drain(dispatcher, pool)) == ["nonfinite"]
    assert pool.orders(0) == [replace(shard(1), attempt=1), replace(shard(0), attempt=1)]
    pool.reply(0)
    reply_bad(pool, 0)
    outcomes = drain(dispatcher, pool)
    assert [(o.contribution.shard, o.finite) for o in outcomes if isinstance(o, Accepted)] == [(1, True), (0, False)]


def test_a_second_opinion_that_is_lost_is_asked_of_yet_another_worker_not_of_the_first() -> None:
    dispatcher, pool = started(3)
    submit(dispatcher, shard(0))
    reply_bad(pool, 0)
    drain(dispatcher, pool)
    pool.lose(1)
    drain(dispatcher, pool)
    assert pool.orders(2) == [replace(shard(0), attempt=2)]
    pool.error(2)
    assert kinds(drain(dispatcher, pool)) == ["shard_error"]
    # Worker 2 has failed, worker 0 has given what is in doubt, the new worker 1 is not there yet.
    assert pool.orders(2) == [replace(shard(0), attempt=3)]


def test_a_new_worker_in_the_first_one_s_slot_may_give_the_second_opinion() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, shard(0), shard(1), shard(2), shard(3))
    reply_bad(pool, 0)
    drain(dispatcher, pool)
    pool.lose(0)
    drain(dispatcher, pool)
    pool.ready(0)
    drain(dispatcher, pool)
    assert pool.orders(0) == [replace(shard(0), attempt=1), replace(shard(2), attempt=1)]


def test_nothing_speaks_against_a_new_worker_in_the_first_one_s_slot() -> None:
    dispatcher, pool = started(2, limit=3, attempts=9)
    submit(dispatcher, shard(0))
    reply_bad(pool, 0)
    drain(dispatcher, pool)
    pool.error(1)
    drain(dispatcher, pool)
    assert pool.orders(1) == [replace(shard(0), attempt=2)]
    submit(dispatcher, shard(1))
    pool.lose(0)
    drain(dispatcher, pool)
    pool.ready(0)
    drain(dispatcher, pool)
    pool.error(1)
    drain(dispatcher, pool)
    # Both present workers have failed at it, neither has given the reply in doubt: the less loaded one is asked.
    pool.error(0)
    drain(dispatcher, pool)
    assert pool.orders(1) == [replace(shard(1), attempt=1)]
    assert pool.orders(0) == [replace(shard(0), attempt=4)]


# ---------------------------------------------------------------------------------------------- starts, evaluation, end


def test_three_failed_starts_of_one_worker_in_a_row_end_the_run() -> None:
    pool = FakePool(2)
    dispatcher = Dispatcher(pool, Policy(2, 3, backoff=0.0), still)
    pool.fail_start(0)
    (failure,) = drain(dispatcher, pool)
    assert failure == Failure("worker_lost", "worker 0 failed to start: no such luck")
    assert pool.replaced == [0]
    pool.fail_start(0)
    drain(dispatcher, pool)
    pool.fail_start(0)
    with pytest.raises(ClusterError, match="workers fail to start: no such luck"):
        drain(dispatcher, pool)


def test_a_node_that_dies_with_all_workers_that_start_there_does_not_end_the_run() -> None:
    pool = FakePool(8)
    dispatcher = Dispatcher(pool, Policy(2, 3, backoff=0.0), still)
    for _ in range(2):
        for slot in range(8):
            pool.fail_start(slot)
        assert kinds(drain(dispatcher, pool)) == ["worker_lost"] * 8
    assert pool.replaced == list(range(8)) * 2
    pool.ready(5)
    assert kinds(drain(dispatcher, pool)) == ["Joined"]


def test_starts_that_fail_beside_workers_do_not_count_when_those_are_gone() -> None:
    pool = FakePool(2)
    dispatcher = Dispatcher(pool, Policy(2, 3, backoff=0.0), still)
    pool.ready(0)
    drain(dispatcher, pool)
    for _ in range(3):
        pool.fail_start(1)
        assert kinds(drain(dispatcher, pool)) == ["worker_lost"]
    submit(dispatcher, shard(0))
    pool.lose(0)
    drain(dispatcher, pool)
    pool.fail_start(1)
    assert kinds(drain(dispatcher, pool)) == ["worker_lost"]


def test_a_start_that_works_forgives_the_failed_ones_before() -> None:
    pool = FakePool(2)
    dispatcher = Dispatcher(pool, Policy(2, 3, backoff=0.0), still)
    for _ in range(4):
        for _ in range(2):
            pool.fail_start(0)
            assert kinds(drain(dispatcher, pool)) == ["worker_lost"]
        if 1 in pool.starting:
            pool.ready(1)
        else:
            submit(dispatcher, shard(len(pool.submitted)))
            pool.lose(1)
            drain(dispatcher, pool)
            pool.ready(1)
        assert "Joined" in kinds(drain(dispatcher, pool))
        while pool.busy:
            pool.reply(1)
            drain(dispatcher, pool)
    assert pool.replaced.count(0) == 8


def test_evaluation_orders_go_the_same_ways() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, evaluation(0, 5), shard(0, 5), evaluation(1, 5))
    assert [slot for slot, _ in pool.submitted] == [0, 1, 0]
    pool.reply(0)
    (outcome,) = drain(dispatcher, pool)
    assert isinstance(outcome, Evaluated) and (outcome.part.part, outcome.part.version) == (0, 5)
    pool.lose(0)
    drain(dispatcher, pool)
    pool.reply(1)
    pool.reply(1)
    outcomes = drain(dispatcher, pool)
    assert kinds(outcomes) == ["Accepted", "Evaluated"]
    assert isinstance(outcomes[1], Evaluated) and outcomes[1].part.attempt == 1


def test_scores_that_were_damaged_on_their_way_are_computed_again() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, evaluation(0, 5))
    part = answer(0, evaluation(0, 5))
    assert isinstance(part, EvaluationPart)
    pool.reply(0, replace(part, loss=part.loss + 1))
    assert kinds(drain(dispatcher, pool)) == ["shard_error"]
    pool.reply(1)
    (outcome,) = drain(dispatcher, pool)
    assert isinstance(outcome, Evaluated) and outcome.part.loss.tolist() == part.loss.tolist()


def test_a_dispute_ends_the_run_if_no_third_worker_comes() -> None:
    now = [0.0]
    pool = FakePool(3, restarts=True)
    dispatcher = Dispatcher(pool, Policy(2, 3, backoff=0.0, verify=1.0, start_timeout=10.0), lambda: now[0])
    pool.ready(0, 1)
    drain(dispatcher, pool)
    submit(dispatcher, shard(0))
    drain(dispatcher, pool)
    for slot in (0, 1):
        pool.reply(slot, contribution(0, gradient=(slot, 0.0, 0.0), attempt=slot, worker=slot, episodes=8))
    (disputed,) = drain(dispatcher, pool)
    assert isinstance(disputed, Failure) and "workers [0, 1] differ; a third one is asked" in disputed.message
    now[0] = 50.0
    assert drain(dispatcher, pool) == []
    now[0] = 51.0
    with pytest.raises(
        NumericsError, match=r"workers \[0, 1\] give different bits, and no further one has come in 50 s"
    ):
        drain(dispatcher, pool)


def test_workers_whose_node_is_being_sent_the_store_may_take_longer_and_that_is_said() -> None:
    now = [0.0]
    pool = FakePool(2, restarts=True)
    dispatcher = Dispatcher(pool, Policy(2, 3, backoff=0.0, start_timeout=20.0), lambda: now[0])
    said = []
    for second in range(0, 400, 2):
        now[0] = float(second)
        pool.send(1, second * 1_000_000, 400_000_000)
        said += [outcome for outcome in drain(dispatcher, pool) if isinstance(outcome, Delay)]
    assert pool.replaced == []
    assert said[1] == Delay("worker 1's node lacks the store: it has been sent 6.0 of 400.0 MB")
    assert len(said) == len(range(0, 400, 6))
    now[0] += 101.0
    drain(dispatcher, pool)
    assert pool.replaced == [0, 1]


def test_what_was_computed_for_nothing_is_counted_by_cause() -> None:
    now = [0.0]
    dispatcher, pool = started(2, clock=lambda: now[0])
    submit(dispatcher, shard(0), shard(1), shard(2))
    now[0] = 1.0
    pool.miss(0)
    drain(dispatcher, pool)
    assert dispatcher.goodput.lost == {"unreachable": 1}
    now[0] = 3.0
    dispatcher.forget()
    assert dispatcher.goodput.lost == {"unreachable": 1, "stopped": 2}
    assert dispatcher.goodput.lost_seconds == {"unreachable": 1.0, "stopped": 5.0}


def test_what_is_forgotten_never_comes_back_but_occupies_its_worker_until_it_is_done() -> None:
    dispatcher, pool = started(3)
    submit(dispatcher, *map(shard, range(5)))
    pool.error(0)
    assert kinds([dispatcher.next(1.0)]) == ["shard_error"]  # type: ignore[list-item]
    assert pool.orders(2) == [shard(2), replace(shard(0), attempt=1)]
    dispatcher.forget()
    assert (dispatcher._work, dispatcher.in_flight, dispatcher.room) == ({}, 5, 1)
    pool.error(0)
    pool.reply(2)
    reply_bad(pool, 2)
    assert drain(dispatcher, pool) == []
    assert (dispatcher.in_flight, dispatcher.room) == (2, 4)
    pool.lose(1)
    assert kinds(drain(dispatcher, pool)) == ["worker_lost"]
    assert (pool.replaced, dispatcher.in_flight) == ([1], 0)
    # The same work may be ordered again, and its forgotten attempts do not count for it.
    submit(dispatcher, evaluation(1))
    pool.reply(0)
    assert kinds(drain(dispatcher, pool)) == ["Evaluated"]


def test_what_waits_for_room_is_forgotten_as_well() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, *map(shard, range(4)))
    pool.error(0)
    drain(dispatcher, pool)
    assert dispatcher.room == 0
    dispatcher.forget()
    assert dispatcher.room == 1
    pool.reply(1)
    assert drain(dispatcher, pool) == []
    assert pool.orders(1) == [shard(3)]


def test_a_forgotten_attempt_settles_nothing_when_its_order_is_given_again() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, shard(0))
    pool.error(0)
    drain(dispatcher, pool)
    assert pool.orders(1) == [replace(shard(0), attempt=1)]
    dispatcher.forget()
    pool.forget()
    submit(dispatcher, shard(0))
    assert pool.orders(0) == [shard(0)]
    pool.reply(1)
    assert drain(dispatcher, pool) == [] and dispatcher._work
    pool.reply(0)
    (outcome,) = drain(dispatcher, pool)
    assert isinstance(outcome, Accepted) and outcome.contribution.attempt == 0


def test_an_outcome_that_was_not_fetched_is_forgotten_and_its_failures_are_not() -> None:
    dispatcher, pool = started(2)
    submit(dispatcher, shard(0))
    reply_bad(pool, 0)
    drain(dispatcher, pool)
    pool.reply(1)
    assert kinds([dispatcher.next(1.0)]) == ["duplicate_mismatch"]  # type: ignore[list-item]
    dispatcher.forget()
    assert dispatcher.next(1.0) is None


def test_orders_in_words() -> None:
    assert describe(shard(3)) == "shard 3 (episodes 24–31)"
    assert describe(evaluation(3, split="test")) == "evaluation of test episodes 30–39"


# ------------------------------------------------------------------------------------------------------ any schedule


class Simulation:
    """A run driven by aggregator, dispatcher and scripted pool; ``choose`` decides what happens next.

    Args:
        config: of the aggregator.
        versions: after which the run ends.
        workers: slots.
        choose: a number below its argument.
        faults: deaths, errors and failed starts that may still happen.
        nonfinite: shards that are not finite, whoever computes them.
        transient: shards whose first attempt is not finite.
    """

    def __init__(
        self,
        config: sections.Aggregator,
        versions: int,
        workers: int,
        choose: Callable[[int], int],
        faults: int = 0,
        nonfinite: frozenset[int] = frozenset(),
        transient: frozenset[int] = frozenset(),
    ) -> None:
        self._choose, self._faults = choose, faults
        self._nonfinite, self._transient = nonfinite, transient
        self._versions = versions
        self.pool = FakePool(workers, 2, self._answer)
        self.aggregator = build_aggregator(config)
        self.dispatcher = Dispatcher(self.pool, Policy(2, attempts=1000, backoff=0.0), still)
        self.version = 0
        self.counted: list[Counted] = []
        self.happened: Counter[str] = Counter()
        self._digest = hashlib.sha256()

    def run(self) -> str:
        """Run to the last version; the digest of all updates."""
        for _ in range(10_000):
            if self.version == self._versions:
                return self._digest.hexdigest()
            while self.dispatcher.room > 0 and (number := self.aggregator.next_shard()) is not None:
                submit(self.dispatcher, shard(number, self.version))
            self._happen()
            outcome = self.dispatcher.next(1.0)
            self.happened[kinds([outcome])[0] if outcome is not None else "nothing"] += 1
            if isinstance(outcome, Accepted):
                self._take(outcome)
        raise AssertionError(f"the run hangs: {self.happened}, in flight {self.dispatcher.in_flight}")

    def _happen(self) -> None:
        pool = self.pool
        acts: list[Callable[[], None]] = [lambda slot=slot: pool.reply(slot) for slot in pool.busy]  # type: ignore[misc]
        acts += [lambda slot=slot: pool.ready(slot) for slot in pool.starting]  # type: ignore[misc]
        acts += [lambda index=index: pool.release(index) for index in range(len(pool.late))]  # type: ignore[misc]
        if self._faults:
            acts += [lambda slot=slot: self._fault(slot) for slot in pool.busy]  # type: ignore[misc]
        if acts:
            acts[self._choose(len(acts))]()

    def _fault(self, slot: int) -> None:
        self._faults -= 1
        orders = len(self.pool.orders(slot))
        match self._choose(4):
            case 0:
                self.pool.error(slot)
            case 1:
                self.pool.lose(slot)
            case 2:
                self.pool.lose(slot, first=orders - 1)
            case _:
                self.pool.lose(slot, first=orders - 1, computed=True)

    def _answer(self, slot: int, order: Order) -> Contribution | EvaluationPart:
        result = answer(slot, order)
        assert isinstance(result, Contribution)
        if result.shard in self._nonfinite or (result.shard in self._transient and order.attempt == 0):
            return contribution(result.shard, result.base_version, result.gradient * NAN, worker=slot)
        return result

    def _take(self, outcome: Accepted) -> None:
        result = self.aggregator.add(outcome.contribution, self.version, finite=outcome.finite)
        if isinstance(result, Update):
            self.counted += result.counted
            self.version += 1
            self._digest.update(result.gradient.tobytes() + repr((result.counted, result.loss)).encode())
        elif isinstance(result, Dropped):
            self.happened["dropped"] += 1


def reference_digest(versions: int, shards: int, nonfinite: frozenset[int]) -> str:
    """The digest of a synchronous run by the definition, in float32, shard after shard."""
    digest = hashlib.sha256()
    for version in range(versions):
        gradients, episodes, counted, losses = [], 0, [], 0.0
        for number in range(version * shards, (version + 1) * shards):
            made = answer(0, shard(number, version))
            assert isinstance(made, Contribution)
            if number in nonfinite:
                made = contribution(number, version, made.gradient * NAN)
            else:
                episodes += made.episodes
                losses += made.statistics.loss * made.episodes
            weight = 0.0 if number in nonfinite else 1.0
            gradients.append(np.zeros_like(made.gradient) if number in nonfinite else made.gradient)
            counted.append(Counted(number, version, weight, made.digest, "f"))
        assert shards == 3
        total = (gradients[0] + gradients[1]) + gradients[2]
        loss = losses / episodes if episodes else NAN
        digest.update((total / np.float32(max(1, episodes))).tobytes() + repr((tuple(counted), loss)).encode())
    return digest.hexdigest()


VERSIONS, SHARDS = 3, 3
some_shards = st.frozensets(st.integers(0, VERSIONS * SHARDS - 1), max_size=3)
luck = st.randoms(use_true_random=False)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(luck, st.integers(1, 4), st.integers(0, 12), some_shards, some_shards)
def test_any_schedule_of_replies_deaths_and_delays_gives_the_same_synchronous_run(
    random: st.random.Random,  # type: ignore[name-defined]
    workers: int,
    faults: int,
    nonfinite: frozenset[int],
    transient: frozenset[int],
) -> None:
    simulation = Simulation(
        sections.SyncAggregator(shards=SHARDS), VERSIONS, workers, random.randrange, faults, nonfinite, transient
    )
    assert simulation.run() == reference_digest(VERSIONS, SHARDS, nonfinite)
    assert [line.shard for line in simulation.counted] == list(range(VERSIONS * SHARDS))
    assert simulation.happened["Accepted"] == VERSIONS * SHARDS
    assert simulation.happened["worker_lost"] == len(simulation.pool.replaced)
    assert simulation.happened["nonfinite"] >= len(nonfinite)
    assert not simulation.dispatcher._work


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(luck, st.integers(1, 4), st.integers(0, 12), st.integers(0, 3), st.integers(1, 3), some_shards)
def test_any_schedule_keeps_an_asynchronous_run_within_its_bound(
    random: st.random.Random,  # type: ignore[name-defined]
    workers: int,
    faults: int,
    bound: int,
    buffer: int,
    nonfinite: frozenset[int],
) -> None:
    config = sections.AsyncAggregator(staleness_bound=bound, buffer=buffer)
    simulation = Simulation(config, 6, workers, random.randrange, faults, nonfinite)
    simulation.run()
    versions = [index // buffer for index in range(6 * buffer)]
    lines = list(zip(versions, simulation.counted, strict=True))
    assert all(0 <= version - line.base_version <= bound for version, line in lines)
    assert len({line.shard for _, line in lines}) == len(lines)
    assert all((line.weight == 0) == (line.shard in nonfinite) for _, line in lines)


def test_the_random_schedules_do_contain_what_they_are_about() -> None:
    seen: Counter[str] = Counter()
    configs = [sections.SyncAggregator(shards=SHARDS), sections.AsyncAggregator(staleness_bound=0, buffer=2)]
    for seed in range(60):
        random = np.random.default_rng(seed)

        def choose(below: int, random: np.random.Generator = random) -> int:
            return int(random.integers(below))

        workers, nonfinite, transient = 1 + seed // 2 % 4, frozenset({1}), frozenset({2})
        simulation = Simulation(configs[seed % 2], VERSIONS, workers, choose, 12, nonfinite, transient)
        simulation.run()
        seen += simulation.happened
    usual = {"Joined", "Accepted", "nothing"}
    faulty = {"worker_lost", "shard_error", "nonfinite", "duplicate_mismatch", "dropped"}
    assert {name for name, count in seen.items() if count >= 10} == usual | faulty
