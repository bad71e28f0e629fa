"""Learners that embed samples and let a head compare queries with the support set: no inner steps.

    e = f_θ(x) for support and query samples,   logits = head_θ(support e, support labels, query e)

One head per algorithm, in a file of its own. θ is the encoder's and the head's parameters together; the meta-gradient
is that of the head's loss on the queries, ``exact`` unless the head says otherwise. As in the code of Prototypical
Networks, support and query pass the encoder together in training, and in evaluation with ``transductive`` batch-norm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
from metaworker.learners.objective import CLASSIFICATION
from metaworker.learners.vectorise import Score, differentiate
from metaworker.models.base import Backbone, Initialiser
from metaworker.models.layers import EPSILON

PREFIX = "head/"
"""Of the names of a head's parameters within θ."""


class Head(ABC):
    """Compares queries with a support set: pure functions of named parameters, for one episode, under ``vmap``."""

    @property
    def kind(self) -> GradientKind:
        """What the gradient of ``loss`` claims to be."""
        return "exact"

    @property
    def ordered(self) -> bool:
        """Whether the order of support samples matters."""
        return False

    @property
    def names_matter(self) -> bool:
        """Whether it matters which label which class has."""
        return False

    def parameters(self, normal: Initialiser) -> Tensors:
        """Initial parameters, drawn by key; none for many heads."""
        return {}

    def noise(self, support: int, query: int) -> int:
        """How many uniform numbers an episode's loss takes; 0 for heads without randomness."""
        return 0

    @abstractmethod
    def logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """Scores of the classes for each query; the largest is the prediction. Queries do not see one another."""

    def loss(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
        query_labels: Int[Tensor, "query"],
        noise: Float[Tensor, "noise"] | None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "query way"]]:
        """What training minimises, and the logits beside it; the logits' mean cross-entropy unless overridden."""
        logits = self.logits(parameters, support, labels, query)
        return CLASSIFICATION.loss(logits, query_labels), logits


class SequentialHead(Head):
    """A head that reads the support set sample by sample, labels included.

    Training draws the order by key: the sampler gives class after class, and a sample's place would tell its label.
    """

    @property
    def ordered(self) -> bool:
        """The support set is a sequence."""
        return True

    @property
    def names_matter(self) -> bool:
        """A label is an input and an output of its own."""
        return True

    def noise(self, support: int, query: int) -> int:
        """One number a support sample, by which they are sorted."""
        return support

    def training_logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """What training judges: the logits, unless overridden."""
        return self.logits(parameters, support, labels, query)

    def loss(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
        query_labels: Int[Tensor, "query"],
        noise: Float[Tensor, "noise"] | None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "query way"]]:
        """Mean cross-entropy of the queries after the support set in the order that ``noise`` gives."""
        assert noise is not None
        order = noise.argsort()
        logits = self.training_logits(parameters, support[order], labels[order], query)
        return CLASSIFICATION.loss(logits, query_labels), logits


@dataclass(frozen=True)
class EmbeddingLearner:
    """An encoder and a head."""

    backbone: Backbone
    head: Head
    batch_norm: BatchNorm
    seed: int
    """Of the head's noise."""

    @property
    def kind(self) -> GradientKind:
        """The head's."""
        return self.head.kind

    @property
    def transductive(self) -> bool:
        """Whether queries share batch statistics."""
        return self.batch_norm == "transductive" and bool(self.backbone.statistics())

    @property
    def ordered(self) -> bool:
        """The head's."""
        return self.head.ordered

    @property
    def names_matter(self) -> bool:
        """The head's."""
        return self.head.names_matter

    def meta_parameters(self, seed: int) -> Tensors:
        """The encoder's and the head's initial parameters."""
        encoder = self.backbone.parameters(lambda name, shape: keys.tensor_normals(seed, "init", name, shape))
        head = self.head.parameters(lambda name, shape: keys.tensor_normals(seed, "init", PREFIX + name, shape))
        return encoder | {PREFIX + name: tensor for name, tensor in head.items()}

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
        """One task model: θ with the support set that it compares queries to."""
        statistics = given_statistics(self.batch_norm, state, training=False)
        if self.batch_norm == "support":
            statistics = self.backbone(theta, support_x, None)[1] or None
        return [{"parameters": theta, "statistics": statistics, "support_x": support_x, "support_y": support_y}]

    def predict(self, task: Task, query_x: Float[Tensor, "query *sample"]) -> Float[Tensor, "query way"]:
        """The head's logits."""
        parameters, support, query = self.embed(task, query_x)
        return self.head.logits(parameters, support, task["support_y"], query)

    def embed(
        self, task: Task, query_x: Float[Tensor, "query *sample"]
    ) -> tuple[Tensors, Float[Tensor, "support embedding"], Float[Tensor, "query embedding"]]:
        """What the head is given: its parameters, and the embeddings of the support set and of queries."""
        x = torch.cat([task["support_x"], query_x])
        embedded, _ = self.backbone(task["parameters"], x, task["statistics"])
        shots = len(task["support_y"])
        return _own(task["parameters"]), embedded[:shots], embedded[shots:]

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Differentiate the head's loss."""
        looped, noise = self._looped_score(), self._noise(episodes)
        return differentiate(theta, episodes, context.chunk, self._score, looped_score=looped, extra=noise)

    def commit_state(
        self, state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Update the running batch statistics."""
        return commit_running_statistics(state, proposals)

    def _score(
        self,
        theta: Mapping[str, Tensor],
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensors]:
        given = self.backbone(theta, support_x, None)[1] or None if self.batch_norm == "support" else None
        embedded, observed = self.backbone(theta, torch.cat([support_x, query_x]), given)
        support, query = embedded[: len(support_y)], embedded[len(support_y) :]
        loss, logits = self.head.loss(_own(theta), support, support_y, query, query_y, noise)
        return loss, CLASSIFICATION.metric(logits, query_y), observed

    def _looped_score(self) -> Score | None:
        """``_score`` by fused kernels, which give no gradient to statistics that others use."""
        return None if self.batch_norm == "support" else replace(self, backbone=self.backbone.fused())._score

    def _noise(self, episodes: Episodes) -> Tensor | None:
        """The head's uniform numbers, ``[episode, noise]``, drawn by (seed, episode id)."""
        count = self.head.noise(episodes.support_x.shape[1], episodes.query_x.shape[1])
        if not count:
            return None
        drawn = keys.uniforms(self.seed, "head noise", "train", episodes.ids, count)
        return torch.from_numpy(drawn).to(episodes.support_x)


def members(labels: Int[Tensor, "sample"], way: int, dtype: torch.dtype) -> Float[Tensor, "way sample"]:
    """Which samples are of which class: 1 or 0."""
    return (labels[None, :] == torch.arange(way, device=labels.device)[:, None]).to(dtype)


def by_class(
    scores: Float[Tensor, "query support"], labels: Int[Tensor, "support"], way: int
) -> Float[Tensor, "query way support"]:
    """The scores of each class's own samples; those of other classes are as low as numbers go."""
    other = labels[None, :] != torch.arange(way, device=labels.device)[:, None]
    return scores[:, None, :].masked_fill(other[None], torch.finfo(scores.dtype).min)


def unit_length(x: Float[Tensor, "sample embedding"]) -> Float[Tensor, "sample embedding"]:
    """Each sample's embedding over its length; ε keeps the gradient of an embedding of zeros finite."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)


def _own(theta: Mapping[str, Tensor]) -> Tensors:
    """The head's parameters."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in theta.items() if name.startswith(PREFIX)}
