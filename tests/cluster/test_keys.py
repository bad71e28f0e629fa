"""Streams: published known answers, an independent scalar reference, uniformity, prefix stability, separation."""

import hashlib
import json
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster import keys

IDS = np.arange(32, dtype=np.int64)


def scalar_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 with Python integers, written from the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    mixed = keys.philox4x32(np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64))
    assert tuple(int(word) for word in mixed[:, 0]) == answer
    assert scalar_philox(counter, key) == answer


def test_words_follow_the_documented_layout() -> None:
    seed, split, purpose = 2**63 - 1, "val", "samples"
    digest = hashlib.sha256(json.dumps(["metafleet.keys/1", seed, split, purpose]).encode()).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    ids = np.array([0, 7, 2**32 + 5, 2**62], dtype=np.int64)
    drawn = keys.lane_words(seed, purpose, split, ids, lanes=3, count=6)
    assert drawn.shape == (4, 3, 6) and drawn.dtype == np.uint32
    for e, episode in enumerate(ids.tolist()):
        for lane in range(3):
            blocks = [scalar_philox((episode % 2**32, episode >> 32, block, lane), key) for block in range(2)]
            assert drawn[e, lane].tolist() == [*blocks[0], *blocks[1]][:6]


def test_words_are_pinned() -> None:
    drawn = keys.words(0, "classes", "train", IDS[:2], 3)
    assert drawn.tolist() == [[1540894282, 2912799403, 3096232369], [2165404228, 1231970260, 2006003511]]


def test_streams_do_not_depend_on_batch_or_count() -> None:
    whole = keys.words(3, "p", "train", IDS, 11)
    assert np.array_equal(
        whole, np.concatenate([keys.words(3, "p", "train", IDS[i : i + 8], 11) for i in (0, 8, 16, 24)])
    )
    assert np.array_equal(whole[:, :5], keys.words(3, "p", "train", IDS, 5))
    assert np.array_equal(whole, keys.lane_words(3, "p", "train", IDS, 4, 11)[:, 0])
    assert np.array_equal(keys.normals(3, "p", "train", IDS, 4)[:, :3], keys.normals(3, "p", "train", IDS, 3))


def test_seed_split_purpose_episode_and_lane_each_make_another_stream() -> None:
    streams = [
        keys.lane_words(seed, purpose, split, IDS, 3, 4).reshape(-1, 4)
        for seed in (0, 1, 2**40)
        for split in ("train", "val", "rain")
        for purpose in ("a", "b", "at")
    ]
    rows = np.concatenate(streams)
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_uniforms_fill_the_unit_interval() -> None:
    drawn = keys.uniforms(1, "u", "train", np.arange(2000, dtype=np.int64), 10)
    assert drawn.dtype == np.float64 and drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=16, range=(0, 1))[0]
    assert ((counts - drawn.size / 16) ** 2 / (drawn.size / 16)).sum() < 37.7, "chi-square, 15 degrees, p = 0.001"
    extremes = np.array([[0, 0, 2**32 - 1, 2**32 - 1]], dtype=np.uint32)
    assert keys.to_uniforms(extremes).tolist() == [[0.0, 1 - 2.0**-53]]


def test_normals_are_normal_and_follow_box_muller() -> None:
    ids = np.arange(2000, dtype=np.int64)
    drawn = keys.normals(1, "n", "train", ids, 10)
    u = keys.uniforms(1, "n", "train", ids, 10)
    expected = math.sqrt(-2 * math.log(1 - u[5, 2])) * math.sin(2 * math.pi * u[5, 3])
    assert drawn[5, 3] == pytest.approx(expected, rel=1e-12)
    quantiles = [statistics.NormalDist().inv_cdf(q / 10) for q in range(1, 10)]
    counts = np.bincount(np.searchsorted(quantiles, drawn.ravel()), minlength=10)
    assert ((counts - drawn.size / 10) ** 2 / (drawn.size / 10)).sum() < 27.9, "chi-square, 9 degrees, p = 0.001"
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.08


@given(st.data())
def test_choose_picks_from_the_pool_that_is_left(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 24))
    sizes = data.draw(st.lists(st.integers(k, 60), min_size=1, max_size=6))
    drawn = np.array(
        data.draw(
            st.lists(
                st.lists(st.integers(0, 2**32 - 1), min_size=k, max_size=k), min_size=len(sizes), max_size=len(sizes)
            )
        ),
        dtype=np.uint32,
    )
    picks = keys.choose(drawn, np.array(sizes))
    for row, n, picked in zip(drawn.tolist(), sizes, picks.tolist(), strict=True):
        pool = list(range(n))
        assert picked == [pool.pop(word * len(pool) >> 32) for word in row]
    assert np.array_equal(keys.choose(drawn[:, : k // 2 + 1], np.array(sizes)), picks[:, : k // 2 + 1])


def test_choose_gives_every_ordered_triple_equally_often() -> None:
    picks = keys.choose(keys.words(5, "c", "train", np.arange(12000, dtype=np.int64), 3), 4)
    counts = np.bincount(picks @ np.array([16, 4, 1]), minlength=64)
    seen = counts[counts > 0]
    assert len(seen) == 24
    assert ((seen - 500) ** 2 / 500).sum() < 49.7, "chi-square, 23 degrees, p = 0.001"


def test_choose_refuses_more_picks_than_there_are() -> None:
    with pytest.raises(ValueError, match="cannot choose 3 distinct indices out of 2"):
        keys.choose(np.zeros((2, 3), dtype=np.uint32), np.array([5, 2]))


def test_named_tensors_are_decided_by_their_name() -> None:
    first = keys.tensor_normals(0, "init", "conv1.weight", (70, 1000))
    assert first.dtype == torch.float32 and first.shape == (70, 1000)
    assert torch.equal(first, keys.tensor_normals(0, "init", "conv1.weight", (70, 1000)))
    assert torch.equal(first[:2], keys.tensor_normals(0, "init", "conv1.weight", (2, 1000)))
    others = [
        keys.tensor_normals(0, "init", "conv2.weight", (2, 1000)),
        keys.tensor_normals(1, "init", "conv1.weight", (2, 1000)),
        keys.tensor_normals(0, "memory", "conv1.weight", (2, 1000)),
    ]
    assert not any((first[:2] == other).any() for other in others)
    assert abs(first.mean().item()) < 0.02 and abs(first.std().item() - 1) < 0.02
    assert len(np.unique(first.numpy())) > 0.99 * first.numel(), "no row of a tensor repeats another"
    scalar = keys.tensor_normals(0, "init", "scale", ())
    assert scalar.shape == () and keys.tensor_normals(0, "init", "none", (0, 3)).shape == (0, 3)


def test_tensor_uniforms_lie_in_their_range() -> None:
    drawn = keys.tensor_uniforms(0, "init", "w", (4000,), -0.5, 1.5)
    assert drawn.dtype == torch.float32 and -0.5 <= drawn.min() < -0.49 and 1.49 < drawn.max() <= 1.5
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.05)
