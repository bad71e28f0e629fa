"""Store episodes against an independent scalar sampler, and their invariants: disjoint, distinct, uniform, keyed."""

import hashlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import keys
from cluster.config.sections import FractionSplit, ListedSplit, MetadataSplit
from cluster.episodes.sampler import StoreSource
from cluster.episodes.types import Episodes
from cluster.errors import SplitError
from cluster.messages import SplitName

SPLIT = MetadataSplit(column="alphabet", val=("v",), test=("t",))
CLASSES = 30
TRAIN, VAL, TEST = range(0, 16), range(16, 23), range(23, 30)


@dataclass
class Store:
    """A store in memory that, like the memory map, refuses to be written to. Class i has 6 + i % 3 samples."""

    samples: np.ndarray
    sample_shape: tuple[int, ...]
    class_count: np.ndarray = field(default_factory=lambda: 6 + np.arange(CLASSES) % 3)
    digest: str = "d" * 64
    classes: tuple[str, ...] = tuple(f"class {i}" for i in range(CLASSES))

    def __post_init__(self) -> None:
        self.samples.flags.writeable = False
        self.class_start = np.cumsum(self.class_count) - self.class_count
        self.class_metadata = {"alphabet": tuple("a" * 16 + "v" * 7 + "t" * 7)}


ROWS = int((6 + np.arange(CLASSES) % 3).sum())


def feature_store() -> Store:
    """Samples that say which row they are."""
    return Store(np.arange(ROWS, dtype=np.float32)[:, None].copy(), (1,))


def image_store(shape: tuple[int, int, int] = (2, 5, 5)) -> Store:
    """Noise images: no two are alike, turned or not."""
    drawn = keys.words(0, "noise", "", np.arange(ROWS, dtype=np.int64), int(np.prod(shape)))
    return Store((drawn >> np.uint32(24)).astype(np.uint8).reshape(ROWS, *shape), shape)


@cache
def features(rotations: bool = False, seed: int = 11) -> StoreSource:
    store = image_store((1, 1, 1)) if rotations else feature_store()
    return StoreSource(store, SPLIT, seed, rotations)


@cache
def images(rotations: bool) -> StoreSource:
    return StoreSource(image_store(), SPLIT, 11, rotations)


def rows_of(samples: torch.Tensor) -> np.ndarray:
    return samples[..., 0].numpy().astype(np.int64)


def scalar_episode(split: SplitName, episode: int, way: int, shot: int, query: int) -> tuple[list[int], list[int]]:
    """Rows of the support and query set by plain Python: pops from lists, one word a pick."""
    store, ids = feature_store(), np.array([episode], dtype=np.int64)
    pool = list({"train": TRAIN, "val": VAL, "test": TEST, "all": range(CLASSES)}[split])
    words = keys.words(11, "classes", split, ids, way)[0].tolist()
    classes = [pool.pop(word * len(pool) >> 32) for word in words]
    support, queries = [], []
    for lane, index in enumerate(classes):
        start, count = int(store.class_start[index]), int(store.class_count[index])
        left = list(range(start, start + count))
        drawn = keys.lane_words(11, "samples", split, ids, way, shot + query)[0, lane].tolist()
        picks = [left.pop(word * len(left) >> 32) for word in drawn]
        support += picks[:shot]
        queries += picks[shot:]
    return support, queries


@settings(max_examples=60)
@given(
    st.sampled_from(["train", "val", "test", "all"]),
    st.integers(0, 2**50),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_episodes_equal_the_scalar_sampler(split: SplitName, first: int, way: int, shot: int, query: int) -> None:
    episodes = features().sample(split, first, 3, way, shot, query)
    for i, episode in enumerate(range(first, first + 3)):
        support, queries = scalar_episode(split, episode, way, shot, query)
        assert rows_of(episodes.support_x)[i].tolist() == support
        assert rows_of(episodes.query_x)[i].tolist() == queries


@settings(max_examples=60)
@given(st.sampled_from(["train", "val", "test"]), st.integers(0, 2**50), st.integers(1, 7), st.integers(1, 3))
def test_invariants_of_an_episode(split: SplitName, first: int, way: int, shot: int) -> None:
    query = 6 - shot
    source, store = features(), feature_store()
    episodes = source.sample(split, first, 4, way, shot, query)
    support, queries = rows_of(episodes.support_x), rows_of(episodes.query_x)
    classes = episodes.metadata["class_index"]
    assert support.shape == (4, way * shot) and queries.shape == (4, way * query)
    for i in range(4):
        assert len({*support[i], *queries[i]}) == way * 6, "support and query are disjoint and distinct"
        assert len(set(classes[i])) == way
        assert set(classes[i]) <= set({"train": TRAIN, "val": VAL, "test": TEST}[split])
        for rows, labels in ((support[i], episodes.support_y[i]), (queries[i], episodes.query_y[i])):
            true = np.searchsorted(store.class_start, rows, side="right") - 1
            assert true.tolist() == classes[i][labels.numpy()].tolist(), "each label is its class"
    assert episodes.support_y.dtype == torch.int64 and episodes.support_x.dtype == torch.float32
    assert episodes.support_y[0].tolist() == [c for c in range(way) for _ in range(shot)], "class by class"
    assert (episodes.metadata["alphabet"] == {"train": "a", "val": "v", "test": "t"}[split]).all()


def indices_digest(episodes: Episodes) -> str:
    return hashlib.sha256(rows_of(episodes.support_x).tobytes() + rows_of(episodes.query_x).tobytes()).hexdigest()[:16]


def test_episodes_are_pinned() -> None:
    digests = {split: indices_digest(features().sample(split, 0, 16, 5, 1, 3)) for split in ("train", "val", "test")}
    assert digests == {"train": "2987c289158fe3bf", "val": "224e5f96da0a9fa8", "test": "9c85d6a4090867df"}


@pytest.mark.parametrize("rotations", [False, True])
def test_shard_size_does_not_matter(rotations: bool) -> None:
    whole = images(rotations).sample("train", 0, 32, 5, 1, 5)
    parts = [images(rotations).sample("train", start, 8, 5, 1, 5) for start in (0, 8, 16, 24)]
    for name in ("support_x", "support_y", "query_x", "query_y"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    for name in whole.metadata:
        assert np.array_equal(whole.metadata[name], np.concatenate([part.metadata[name] for part in parts]))


def test_growing_query_or_way_keeps_what_was_there() -> None:
    few, many = features().sample("train", 0, 16, 3, 2, 1), features().sample("train", 0, 16, 5, 2, 4)
    assert torch.equal(few.support_x, many.support_x[:, :6])
    assert torch.equal(few.query_x.view(16, 3, 1), many.query_x.view(16, 5, 4)[:, :3, :1])


def test_consecutive_episodes_seeds_and_splits_differ() -> None:
    rows = rows_of(features().sample("train", 0, 64, 5, 1, 5).query_x)
    assert len({row.tobytes() for row in rows}) == 64
    other = rows_of(features(seed=12).sample("train", 0, 64, 5, 1, 5).query_x)
    assert not {row.tobytes() for row in rows} & {row.tobytes() for row in other}


def test_classes_and_samples_are_uniform() -> None:
    episodes = features().sample("train", 0, 6000, 4, 1, 1)
    classes = episodes.metadata["class_index"]
    for slot in (0, 3):
        counts = np.bincount(classes[:, slot], minlength=16)
        assert ((counts - 375) ** 2 / 375).sum() < 37.7, "chi-square, 15 degrees, p = 0.001"
    for samples in (episodes.support_x, episodes.query_x):
        of_class_0 = rows_of(samples)[classes == 0]
        counts, expected = np.bincount(of_class_0, minlength=6), len(of_class_0) / 6
        assert len(counts) == 6 and ((counts - expected) ** 2 / expected).sum() < 20.5, "5 degrees, p = 0.001"


def test_images_are_scaled_to_the_unit_interval() -> None:
    store = image_store()
    episodes = images(False).sample("train", 0, 8, 5, 1, 5)
    assert episodes.support_x.shape == (8, 5, 2, 5, 5) and episodes.query_x.shape == (8, 25, 2, 5, 5)
    assert episodes.support_x.is_contiguous() and episodes.query_x.is_contiguous()
    known = {(image / np.float32(255)).round(4).tobytes() for image in store.samples.astype(np.float32)}
    assert {image.round(4).tobytes() for image in episodes.support_x.flatten(0, 1).numpy()} <= known
    extremes = Store(np.full((ROWS, 1, 2, 2), 255, dtype=np.uint8), (1, 2, 2))
    assert (StoreSource(extremes, SPLIT, 0, False).sample("train", 0, 1, 2, 1, 1).query_x == 1).all()


def check_turned(episodes: Episodes, store: Store, way: int) -> None:
    """Every image is one of its class's samples, turned as the metadata says."""
    for samples, labels in ((episodes.support_x, episodes.support_y), (episodes.query_x, episodes.query_y)):
        for i in range(len(episodes)):
            for image, label in zip(samples[i].numpy(), labels[i].tolist(), strict=True):
                index, turns = (int(episodes.metadata[name][i, label]) for name in ("class_index", "class_turns"))
                start, count = int(store.class_start[index]), int(store.class_count[index])
                originals = store.samples[start : start + count].astype(np.float32) / 255
                found = np.abs(np.rot90(originals, turns, axes=(2, 3)) - image).max(axis=(1, 2, 3)) < 1e-6
                assert found.sum() == 1


def test_rotated_classes_are_turned_as_a_whole() -> None:
    episodes = images(True).sample("train", 0, 24, 7, 2, 4)
    check_turned(episodes, image_store(), 7)
    turns = episodes.metadata["class_turns"]
    assert set(turns.ravel()) == {0, 1, 2, 3}
    pairs = episodes.metadata["class_index"] * 4 + turns
    assert all(len(set(row)) == 7 for row in pairs.tolist())
    assert any(len(set(row)) < 7 for row in episodes.metadata["class_index"].tolist()), "one character, two turns"


def test_rotated_classes_are_uniform() -> None:
    episodes = features(rotations=True).sample("train", 0, 6400, 2, 1, 1)
    pairs = (episodes.metadata["class_index"] * 4 + episodes.metadata["class_turns"])[:, 1]
    counts = np.bincount(pairs, minlength=64)
    assert len(counts) == 64 and ((counts - 100) ** 2 / 100).sum() < 103.4, "chi-square, 63 degrees, p = 0.001"


@pytest.mark.parametrize("split", ["val", "test", "all"])
def test_only_training_is_rotated(split: SplitName) -> None:
    turned, plain = (images(rotations).sample(split, 0, 16, 5, 1, 5) for rotations in (True, False))
    assert not turned.metadata["class_turns"].any()
    assert torch.equal(turned.support_x, plain.support_x) and torch.equal(turned.query_x, plain.query_x)
    check_turned(turned, image_store(), 5)


def test_all_is_every_class_of_the_store() -> None:
    source = StoreSource(feature_store(), ListedSplit(train=("class 0",), val=("class 1",)), 0, False)
    seen = source.sample("all", 0, 40, 10, 1, 1).metadata["class_index"]
    assert set(seen.ravel()) == set(range(CLASSES))


def test_a_memory_map_is_read_and_never_written(tmp_path: Path) -> None:
    store = image_store()
    path = tmp_path / "samples.npy"
    np.save(path, store.samples)
    before = path.read_bytes()
    mapped = Store(np.load(path, mmap_mode="r"), store.sample_shape)
    episodes = StoreSource(mapped, SPLIT, 11, True).sample("train", 0, 8, 5, 1, 5)
    assert torch.equal(episodes.query_x, images(True).sample("train", 0, 8, 5, 1, 5).query_x)
    features_first = features().sample("train", 0, 1, 2, 1, 1)
    features_first.support_x.zero_()
    assert path.read_bytes() == before
    assert rows_of(features().sample("train", 0, 1, 2, 1, 1).support_x).any(), "float samples are copies as well"


@pytest.mark.parametrize(
    ("split", "rotations", "way", "shot", "query", "message"),
    [
        ("val", False, 8, 1, 1, "way 8 is more than the 7 classes of split val; lower way"),
        ("val", True, 8, 1, 1, "way 8 is more than the 7 classes of split val; lower way"),
        ("train", True, 65, 1, 1, "way 65 is more than the 64 classes of split train (rotations included); lower way"),
        (
            "test",
            False,
            2,
            3,
            4,
            "shot + query = 7 is more than the 6 samples of class 'class 24', the smallest of split",
        ),
        ("test", False, 2, 0, 4, "way 2, shot 0, query 4: all must be at least 1"),
    ],
)
def test_impossible_episodes_are_refused(
    split: SplitName, rotations: bool, way: int, shot: int, query: int, message: str
) -> None:
    source = images(rotations)
    for refused in (
        lambda: source.check(split, way, shot, query),
        lambda: source.sample(split, 0, 1, way, shot, query),
    ):
        with pytest.raises(SplitError) as refusal:
            refused()
        assert message in str(refusal.value)


def test_the_largest_possible_episode_is_given() -> None:
    assert features().sample("val", 0, 2, 7, 3, 3).query_x.shape == (2, 21, 1)
    assert images(True).sample("train", 0, 1, 64, 1, 5).query_x.shape == (1, 320, 2, 5, 5)


def test_an_empty_split_has_no_episodes() -> None:
    source = StoreSource(feature_store(), FractionSplit(val=0, test=0.2), 0, False)
    with pytest.raises(SplitError, match="split val has no classes"):
        source.check("val", 1, 1, 1)
    assert source.empty("val") and not source.empty("test")


@pytest.mark.parametrize("store", [feature_store(), image_store((1, 4, 6))])
def test_rotations_need_square_images(store: Store) -> None:
    with pytest.raises(SplitError, match="rotations need square images"):
        StoreSource(store, SPLIT, 0, True)


def test_reserved_metadata_names_are_refused() -> None:
    store = feature_store()
    store.class_metadata["class_turns"] = store.class_metadata["alphabet"]
    with pytest.raises(SplitError, match="'class_turns' has a reserved name"):
        StoreSource(store, SPLIT, 0, False)


def test_digests_are_the_stores_and_the_splits() -> None:
    source = features()
    assert source.digest == "d" * 64 and source.split_digest == source.splits.digest
    assert source.sample_shape == (1,) and not source.regression
