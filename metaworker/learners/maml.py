"""Model-agnostic meta-learning (Finn, Abbeel, Levine 2017, arXiv 1703.03400), second or first order.

    φ₀ = θ,   φₜ₊₁ = φₜ − α ∇L_support(φₜ),   meta-gradient = ∇_θ Σ_episodes L_query(φ_T)

First order drops the derivatives of the inner gradients: ∇_φ L_query(φ_T). Second order is ``exact``, first order a
``surrogate``. Depart from the paper: convolutions without bias (batch-norm's shift does its work).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from torch import Tensor
from torch.func import grad

from cluster import keys
from cluster.config.sections import BatchNorm
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.inner_loop import gradient_descent
from metaworker.learners.base import Context, GradientKind, ShardResult, Task
from metaworker.learners.normalisation import commit_running_statistics, given_statistics
from metaworker.learners.objective import Objective
from metaworker.learners.stacked import Scores, Stack, repeat, shard_result
from metaworker.learners.vectorise import Score, differentiate
from metaworker.models.base import Backbone


@dataclass(frozen=True)
class MAML:
    """MAML on a backbone with a head."""

    backbone: Backbone
    objective: Objective
    batch_norm: BatchNorm
    inner_lr: float
    inner_steps: int
    eval_steps: int
    first_order: bool

    @property
    def kind(self) -> GradientKind:
        """``exact`` in second order."""
        return "surrogate" if self.first_order else "exact"

    @property
    def transductive(self) -> bool:
        """Whether queries share batch statistics."""
        return self.batch_norm == "transductive" and bool(self.backbone.statistics())

    @property
    def ordered(self) -> bool:
        """All samples are in every step."""
        return False

    @property
    def names_matter(self) -> bool:
        """The head has weights of its own for each label."""
        return True

    def meta_parameters(self, seed: int) -> Tensors:
        """The backbone's initial parameters."""
        return self.backbone.parameters(lambda name, shape: keys.tensor_normals(seed, "init", name, shape))

    def initial_state(self) -> Tensors:
        """Running batch statistics."""
        return self.backbone.statistics()

    def adapt(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        support_x: Float[Tensor, "support *sample"],
        support_y: Tensor,
        metadata: Mapping[str, Tensor],
    ) -> Sequence[Task]:
        """``eval_steps`` steps of gradient descent on the support set."""
        given = given_statistics(self.batch_norm, state, training=False)

        def loss(parameters: Mapping[str, Tensor]) -> Float[Tensor, ""]:
            return self.objective.loss(self.backbone(parameters, support_x, given)[0], support_y)

        trajectory = gradient_descent(grad(loss), theta, self.inner_lr, self.eval_steps, first_order=True)
        return [{"parameters": p, "statistics": self._query_statistics(p, support_x, given)} for p in trajectory]

    def predict(self, task: Task, query_x: Float[Tensor, "query *sample"]) -> Tensor:
        """The adapted network's outputs."""
        return self.backbone(task["parameters"], query_x, task["statistics"])[0]

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Differentiate the query loss after ``inner_steps`` steps."""
        if self.first_order and self.batch_norm != "support":
            return self._first_order(theta, episodes, context.chunk)
        return differentiate(theta, episodes, context.chunk, self._score, self._adapt, self._looped_score())

    def commit_state(
        self, state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Update the running batch statistics."""
        return commit_running_statistics(state, proposals)

    def _first_order(self, theta: Mapping[str, Tensor], episodes: Episodes, chunk: int) -> ShardResult:
        """``contribute`` where no derivative is needed but the inner ones and ∇_φ L_query(φ_T)."""
        stack = Stack(self.backbone, self.objective)
        gradient = {name: tensor.new_zeros(tensor.shape) for name, tensor in theta.items()}
        scores: list[Scores] = []
        for start in range(0, len(episodes), chunk):
            part = episodes.chunk(start, start + chunk)
            inner = stack.gradient(part.support_x, part.support_y)
            phi = gradient_descent(inner, repeat(theta, len(part)), self.inner_lr, self.inner_steps, first_order=True)
            found, score = stack.differentiate(phi[-1], part.query_x, part.query_y)
            gradient = {name: total + found[name].sum(0) for name, total in gradient.items()}
            scores.append(score)
        return shard_result(gradient, scores)

    def _adapt(self, theta: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor) -> Tensors:
        """Parameters after ``inner_steps`` training steps."""

        def loss(parameters: Mapping[str, Tensor]) -> Float[Tensor, ""]:
            return self.objective.loss(self.backbone(parameters, support_x, None)[0], support_y)

        return gradient_descent(grad(loss), theta, self.inner_lr, self.inner_steps, self.first_order)[-1]

    def _score(
        self, adapted: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> tuple[Tensor, Tensor, Tensors]:
        given = self._query_statistics(adapted, support_x, None)
        outputs, observed = self.backbone(adapted, query_x, given)
        return self.objective.loss(outputs, query_y), self.objective.metric(outputs, query_y), observed

    def _looped_score(self) -> Score | None:
        """``_score`` by fused kernels, which give no gradient to statistics that others use."""
        return None if self.batch_norm == "support" else replace(self, backbone=self.backbone.fused())._score

    def _query_statistics(
        self, parameters: Mapping[str, Tensor], support_x: Tensor, given: Mapping[str, Tensor] | None
    ) -> Mapping[str, Tensor] | None:
        """Statistics to normalise the query set with; ``None`` for its own."""
        if self.batch_norm == "support":
            return self.backbone(parameters, support_x, None)[1] or None
        return given
