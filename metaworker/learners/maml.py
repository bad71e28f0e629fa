"""Model-agnostic meta-learning (Finn, Abbeel, Levine 2017, arXiv 1703.03400), second or first order.

    φ₀ = θ,   φₜ₊₁ = φₜ − α ∇L_support(φₜ),   meta-gradient = ∇_θ Σ_episodes L_query(φ_T)

φₜ has θ's names and shapes, ``[episode, …]`` for a chunk of episodes; L_support takes the way · shot samples
``[support, *sample]``, L_query ``[query, *sample]``, and the network's outputs are ``[sample, way]``.

First order drops the derivatives of the inner gradients: ∇_φ L_query(φ_T). Second order is ``exact``, first order a
``surrogate``. Depart from the paper: convolutions without bias (batch-norm's shift does its work).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor

from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.inner_loop import gradient_descent, last
from metaworker.learners.base import Context, GradientKind, ShardResult, Task
from metaworker.learners.gradient_based import GradientBased, Network
from metaworker.learners.stacked import Scores, Stack, repeat, shard_result
from metaworker.learners.vectorise import differentiate


@dataclass(frozen=True)
class MAML(GradientBased):
    """MAML on a network."""

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
        """``eval_steps`` steps of gradient descent on the support set."""
        given = self.network.evaluation_statistics(state)
        gradient = self.network.gradient(support_x, support_y, given)
        trajectory = gradient_descent(gradient, theta, self.inner_lr, self.eval_steps, first_order=True)
        return [self.network.task(parameters, support_x, given) for parameters in trajectory]

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Differentiate the query loss after ``inner_steps`` steps."""
        if self.first_order and self.network.batch_norm != "support":
            return self._first_order(theta, episodes, context.chunk)
        fused = self.network.fused()
        return differentiate(
            theta, episodes, context.chunk, self.network.score, self._adapt, fused.score if fused else None
        )

    def _first_order(self, theta: Mapping[str, Tensor], episodes: Episodes, chunk: int) -> ShardResult:
        """``contribute`` where no derivative is needed but the inner ones and ∇_φ L_query(φ_T)."""
        stack = Stack(self.network.backbone, self.network.objective)
        gradient = {name: tensor.new_zeros(tensor.shape) for name, tensor in theta.items()}
        scores: list[Scores] = []
        for start in range(0, len(episodes), chunk):
            part = episodes.chunk(start, start + chunk)
            inner = stack.gradient(part.support_x, part.support_y)
            start_points = repeat(theta, len(part))
            (phi,) = last(gradient_descent(inner, start_points, self.inner_lr, self.inner_steps, first_order=True))
            found, score = stack.differentiate(phi, part.query_x, part.query_y)
            gradient = {name: total + found[name].sum(0) for name, total in gradient.items()}
            scores.append(score)
        return shard_result(gradient, scores)

    def _adapt(self, theta: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor) -> Tensors:
        """Parameters after ``inner_steps`` training steps."""
        gradient = self.network.gradient(support_x, support_y)
        return last(gradient_descent(gradient, theta, self.inner_lr, self.inner_steps, self.first_order))[0]
