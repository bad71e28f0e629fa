"""Relation Networks (Sung, Yang, Zhang, Xiang, Torr, Hospedales 2018, arXiv 1711.06025).

    r(k, q) = σ(g_φ([Σ over the support samples x of class k of f_θ(x),  f_θ(q)])),   L = mean (r(k, q) − [y_q = k])²

f_θ gives maps ``[channel, height, width]``, concatenated along channels; g_φ is two blocks of 3×3 convolution,
normalisation, ReLU and 2×2 max-pool, a layer of 8 units with ReLU, and one unit. Logits are g_φ, the log odds of r. The
meta-gradient is ``exact``: that of L over all pairs of an episode's queries and classes.

Departs from the paper: g_φ normalises each pair on its own, over all channels and positions (group norm with one
group), where batch-norm would let queries see one another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cluster.config.sections import Conv4Pool, Model
from cluster.errors import ConfigError
from cluster.flat import Tensors
from metaworker.learners.embedding import Head, members
from metaworker.models.base import Backbone, Initialiser
from metaworker.models.conv4 import Conv4
from metaworker.models.layers import EPSILON, conv3x3
from metaworker.models.memory import one_hot

BLOCKS = 2
SMALLEST = 2
"""Least height and width of maps that are worth convolving."""
UNITS = 8
"""Of the layer before the last."""


def map_to_compare(model: Model, backbone: Backbone) -> tuple[int, int, int]:
    """Channel, height and width of what the encoder's embeddings are flattened from.

    Raises:
        ConfigError: an encoder that leaves no map, or one of a single position.
    """
    if isinstance(model, Conv4Pool) and isinstance(backbone, Conv4):
        _, height, width = backbone.map_shape
        if min(height, width) >= SMALLEST:
            return backbone.map_shape
        raise ConfigError(
            f"model.pools must leave learner relation a map of {SMALLEST} × {SMALLEST} or more to compare, got "
            f"{model.pools}, which leaves {height} × {width}: use 2, as in the paper"
        )
    raise ConfigError(f"model.type must be conv4_pool (with model.pools 2) for learner relation, got {model.type}")


@dataclass(frozen=True)
class RelationModule(Head):
    """A learned comparison of a query's map with each class's."""

    way: int
    map_shape: tuple[int, int, int]
    """Channel, height and width of what the embeddings are flattened from."""
    channels: int
    """Of both convolutions."""

    def parameters(self, normal: Initialiser) -> Tensors:
        """Glorot's variance for weights; scales 1, shifts and biases 0."""
        result: Tensors = {}
        inputs = 2 * self.map_shape[0]
        for block in range(BLOCKS):
            deviation = math.sqrt(2 / (9 * (inputs + self.channels)))
            result[f"conv.{block}"] = normal(f"conv.{block}", (self.channels, inputs, 3, 3)) * deviation
            result[f"scale.{block}"] = torch.ones(self.channels)
            result[f"shift.{block}"] = torch.zeros(self.channels)
            inputs = self.channels
        for layer, (fan_in, fan_out) in enumerate(((self._flat_size(), UNITS), (UNITS, 1))):
            deviation = math.sqrt(2 / (fan_in + fan_out))
            result[f"weight.{layer}"] = normal(f"weight.{layer}", (fan_out, fan_in)) * deviation
            result[f"bias.{layer}"] = torch.zeros(fan_out)
        return result

    def logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """Log odds of the relation scores."""
        classes = (members(labels, self.way, support.dtype) @ support).reshape(-1, *self.map_shape)
        queries = query.reshape(-1, *self.map_shape)
        # A convolution of concatenated maps is the sum of one of either: per query and per class instead of per pair.
        of_class, of_query = parameters["conv.0"].chunk(2, 1)
        x = conv3x3(queries, of_query, stride=1)[:, None] + conv3x3(classes, of_class, stride=1)[None]
        x = _finish_block(parameters, 0, x.flatten(0, 1))
        x = _finish_block(parameters, 1, conv3x3(x, parameters["conv.1"], stride=1)).flatten(1)
        x = F.relu(x @ parameters["weight.0"].T + parameters["bias.0"])
        x = x @ parameters["weight.1"].T + parameters["bias.1"]
        return x.view(len(query), self.way)

    def loss(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
        query_labels: Int[Tensor, "query"],
        noise: Float[Tensor, "noise"] | None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "query way"]]:
        """Squared error of the relation scores."""
        logits = self.logits(parameters, support, labels, query)
        same = one_hot(query_labels, self.way, logits.dtype)
        return (torch.sigmoid(logits) - same).square().mean(), logits

    def _flat_size(self) -> int:
        """Width of what both blocks leave."""
        _, height, width = self.map_shape
        for _ in range(BLOCKS):
            if min(height, width) > 1:
                height, width = height // 2, width // 2
        return self.channels * height * width


def _finish_block(
    parameters: Mapping[str, Tensor], block: int, x: Float[Tensor, "pair channel height width"]
) -> Float[Tensor, "pair channel pooled_height pooled_width"]:
    """What follows a convolution: each pair normalised on its own, ReLU, and pooling while there is something to."""
    centred = x - x.mean((1, 2, 3), keepdim=True)
    x = centred * torch.rsqrt(centred.square().mean((1, 2, 3), keepdim=True) + EPSILON)
    scale, shift = parameters[f"scale.{block}"], parameters[f"shift.{block}"]
    x = F.relu(x * scale[:, None, None] + shift[:, None, None])
    return F.max_pool2d(x, 2) if min(x.shape[-2:]) > 1 else x
