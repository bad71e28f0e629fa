"""What an aggregator is: a collector of the form ``add(contribution) -> Update | Dropped | None``.

Synchronous, bounded-staleness and buffered asynchronous runs differ only here. Aggregators are pure Python objects
without clock, network or Ray; they decide which shard is wanted next and when contributions make an update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.messages import Contribution


@dataclass(frozen=True)
class Counted:
    """A contribution's line in the commit log."""

    shard: int
    base_version: int
    weight: float
    """1 in synchronous runs, (1 + staleness)^−a in asynchronous ones, 0 for a non-finite contribution."""
    digest: str
    fingerprint: str


@dataclass(frozen=True)
class Update:
    """What one commit applies."""

    gradient: np.ndarray
    """Aggregated meta-gradient, float32 ``[parameters]``."""
    proposals: Sequence[Mapping[str, np.ndarray]]
    """Proposals for the learner state in commit order, those of zero weight left out."""
    counted: Sequence[Counted]
    episodes: int
    """Episodes that count."""
    loss: float
    """Mean query loss over the episodes that count; NaN if none does."""
    metric: float
    """Mean query accuracy or squared error, likewise."""
    staleness: float
    """Mean staleness of the contributions, versions."""


@dataclass(frozen=True)
class Dropped:
    """A contribution that is not applied, and why."""

    shard: int
    base_version: int
    digest: str
    reason: str


class Aggregator(Protocol):
    """Decides what is computed next and when it makes an update."""

    def next_shard(self) -> int | None:
        """The next shard id to dispatch, or ``None`` while nothing more is wanted before the next commit."""
        ...

    def add(self, contribution: Contribution, version: int, *, finite: bool = True) -> Update | Dropped | None:
        """Take a contribution while the run is at ``version``; a non-finite one counts with weight zero.

        Raises:
            ValueError: the shard has been counted already, or was never wanted.
        """
        ...

    def pending(self) -> Sequence[tuple[Contribution, bool]]:
        """Contributions taken but not yet committed, each with whether it is finite, for a checkpoint."""
        ...

    def outstanding(self) -> Sequence[int]:
        """Shards handed out by ``next_shard`` and not yet taken, ascending."""
        ...

    @property
    def next_id(self) -> int:
        """The lowest shard id never handed out."""
        ...


def summarise(
    contributions: Sequence[Contribution], weights: Sequence[float], version: int
) -> tuple[Sequence[Mapping[str, np.ndarray]], Sequence[Counted], int, float, float, float]:
    """Everything of an ``Update`` but its gradient: proposals, log lines, episodes, loss, metric and staleness."""
    kept = [c for c, weight in zip(contributions, weights, strict=True) if weight > 0]
    episodes = sum(c.episodes for c in kept)
    total = max(1, episodes)
    nan = float("nan")
    return (
        tuple(c.proposals for c in kept if c.proposals),
        tuple(
            Counted(c.shard, c.base_version, weight, c.digest, c.fingerprint)
            for c, weight in zip(contributions, weights, strict=True)
        ),
        episodes,
        sum(c.statistics.loss * c.episodes for c in kept) / total if kept else nan,
        sum(c.statistics.metric * c.episodes for c in kept) / total if kept else nan,
        sum(version - c.base_version for c in contributions) / len(contributions),
    )
