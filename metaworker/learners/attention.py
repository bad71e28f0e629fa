"""An attention-based meta-learner: a query attends to the support samples and reads the class off their labels.

    x = embedding, layer-normalised              of a support sample or a query, or of each position of its map
    x ← x + self-attention(x)                    over the support set, optional
    t = mean over the support set of relu(T x)   the task embedding, in any order of samples; + M m with metadata m
    x ← (1 + γ(t)) ⊙ x + β(t)                    FiLM (arXiv 1709.07871) of queries and keys alike, γ and β linear
    r, w = attention(query x, support x)         read-out and weights: additive, dot-product or multi-head; soft or hard
    e_k = Σ of w over the samples of class k     evidence for k, of each head
    c_k = Σ of w x over them, mean over heads    what was read of class k
    logit_k = s · mean e_k + uᵀ relu(A x + B r + C c_k + D e_k + b)

With ``size`` the width of an embedding, or the channels of its map, and a key for each position of each support sample,
x is ``[key, size]`` and ``[query, size]``, m ``[features]``, t ``[units]``, γ and β ``[size]``, r ``[query, units]``, w
``[head, query, key]``, e ``[query, way, head]``, c ``[query, way, size]``, logits ``[query, way]``.

Scores of the classes share all weights, so there may be any number of classes, named in any way. Where the encoder
leaves maps and ``spatial`` is set, keys are all positions of all support samples, and a query is the attention pooling
of its own positions by a learned vector. `attention_weights` shows where an adapted model looks.

The meta-gradient is ``exact`` with soft attention. With hard attention it is a biased ``estimator``, straight-through
Gumbel-softmax (arXiv 1611.01144): training samples the choices by numbers drawn by key, prediction takes the highest
score. Its bias falls with the temperature, while its variance grows: on small random tasks it was 0.1, 0.1–0.2 and
0.3–0.6 of the gradient's length at temperatures 0.1, 0.3 and 1 (``tests/metaworker/test_attention.py``). Attention and
self-attention themselves: ``metaworker.models.attention``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from cluster.config import learners
from cluster.errors import ConfigError
from cluster.flat import Tensors
from metaworker.learners.base import GradientKind, Task
from metaworker.learners.embedding import EmbeddingLearner, Head, members
from metaworker.learners.objective import CLASSIFICATION
from metaworker.metadata import features_width
from metaworker.models.attention import (
    additive_attention,
    additive_parameters,
    dot_product_attention,
    hard,
    layer_norm,
    multi_head_attention,
    multi_head_parameters,
    self_attention,
    soft,
)
from metaworker.models.base import Backbone, Initialiser
from metaworker.models.conv4 import Conv4

EVIDENCE_SCALE = 8.0
"""Initial s: logits are as far apart where all the attention is on one class."""
SMALL = 0.1
"""Initial weights of what changes features or logits besides the evidence, times the usual deviation."""


class AttentionWeights(NamedTuple):
    """Where queries look; maps are 1 × 1 without spatial attention."""

    support: Float[Tensor, "head query support height width"]
    """On the positions of the support samples; of each head and query they sum to 1."""
    query: Float[Tensor, "query height width"]
    """On the query's own positions; of each query they sum to 1."""

    @property
    def samples(self) -> Float[Tensor, "query support"]:
        """On each support sample, mean over heads; of each query they sum to 1."""
        return self.support.sum((-2, -1)).mean(0)


@dataclass(frozen=True)
class Attention(Head):
    """Attention from queries to support samples.

    Attributes:
        way: classes.
        section: the configured options.
        map_shape: channel, height and width of what an embedding is flattened from; (embedding, 1, 1) for a vector.
        features: what metadata say of the task.
    """

    way: int
    section: learners.AttentionLearner
    map_shape: tuple[int, int, int]
    features: Float[Tensor, "features"] | None = None

    @property
    def kind(self) -> GradientKind:
        """``estimator`` with hard attention."""
        return "estimator" if self.section.hard else "exact"

    @property
    def columns(self) -> tuple[str, ...]:
        """The configured ones."""
        return self.section.columns

    def given(self, state: Mapping[str, Tensor], features: Float[Tensor, "features"]) -> Attention:
        """With what metadata say of the task."""
        return replace(self, features=features)

    @property
    def heads(self) -> int:
        """Attentions side by side."""
        return self.section.heads if self.section.kind == "multihead" else 1

    @property
    def positions(self) -> int:
        """Of an embedding's map."""
        return math.prod(self.map_shape[1:])

    def parameters(self, normal: Initialiser) -> Tensors:
        """Weights of variance 1 / fan-in, smaller ones where the module's equations add to a similarity."""
        size, units = self.map_shape[0], self.section.units

        def linear(name: str, outputs: int, inputs: int, gain: float = 1.0) -> Tensors:
            return {name: normal(name, (outputs, inputs)) * (gain / math.sqrt(inputs))}

        result = linear("task.sample", units, size) | linear("task.film", 2 * size, units, SMALL)
        if self.columns:
            result |= linear("task.metadata", units, features_width(self.columns))
        if self.positions > 1:
            result |= linear("pool", 1, size, SMALL)
        if self.section.self_attention:
            result |= multi_head_parameters("self", size, units, normal) | linear("self.join", size, units, SMALL)
        initial = additive_parameters if self.section.kind == "additive" else multi_head_parameters
        result |= initial("attention", size, units, normal)
        result |= linear("class.query", units, size) | linear("class.read", units, units)
        result |= linear("class.sample", units, size) | linear("class.evidence", units, self.heads)
        result |= linear("class.score", 1, units, SMALL)
        return result | {"class.bias": torch.zeros(units), "evidence": torch.full((1,), EVIDENCE_SCALE)}

    def noise(self, support: int, query: int) -> int:
        """One number a head, query and support position where attention is hard."""
        return self.heads * query * support * self.positions if self.section.hard else 0

    def logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """The module's logits, without noise."""
        return self.noisy_logits(parameters, support, labels, query, None)

    def loss(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
        query_labels: Int[Tensor, "query"],
        noise: Float[Tensor, "noise"] | None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "query way"]]:
        """Mean cross-entropy, after sampled choices where attention is hard."""
        logits = self.noisy_logits(parameters, support, labels, query, noise)
        return CLASSIFICATION.loss(logits, query_labels), logits

    def noisy_logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
        noise: Float[Tensor, "noise"] | None,
    ) -> Float[Tensor, "query way"]:
        """``logits``, with the noise of hard attention where given."""
        x, keys, _ = self._features(parameters, support, query)
        read, weights = self._attend(parameters, x, keys, noise)
        member = members(labels, self.way, keys.dtype).repeat_interleave(self.positions, 1)
        evidence = torch.einsum("hqs,ks->qkh", weights, member)
        of_class = torch.einsum("qs,ks,si->qki", weights.mean(0), member, keys)
        own = x @ parameters["class.query"].T + read @ parameters["class.read"].T + parameters["class.bias"]
        hidden = of_class @ parameters["class.sample"].T + evidence @ parameters["class.evidence"].T
        scores = torch.relu(own[:, None] + hidden) @ parameters["class.score"][0]
        return parameters["evidence"] * evidence.mean(-1) + scores

    def weights(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        query: Float[Tensor, "query embedding"],
    ) -> AttentionWeights:
        """Where queries look."""
        x, keys, pooling = self._features(parameters, support, query)
        _, weights = self._attend(parameters, x, keys, None)
        _, height, width = self.map_shape
        maps = weights.reshape(self.heads, len(query), len(support), height, width)
        return AttentionWeights(maps, pooling.reshape(len(query), height, width))

    def task_embedding(
        self,
        parameters: Mapping[str, Tensor],
        keys: Float[Tensor, "key size"],
    ) -> Float[Tensor, "units"]:
        """Pooled support features, whatever their order, and what is known of the task besides."""
        task = torch.relu(keys @ parameters["task.sample"].T).mean(0)
        return task if self.features is None or not self.columns else task + parameters["task.metadata"] @ self.features

    def _features(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        query: Float[Tensor, "query embedding"],
    ) -> tuple[Float[Tensor, "query size"], Float[Tensor, "key size"], Float[Tensor, "query position"]]:
        """Conditioned queries and keys, and the weights that pooled a query's positions."""
        size, positions = self.map_shape[0], self.positions
        keys = layer_norm(support.reshape(len(support), size, positions).transpose(1, 2)).flatten(0, 1)
        x = layer_norm(query.reshape(len(query), size, positions).transpose(1, 2))
        pooling = x.new_ones(len(x), 1)
        if positions > 1:
            read, weights = dot_product_attention(parameters["pool"].expand(len(x), 1, -1), x, x, soft)
            x, pooling = layer_norm(read), weights[:, 0]
        if self.section.self_attention:
            keys = keys + self_attention(parameters, "self", keys, self.heads)[0] @ parameters["self.join"].T
        task = self.task_embedding(parameters, keys)
        scale, shift = (parameters["task.film"] @ task).chunk(2)
        return x[:, 0] * (1 + scale) + shift, keys * (1 + scale) + shift, pooling

    def _attend(
        self,
        parameters: Mapping[str, Tensor],
        x: Float[Tensor, "query size"],
        keys: Float[Tensor, "key size"],
        noise: Float[Tensor, "noise"] | None,
    ) -> tuple[Float[Tensor, "query units"], Float[Tensor, "head query key"]]:
        """What queries read, and each head's weights."""
        shape = (self.heads, len(x), len(keys))
        temperature = self.section.temperature
        choose = partial(soft, temperature=temperature)
        if self.section.hard:
            uniforms = None if noise is None else noise.view(shape)
            choose = partial(hard, temperature=temperature, uniforms=uniforms)
        if self.section.kind != "additive":
            return multi_head_attention(parameters, "attention", x, keys, self.heads, choose)
        read, weights = additive_attention(
            parameters, "attention", x, keys, lambda scores: choose(scores[None]).squeeze(0)
        )
        return read, weights[None]


def attention_head(section: learners.AttentionLearner, backbone: Backbone, way: int) -> Attention:
    """The configured head on the embeddings of ``backbone``.

    Raises:
        ConfigError: spatial attention without a map to attend to.
    """
    if not section.spatial:
        return Attention(way, section, (backbone.output_size, 1, 1))
    if not isinstance(backbone, Conv4) or math.prod(backbone.map_shape[1:]) == 1:
        raise ConfigError(
            "learner.spatial needs an encoder that leaves a map of more than one position: use model.type conv4_pool "
            "with model.pools 2"
        )
    return Attention(way, section, backbone.map_shape)


def attention_weights(
    learner: EmbeddingLearner, task: Task, query_x: Shaped[Tensor, "query *sample"]
) -> AttentionWeights:
    """Where an adapted model of an attention learner looks, to judge ``query_x``.

    Args:
        learner: an attention learner.
        task: as from its ``adapt``.
        query_x: queries, as for its ``predict``.
    """
    head = learner.head_of(task)
    assert isinstance(head, Attention), f"not an attention learner: {head}"
    return head.weights(*learner.embed(task, query_x))
