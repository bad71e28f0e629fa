"""Episodes of an episode store, rebuilt from their ids: (seed, split, episode id) decides an episode completely.

    classes     ``way`` of the split's classes without replacement, purpose "classes"
    samples     ``shot + query`` of each class's samples without replacement, purpose "samples", one lane a class slot;
                the first ``shot`` are the support set
    distortion  of each training image where ``augment`` asks for it, purpose "augment", one lane a class slot

Growing ``query`` changes neither the classes nor the support set; growing ``way`` adds classes after the same first
ones. Per batch there is one draw of words for each purpose, one gather from the memory map, one conversion to float32:
nothing is done sample by sample in Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from cluster import keys
from cluster.config.sections import Augment, FractionSplit, ListedSplit, MetadataSplit
from cluster.episodes import augment as augmentation
from cluster.episodes.groups import Groups
from cluster.episodes.splits import ClassSplits, resolve
from cluster.episodes.types import Episodes
from cluster.errors import SplitError
from cluster.messages import SplitName

QUARTER_TURNS = 4


@runtime_checkable
class SampleStore(Protocol):
    """What the sampler needs of an episode store. The samples of one class are consecutive rows."""

    @property
    def samples(self) -> np.ndarray:
        """Images, uint8 ``[sample, channel, height, width]``, or features, float32 ``[sample, feature]``; read-only."""
        ...

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """``(channel, height, width)`` or ``(feature,)``."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the data."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        ...

    @property
    def class_start(self) -> np.ndarray:
        """First row of each class, int64 ``[class]``."""
        ...

    @property
    def class_count(self) -> np.ndarray:
        """Rows of each class, int64 ``[class]``."""
        ...

    @property
    def class_metadata(self) -> Mapping[str, tuple[str, ...]]:
        """Class metadata columns, each as long as ``classes``."""
        ...


class StoreSource:
    """Episodes of an episode store with a class split; an ``EpisodeSource``.

    With ``rotations``, a class of split train counts four times, turned by 0, 90, 180 and 270 degrees; an episode may
    hold two turns of one character as two classes. With ``augment``, each image of split train is then distorted by
    itself. Other splits are never turned nor distorted.

    Raises:
        SplitError: the split does not fit the store (see ``splits.resolve``); or rotations of samples that are not
            square images; or distortion of samples that are not images; or a metadata column with a reserved name.
    """

    def __init__(
        self,
        store: SampleStore,
        split: ListedSplit | MetadataSplit | FractionSplit,
        seed: int,
        rotations: bool,
        augment: Augment = augmentation.OFF,
    ) -> None:
        shape = store.sample_shape
        if rotations and (len(shape) != 3 or shape[1] != shape[2]):
            raise SplitError(f"rotations need square images, the store's samples are {shape}; set rotations to false")
        if augment != augmentation.OFF and len(shape) != 3:
            raise SplitError(f"augment distorts images, the store's samples are {shape}; leave data.augment out")
        self._store = store
        self._seed = seed
        self._rotations = rotations
        self._augment = augment
        self._splits: ClassSplits = resolve(split, store.classes, store.class_metadata)
        self._smallest = {name: _smallest(store.class_count, self._splits[name]) for name in get_args(SplitName)}
        self._grouped: dict[tuple[SplitName, str], Groups] = {}
        self._columns = {name: np.array(column) for name, column in store.class_metadata.items()}
        if reserved := self._columns.keys() & {"class_index", "class_turns"}:
            raise SplitError(f"class metadata column {min(reserved)!r} has a reserved name; rename it in the store")

    @property
    def digest(self) -> str:
        """The store digest, SHA-256 hex."""
        return self._store.digest

    @property
    def split_digest(self) -> str:
        """Digest of which class belongs to which split, SHA-256 hex."""
        return self._splits.digest

    @property
    def splits(self) -> ClassSplits:
        """The classes of each split."""
        return self._splits

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the store's order."""
        return self._store.classes

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """``(channel, height, width)`` or ``(feature,)``."""
        return self._store.sample_shape

    @property
    def regression(self) -> bool:
        """Targets are class labels."""
        return False

    def empty(self, split: SplitName) -> bool:
        """Whether a split has no classes."""
        return len(self._splits[split]) == 0

    def check(self, split: SplitName, way: int, shot: int, query: int, within: str | None = None) -> None:
        """Refuse episodes that the store cannot give.

        Raises:
            SplitError: more classes than the split (or any group) has, more samples than its smallest class has, counts
                below 1, or no such column.
        """
        if min(way, shot, query) < 1:
            raise SplitError(f"way {way}, shot {shot}, query {query}: all must be at least 1")
        if self.empty(split):
            raise SplitError(f"split {split} has no classes: give it some by data.split")
        available = len(self._splits[split]) * self._turns(split)
        if way > available:
            turned = " (rotations included)" if self._turns(split) > 1 else ""
            raise SplitError(f"way {way} is more than the {available} classes of split {split}{turned}; lower way")
        if within is not None:
            self._groups(split, within).at_least(way)
        smallest = self._smallest[split]
        if shot + query > self._store.class_count[smallest]:
            raise SplitError(
                f"shot + query = {shot + query} is more than the {self._store.class_count[smallest]} samples of class "
                f"{self._store.classes[smallest]!r}, the smallest of split {split}; lower shot or query"
            )

    def sample(
        self,
        split: SplitName,
        first_episode: int,
        episodes: int,
        way: int,
        shot: int,
        query: int,
        within: str | None = None,
    ) -> Episodes:
        """Episodes ``first_episode … first_episode + episodes − 1`` of ``split``.

        With ``within``, a group is drawn first, of those with enough classes, and with rotations one turn for all.

        Metadata, each ``[episode, way]``: the store's class columns; ``class_index``, the class's index in the store;
        ``class_turns``, its counter-clockwise quarter turns (0 outside split train).

        Raises:
            SplitError: as ``check``.
        """
        self.check(split, way, shot, query, within)
        ids = np.arange(first_episode, first_episode + episodes, dtype=np.int64)
        classes, turns = self._draw_classes(split, ids, way) if within is None else self._draw(split, ids, way, within)
        drawn = keys.lane_words(self._seed, "samples", split, ids, way, shot + query)
        rows = keys.choose(drawn, self._store.class_count[classes]) + self._store.class_start[classes][..., None]
        support, queries = self._gather(rows, turns, self._maps(split, ids, way, shot + query), shot)
        labels = torch.arange(way)
        return Episodes(
            ids=ids,
            way=way,
            support_x=support,
            support_y=labels.repeat_interleave(shot).repeat(episodes, 1),
            query_x=queries,
            query_y=labels.repeat_interleave(query).repeat(episodes, 1),
            metadata={name: column[classes] for name, column in self._columns.items()}
            | {"class_index": classes, "class_turns": turns},
        )

    def _turns(self, split: SplitName) -> int:
        return QUARTER_TURNS if self._rotations and split == "train" else 1

    def _draw_classes(self, split: SplitName, ids: np.ndarray, way: int) -> tuple[np.ndarray, np.ndarray]:
        """Class indices in the store and their quarter turns, both int64 ``[episode, way]``."""
        rows, turns = self._splits[split], self._turns(split)
        picks = keys.choose(keys.words(self._seed, "classes", split, ids, way), len(rows) * turns)
        return rows[picks // turns], picks % turns

    def _draw(self, split: SplitName, ids: np.ndarray, way: int, within: str) -> tuple[np.ndarray, np.ndarray]:
        """As ``_draw_classes``, all classes of an episode from one group."""
        groups, turns = self._groups(split, within), self._turns(split)
        able = groups.at_least(way)
        drawn = keys.choose(keys.words(self._seed, "groups", split, ids, 1), len(able) * turns)[:, 0]
        group = able[drawn // turns]
        picks = keys.choose(keys.words(self._seed, "classes", split, ids, way), groups.count[group])
        return groups.classes[groups.start[group][:, None] + picks], np.repeat((drawn % turns)[:, None], way, 1)

    def _maps(self, split: SplitName, ids: np.ndarray, way: int, samples: int) -> np.ndarray | None:
        """The inverse map of every sample, float32 ``[episode, way, sample, 2, 3]``; None where none is distorted."""
        if self._augment == augmentation.OFF or split != "train":
            return None
        _, height, width = self._store.sample_shape
        numbers = augmentation.draw(self._seed, split, ids, way, samples)
        return augmentation.inverse_maps(self._augment, numbers, height, width)

    def _groups(self, split: SplitName, column: str) -> Groups:
        if column not in self._columns:
            known = ", ".join(self._columns) or "none"
            raise SplitError(f"within {column}: no class metadata column has that name; there are: {known}")
        if (split, column) not in self._grouped:
            self._grouped[split, column] = Groups.of(column, self._columns[column], self._splits[split])
        return self._grouped[split, column]

    def _gather(self, rows: np.ndarray, turns: np.ndarray, maps: np.ndarray | None, shot: int) -> tuple[Tensor, Tensor]:
        """Samples at ``rows`` (``[episode, way, shot + query]``) as support and query tensors, class by class."""
        episodes, way, per_class = rows.shape
        cut = episodes * way * shot
        taken = self._store.samples.take(_support_first(rows, shot), axis=0)
        if turns.any():
            _rotate(taken, _support_first(np.repeat(turns[..., None], per_class, axis=-1), shot))
        x = torch.from_numpy(taken)
        if x.dtype == torch.uint8:
            x = x.to(torch.float32).mul_(1 / 255)
        if maps is not None:
            x = augmentation.distort(x, torch.from_numpy(_support_first(maps, shot)))
        shape = self._store.sample_shape
        return x[:cut].view(episodes, way * shot, *shape), x[cut:].view(episodes, way * (per_class - shot), *shape)


def _smallest(class_count: np.ndarray, rows: np.ndarray) -> int:
    """The class of ``rows`` with the fewest samples; −1 where there is no class, and so no episode of any way."""
    return int(rows[class_count[rows].argmin()]) if len(rows) else -1


def _support_first(each: np.ndarray, shot: int) -> np.ndarray:
    """What each sample has, ``[episode, way, shot + query, *n]``, as ``[sample, *n]``: support, then queries."""
    shape = (-1, *each.shape[3:])
    return np.concatenate([each[:, :, :shot].reshape(shape), each[:, :, shot:].reshape(shape)])


def _rotate(images: np.ndarray, turns: np.ndarray) -> None:
    """Turn each image ``[channel, height, width]`` in place by its number of counter-clockwise quarter turns."""
    for turn in range(1, QUARTER_TURNS):
        where = np.flatnonzero(turns == turn)
        images[where] = np.rot90(images[where], turn, axes=(2, 3))
