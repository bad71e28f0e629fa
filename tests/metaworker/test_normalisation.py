"""Running batch statistics as learner state: a pure, ordered moving average that converges to the proposals' mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metaworker.learners.normalisation import MOMENTUM, commit_running_statistics, given_statistics

CHANNELS = 3


def proposals_of(rows: list[int], seed: int = 0, dtype: type = np.float32) -> list[dict[str, np.ndarray]]:
    """One proposal for each number of episodes, read-only as they arrive."""
    rng = np.random.default_rng(seed)
    proposals = []
    for count in rows:
        proposal = {
            "mean.0": rng.normal(size=(count, CHANNELS)).astype(dtype),
            "variance.0": rng.uniform(0.5, 2, (count, CHANNELS)).astype(dtype),
        }
        for array in proposal.values():
            array.setflags(write=False)
        proposals.append(proposal)
    return proposals


def initial(dtype: type = np.float32) -> dict[str, np.ndarray]:
    state = {"mean.0": np.zeros(CHANNELS, dtype), "variance.0": np.ones(CHANNELS, dtype)}
    for array in state.values():
        array.setflags(write=False)
    return state


@given(rows=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_a_commit_moves_towards_the_mean_over_all_episodes(rows: list[int], seed: int) -> None:
    proposals, state = proposals_of(rows, seed, np.float64), initial(np.float64)
    following = commit_running_statistics(state, proposals)
    for name, old in state.items():
        episodes = np.concatenate([proposal[name] for proposal in proposals])
        np.testing.assert_allclose(following[name], (1 - MOMENTUM) * old + MOMENTUM * episodes.mean(0), rtol=1e-12)


def test_repeated_commits_converge_to_the_mean() -> None:
    proposals, state = proposals_of([4, 2, 7]), initial()
    for _ in range(400):
        state = commit_running_statistics(state, proposals)
    for name, settled in state.items():
        mean = np.concatenate([proposal[name] for proposal in proposals]).mean(0)
        np.testing.assert_allclose(settled, mean, atol=2e-6)


def test_a_commit_is_summed_in_the_order_of_the_proposals() -> None:
    huge, tiny = np.float32(1e8), np.float32(1)
    values = [huge, tiny, -huge]
    proposals = [{"mean.0": np.full((1, CHANNELS), value, np.float32)} for value in values]
    state = {"mean.0": np.zeros(CHANNELS, np.float32)}
    for order in ([0, 1, 2], [0, 2, 1], [2, 1, 0]):
        total = np.float32(0)
        for index in order:
            total = np.float32(total + values[index])
        expected = np.float32(MOMENTUM) * (total / np.float32(3))
        following = commit_running_statistics(state, [proposals[index] for index in order])
        assert following["mean.0"].tobytes() == np.full(CHANNELS, expected, np.float32).tobytes()


def test_dtype_stays_and_nothing_given_is_touched() -> None:
    proposals, state = proposals_of([2, 3]), initial()
    before = [array.tobytes() for array in (*state.values(), *proposals[0].values())]
    following = commit_running_statistics(state, proposals)
    assert [array.tobytes() for array in (*state.values(), *proposals[0].values())] == before
    assert all(array.dtype == np.float32 and array.flags.writeable for array in following.values())


def test_learners_without_batch_norm_have_nothing_to_commit() -> None:
    assert commit_running_statistics({}, [{}, {}]) == {}


@pytest.mark.parametrize("mode", ["transductive", "support", "running"])
def test_an_evaluation_normalises_by_running_averages_in_running_mode_alone(mode: str) -> None:
    state = {"mean.0": torch.zeros(CHANNELS)}
    assert given_statistics(mode, state) is (state if mode == "running" else None)
    assert given_statistics(mode, {}) is None
