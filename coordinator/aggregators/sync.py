"""Synchronous aggregation: the mean over a version's episodes, reduced in a fixed binary tree by shard id.

    g = tree(Σ_shards gradient sums) / Σ_shards episodes

The tree adds neighbours, then neighbours of those, by position in the version; it depends on nothing but the number
of shards, so neither the order of replies nor the number of workers changes a bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.messages import Contribution
from coordinator.aggregators.base import Dropped, Update, summarise


def tree_sum(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of one or more arrays in a fixed binary tree over their order; an odd one at the end moves up as is."""
    level = list(arrays)
    while len(level) > 1:
        pairs = [a + b for a, b in zip(level[0::2], level[1::2], strict=False)]
        level = pairs + (level[-1:] if len(level) % 2 else [])
    return level[0]


class SyncAggregator:
    """Collects the shards ``version · shards … (version + 1) · shards − 1``.

    Args:
        shards: shards a version.
        version: the version that the run is at.
        pending: contributions of that version that a checkpoint had kept, each with whether it is finite.
    """

    def __init__(self, shards: int, version: int = 0, pending: Sequence[tuple[Contribution, bool]] = ()) -> None:
        self._shards = shards
        self._taken = {c.shard: (c, finite) for c, finite in pending}
        self._version = version
        foreign = [shard for shard in self._taken if shard not in self._ids()]
        if foreign:
            raise ValueError(f"pending shards {foreign} are not of version {version}, which has shards {self._ids()}")
        self._wanted = [shard for shard in self._ids() if shard not in self._taken]
        self._issued: set[int] = set()

    def next_shard(self) -> int | None:
        """The next shard of this version that nobody computes yet."""
        if not self._wanted:
            return None
        shard = self._wanted.pop(0)
        self._issued.add(shard)
        return shard

    def add(self, contribution: Contribution, version: int, *, finite: bool = True) -> Update | Dropped | None:
        """Take a shard; the last one of the version makes the update."""
        shard = contribution.shard
        if shard in self._taken or shard not in self._issued or contribution.base_version != version:
            raise ValueError(f"shard {shard} of version {contribution.base_version} is not awaited at {version}")
        self._issued.remove(shard)
        self._taken[shard] = (contribution, finite)
        if len(self._taken) < self._shards:
            return None
        update = self._reduce(version)
        self._version = version + 1
        self._taken, self._wanted = {}, list(self._ids())
        return update

    def pending(self) -> Sequence[tuple[Contribution, bool]]:
        """This version's contributions so far, by shard id."""
        return [self._taken[shard] for shard in sorted(self._taken)]

    def outstanding(self) -> Sequence[int]:
        """Shards being computed."""
        return sorted(self._issued)

    @property
    def next_id(self) -> int:
        """The first shard of the next version."""
        return (self._version + 1) * self._shards

    def _ids(self) -> range:
        return range(self._version * self._shards, (self._version + 1) * self._shards)

    def _reduce(self, version: int) -> Update:
        taken = [self._taken[shard] for shard in self._ids()]
        contributions = [c for c, _ in taken]
        weights = [1.0 if finite else 0.0 for _, finite in taken]
        proposals, counted, episodes, loss, metric, staleness = summarise(contributions, weights, version)
        # A zero-weight leaf is a zero, not a gap: the tree keeps its shape.
        total = tree_sum([c.gradient if finite else np.zeros_like(c.gradient) for c, finite in taken])
        gradient = total / total.dtype.type(max(1, episodes))
        return Update(gradient, proposals, counted, episodes, loss, metric, staleness)
