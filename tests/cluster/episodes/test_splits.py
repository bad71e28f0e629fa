"""Class splits: each kind resolved, every refusal with its message, digests that see what matters and nothing else."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.sections import FractionSplit, ListedSplit, MetadataSplit
from cluster.episodes.splits import OMNIGLOT_SPLIT, ClassSplits, resolve
from cluster.errors import SplitError

CLASSES = ("alpha", "beta", "gamma", "aleph", "bet", "ka")
SCRIPT = {"script": ("Greek", "Greek", "Greek", "Hebrew", "Hebrew", "Kana")}
OMNIGLOT = Path(__file__).parents[4] / "shared" / "data" / "omniglot" / "images_background.zip"


def names(splits: ClassSplits, classes: tuple[str, ...] = CLASSES) -> dict[str, list[str]]:
    return {part: [classes[i] for i in splits[part]] for part in ("train", "val", "test")}


def test_lists_name_their_classes_and_leave_the_rest_unused() -> None:
    splits = resolve(ListedSplit(train=("ka", "alpha"), val=("bet",), test=("gamma",)), CLASSES, {})
    assert names(splits) == {"train": ["alpha", "ka"], "val": ["bet"], "test": ["gamma"]}
    assert splits["all"].tolist() == [0, 1, 2, 3, 4, 5]
    assert all(splits[part].dtype == np.int64 for part in ("train", "val", "test", "all"))


def test_metadata_holds_out_whole_groups() -> None:
    splits = resolve(MetadataSplit(column="script", val=("Kana",), test=("Hebrew",)), CLASSES, SCRIPT)
    assert names(splits) == {"train": ["alpha", "beta", "gamma"], "val": ["ka"], "test": ["aleph", "bet"]}


@given(st.integers(1, 60), st.floats(0, 0.9), st.floats(0, 0.9), st.integers(0, 2**63 - 1), st.randoms())
def test_fractions_partition_the_classes_whatever_their_order(
    count: int, val: float, test: float, seed: int, random: object
) -> None:
    classes = [f"class {i}" for i in range(count)]
    test *= 1 - val
    split = FractionSplit(val=val, test=test, seed=seed)
    try:
        splits = resolve(split, classes, {})
    except SplitError:
        assert (1 - val - test) * count <= 1, "only rounding can leave no class to train on"
        return
    parts = names(splits, tuple(classes))
    assert sorted(name for held in parts.values() for name in held) == sorted(classes)
    assert abs(len(parts["val"]) - val * count) <= 0.5 and abs(len(parts["test"]) - test * count) <= 0.5
    shuffled = classes.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = resolve(split, shuffled, {})
    assert again.digest == splits.digest
    assert {k: sorted(v) for k, v in names(again, tuple(shuffled)).items()} == {k: sorted(v) for k, v in parts.items()}


def test_fractions_are_pinned_and_follow_their_seed() -> None:
    classes = [f"class {i}" for i in range(20)]
    first, second = (resolve(FractionSplit(val=0.15, test=0.2, seed=seed), classes, {}) for seed in (0, 1))
    assert (first.val.tolist(), first.test.tolist()) == ([1, 3, 17], [4, 6, 13, 14])
    assert first.digest != second.digest


def test_fractions_put_every_class_into_test_equally_often() -> None:
    classes = [f"{i}" for i in range(10)]
    counts = np.zeros(10)
    for seed in range(600):
        counts[resolve(FractionSplit(val=0.2, test=0.3, seed=seed), classes, {}).test] += 1
    assert ((counts - 180) ** 2 / (180 * 0.7)).sum() * 0.9 < 27.9, "chi-square, 9 degrees, p = 0.001"


def test_digest_sees_membership_only() -> None:
    base = resolve(ListedSplit(train=("alpha", "beta"), test=("ka",)), CLASSES, {})
    reordered = resolve(ListedSplit(train=("beta", "alpha"), test=("ka",)), CLASSES[::-1], {})
    moved = resolve(ListedSplit(train=("alpha",), test=("ka", "beta")), CLASSES, {})
    other_part = resolve(ListedSplit(train=("alpha", "beta"), val=("ka",)), CLASSES, {})
    grouped = resolve(MetadataSplit(column="g", test=("y",)), ("alpha", "beta", "ka"), {"g": ("x", "x", "y")})
    assert base.digest == reordered.digest == grouped.digest
    assert len({base.digest, moved.digest, other_part.digest}) == 3


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            ListedSplit(train=("alpa",)),
            "split train: unknown class 'alpa'; did you mean 'alpha'? the store has aleph, ",
        ),
        (
            ListedSplit(train=("alpha",), val=("zzz",)),
            "split val: unknown class 'zzz'; the store has aleph, alpha, bet",
        ),
        (ListedSplit(train=("alpha",), test=("alpha",)), "class 'alpha' is in both train and test; list it once"),
        (ListedSplit(train=("alpha", "alpha")), "class 'alpha' is twice in split train; list it once"),
        (
            MetadataSplit(column="scrip"),
            "unknown class metadata column 'scrip'; did you mean 'script'? the store has scr",
        ),
        (
            MetadataSplit(column="script", val=("greek",)),
            "split val: unknown group of column 'script' 'greek'; did you m",
        ),
        (MetadataSplit(column="script", val=("Kana",), test=("Kana",)), "'Kana' is in both val and test; list it once"),
        (MetadataSplit(column="script", val=("Greek", "Kana"), test=("Hebrew",)), "no class is left to train on"),
        (FractionSplit(val=0.45, test=0.5), "no class is left to train on: 6 classes, 3 in val and 3 in test"),
    ],
)
def test_refusals_say_what_and_what_is_allowed(
    split: ListedSplit | MetadataSplit | FractionSplit, message: str
) -> None:
    with pytest.raises(SplitError) as refusal:
        resolve(split, CLASSES, SCRIPT)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_long_list_of_allowed_names_is_cut() -> None:
    with pytest.raises(SplitError, match="c19 and 88 more"):
        resolve(ListedSplit(train=("x",)), [f"c{i}" for i in range(100)], {})


def test_class_names_must_be_unique() -> None:
    with pytest.raises(SplitError, match="class 'a' is in the store twice"):
        resolve(FractionSplit(), ("a", "b", "a"), {})


@pytest.mark.skipif(not OMNIGLOT.exists(), reason="Omniglot's background set is not beside the repository")
def test_omniglot_split_on_its_real_alphabets() -> None:
    with zipfile.ZipFile(OMNIGLOT) as archive:
        paths = {tuple(name.split("/")[1:3]) for name in archive.namelist() if name.endswith(".png")}
    classes = sorted("/".join(path) for path in paths)
    alphabets = tuple(name.split("/")[0] for name in classes)
    splits = resolve(OMNIGLOT_SPLIT, classes, {"alphabet": alphabets})
    held = {part: {alphabets[i] for i in splits[part]} for part in ("train", "val", "test")}
    assert (len(held["train"]), len(held["val"]), len(held["test"])) == (22, 3, 5)
    assert not held["train"] & held["val"] and not held["train"] & held["test"] and not held["val"] & held["test"]
    assert len(splits.train) + len(splits.val) + len(splits.test) == len(splits.all) == 964
