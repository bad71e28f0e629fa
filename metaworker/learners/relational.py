"""Recurrent relational network (Palm, Paquet, Winther 2018, arXiv 1711.08028) over a support set and one query.

    x_i = MLP([e_i, y_i, 1 if query])                       e = f_θ(x), normalised; y one-hot, zeros for the query
    m_j = Σ_{i ≠ j} MLP([h_i, h_j, e_i · e_j / √d])         messages along all edges, at every step
    h_j = LSTM(MLP([x_j, m_j]), h_j),   h_j = x_j at first
    logits = MLP(h_query)                                   at every step; the last step's are the prediction

Each query has a graph of its own, ``[node = support + 1, hidden]``, fully connected. The loss is the mean over the
steps of the query cross-entropy, as in the paper, and the meta-gradient is ``exact``.

Departures: only the query's node is classified, node features and messages are normalised, layers have SiLU in place of
ReLU, and messages see how alike the embeddings of the two samples are: without that, training stays at chance for long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cluster.flat import Tensors
from metaworker.learners.embedding import Head
from metaworker.learners.objective import CLASSIFICATION
from metaworker.models.attention import layer_norm
from metaworker.models.base import Initialiser
from metaworker.models.memory import linear, linear_parameters, one_hot
from metaworker.models.recurrent import lstm_cell, lstm_parameters


@dataclass(frozen=True)
class RecurrentRelational(Head):
    """Message passing between the support samples and one query."""

    way: int
    embedding: int
    hidden: int
    steps: int

    @property
    def names_matter(self) -> bool:
        """Labels are inputs."""
        return True

    def parameters(self, normal: Initialiser) -> Tensors:
        """The layers of the nodes, messages, updates and outputs."""
        layers = {
            "node": self.embedding + self.way + 1,
            "node.out": self.hidden,
            "sender": self.hidden,
            "receiver": self.hidden,
            "message": self.hidden,
            "message.out": self.hidden,
            "update": 2 * self.hidden,
            "update.out": self.hidden,
            "output": self.hidden,
        }
        found: Tensors = {"alike": normal("alike", (self.hidden,))}
        for name, inputs in layers.items():
            found |= linear_parameters(name, inputs, self.hidden, normal)
        # As loud as the embedding, of which there are many more features.
        found["node.weight"][:, self.embedding :] *= math.sqrt(self.embedding)
        found |= lstm_parameters("memory", self.hidden, self.hidden, normal)
        return found | linear_parameters("output.out", self.hidden, self.way, normal)

    def logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """Outputs after the last step."""
        return self._steps(parameters, support, labels, query)[-1]

    def loss(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
        query_labels: Int[Tensor, "query"],
        noise: Float[Tensor, "noise"] | None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "query way"]]:
        """The cross-entropy's mean over the queries and the steps."""
        logits = self._steps(parameters, support, labels, query)
        return CLASSIFICATION.loss(torch.cat(logits), query_labels.repeat(self.steps)), logits[-1]

    def _steps(
        self, parameters: Mapping[str, Tensor], support: Tensor, labels: Tensor, query: Tensor
    ) -> list[Float[Tensor, "query way"]]:
        """Outputs of the query's node after each step."""
        x, edges = self._nodes(parameters, support, labels, query), self._edges(support, query)
        hidden, cell = x, torch.zeros_like(x)
        outputs = []
        for _ in range(self.steps):
            inputs = torch.cat([x, layer_norm(self._messages(parameters, hidden, edges))], -1)
            hidden, cell = lstm_cell(parameters, "memory", _mlp(parameters, "update", inputs), (hidden, cell))
            outputs.append(_mlp(parameters, "output", hidden[:, -1]))
        return outputs

    def _nodes(
        self, parameters: Mapping[str, Tensor], support: Tensor, labels: Tensor, query: Tensor
    ) -> Float[Tensor, "query node hidden"]:
        """Features of the support samples and, last, of each query."""
        names = one_hot(labels, self.way, support.dtype)
        known = torch.cat([layer_norm(support), names, torch.zeros_like(names[:, :1])], 1)
        none = query.new_zeros(len(query), self.way)
        asked = torch.cat([layer_norm(query), none, torch.ones_like(query[:, :1])], 1)
        samples, queries = (layer_norm(_mlp(parameters, "node", part)) for part in (known, asked))
        return torch.cat([samples.expand(len(query), *samples.shape), queries[:, None]], 1)

    def _edges(self, support: Tensor, query: Tensor) -> Float[Tensor, "query node node"]:
        """How alike the embeddings of two nodes are: their products, of variance about 1 for unlike ones."""
        samples, queries = layer_norm(support), layer_norm(query)
        x = torch.cat([samples.expand(len(query), *samples.shape), queries[:, None]], 1)
        return x @ x.transpose(1, 2) / math.sqrt(self.embedding)

    def _messages(
        self,
        parameters: Mapping[str, Tensor],
        hidden: Float[Tensor, "query node hidden"],
        edges: Float[Tensor, "query node node"],
    ) -> Float[Tensor, "query node hidden"]:
        """What each node receives. The first layer splits into both ends' parts, the last is taken of the sum."""
        sent, received = linear(parameters, "sender", hidden), linear(parameters, "receiver", hidden)
        alike = edges[..., None] * parameters["alike"]
        pairs = F.silu(linear(parameters, "message", F.silu(sent[:, None] + received[:, :, None] + alike)))
        others = 1 - torch.eye(hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        return linear(parameters, "message.out", (pairs * others[:, :, None]).sum(2))


def _mlp(parameters: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """One hidden layer."""
    return linear(parameters, f"{name}.out", F.silu(linear(parameters, name, x)))
