"""Aggregators: the fixed tree, each shard once, staleness bound and weights, and what a resume brings back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import sections
from cluster.messages import Contribution
from coordinator.aggregators import build_aggregator
from coordinator.aggregators.asynchronous import AsyncAggregator, staleness_weight
from coordinator.aggregators.base import Dropped, Update
from coordinator.aggregators.sync import SyncAggregator, tree_sum
from tests.coordinator.harness import contribution

NAN = float("nan")


def mixed_magnitudes(count: int, size: int = 4, seed: int = 0) -> list[np.ndarray]:
    """Float32 arrays whose sum depends on the order of summation."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-4, 5, (count, size))
    return list((rng.standard_normal((count, size)) * scale).astype(np.float32))


def all_issued(aggregator: SyncAggregator | AsyncAggregator, count: int) -> list[int]:
    shards = [aggregator.next_shard() for _ in range(count)]
    assert None not in shards
    return [shard for shard in shards if shard is not None]


def updated(result: Update | Dropped | None) -> Update:
    assert isinstance(result, Update)
    return result


# ------------------------------------------------------------------------------------------------------------ the tree


def test_the_tree_adds_neighbours_and_lifts_an_odd_one_as_it_is() -> None:
    a, b, c, d, e, f, g = mixed_magnitudes(7, size=100)
    assert np.array_equal(tree_sum([a]), a)
    assert np.array_equal(tree_sum([a, b, c]), (a + b) + c)
    assert np.array_equal(tree_sum([a, b, c, d, e]), ((a + b) + (c + d)) + e)
    assert np.array_equal(tree_sum([a, b, c, d, e, f, g]), ((a + b) + (c + d)) + ((e + f) + g))
    assert not np.array_equal(tree_sum([a, b, c, d, e, f, g]), a + b + c + d + e + f + g)


@pytest.mark.parametrize("count", range(1, 18))
def test_the_tree_is_the_sum(count: int) -> None:
    arrays = mixed_magnitudes(count, size=50, seed=count)
    before = [array.copy() for array in arrays]
    exact = np.sum([array.astype(np.float64) for array in arrays], axis=0)
    size = np.sum([np.abs(array.astype(np.float64)) for array in arrays], axis=0)
    total = tree_sum(arrays)
    assert total.dtype == np.float32
    # log2(count) roundings on every leaf's way up, each of at most half a unit in the last place of the partial sum.
    assert np.all(np.abs(total - exact) <= math.ceil(math.log2(max(2, count))) * 2**-24 * size)
    assert all(np.array_equal(now, then) for now, then in zip(arrays, before, strict=True))


class ArrivalOrder(SyncAggregator):
    """The defect that the tree is there to prevent: summing in the order of arrival."""

    def _reduce(self, version: int) -> Update:
        taken = [c for c, _ in self._taken.values()]
        total = tree_sum([c.gradient for c in taken]) / np.float32(sum(c.episodes for c in taken))
        return Update(total, (), (), 0, 0.0, 0.0, 0.0)


def synchronous_update(shards: Sequence[Contribution], arrival: Sequence[int], kind: type[SyncAggregator]) -> Update:
    aggregator = kind(len(shards))
    all_issued(aggregator, len(shards))
    results = [aggregator.add(shards[index], 0) for index in arrival]
    assert all(result is None for result in results[:-1])
    return updated(results[-1])


SHARDS = 7
arrivals = st.permutations(range(SHARDS))
made = [contribution(shard, gradient=g, loss=0.1 * shard) for shard, g in enumerate(mixed_magnitudes(SHARDS))]


@settings(max_examples=200, deadline=None)
@given(arrivals)
def test_any_order_of_arrival_gives_the_same_update(arrival: Sequence[int]) -> None:
    expected = synchronous_update(made, range(SHARDS), SyncAggregator)
    update = synchronous_update(made, arrival, SyncAggregator)
    assert update.gradient.tobytes() == expected.gradient.tobytes()
    assert update.gradient.dtype == np.float32
    assert (update.counted, update.loss, update.metric) == (expected.counted, expected.loss, expected.metric)
    assert [c.shard for c in update.counted] == list(range(SHARDS))


def test_summing_in_the_order_of_arrival_would_be_caught() -> None:
    rng = np.random.default_rng(0)
    orders = [rng.permutation(SHARDS).tolist() for _ in range(20)]
    gradients = {synchronous_update(made, order, ArrivalOrder).gradient.tobytes() for order in orders}
    assert len(gradients) > 1


# --------------------------------------------------------------------------------------------------------- synchronous


def test_a_synchronous_update_is_the_mean_over_the_version_s_episodes() -> None:
    aggregator = SyncAggregator(3)
    assert [aggregator.next_shard() for _ in range(4)] == [0, 1, 2, None]
    proposals = {"mean": np.arange(4.0)}
    assert aggregator.add(contribution(2, gradient=[6, 0], episodes=3, loss=1.0, metric=0.5), 0) is None
    assert aggregator.add(contribution(0, gradient=[1, 8], episodes=1, loss=3.0, metric=0.1), 0) is None
    last = contribution(1, gradient=[5, 4], episodes=4, loss=2.0, metric=0.25, proposals=proposals)
    update = updated(aggregator.add(last, 0))
    assert update.gradient.tolist() == [12 / 8, 12 / 8]
    assert (update.episodes, update.staleness) == (8, 0.0)
    assert update.loss == pytest.approx((3 * 1.0 + 3.0 + 4 * 2.0) / 8)
    assert update.metric == pytest.approx((3 * 0.5 + 0.1 + 4 * 0.25) / 8)
    assert [(c.shard, c.base_version, c.weight) for c in update.counted] == [(0, 0, 1.0), (1, 0, 1.0), (2, 0, 1.0)]
    assert update.counted[1].digest == last.digest and update.counted[1].fingerprint == "f"
    assert list(update.proposals) == [proposals]


def test_the_next_version_has_the_next_shards() -> None:
    aggregator = SyncAggregator(2, version=3)
    for version in (3, 4):
        assert all_issued(aggregator, 2) == [2 * version, 2 * version + 1]
        assert (aggregator.next_shard(), aggregator.next_id) == (None, 2 * (version + 1))
        assert aggregator.outstanding() == [2 * version, 2 * version + 1]
        assert aggregator.add(contribution(2 * version + 1, version), version) is None
        assert (aggregator.outstanding(), len(aggregator.pending())) == ([2 * version], 1)
        updated(aggregator.add(contribution(2 * version, version), version))
        assert (aggregator.outstanding(), aggregator.pending()) == ([], [])


def test_a_synchronous_version_takes_each_shard_exactly_once_and_no_other() -> None:
    aggregator = SyncAggregator(3, version=1)
    assert all_issued(aggregator, 2) == [3, 4]
    assert aggregator.add(contribution(3, 1), 1) is None
    for refused in (
        contribution(3, 1),  # a duplicate
        contribution(5, 1),  # wanted, but never handed out
        contribution(0, 0),  # of an earlier version
        contribution(4, 0),  # the right shard of a stale base version
        contribution(9, 1),  # of no version near
    ):
        with pytest.raises(
            ValueError, match=rf"shard {refused.shard} of version {refused.base_version} is not awaited"
        ):
            aggregator.add(refused, 1)
    with pytest.raises(ValueError, match="shard 4 of version 1 is not awaited at 2"):
        aggregator.add(contribution(4, 1), 2)
    assert ([c.shard for c, _ in aggregator.pending()], aggregator.outstanding()) == ([3], [4])
    assert aggregator.add(contribution(4, 1), 1) is None
    assert all_issued(aggregator, 1) == [5]
    assert [c.shard for c in updated(aggregator.add(contribution(5, 1), 1)).counted] == [3, 4, 5]
    with pytest.raises(ValueError, match="not awaited"):
        aggregator.add(contribution(5, 1), 2)


def test_a_non_finite_shard_has_no_weight_in_a_synchronous_update() -> None:
    aggregator = SyncAggregator(3)
    all_issued(aggregator, 3)
    aggregator.add(contribution(0, gradient=[2, 4], loss=1.0), 0)
    bad = contribution(1, gradient=[NAN, math.inf], loss=NAN, proposals={"mean": np.array([NAN])})
    aggregator.add(bad, 0, finite=False)
    update = updated(aggregator.add(contribution(2, gradient=[6, 0], loss=2.0), 0))
    assert update.gradient.tolist() == [8 / 4, 4 / 4]
    assert (update.episodes, update.loss, list(update.proposals)) == (4, 1.5, [])
    assert [(c.shard, c.weight) for c in update.counted] == [(0, 1.0), (1, 0.0), (2, 1.0)]
    assert update.counted[1].digest == bad.digest


@pytest.mark.parametrize("aggregator", [SyncAggregator(1), AsyncAggregator(3, 0.5, 1)], ids=["sync", "async"])
def test_an_update_of_nothing_finite_moves_nothing_and_has_no_loss(
    aggregator: SyncAggregator | AsyncAggregator,
) -> None:
    all_issued(aggregator, 1)
    update = updated(aggregator.add(contribution(0, gradient=[NAN, 1]), 0, finite=False))
    assert update.gradient.tolist() == [0.0, 0.0]
    assert update.episodes == 0 and math.isnan(update.loss) and math.isnan(update.metric)


def test_a_synchronous_resume_goes_on_with_what_was_taken() -> None:
    undisturbed, aggregator = SyncAggregator(4, version=2), SyncAggregator(4, version=2)
    shards = {8 + index: contribution(8 + index, 2, gradient) for index, gradient in enumerate(mixed_magnitudes(4))}
    for each in (undisturbed, aggregator):
        all_issued(each, 4)
        each.add(shards[10], 2, finite=False)
        each.add(shards[8], 2)
    pending = aggregator.pending()
    assert [(c.shard, finite) for c, finite in pending] == [(8, True), (10, False)]
    resumed = build_aggregator(sections.SyncAggregator(shards=4), 2, pending=pending)
    assert [resumed.next_shard() for _ in range(3)] == [9, 11, None]
    for each in (undisturbed, resumed):
        each.add(shards[11], 2)
    results = [updated(each.add(shards[9], 2)) for each in (undisturbed, resumed)]
    assert results[0].gradient.tobytes() == results[1].gradient.tobytes()
    assert results[0].counted == results[1].counted
    with pytest.raises(ValueError, match=r"pending shards \[9\] are not of version 3"):
        SyncAggregator(4, 3, [(shards[9], True)])


# -------------------------------------------------------------------------------------------------------- asynchronous


@pytest.mark.parametrize(
    ("staleness", "exponent", "weight"), [(0, 0.5, 1.0), (3, 0.5, 0.5), (3, 1.0, 0.25), (7, 0.0, 1.0), (8, 0.5, 1 / 3)]
)
def test_the_weight_falls_with_staleness(staleness: int, exponent: float, weight: float) -> None:
    assert staleness_weight(staleness, exponent) == pytest.approx(weight, rel=1e-15)


def test_an_asynchronous_update_is_the_weighted_mean_gradient() -> None:
    aggregator = AsyncAggregator(bound=3, exponent=0.5, buffer=1)
    assert all_issued(aggregator, 3) == [0, 1, 2]
    update = updated(aggregator.add(contribution(1, 4, [4, 8], episodes=2, loss=0.75), 7))
    assert update.gradient.tolist() == [0.5 * 4 / 2, 0.5 * 8 / 2]
    assert (update.episodes, update.loss, update.staleness) == (2, 0.75, 3.0)
    assert [(c.shard, c.base_version, c.weight) for c in update.counted] == [(1, 4, 0.5)]


def test_what_is_too_stale_is_dropped_and_never_counted() -> None:
    aggregator = AsyncAggregator(bound=3, exponent=0.5, buffer=2)
    all_issued(aggregator, 3)
    stale = contribution(1, 2)
    dropped = aggregator.add(stale, 6)
    assert dropped == Dropped(1, 2, stale.digest, "staleness 4 is above the bound 3")
    assert (aggregator.pending(), aggregator.outstanding()) == ([], [0, 2])
    with pytest.raises(ValueError, match="shard 1 is not awaited"):
        aggregator.add(stale, 6)
    assert aggregator.add(contribution(0, 3), 6) is None
    assert [c.shard for c in updated(aggregator.add(contribution(2, 6), 6)).counted] == [0, 2]


def test_an_asynchronous_run_takes_each_shard_at_most_once_and_none_of_the_future() -> None:
    aggregator = AsyncAggregator(bound=3, exponent=0.5, buffer=3)
    all_issued(aggregator, 2)
    aggregator.add(contribution(0), 0)
    for unknown in (0, 2):
        with pytest.raises(ValueError, match=f"shard {unknown} is not awaited: it counts at most once"):
            aggregator.add(contribution(unknown), 0)
    with pytest.raises(ValueError, match="shard 1 is of version 5, the run is at 4"):
        aggregator.add(contribution(1, 5), 4)
    assert aggregator.outstanding() == [1]
    assert aggregator.add(contribution(1, 4), 4) is None


@pytest.mark.parametrize("buffer", [1, 3, 8])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.3])
def test_a_buffered_update_is_the_float64_reference(buffer: int, exponent: float) -> None:
    rng = np.random.default_rng(buffer)
    aggregator = AsyncAggregator(bound=20, exponent=exponent, buffer=buffer)
    all_issued(aggregator, buffer)
    version, reference, size = 20, np.zeros(6), np.zeros(6)
    results: list[Update | Dropped | None] = []
    for shard in rng.permutation(buffer).tolist():
        base, episodes, finite = int(rng.integers(0, 21)), int(rng.integers(1, 9)), bool(rng.random() < 0.8)
        gradient = rng.standard_normal(6).astype(np.float32) * 10.0 ** rng.integers(-3, 4)
        made = contribution(shard, base, gradient if finite else gradient * NAN, episodes=episodes)
        if finite:
            term = (1 + version - base) ** -exponent * made.gradient.astype(np.float64) / episodes / buffer
            reference, size = reference + term, size + np.abs(term)
        results.append(aggregator.add(made, version, finite=finite))
    assert all(result is None for result in results[:-1])
    update = updated(results[-1])
    assert update.gradient.dtype == np.float32
    assert np.all(np.abs(update.gradient - reference) <= (buffer + 3) * 2**-24 * size)


class AsyncModel:
    """A run of an asynchronous aggregator in arbitrary order, with everything it must keep to written down again."""

    def __init__(self, bound: int, buffer: int, exponent: float) -> None:
        self.bound, self.buffer, self.exponent = bound, buffer, exponent
        self.aggregator = build_aggregator(
            sections.AsyncAggregator(staleness_bound=bound, staleness_exponent=exponent, buffer=buffer)
        )
        self.version = 0
        self.flying: dict[int, int] = {}
        self.seen: set[int] = set()
        self.counted: list[int] = []
        self.dropped: list[int] = []

    def issue(self) -> None:
        shard = self.aggregator.next_shard()
        assert shard is not None and shard not in self.seen
        self.seen.add(shard)
        self.flying[shard] = self.version

    def arrive(self, index: int, finite: bool) -> None:
        shard = sorted(self.flying)[index % len(self.flying)]
        base = self.flying.pop(shard)
        result = self.aggregator.add(contribution(shard, base), self.version, finite=finite)
        if self.version - base > self.bound:
            assert isinstance(result, Dropped) and result.shard == shard
            self.dropped.append(shard)
        elif isinstance(result, Update):
            for line in result.counted:
                staleness = self.version - line.base_version
                assert 0 <= staleness <= self.bound
                assert line.weight in (0.0, staleness_weight(staleness, self.exponent))
            assert len(result.counted) == self.buffer and result.counted[-1].shard == shard
            assert (result.counted[-1].weight == 0) == (not finite)
            self.counted += [line.shard for line in result.counted]
            self.version += 1
        else:
            assert result is None

    def check(self) -> None:
        pending = [c.shard for c, _ in self.aggregator.pending()]
        everywhere = [*self.counted, *self.dropped, *pending, *self.aggregator.outstanding()]
        assert sorted(everywhere) == list(range(self.aggregator.next_id))
        assert sorted(self.flying) == [s for s in self.aggregator.outstanding() if s in self.seen]


steps = st.lists(st.tuples(st.sampled_from(["issue", "arrive", "arrive"]), st.integers(0, 50), st.integers(0, 9)))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 3), st.integers(1, 3), st.sampled_from([0.0, 0.5, 2.0]), steps, st.integers(0, 40))
def test_any_schedule_keeps_the_bound_and_counts_each_shard_at_most_once(
    bound: int, buffer: int, exponent: float, steps: list[tuple[str, int, int]], resume_at: int
) -> None:
    model = AsyncModel(bound, buffer, exponent)
    for number, (what, index, luck) in enumerate(steps):
        if what == "issue":
            model.issue()
        elif model.flying:
            model.arrive(index, finite=luck > 0)
        if number == resume_at:  # everything in flight is given up, and issued again before anything new
            aggregator = model.aggregator
            lost = aggregator.outstanding()
            config = sections.AsyncAggregator(staleness_bound=bound, staleness_exponent=exponent, buffer=buffer)
            model.aggregator = build_aggregator(config, model.version, aggregator.next_id, lost, aggregator.pending())
            model.seen -= set(lost)
            model.flying.clear()
            assert model.aggregator.outstanding() == lost
        model.check()


def test_reissued_shards_come_first_and_the_buffer_goes_on() -> None:
    before = AsyncAggregator(bound=3, exponent=0.5, buffer=3)
    all_issued(before, 6)
    before.add(contribution(4, 0, [1, 0]), 0)
    before.add(contribution(1, 0, [NAN, 0]), 0, finite=False)
    config = sections.AsyncAggregator(staleness_bound=3, staleness_exponent=0.5, buffer=3)
    after = build_aggregator(config, 0, before.next_id, reversed(before.outstanding()), before.pending())
    assert (after.outstanding(), after.next_id) == ([0, 2, 3, 5], 6)
    assert [after.next_shard() for _ in range(6)] == [0, 2, 3, 5, 6, 7]
    assert after.outstanding() == [0, 2, 3, 5, 6, 7]
    update = updated(after.add(contribution(7, 0, [3, 6]), 0))
    assert [(c.shard, c.weight) for c in update.counted] == [(4, 1.0), (1, 0.0), (7, 1.0)]
    assert update.gradient.tolist() == pytest.approx([(1 / 2 + 3 / 2) / 3, (6 / 2) / 3])
