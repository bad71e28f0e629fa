"""Which class belongs to which split: ``resolve`` turns a split's configuration into class indices.

A split is about classes, never samples: no class is in two of train, val and test, and ``all`` is every class of the
store whether or not a split names it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster import keys
from cluster.config.sections import FractionSplit, ListedSplit, MetadataSplit
from cluster.errors import SplitError
from cluster.messages import SplitName

OMNIGLOT_SPLIT = MetadataSplit(
    column="alphabet",
    val=("Gujarati", "Hebrew", "Grantha"),
    test=("Sanskrit", "Syriac_(Estrangelo)", "Tifinagh", "N_Ko", "Bengali"),
)
"""Omniglot's 30 background alphabets, split by whole alphabets: 22 train, 3 validation, 5 test."""

_SHOWN = 12
"""How many allowed values an error lists at most."""


@dataclass(frozen=True)
class ClassSplits:
    """Class indices of each split, int64, ascending; train, val and test are disjoint."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    all: np.ndarray
    """Every class of the store, also those in no split."""
    digest: str
    """SHA-256 (hex) over the sorted class names of train, val and test."""

    def __getitem__(self, split: SplitName) -> np.ndarray:
        return {"train": self.train, "val": self.val, "test": self.test, "all": self.all}[split]


def resolve(
    split: ListedSplit | MetadataSplit | FractionSplit,
    classes: Sequence[str],
    metadata: Mapping[str, Sequence[str]],
) -> ClassSplits:
    """The classes of each split.

    Args:
        split: the configuration.
        classes: class names of the store, in its order.
        metadata: class metadata columns, each as long as ``classes``.

    Raises:
        SplitError: an unknown class, column or group; one in two splits; a class name that the store has twice;
            or no class left to train on.
    """
    if len(set(classes)) < len(classes):
        twice, _ = Counter(classes).most_common(1)[0]
        raise SplitError(f"class {twice!r} is in the store twice; class names must be unique")
    if isinstance(split, ListedSplit):
        parts = _listed(split, classes)
    elif isinstance(split, MetadataSplit):
        parts = _by_metadata(split, classes, metadata)
    else:
        parts = _fractions(split, classes)
    if not parts["train"]:
        raise SplitError(
            f"no class is left to train on: {len(classes)} classes, {len(parts['val'])} in val and "
            f"{len(parts['test'])} in test; give val and test less"
        )
    index = {name: i for i, name in enumerate(classes)}
    rows = {part: np.array(sorted(index[name] for name in names), dtype=np.int64) for part, names in parts.items()}
    canonical = json.dumps({part: sorted(names) for part, names in parts.items()}, sort_keys=True)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    everything = np.arange(len(classes), dtype=np.int64)
    return ClassSplits(rows["train"], rows["val"], rows["test"], everything, digest)


def _listed(split: ListedSplit, classes: Sequence[str]) -> dict[str, list[str]]:
    parts = {"train": split.train, "val": split.val, "test": split.test}
    _claim("class", parts, classes)
    return {part: list(names) for part, names in parts.items()}


def _by_metadata(
    split: MetadataSplit, classes: Sequence[str], metadata: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    if split.column not in metadata:
        raise SplitError(_unknown("class metadata column", split.column, metadata))
    column = metadata[split.column]
    claimed = _claim(f"group of column {split.column!r}", {"val": split.val, "test": split.test}, column)
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name, group in zip(classes, column, strict=True):
        parts[claimed.get(group, "train")].append(name)
    return parts


def _fractions(split: FractionSplit, classes: Sequence[str]) -> dict[str, list[str]]:
    """Sorted names are shuffled by sorting on a 64-bit random key each, so the store's order does not matter."""
    names = sorted(classes)
    drawn = keys.words(split.seed, "fraction split", "", np.arange(len(names), dtype=np.int64), 2).astype(np.uint64)
    order = np.argsort(drawn[:, 0] << np.uint64(32) | drawn[:, 1], kind="stable")
    shuffled = [names[i] for i in order]
    val, test = (int(fraction * len(names) + 0.5) for fraction in (split.val, split.test))
    return {"val": shuffled[:val], "test": shuffled[val : val + test], "train": shuffled[val + test :]}


def _claim(what: str, parts: Mapping[str, Sequence[str]], known: Iterable[str]) -> dict[str, str]:
    """Which part each listed name belongs to; every name must be known and listed once."""
    known = set(known)
    claimed: dict[str, str] = {}
    for part, names in parts.items():
        for name in names:
            if name not in known:
                raise SplitError(f"split {part}: " + _unknown(what, name, known))
            if name in claimed:
                where = f"twice in split {part}" if claimed[name] == part else f"in both {claimed[name]} and {part}"
                raise SplitError(f"{what} {name!r} is {where}; list it once")
            claimed[name] = part
    return claimed


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return f"unknown {what} {name!r}; {hint}the store has {shown or 'none'}"
