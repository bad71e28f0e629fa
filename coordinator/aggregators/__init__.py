"""Aggregators: how contributions become an update. ``build_aggregator`` makes the configured one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.config import sections
from cluster.messages import Contribution
from coordinator.aggregators.asynchronous import AsyncAggregator
from coordinator.aggregators.base import Aggregator
from coordinator.aggregators.sync import SyncAggregator


def build_aggregator(
    config: sections.Aggregator,
    version: int = 0,
    next_id: int = 0,
    reissue: Iterable[int] = (),
    pending: Sequence[tuple[Contribution, bool]] = (),
) -> Aggregator:
    """The aggregator that ``config`` describes, for a run at ``version``.

    Args:
        config: its configuration.
        version: the version that the run is at.
        next_id: the lowest shard id never handed out (asynchronous).
        reissue: shards handed out earlier and never counted (asynchronous).
        pending: contributions kept by a checkpoint.
    """
    match config:
        case sections.SyncAggregator(shards=shards):
            return SyncAggregator(shards, version, pending)
        case sections.AsyncAggregator(staleness_bound=bound, staleness_exponent=exponent, buffer=buffer):
            return AsyncAggregator(bound, exponent, buffer, next_id, reissue, pending)
