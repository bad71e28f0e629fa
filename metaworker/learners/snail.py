"""SNAIL, a simple neural attentive meta-learner (Mishra, Rohaninejad, Chen, Abbeel 2018, arXiv 1707.03141).

The support set is a sequence of (embedding, one-hot label); a query with label zeros is its last step, where the class
is read. Each query ends a sequence of its own. For D ``filters`` the blocks are those of the paper's Omniglot net:

    attention(D/2, D/4), temporal(D), attention(2D, D), temporal(D), attention(4D, 2D), linear to ``way`` logits

    temporal block     dense blocks of dilations 1, 2, 4 … that cover the sequence: concat[x, tanh(xf) σ(xg)], where xf
                       and xg are causal convolutions of kernel 2:  y_t = A x_{t−dilation} + B x_t + b
    attention block    (keys, values): concat[x, softmax(q kᵀ / √keys) v], each step seeing itself and what is before

As no step sees a later one, the support steps are the same for every query, and are computed once: activations are
support rows ``[support, channel]`` and last steps ``[query, channel]``.

The meta-gradient is ``exact``. In training the order of the support samples is drawn by key. Departures: embeddings
are layer-normalised; dilations start at 1 (in the paper's listing at 2), so that no step is skipped; the first
attention block's values are max(D/4, way) wide (the paper: D/4), to have room for the labels, and it starts as one from
a query to similar samples that reads their labels, the output as reading that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cluster.flat import Tensors
from metaworker.learners.embedding import SequentialHead
from metaworker.models.attention import layer_norm
from metaworker.models.base import Initialiser
from metaworker.models.memory import linear, one_hot

OUTPUT_DEVIATION = 0.1
"""Of the output's initial weights times √channels, besides those that read labels."""


class Steps(NamedTuple):
    """A sequence for each query, all with the same support steps."""

    support: Float[Tensor, "support channel"]
    query: Float[Tensor, "query channel"]
    """The last step of each."""

    def joined(self, other: Steps) -> Steps:
        """Channels of both, one behind the other."""
        return Steps(torch.cat([self.support, other.support], -1), torch.cat([self.query, other.query], -1))


@dataclass(frozen=True)
class SNAIL(SequentialHead):
    """Classes read at the end of a sequence.

    Attributes:
        way: classes.
        size: width of the embedding.
        steps: steps that the temporal blocks cover: support samples of training and a query.
        filters: channels of each dense block, a multiple of 4.
    """

    way: int
    size: int
    steps: int
    filters: int

    @property
    def attention_sizes(self) -> tuple[tuple[int, int], ...]:
        """Keys and values of the attention blocks; the first one's values have room for the labels."""
        d = self.filters
        return (d // 2, max(d // 4, self.way)), (2 * d, d), (4 * d, 2 * d)

    @property
    def dilations(self) -> tuple[int, ...]:
        """Of a temporal block's dense blocks."""
        return tuple(2**i for i in range(math.ceil(math.log2(self.steps))))

    def parameters(self, normal: Initialiser) -> Tensors:
        """Weights of variance 1 / fan-in and biases 0, but as the module says in the first block and the output."""
        result: Tensors = {}
        width = self.size + self.way

        def add(name: str, outputs: int, inputs: int) -> None:
            result[f"{name}.weight"] = normal(f"{name}.weight", (outputs, inputs)) / math.sqrt(inputs)
            result[f"{name}.bias"] = torch.zeros(outputs)

        for block, (keys, values) in enumerate(self.attention_sizes):
            add(f"attention.{block}.query", keys, width)
            add(f"attention.{block}.key", keys, width)
            add(f"attention.{block}.value", values, width)
            width += values
            for i in range(len(self.dilations) if block < 2 else 0):
                add(f"temporal.{block}.{i}", 2 * self.filters, 2 * width)
                width += self.filters
        add("output", self.way, width)
        return result | self._similarity(result)

    def logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """What the last steps say."""
        known = one_hot(labels, self.way, support.dtype)
        unknown = F.pad(layer_norm(query), (0, self.way))
        steps = Steps(torch.cat([layer_norm(support), known], -1), unknown)
        for block in range(len(self.attention_sizes)):
            steps = steps.joined(causal_attention(parameters, f"attention.{block}", steps))
            for i, dilation in enumerate(self.dilations if block < 2 else ()):
                found = causal_convolution(parameters, f"temporal.{block}.{i}", steps, dilation)
                steps = steps.joined(Steps(gated_unit(found.support), gated_unit(found.query)))
        return linear(parameters, "output", steps.query)

    def _similarity(self, drawn: Mapping[str, Tensor]) -> Tensors:
        """The initial weights by which labels of similar samples are read."""
        labels = slice(self.size, self.size + self.way)
        values = drawn["attention.0.value.weight"].clone()
        values[: self.way] = 0
        values[: self.way, labels] = torch.eye(self.way)
        output = OUTPUT_DEVIATION * drawn["output.weight"]
        output[:, self.size + self.way : self.size + 2 * self.way] = torch.eye(self.way)
        return {
            "attention.0.key.weight": drawn["attention.0.query.weight"].clone(),
            "attention.0.value.weight": values,
            "output.weight": output,
        }


def causal_convolution(parameters: Mapping[str, Tensor], name: str, steps: Steps, dilation: int) -> Steps:
    """Convolution of kernel 2, nothing being before the first step."""
    width = steps.support.shape[-1]
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    before = F.pad(steps.support, (0, 0, dilation, 0)) @ weight[:, :width].T
    support = before[: len(steps.support)] + steps.support @ weight[:, width:].T + bias
    query = before[len(steps.support)] + steps.query @ weight[:, width:].T + bias
    return Steps(support, query)


def gated_unit(x: Float[Tensor, "step two_filters"]) -> Float[Tensor, "step filters"]:
    """tanh(xf) σ(xg) of the two halves of the channels."""
    xf, xg = x.chunk(2, -1)
    return torch.tanh(xf) * torch.sigmoid(xg)


def causal_attention(parameters: Mapping[str, Tensor], name: str, steps: Steps) -> Steps:
    """What each step reads from itself and those before it."""

    def projected(part: str) -> Steps:
        support, query = (linear(parameters, f"{name}.{part}", x) for x in (steps.support, steps.query))
        return Steps(support, query)

    query, key, value = projected("query"), projected("key"), projected("value")
    scale = 1 / math.sqrt(key.support.shape[-1])
    later = torch.ones(len(key.support), len(key.support), device=key.support.device).triu(1).bool()
    among = (query.support @ key.support.T * scale).masked_fill(later, -torch.inf)
    itself = (query.query * key.query).sum(-1, keepdim=True) * scale
    last = torch.softmax(torch.cat([query.query @ key.support.T * scale, itself], -1), -1)
    return Steps(torch.softmax(among, -1) @ value.support, last[:, :-1] @ value.support + last[:, -1:] * value.query)
