"""Meta-SGD (Li, Zhou, Chen, Li 2017, arXiv 1707.09835).

    φₜ₊₁ = φₜ − α ∘ ∇L_support(φₜ),   φ₀ and α both meta-learned,   meta-gradient = ∇_(φ₀, α) Σ_episodes L_query(φ_T)

α has a step size for each element of each parameter (``rate/<name>``, shaped as it), which decides the direction of
a step too: it may become negative. φₜ has the names and shapes of the network's parameters φ₀; samples are
``[support, *sample]`` and ``[query, *sample]``, the network's outputs ``[sample, way]``.

The gradient is ``exact``. Depart from the paper: α starts at one value instead of random ones; more steps than one are
allowed, all with the same α.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.inner_loop import InnerGradient, last, rated_descent
from metaworker.learners.base import Context, GradientKind, ShardResult, Task
from metaworker.learners.gradient_based import RATE, GradientBased, Network
from metaworker.learners.vectorise import differentiate


@dataclass(frozen=True)
class MetaSGD(GradientBased):
    """Meta-SGD on a network."""

    network: Network
    inner_lr: float
    """Of every element, to start with."""
    inner_steps: int
    eval_steps: int

    @property
    def kind(self) -> GradientKind:
        """``exact``."""
        return "exact"

    def meta_parameters(self, seed: int) -> Tensors:
        """The network's initial parameters and the step sizes."""
        network = self.network.parameters(seed)
        return network | {RATE + name: torch.full_like(tensor, self.inner_lr) for name, tensor in network.items()}

    def adapt(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        support_x: Shaped[Tensor, "support *sample"],
        support_y: Tensor,
        metadata: Mapping[str, Tensor],
    ) -> Sequence[Task]:
        """``eval_steps`` steps with the learned sizes."""
        given = self.network.evaluation_statistics(state)
        gradient = self.network.gradient(support_x, support_y, given)
        trajectory = _descend(gradient, theta, self.eval_steps, first_order=True)
        return [self.network.task(parameters, support_x, given) for parameters in trajectory]

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Differentiate the query loss after ``inner_steps`` steps."""
        fused = self.network.fused()
        return differentiate(
            theta, episodes, context.chunk, self.network.score, self._adapt, fused.score if fused else None
        )

    def _adapt(self, theta: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor) -> Tensors:
        """Parameters after ``inner_steps`` training steps."""
        gradient = self.network.gradient(support_x, support_y)
        return last(_descend(gradient, theta, self.inner_steps, first_order=False))[0]


def _descend(gradient: InnerGradient, theta: Mapping[str, Tensor], steps: int, first_order: bool) -> Iterator[Tensors]:
    """The network's parameters before and after each step."""
    start = {name: tensor for name, tensor in theta.items() if not name.startswith(RATE)}
    rates = {name: theta[RATE + name] for name in start}
    return rated_descent([gradient] * steps, start, [rates] * steps, first_order)
