"""Learners that embed samples and let a head compare queries with the support set: no inner steps.

    e = f_θ(x) for support and query samples,   logits = head_θ(support e, support labels, query e)

One head per algorithm, in a file of its own. θ is the encoder's and the head's parameters together; the meta-gradient
is that of the head's loss on the queries, ``exact`` unless the head says otherwise. As in the code of Prototypical
Networks, support and query pass the encoder together in training, and in evaluation with ``transductive`` batch-norm.

Some heads are told more than samples: what the task's metadata say (`Head.columns`), and learner state of their own,
to which every episode proposes an update (`Head.initial_state`). `Head.given` binds both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from cluster import keys
from cluster.config.sections import BatchNorm
from cluster.episodes.types import Episodes
from cluster.flat import Tensors, some_tensor
from metaworker.learners.base import Context, GradientKind, ShardResult, Task
from metaworker.learners.normalisation import commit_running_statistics, given_statistics
from metaworker.learners.objective import CLASSIFICATION
from metaworker.learners.vectorise import differentiate
from metaworker.metadata import episode_features, task_features
from metaworker.models.base import Backbone, Initialiser
from metaworker.models.layers import EPSILON
from metaworker.models.memory import one_hot

PREFIX = "head/"
"""Of the names of what is a head's, in θ and in the learner state."""

T = TypeVar("T", Tensor, np.ndarray)


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

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that it is told of a task; none for most heads."""
        return ()

    def initial_state(self) -> Tensors:
        """Its learner state at version 0; none for most heads."""
        return {}

    def given(self, state: Mapping[str, Tensor], features: Float[Tensor, "features"]) -> Head:
        """The head for one task: with its learner state, and with `task_features` of its columns."""
        return self

    def proposal(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
        query_labels: Int[Tensor, "query"],
    ) -> Tensors:
        """What a training episode proposes for its learner state; the arguments carry no gradient."""
        return {}

    def commit(
        self, state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Its learner state after the rows ``[episode, …]`` that were proposed, in their order."""
        return dict(state)

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
        return encoder | _named(head)

    def initial_state(self) -> Tensors:
        """Running batch statistics, and what the head keeps."""
        return self.backbone.statistics() | _named(self.head.initial_state())

    def adapt(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        support_x: Shaped[Tensor, "support *sample"],
        support_y: Int[Tensor, "support"],
        metadata: Mapping[str, Tensor],
    ) -> Sequence[Task]:
        """One task model: θ with the support set that it compares queries to."""
        statistics = given_statistics(self.batch_norm, _encoders(state))
        if self.batch_norm == "support":
            statistics = self.backbone(theta, support_x, None)[1] or None
        samples = {"support_x": support_x, "support_y": support_y}
        told = {"state": own(state), "features": task_features(metadata, self.head.columns, some_tensor(theta))}
        return [{"parameters": theta, "statistics": statistics, **samples, **told}]

    def predict(self, task: Task, query_x: Shaped[Tensor, "query *sample"]) -> Float[Tensor, "query way"]:
        """The head's logits."""
        parameters, support, query = self.embed(task, query_x)
        return self.head_of(task).logits(parameters, support, task["support_y"], query)

    def head_of(self, task: Task) -> Head:
        """The head as the task has it."""
        return self.head.given(task["state"], task["features"])

    def embed(
        self, task: Task, query_x: Shaped[Tensor, "query *sample"]
    ) -> tuple[Tensors, Float[Tensor, "support embedding"], Float[Tensor, "query embedding"]]:
        """What the head is given: its parameters, and the embeddings of the support set and of queries."""
        x = torch.cat([task["support_x"], query_x])
        embedded, _ = self.backbone(task["parameters"], x, task["statistics"])
        shots = len(task["support_y"])
        return own(task["parameters"]), embedded[:shots], embedded[shots:]

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Differentiate the head's loss; propose batch statistics, and what the head proposes."""
        kept, looped = own(state), None
        if self.batch_norm != "support":  # fused kernels give no gradient to statistics that others use
            looped = partial(replace(self, backbone=self.backbone.fused())._score, kept)
        like = some_tensor(theta)
        besides = self._noise(episodes, like) | {"features": episode_features(episodes, self.head.columns, like)}
        score = partial(self._score, kept)
        return differentiate(theta, episodes, context.chunk, score, looped_score=looped, extra=besides)

    def commit_state(
        self, state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Update the running batch statistics and what the head keeps."""
        statistics = commit_running_statistics(_encoders(state), proposals)
        return statistics | _named(self.head.commit(own(state), [own(proposal) for proposal in proposals]))

    def _score(
        self,
        kept: Tensors,
        theta: Mapping[str, Tensor],
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        besides: Tensors,
    ) -> tuple[Tensor, Tensor, Tensors]:
        given = self.backbone(theta, support_x, None)[1] or None if self.batch_norm == "support" else None
        embedded, observed = self.backbone(theta, torch.cat([support_x, query_x]), given)
        support, query = embedded[: len(support_y)], embedded[len(support_y) :]
        head, parameters = self.head.given(kept, besides["features"]), own(theta)
        loss, logits = head.loss(parameters, support, support_y, query, query_y, besides.get("noise"))
        fixed = {name: tensor.detach() for name, tensor in parameters.items()}
        proposed = head.proposal(fixed, support.detach(), support_y, query.detach(), query_y)
        return loss, CLASSIFICATION.metric(logits, query_y), observed | _named(proposed)

    def _noise(self, episodes: Episodes, like: Tensor) -> Tensors:
        """The head's uniform numbers, ``[episode, noise]``, drawn by (seed, episode id); none if it takes none."""
        count = self.head.noise(episodes.support_x.shape[1], episodes.query_x.shape[1])
        if not count:
            return {}
        drawn = keys.uniforms(self.seed, "head noise", "train", episodes.ids, count)
        return {"noise": torch.from_numpy(drawn).to(like)}


def members(labels: Int[Tensor, "sample"], way: int, dtype: torch.dtype) -> Float[Tensor, "way sample"]:
    """Which samples are of which class: 1 or 0."""
    return one_hot(labels, way, dtype).T


def by_class(
    scores: Float[Tensor, "query support"], labels: Int[Tensor, "support"], way: int
) -> Float[Tensor, "query way support"]:
    """The scores of each class's own samples; those of other classes are as low as numbers go."""
    other = labels[None, :] != torch.arange(way, device=labels.device)[:, None]
    return scores[:, None, :].masked_fill(other[None], torch.finfo(scores.dtype).min)


def unit_length(x: Float[Tensor, "sample embedding"]) -> Float[Tensor, "sample embedding"]:
    """Each sample's embedding over its length; ε keeps the gradient of an embedding of zeros finite."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)


def own(named: Mapping[str, T]) -> dict[str, T]:
    """What is the head's, of parameters, learner state or proposals, by the head's own names."""
    return {name.removeprefix(PREFIX): value for name, value in named.items() if name.startswith(PREFIX)}


def _named(own: Mapping[str, T]) -> dict[str, T]:
    """What is the head's, by the learner's names."""
    return {PREFIX + name: value for name, value in own.items()}


def _encoders(named: Mapping[str, T]) -> dict[str, T]:
    """What is not the head's."""
    return {name: value for name, value in named.items() if not name.startswith(PREFIX)}
