"""What the dispatcher tells the train loop, and what makes a reply none.

Accepted, Evaluated    an order is settled
Failure, Notice        something was dealt with; something is to be known
Delay                  a notice: workers take longer to start, and why
Joined                 a worker is ready
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.messages import Contribution, EvaluationPart, ShardTask, WorkerHello
from cluster.metrics_catalogue import FailureKind
from coordinator.pool import Reply


@dataclass(frozen=True)
class Accepted:
    """A shard's contribution, settled: finite, or non-finite on two attempts."""

    contribution: Contribution
    finite: bool
    seconds: float
    """From submission to reply."""
    size: int


@dataclass(frozen=True)
class Evaluated:
    """An evaluation task's scores."""

    part: EvaluationPart


@dataclass(frozen=True)
class Failure:
    """Something failed and was dealt with; ``message`` says what and how, in one line."""

    kind: FailureKind
    message: str


@dataclass(frozen=True)
class Notice:
    """Something that people should know and that is no failure."""

    message: str


@dataclass(frozen=True)
class Joined:
    """A worker is ready."""

    hello: WorkerHello
    late: bool = False
    """Whether it was not there from the start."""


@dataclass(frozen=True)
class Delay(Notice):
    """Workers that start take longer, for a good reason: whoever waits for them is to wait on."""


Outcome = Accepted | Evaluated | Failure | Notice | Joined


def problem_with(reply: Reply) -> str | None:
    """What is wrong with a reply, whatever it says; a worker's own digest finds damage on the way, nothing more."""
    order, result = reply.order, reply.result
    if isinstance(order, ShardTask):
        about = order.shard, order.base_version
        if not isinstance(result, Contribution) or (result.shard, result.base_version) != about:
            return "its reply is no answer to the order"
        return None if result.content_digest() == result.digest else "its reply was damaged on its way"
    wanted = order.part, order.base_version, order.first_episode, order.episodes
    if isinstance(result, EvaluationPart):
        given = result.part, result.version, result.first_episode, len(result.loss)
        if given == wanted:
            return None if result.content_digest() == result.digest else "its reply was damaged on its way"
    return "its reply is no answer to the order"
