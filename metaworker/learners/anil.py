"""Almost no inner loop (ANIL; Raghu, Raghu, Bengio, Vinyals 2020, arXiv 1909.09157).

    θ = (encoder, head w₀),   wₜ₊₁ = wₜ − α ∇_w L(head_wₜ(f_θ(support))),   meta-gradient = ∇_θ Σ_episodes L_query(w_T)

MAML whose inner loop changes the last layer alone, a weight ``[way, feature]`` and a bias ``[way]``, so an episode's
samples pass the encoder f once, ``[sample, feature]``. Second order is ``exact``: it includes how the features of the
support set change the head's steps. First order, which takes those steps for constants, is a ``surrogate``. Departs
from the paper as MAML does: convolutions without bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.func import grad

from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.inner_loop import InnerGradient, gradient_descent, last
from metaworker.learners.base import Context, GradientKind, ShardResult, Task
from metaworker.learners.gradient_based import GradientBased, Network
from metaworker.learners.vectorise import differentiate
from metaworker.models.base import Backbone, Statistics
from metaworker.models.conv4 import Conv4
from metaworker.models.mlp import MLP

Encoder = Callable[[Mapping[str, Tensor], Tensor, Mapping[str, Tensor] | None], tuple[Tensor, Statistics]]
"""What a backbone computes before its head: (parameters, x, statistics) -> (features, statistics used)."""


@dataclass(frozen=True)
class ANIL(GradientBased):
    """ANIL on a network whose last two parameters are its linear head."""

    network: Network
    inner_lr: float
    inner_steps: int
    eval_steps: int
    first_order: bool

    @property
    def kind(self) -> GradientKind:
        """``exact`` in second order."""
        return "surrogate" if self.first_order else "exact"

    def meta_parameters(self, seed: int) -> Tensors:
        """The network's initial parameters."""
        return self.network.parameters(seed)

    def adapt(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        support_x: Shaped[Tensor, "support *sample"],
        support_y: Tensor,
        metadata: Mapping[str, Tensor],
    ) -> Sequence[Task]:
        """``eval_steps`` steps of gradient descent on the head."""
        given = self.network.evaluation_statistics(state)
        features, seen = encoder(self.network.backbone)(theta, support_x, given)
        gradient = self._gradient(features, support_y)
        heads = gradient_descent(gradient, head(theta), self.inner_lr, self.eval_steps, first_order=True)
        statistics = self._query_statistics(seen, given)
        return [{"parameters": {**theta, **adapted}, "statistics": statistics} for adapted in heads]

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Differentiate the query loss after ``inner_steps`` steps of the head."""
        fused = self.network.fused()
        looped = replace(self, network=fused)._score if fused else None
        return differentiate(theta, episodes, context.chunk, self._score, looped_score=looped)

    def _score(
        self, theta: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Tensors]:
        encode, objective = encoder(self.network.backbone), self.network.objective
        features, seen = encode(theta, support_x, None)
        gradient = self._gradient(features, support_y)
        (adapted,) = last(gradient_descent(gradient, head(theta), self.inner_lr, self.inner_steps, self.first_order))
        embedded, observed = encode(theta, query_x, self._query_statistics(seen, None))
        outputs = linear(adapted, embedded)
        return objective.loss(outputs, query_y), objective.metric(outputs, query_y), observed

    def _gradient(self, features: Float[Tensor, "support feature"], support_y: Tensor) -> InnerGradient:
        """The gradient of the support loss as a function of the head."""
        return grad(lambda adapted: self.network.objective.loss(linear(adapted, features), support_y))

    def _query_statistics(self, seen: Statistics, given: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        """Statistics to normalise the query set with, after those ``seen`` in the support set; ``None`` for its own."""
        return seen or None if self.network.batch_norm == "support" else given


def head(theta: Mapping[str, Tensor]) -> Tensors:
    """The last layer's weight and bias."""
    return dict(list(theta.items())[-2:])


def linear(parameters: Mapping[str, Tensor], features: Float[Tensor, "sample feature"]) -> Float[Tensor, "sample out"]:
    """The outputs of a head."""
    weight, bias = parameters.values()
    return features @ weight.T + bias


def encoder(backbone: Backbone) -> Encoder:
    """The backbone without its head.

    Raises:
        TypeError: a backbone that is not known to end in a linear layer.
    """
    match backbone:
        case Conv4():
            return replace(backbone, outputs=None)
        case MLP(hidden=()):
            return lambda parameters, x, statistics: (x.flatten(1), {})
        case MLP(inputs, (*before, width)):
            layers = MLP(inputs, tuple(before), width)
            return lambda parameters, x, statistics: (torch.relu(layers(parameters, x, None)[0]), {})
    raise TypeError(f"ANIL takes a backbone that ends in a linear head, Conv4 or MLP, got {type(backbone).__name__}")
