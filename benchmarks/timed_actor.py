"""The worker actor with a clock: its contributions also say when they were finished.

The clock is CLOCK_MONOTONIC, which all processes of one Linux machine share.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

from cluster.config.run import RunConfig
from cluster.messages import Contribution, EvaluationPart, EvaluationTask, Published, ShardTask, WorkerHello
from metaworker.actor import WorkerActor


@dataclass(frozen=True)
class TimedContribution(Contribution):
    """A contribution and when it was finished."""

    finished: float = 0.0
    """Seconds, ``time.perf_counter``."""


class TimedActor:
    """A ``WorkerActor`` that gives ``TimedContribution``."""

    def __init__(self, config: RunConfig, slot: int) -> None:
        self._actor = WorkerActor(config, slot)

    def hello(self) -> WorkerHello:
        """The actor's."""
        return self._actor.hello()

    def compute(self, published: Published, order: ShardTask | EvaluationTask) -> Contribution | EvaluationPart:
        """The actor's answer, with the time."""
        result = self._actor.compute(published, order)
        finished = time.perf_counter()
        if isinstance(result, EvaluationPart):
            return result
        values = {field.name: getattr(result, field.name) for field in fields(result)}
        return TimedContribution(**values, finished=finished)
