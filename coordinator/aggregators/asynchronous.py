"""Asynchronous aggregation with bounded staleness, buffered when a commit takes more than one contribution.

    s = version − base version,   w = (1 + s)^−a,   g = mean gradient of the shard's episodes
    buffer K = 1: the update is w · g;   K > 1: Σ w · g / K over K contributions (FedBuff, arXiv 2106.06639)

A contribution with s above the bound is dropped. Each shard id counts at most once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cluster.messages import Contribution
from coordinator.aggregators.base import Dropped, Update, summarise


def staleness_weight(staleness: int, exponent: float) -> float:
    """``(1 + staleness)^−exponent``."""
    return float((1 + staleness) ** -exponent)


class AsyncAggregator:
    """Commits every ``buffer`` contributions in the order of their arrival.

    Args:
        bound: largest staleness that is applied, versions.
        exponent: of the staleness weight.
        buffer: contributions a commit.
        next_id: the lowest shard id never handed out.
        reissue: shards handed out by an earlier driver and never counted; they come first.
        pending: contributions that a checkpoint had kept, in order, each with whether it is finite.
    """

    def __init__(
        self,
        bound: int,
        exponent: float,
        buffer: int,
        next_id: int = 0,
        reissue: Iterable[int] = (),
        pending: Sequence[tuple[Contribution, bool]] = (),
    ) -> None:
        self._bound = bound
        self._exponent = exponent
        self._buffer = buffer
        self._next_id = next_id
        self._reissue = sorted(reissue)
        self._issued: set[int] = set()
        self._taken = list(pending)

    def next_shard(self) -> int | None:
        """A shard to be reissued, or a new one: an asynchronous run never waits."""
        if self._reissue:
            shard = self._reissue.pop(0)
        else:
            shard = self._next_id
            self._next_id += 1
        self._issued.add(shard)
        return shard

    def add(self, contribution: Contribution, version: int, *, finite: bool = True) -> Update | Dropped | None:
        """Drop what is too stale; keep the rest; commit when the buffer is full."""
        shard = contribution.shard
        staleness = version - contribution.base_version
        if shard not in self._issued:
            raise ValueError(f"shard {shard} is not awaited: it counts at most once")
        if staleness < 0:
            raise ValueError(f"shard {shard} is of version {contribution.base_version}, the run is at {version}")
        self._issued.remove(shard)
        if staleness > self._bound:
            reason = f"staleness {staleness} is above the bound {self._bound}"
            return Dropped(shard, contribution.base_version, contribution.digest, reason)
        self._taken.append((contribution, finite))
        if len(self._taken) < self._buffer:
            return None
        taken, self._taken = self._taken, []
        return self._combine(taken, version)

    def pending(self) -> Sequence[tuple[Contribution, bool]]:
        """The buffer, in order of arrival."""
        return list(self._taken)

    def outstanding(self) -> Sequence[int]:
        """Shards being computed, and those still to be reissued."""
        return sorted([*self._issued, *self._reissue])

    @property
    def next_id(self) -> int:
        """The lowest shard id never handed out."""
        return self._next_id

    def _combine(self, taken: Sequence[tuple[Contribution, bool]], version: int) -> Update:
        contributions = [c for c, _ in taken]
        weights = [staleness_weight(version - c.base_version, self._exponent) if finite else 0.0 for c, finite in taken]
        gradient = np.zeros_like(contributions[0].gradient)
        for contribution, weight in zip(contributions, weights, strict=True):
            if weight > 0:
                gradient += contribution.gradient * gradient.dtype.type(weight / contribution.episodes)
        gradient /= gradient.dtype.type(self._buffer)
        proposals, counted, episodes, loss, metric, staleness = summarise(contributions, weights, version)
        return Update(gradient, proposals, counted, episodes, loss, metric, staleness)
