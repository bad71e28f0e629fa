"""What a task is scored by: cross-entropy and accuracy, or squared error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from metaworker.models.layers import cross_entropy


@dataclass(frozen=True)
class Objective:
    """A differentiable loss and the metric that is reported beside it, both means over samples."""

    loss: Callable[[Tensor, Tensor], Float[Tensor, ""]]
    metric: Callable[[Tensor, Tensor], Float[Tensor, ""]]


def _accuracy(logits: Float[Tensor, "sample way"], labels: Tensor) -> Float[Tensor, ""]:
    return (logits.argmax(-1) == labels).to(logits.dtype).mean()


def squared_error(outputs: Float[Tensor, "sample out"], targets: Float[Tensor, "sample out"]) -> Float[Tensor, ""]:
    """Mean squared error."""
    return (outputs - targets).square().mean()


CLASSIFICATION = Objective(cross_entropy, _accuracy)
REGRESSION = Objective(squared_error, squared_error)
