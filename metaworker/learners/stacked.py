"""Tasks side by side in one computation, for learners that need first derivatives only.

Tasks share nothing, so the gradient of the sum of their losses holds the gradient of each. ``vmap`` of
``torch.func.grad`` gives the same, but always builds the graph of a second derivative, and must not use PyTorch's
batch-norm kernel (whose *second* derivative is wrong there, see ``models.layers``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from cluster.flat import Tensors
from metaworker.inner_loop import InnerGradient
from metaworker.learners.base import ShardResult
from metaworker.learners.objective import Objective
from metaworker.learners.vectorise import concatenate
from metaworker.models.base import Backbone


@dataclass(frozen=True)
class Scores:
    """What tasks come to on samples of theirs."""

    loss: Float[Tensor, "task"]
    metric: Float[Tensor, "task"]
    statistics: Tensors
    """Batch statistics, each ``[task, channel]``."""


@dataclass(frozen=True)
class Stack:
    """A backbone and an objective for many tasks at once; parameters are ``[task, …]``, samples ``[task, sample, …]``.

    Each task is normalised with the batch statistics of its samples.
    """

    backbone: Backbone
    objective: Objective

    def score(self, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Scores:
        """Loss, metric and statistics of each task."""
        with torch.no_grad():
            outputs, statistics = self.backbone.stacked(parameters, x, observe=True)
            return Scores(vmap(self.objective.loss)(outputs, y), vmap(self.objective.metric)(outputs, y), statistics)

    def differentiate(self, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensors, Scores]:
        """The gradient of each task's loss, ``[task, …]``, and the scores."""
        gradient, outputs, loss, statistics = self._differentiate(parameters, x, y, observe=True)
        return gradient, Scores(loss, vmap(self.objective.metric)(outputs, y), statistics)

    def gradient(self, x: Tensor, y: Tensor) -> InnerGradient:
        """The gradient of each task's loss as a function of the parameters."""
        return lambda parameters: self._differentiate(parameters, x, y, observe=False)[0]

    def _differentiate(
        self, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor, *, observe: bool
    ) -> tuple[Tensors, Tensor, Float[Tensor, "task"], Tensors]:
        """Gradient, outputs, loss and statistics of each task."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        with torch.enable_grad():
            outputs, statistics = self.backbone.stacked(leaves, x, observe=observe)
            loss = vmap(self.objective.loss)(outputs, y)
            gradient = torch.autograd.grad(loss.sum(), list(leaves.values()))
        return dict(zip(leaves, gradient, strict=True)), outputs.detach(), loss.detach(), statistics


def repeat(theta: Mapping[str, Tensor], tasks: int) -> Tensors:
    """θ for each task, ``[task, …]``, without a copy."""
    return {name: tensor.detach().expand(tasks, *tensor.shape) for name, tensor in theta.items()}


def shard_result(gradient: Tensors, scores: Sequence[Scores]) -> ShardResult:
    """The result of a shard from its summed gradient and the scores of its chunks of tasks."""
    loss = torch.cat([score.loss for score in scores])
    metric = torch.cat([score.metric for score in scores])
    return ShardResult(gradient, len(loss), concatenate([score.statistics for score in scores]), loss, metric)
