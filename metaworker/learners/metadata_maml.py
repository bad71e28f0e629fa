"""MAML from an initialisation that what is known of the task modulates (after FiLM, Perez et al. 2018, 1709.07871).

    z = tanh(D tanh(M m)),   weights  φ₀ = θ ⊙ (1 + S z),   biases, scales and shifts  φ₀ = θ + B z,   then MAML from φ₀

m ``[features]`` are the features of the task's metadata (`metaworker.metadata`), M is ``[width, features]``, D
``[width, width]``, z ``[width]``; S and B have a row for each output unit of each layer, ``[unit, width]``, and φ₀ has
θ's names and shapes. There are no biases on the way from m to the modulation, and S and B start at zero: without
metadata, and untrained, this is MAML (arXiv 1703.03400). Columns that a task lacks are zeros in m. θ, M, D, S and B are
meta-learned together; the gradient is ``exact``, second derivatives included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from cluster import keys
from cluster.episodes.types import Episodes
from cluster.flat import Tensors, some_tensor
from metaworker.inner_loop import gradient_descent, last
from metaworker.learners.base import Context, GradientKind, ShardResult, Task
from metaworker.learners.gradient_based import GradientBased, Network
from metaworker.learners.vectorise import differentiate
from metaworker.metadata import episode_features, features_width, task_features

TASK = "task/"
"""Before the names of what is not the network's."""


@dataclass(frozen=True)
class MetadataMAML(GradientBased):
    """MAML on a network, with a task embedding of width ``width``."""

    network: Network
    columns: tuple[str, ...]
    width: int
    inner_lr: float
    inner_steps: int
    eval_steps: int

    @property
    def kind(self) -> GradientKind:
        """``exact``."""
        return "exact"

    def meta_parameters(self, seed: int) -> Tensors:
        """The network's, and those of the modulation."""
        network = self.network.parameters(seed)
        found = dict(network)
        for name, inputs in (("mix", features_width(self.columns)), ("deep", self.width)):
            drawn = keys.tensor_normals(seed, "init", TASK + name, (self.width, inputs))
            found[TASK + name] = drawn / math.sqrt(max(1, inputs))
        for name, tensor in network.items():
            found[f"{TASK}on/{name}"] = torch.zeros(len(tensor), self.width)
        return found

    def adapt(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        support_x: Shaped[Tensor, "support *sample"],
        support_y: Tensor,
        metadata: Mapping[str, Tensor],
    ) -> Sequence[Task]:
        """``eval_steps`` steps of gradient descent from the task's initialisation."""
        start = self.initialisation(theta, task_features(metadata, self.columns, some_tensor(theta)))
        given = self.network.evaluation_statistics(state)
        gradient = self.network.gradient(support_x, support_y, given)
        trajectory = gradient_descent(gradient, start, self.inner_lr, self.eval_steps, first_order=True)
        return [self.network.task(parameters, support_x, given) for parameters in trajectory]

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Differentiate the query loss after ``inner_steps`` steps."""
        features = {"features": episode_features(episodes, self.columns, some_tensor(theta))}
        fused, score = self.network.fused(), self.network.score
        looped = fused.score if fused else None
        return differentiate(theta, episodes, context.chunk, score, self._adapt, looped, features)

    def initialisation(self, theta: Mapping[str, Tensor], features: Float[Tensor, "features"]) -> Tensors:
        """The network's parameters for a task with such metadata."""
        z = torch.tanh(theta[TASK + "deep"] @ torch.tanh(theta[TASK + "mix"] @ features))
        network = {name: tensor for name, tensor in theta.items() if not name.startswith(TASK)}
        return {name: _modulated(tensor, theta[f"{TASK}on/{name}"] @ z) for name, tensor in network.items()}

    def _adapt(self, theta: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor, besides: Tensors) -> Tensors:
        """Parameters after ``inner_steps`` training steps."""
        start = self.initialisation(theta, besides["features"])
        gradient = self.network.gradient(support_x, support_y)
        return last(gradient_descent(gradient, start, self.inner_lr, self.inner_steps, first_order=False))[0]


def _modulated(tensor: Tensor, by: Float[Tensor, "units"]) -> Tensor:
    """Weights ``[unit, …]`` scaled by unit, vectors ``[unit]`` shifted."""
    return tensor + by if tensor.ndim == 1 else tensor * (1 + by.reshape(-1, *[1] * (tensor.ndim - 1)))
