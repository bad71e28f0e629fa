"""Prototypical Networks (Snell, Swersky, Zemel 2017, arXiv 1703.05175).

    c_k = mean of f_θ(x) over the support samples of class k,   p(y = k | x) = softmax_k(−‖f_θ(x) − c_k‖²)

The meta-gradient is ``exact``: the query cross-entropy's gradient with respect to θ. Computing the prototypes is all
the adaptation there is, so there are no steps. As in the authors' code, support and query pass the encoder together
in training, and in evaluation with ``transductive`` batch-norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cluster import keys
from cluster.config.sections import BatchNorm
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.learners.base import Context, GradientKind, ShardResult, Task
from metaworker.learners.normalisation import commit_running_statistics, given_statistics
from metaworker.learners.objective import Objective
from metaworker.learners.vectorise import Score, differentiate
from metaworker.models.base import Backbone


@dataclass(frozen=True)
class ProtoNet:
    """Prototypical Networks on a backbone without a head."""

    backbone: Backbone
    objective: Objective
    batch_norm: BatchNorm
    way: int

    @property
    def kind(self) -> GradientKind:
        """The gradient of the query loss itself."""
        return "exact"

    @property
    def transductive(self) -> bool:
        """Whether queries share batch statistics."""
        return self.batch_norm == "transductive" and bool(self.backbone.statistics())

    def meta_parameters(self, seed: int) -> Tensors:
        """The encoder's initial parameters."""
        return self.backbone.parameters(lambda name, shape: keys.tensor_normals(seed, "init", name, shape))

    def initial_state(self) -> Tensors:
        """Running batch statistics."""
        return self.backbone.statistics()

    def adapt(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        support_x: Float[Tensor, "support *sample"],
        support_y: Int[Tensor, "support"],
        metadata: Mapping[str, Tensor],
    ) -> Sequence[Task]:
        """One task model: the encoder with the support set it compares queries to."""
        statistics = given_statistics(self.batch_norm, state, training=False)
        if self.batch_norm == "support":
            statistics = self.backbone(theta, support_x, None)[1] or None
        return [{"parameters": theta, "statistics": statistics, "support_x": support_x, "support_y": support_y}]

    def predict(self, task: Task, query_x: Float[Tensor, "query *sample"]) -> Float[Tensor, "query way"]:
        """Negative squared distances to the prototypes."""
        x = torch.cat([task["support_x"], query_x])
        embedded, _ = self.backbone(task["parameters"], x, task["statistics"])
        return self._logits(embedded, task["support_y"])

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Differentiate the query cross-entropy."""
        return differentiate(theta, episodes, context.chunk, self._score, looped_score=self._looped_score())

    def commit_state(
        self, state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Update the running batch statistics."""
        return commit_running_statistics(state, proposals)

    def _score(
        self, theta: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> tuple[Tensor, Tensor, Tensors]:
        given = self.backbone(theta, support_x, None)[1] or None if self.batch_norm == "support" else None
        embedded, observed = self.backbone(theta, torch.cat([support_x, query_x]), given)
        logits = self._logits(embedded, support_y)
        return self.objective.loss(logits, query_y), self.objective.metric(logits, query_y), observed

    def _looped_score(self) -> Score | None:
        """``_score`` by fused kernels, which give no gradient to statistics that others use."""
        return None if self.batch_norm == "support" else replace(self, backbone=self.backbone.fused())._score

    def _logits(
        self, embedded: Float[Tensor, "sample embedding"], support_y: Int[Tensor, "support"]
    ) -> Float[Tensor, "query way"]:
        support, query = embedded[: len(support_y)], embedded[len(support_y) :]
        member = (support_y[None, :] == torch.arange(self.way, device=support_y.device)[:, None]).to(embedded.dtype)
        prototypes = (member @ support) / member.sum(1, keepdim=True)
        # ‖q − c‖² expanded, without ‖q‖², which every class shares.
        return 2 * query @ prototypes.T - prototypes.square().sum(1)
