"""Evaluation of one version: orders for fixed episode ids, and a collector that turns their parts into scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.config.run import RunConfig
from cluster.config.sections import BatchNorm
from cluster.messages import EvaluationPart, EvaluationTask, Published, SplitName
from coordinator.dispatch import Dispatcher
from coordinator.outcomes import Evaluated, Failure, Joined, Notice
from coordinator.pool import Pool
from metaworker.learners import default_batch_norm
from metaworker.scores import EvaluationScores, combine

PART = 10
"""Episodes an order: small enough to spread 200 episodes evenly over many workers."""

PATIENCE = 0.5
"""Seconds of waiting between two looks at a stop request."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What is evaluated: episodes 0 … ``episodes`` − 1 of a split, always the same ones."""

    split: SplitName
    way: int
    shot: int
    query: int
    episodes: int
    batch_norm: BatchNorm | None
    """``None`` for a net without batch-norm."""
    within: str | None = None
    """Class metadata column whose value an episode's classes share."""

    @staticmethod
    def of(config: RunConfig, split: SplitName, episodes: int) -> EvaluationRequest:
        """The configured evaluation of ``split``."""
        shape = config.evaluation_shape
        counts = shape.way, shape.shot, shape.query, episodes
        return EvaluationRequest(split, *counts, default_batch_norm(config), shape.within)

    def orders(self, version: int) -> Iterator[EvaluationTask]:
        """The orders that cover the episodes."""
        for part, first in enumerate(range(0, self.episodes, PART)):
            count = min(PART, self.episodes - first)
            shape = self.way, self.shot, self.query, self.batch_norm
            yield EvaluationTask(self.split, first, count, *shape, version, part, within=self.within)


class EvaluationCollector:
    """Takes the parts of one evaluation; the last one makes the scores."""

    def __init__(self, request: EvaluationRequest) -> None:
        self._request = request
        self._parts: list[EvaluationPart] = []
        self._episodes = 0

    def add(self, part: EvaluationPart) -> EvaluationScores | None:
        """Take a part."""
        self._parts.append(part)
        self._episodes += len(part.loss)
        return combine(self._parts) if self._episodes == self._request.episodes else None


def evaluate_now(
    dispatcher: Dispatcher,
    pool: Pool,
    published: Published,
    request: EvaluationRequest,
    notice: Callable[[Failure | Notice | Joined], None],
) -> EvaluationScores:
    """Evaluate while nothing else is computed; ``notice`` hears of failures and of workers that join meanwhile.

    Raises:
        PoisonShardError, ClusterError: as the dispatcher.
    """
    handle = pool.publish(published)
    orders = request.orders(published.version)
    collector = EvaluationCollector(request)
    following = next(orders, None)
    while True:
        while following is not None and dispatcher.room > 0:
            dispatcher.submit(following, handle)
            following = next(orders, None)
        match dispatcher.next(PATIENCE):
            case Evaluated(part):
                scores = collector.add(part)
                if scores is not None:
                    return scores
            case (Failure() | Notice() | Joined()) as outcome:
                notice(outcome)
