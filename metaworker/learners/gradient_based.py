"""What learners with an inner loop share: a network that is adapted to the support set, and its plain duties.

`Network` computes for one episode, under ``vmap``. `GradientBased` is a learner but for what makes the algorithm:
its meta-parameters, how it adapts, and its meta-gradient.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.func import grad

from cluster import keys
from cluster.config.sections import BatchNorm
from cluster.flat import Tensors
from metaworker.inner_loop import InnerGradient
from metaworker.learners.base import Task
from metaworker.learners.normalisation import commit_running_statistics, given_statistics
from metaworker.learners.objective import Objective
from metaworker.models.base import Backbone

RATE = "rate/"
"""Before a parameter's name: its learned step sizes."""


@dataclass(frozen=True)
class Network:
    """A backbone with a head, what scores its outputs, and where its batch-norm takes statistics from."""

    backbone: Backbone
    objective: Objective
    batch_norm: BatchNorm

    @property
    def transductive(self) -> bool:
        """Whether queries share batch statistics."""
        return self.batch_norm == "transductive" and bool(self.backbone.statistics())

    def fused(self) -> Network | None:
        """The same by fused kernels; ``None`` where these fail: they give no gradient to statistics others use."""
        return None if self.batch_norm == "support" else replace(self, backbone=self.backbone.fused())

    def parameters(self, seed: int) -> Tensors:
        """The backbone's initial parameters."""
        return self.backbone.parameters(lambda name, shape: keys.tensor_normals(seed, "init", name, shape))

    def evaluation_statistics(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """Statistics to normalise an evaluation's support set with; ``None`` for its own."""
        return given_statistics(self.batch_norm, state)

    def gradient(
        self,
        x: Tensor,
        y: Tensor,
        given: Mapping[str, Tensor] | None = None,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> InnerGradient:
        """The gradient of the loss on ``x``, ``y`` as a function of the parameters, beside ``fixed`` ones."""
        others = dict(fixed or {})

        def loss(parameters: Mapping[str, Tensor]) -> Float[Tensor, ""]:
            return self.objective.loss(self.backbone({**parameters, **others}, x, given)[0], y)

        return grad(loss)

    def query_statistics(
        self, parameters: Mapping[str, Tensor], support_x: Tensor, given: Mapping[str, Tensor] | None
    ) -> Mapping[str, Tensor] | None:
        """Statistics to normalise the query set with; ``None`` for its own."""
        if self.batch_norm == "support":
            return self.backbone(parameters, support_x, None)[1] or None
        return given

    def task(
        self, parameters: Mapping[str, Tensor], support_x: Tensor, given: Mapping[str, Tensor] | None
    ) -> Mapping[str, Mapping[str, Tensor] | None]:
        """The task model with these parameters."""
        return {"parameters": parameters, "statistics": self.query_statistics(parameters, support_x, given)}

    def score(
        self, adapted: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Tensors]:
        """Query loss, metric and batch statistics of adapted parameters, in training."""
        given = self.query_statistics(adapted, support_x, None)
        outputs, observed = self.backbone(adapted, query_x, given)
        return self.objective.loss(outputs, query_y), self.objective.metric(outputs, query_y), observed


class GradientBased(ABC):
    """The part of a learner that all of this family have in common; leaves declare the field ``network``."""

    network: Network

    @property
    def transductive(self) -> bool:
        """Whether queries share batch statistics."""
        return self.network.transductive

    @property
    def ordered(self) -> bool:
        """All samples are in every step."""
        return False

    @property
    def names_matter(self) -> bool:
        """The head has weights of its own for each label."""
        return True

    def initial_state(self) -> Tensors:
        """Running batch statistics."""
        return self.network.backbone.statistics()

    def predict(self, task: Task, query_x: Shaped[Tensor, "query *sample"]) -> Tensor:
        """The adapted network's outputs."""
        return self.network.backbone(task["parameters"], query_x, task["statistics"])[0]

    def commit_state(
        self, state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Update the running batch statistics."""
        return commit_running_statistics(state, proposals)
