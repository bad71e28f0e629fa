"""Sinusoid episodes: the formula in float64, ranges, independence of shard size and query count, separate splits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config.sections import SinusoidData
from cluster.episodes.sinusoid import SinusoidSource
from cluster.episodes.types import EpisodeSource
from cluster.errors import SplitError
from cluster.messages import SplitName


@pytest.fixture(scope="module")
def source() -> EpisodeSource:
    return SinusoidSource(SinusoidData(), seed=7)


def test_targets_follow_the_formula(source: EpisodeSource) -> None:
    episodes = source.sample("train", 0, 25, 1, 10, 20)
    assert episodes.support_x.shape == episodes.support_y.shape == (25, 10, *source.sample_shape)
    assert episodes.query_x.shape == episodes.query_y.shape == (25, 20, 1)
    assert len(episodes) == 25 and episodes.way == 1 and source.regression
    amplitude, phase = episodes.metadata["amplitude"], episodes.metadata["phase"]
    for x, y in ((episodes.support_x, episodes.support_y), (episodes.query_x, episodes.query_y)):
        assert x.dtype == y.dtype == torch.float32
        expected = amplitude[:, None, None] * np.sin(x.double().numpy() - phase[:, None, None])
        np.testing.assert_allclose(y.double().numpy(), expected, rtol=0, atol=3e-7)


def test_ranges_are_uniform_and_the_papers(source: EpisodeSource) -> None:
    episodes = source.sample("train", 0, 4000, 1, 5, 5)
    drawn = {
        (0.1, 5.0): episodes.metadata["amplitude"],
        (0.0, np.pi): episodes.metadata["phase"],
        (-5.0, 5.0): torch.cat([episodes.support_x, episodes.query_x], 1).numpy().ravel(),
    }
    for (low, high), values in drawn.items():
        assert values.min() >= low and values.max() <= high
        counts = np.histogram(values, bins=10, range=(low, high))[0]
        assert ((counts - values.size / 10) ** 2 / (values.size / 10)).sum() < 27.9, "9 degrees, p = 0.001"


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.sampled_from([1, 2, 4, 8]), st.sampled_from(["train", "val", "test", "all"]))
def test_shard_size_does_not_matter(first: int, shard: int, split: SplitName) -> None:
    source = SinusoidSource(SinusoidData(), seed=7)
    whole = source.sample(split, first, 8, 1, 3, 4)
    parts = [source.sample(split, first + start, shard, 1, 3, 4) for start in range(0, 8, shard)]
    for field in ("support_x", "support_y", "query_x", "query_y"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))
    assert whole.ids.tolist() == list(range(first, first + 8))


def test_support_does_not_change_with_queries_and_shots_extend(source: EpisodeSource) -> None:
    few, many = source.sample("val", 3, 8, 1, 5, 1), source.sample("val", 3, 8, 1, 10, 50)
    assert torch.equal(few.support_x, many.support_x[:, :5]) and torch.equal(few.query_x, many.query_x[:, :1])
    assert np.array_equal(few.metadata["phase"], many.metadata["phase"])
    assert not np.isin(few.support_x.numpy(), many.query_x.numpy()).any(), "support and query are separate streams"


def test_seeds_splits_and_episodes_differ(source: EpisodeSource) -> None:
    draws = [source.sample(split, 0, 16, 1, 2, 2) for split in ("train", "val", "test", "all")]
    draws.append(SinusoidSource(SinusoidData(), seed=8).sample("train", 0, 16, 1, 2, 2))
    for values in ([d.support_x.numpy() for d in draws], [d.metadata["amplitude"] for d in draws]):
        assert len(np.unique(np.concatenate(values))) == sum(v.size for v in values)


def test_episodes_are_pinned(source: EpisodeSource) -> None:
    episodes = source.sample("train", 0, 2, 1, 1, 1)
    pinned = [*episodes.metadata["amplitude"], *episodes.metadata["phase"], *episodes.support_x.ravel().tolist()]
    assert pinned == pytest.approx(
        [4.13177699, 2.52606145, 2.481654283, 0.665398754, 0.615958631, 3.099234819], rel=1e-7
    )


def test_digest_sees_the_ranges(source: EpisodeSource) -> None:
    narrow = SinusoidSource(SinusoidData(x=(-1.0, 1.0)), seed=7)
    assert source.digest == SinusoidSource(SinusoidData(), seed=0).digest != narrow.digest
    assert len(source.digest) == len(source.split_digest) == 64
    assert narrow.sample("train", 0, 50, 1, 5, 5).query_x.abs().max() <= 1


@pytest.mark.parametrize(
    ("way", "shot", "query", "message"),
    [(5, 1, 1, "way 5: sinusoid episodes are regression"), (1, 0, 1, "shot 0, query 1: both must be at least 1")],
)
def test_impossible_episodes_are_refused(source: EpisodeSource, way: int, shot: int, query: int, message: str) -> None:
    with pytest.raises(SplitError, match=message):
        source.check("train", way, shot, query)
    with pytest.raises(SplitError, match=message):
        source.sample("train", 0, 1, way, shot, query)


@pytest.mark.parametrize("metadata", ["hidden", "shuffled", "constant"])
def test_metadata_can_be_hidden_another_episode_s_or_all_the_same_and_the_tasks_stay(metadata: str) -> None:
    own = SinusoidSource(SinusoidData(), 0).sample("train", 5, 200, 1, 3, 2)
    other = SinusoidSource(SinusoidData.model_validate({"metadata": metadata}), 0).sample("train", 5, 200, 1, 3, 2)
    assert torch.equal(own.query_y, other.query_y) and torch.equal(own.support_x, other.support_x)
    for name, (low, high) in {"amplitude": (0.1, 5.0), "phase": (0.0, np.pi)}.items():
        column = other.metadata[name]
        if metadata == "hidden":
            assert np.isnan(column).all()
        elif metadata == "constant":
            assert set(column) == {(low + high) / 2}
        else:
            assert low <= column.min() and column.max() <= high
            assert abs(np.corrcoef(column, own.metadata[name])[0, 1]) < 0.2
