"""Episodes within one group of classes: one alphabet, one script."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from cluster.config.sections import FractionSplit, SinusoidData
from cluster.episodes.sampler import StoreSource
from cluster.episodes.sinusoid import SinusoidSource
from cluster.errors import SplitError

ALPHABETS = tuple("Greek" for _ in range(9)) + tuple("Lao" for _ in range(6)) + tuple("Ogham" for _ in range(3))
WHOLE = FractionSplit(val=0.0, test=0.0)


@dataclass
class Store:
    """18 classes of three samples each, in three alphabets of 9, 6 and 3, shuffled."""

    order: np.ndarray = field(default_factory=lambda: np.array([7 * i % 18 for i in range(18)]))
    sample_shape: tuple[int, ...] = (1, 2, 2)
    digest: str = "d" * 64
    classes: tuple[str, ...] = tuple(f"class {i:02}" for i in range(18))

    def __post_init__(self) -> None:
        self.samples = np.zeros((54, 1, 2, 2), np.uint8)
        self.class_start, self.class_count = np.arange(18) * 3, np.full(18, 3)
        self.class_metadata = {"alphabet": tuple(ALPHABETS[i] for i in self.order)}


def source(rotations: bool = False) -> StoreSource:
    return StoreSource(Store(), WHOLE, 3, rotations)


def test_all_classes_of_an_episode_are_distinct_and_of_one_alphabet() -> None:
    episodes = source().sample("train", 0, 300, 5, 1, 1, "alphabet")
    alphabets, classes = episodes.metadata["alphabet"], episodes.metadata["class_index"]
    assert (alphabets == alphabets[:, :1]).all()
    assert all(len(set(row)) == 5 for row in classes)
    assert {Store().class_metadata["alphabet"][i] for i in classes.ravel()} == set(alphabets.ravel())


def test_alphabets_with_enough_classes_are_equally_likely() -> None:
    drawn = Counter(source().sample("train", 0, 3000, 5, 1, 1, "alphabet").metadata["alphabet"][:, 0].tolist())
    assert set(drawn) == {"Greek", "Lao"} and abs(drawn["Greek"] - 1500) < 120
    small = Counter(source().sample("train", 0, 3000, 3, 1, 1, "alphabet").metadata["alphabet"][:, 0].tolist())
    assert set(small) == {"Greek", "Lao", "Ogham"} and all(abs(count - 1000) < 120 for count in small.values())


def test_all_classes_of_an_alphabet_can_be_asked_for() -> None:
    classes = source().sample("train", 0, 10, 9, 1, 1, "alphabet").metadata["class_index"]
    greek = [i for i, name in enumerate(Store().class_metadata["alphabet"]) if name == "Greek"]
    assert all(sorted(row) == greek for row in classes.tolist())


def test_an_episode_is_the_same_in_every_shard_and_turned_as_a_whole() -> None:
    whole = source(rotations=True).sample("train", 10, 40, 4, 1, 1, "alphabet")
    part = source(rotations=True).sample("train", 20, 5, 4, 1, 1, "alphabet")
    for name in ("class_index", "class_turns"):
        assert (whole.metadata[name][10:15] == part.metadata[name]).all()
    turns = whole.metadata["class_turns"]
    assert (turns == turns[:, :1]).all() and set(turns[:, 0]) == {0, 1, 2, 3}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(
        SplitError, match=r"way 10 is more than any alphabet has \(the largest, 'Greek', has 9 classes\)"
    ):
        source().check("train", 10, 1, 1, "alphabet")
    with pytest.raises(SplitError, match="within script: no class metadata column has that name; there are: alphabet"):
        source().check("train", 2, 1, 1, "script")
    with pytest.raises(SplitError, match="within alphabet: sinusoid episodes have no classes"):
        SinusoidSource(SinusoidData(), 0).check("train", 1, 5, 5, "alphabet")
