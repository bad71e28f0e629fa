"""The worker actor with a clock: its contributions also say when they were finished.

The clock is CLOCK_MONOTONIC, which all processes of one Linux machine share.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

from cluster.messages import Contribution, EvaluationPart, EvaluationTask, Published, ShardTask
from metaworker.actor import WorkerActor


@dataclass(frozen=True)
class TimedContribution(Contribution):
    """A contribution and when it was finished."""

    finished: float = 0.0
    """Seconds, ``time.perf_counter``."""


class TimedActor(WorkerActor):
    """A ``WorkerActor`` that gives ``TimedContribution``."""

    def compute(self, published: Published, order: ShardTask | EvaluationTask) -> Contribution | EvaluationPart:
        """The actor's answer, with the time."""
        result = super().compute(published, order)
        finished = time.perf_counter()
        if isinstance(result, EvaluationPart):
            return result
        values = {field.name: getattr(result, field.name) for field in fields(result)}
        return TimedContribution(**values, finished=finished)
