"""Attention as pure functions: what each query reads from a set of values, and the weights by which it reads.

Kinds, by their score of query q and key k (``W``, ``U``, ``v``, ``b`` learned):

    additive              vᵀ tanh(W q + U k + b)             Bahdanau et al. 2014, arXiv 1409.0473
    scaled dot-product    q·k / √units                       Vaswani et al. 2017, arXiv 1706.03762
    multi-head            a scaled dot-product each head, of learned projections of its own; read-outs joined by ``O``

How scores s become weights w, with temperature τ:

    soft    w = softmax(s / τ)
    hard    w = one-hot(argmax(s + g)),  g = −log(−log u)    Jang et al. 2016, arXiv 1611.01144; Maddison 1611.00712

With uniform numbers u, given by the caller, a hard choice is a sample of softmax(s), whatever τ; without them it is
argmax s. Its gradient is the straight-through estimate: that of softmax((s + g) / τ), which is biased.

Initial weights make a key of a query that is equal or near score highest: attention starts as a similarity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cluster.flat import Tensors
from metaworker.models.base import Initialiser
from metaworker.models.layers import EPSILON

Choice = Callable[[Tensor], Tensor]
"""Weights ``[*head, query, key]`` of scores of that shape."""


def soft(scores: Float[Tensor, "*head query key"], temperature: float = 1.0) -> Float[Tensor, "*head query key"]:
    """Softmax over the keys."""
    return torch.softmax(scores / temperature, -1)


def hard(
    scores: Float[Tensor, "*head query key"],
    temperature: float = 1.0,
    uniforms: Float[Tensor, "*head query key"] | None = None,
) -> Float[Tensor, "*head query key"]:
    """One key a query, weight 1: a sample where uniform numbers in [0, 1) are given, else the highest score."""
    if uniforms is not None:
        limits = torch.finfo(uniforms.dtype)
        scores = scores - torch.log(-torch.log(uniforms.clamp(limits.tiny, 1 - limits.eps)))
    surrogate = torch.softmax(scores / temperature, -1)
    keys = torch.arange(scores.shape[-1], device=scores.device)
    chosen = (scores.argmax(-1, keepdim=True) == keys).to(scores.dtype)
    return chosen + (surrogate - surrogate.detach())


def additive_parameters(name: str, inputs: int, units: int, normal: Initialiser) -> Tensors:
    """Projections of queries, keys and values, bias and energy vector.

    They start as Σ over rows w of tanh(1 + w·(q − k)), each w beside −w: an even function, highest at q = k.
    """
    half = normal(f"{name}.query", (-(-units // 2), inputs)) / math.sqrt(inputs)
    mirrored = torch.cat([half, -half])[:units]
    return {
        f"{name}.query": mirrored,
        f"{name}.key": -mirrored,
        f"{name}.bias": torch.ones(units),
        f"{name}.energy": torch.full((units,), 1 / math.sqrt(units)),
        f"{name}.value": normal(f"{name}.value", (units, inputs)) / math.sqrt(inputs),
    }


def additive_attention(
    parameters: Mapping[str, Tensor],
    name: str,
    query: Float[Tensor, "query inputs"],
    key: Float[Tensor, "key inputs"],
    choose: Choice,
) -> tuple[Float[Tensor, "query units"], Float[Tensor, "query key"]]:
    """Read-out of projected keys, and weights."""
    queries = query @ parameters[f"{name}.query"].T + parameters[f"{name}.bias"]
    keys = key @ parameters[f"{name}.key"].T
    scores = torch.tanh(queries[:, None] + keys[None]) @ parameters[f"{name}.energy"]
    weights = choose(scores)
    return weights @ (key @ parameters[f"{name}.value"].T), weights


def dot_product_attention(
    query: Float[Tensor, "*head query units"],
    key: Float[Tensor, "*head key units"],
    value: Float[Tensor, "*head key values"],
    choose: Choice,
) -> tuple[Float[Tensor, "*head query values"], Float[Tensor, "*head query key"]]:
    """Read-out of ``value``, and weights."""
    weights = choose(query @ key.transpose(-1, -2) / math.sqrt(key.shape[-1]))
    return weights @ value, weights


def multi_head_parameters(name: str, inputs: int, units: int, normal: Initialiser) -> Tensors:
    """Projections of queries, keys (which start as those of queries) and values, and of the joined read-outs."""
    projection = normal(f"{name}.query", (units, inputs)) / math.sqrt(inputs)
    return {
        f"{name}.query": projection,
        f"{name}.key": projection.clone(),
        f"{name}.value": normal(f"{name}.value", (units, inputs)) / math.sqrt(inputs),
        f"{name}.output": normal(f"{name}.output", (units, units)) / math.sqrt(units),
    }


def multi_head_attention(
    parameters: Mapping[str, Tensor],
    name: str,
    query: Float[Tensor, "query inputs"],
    key: Float[Tensor, "key inputs"],
    heads: int,
    choose: Choice,
) -> tuple[Float[Tensor, "query units"], Float[Tensor, "head query key"]]:
    """Read-out of projected keys, and each head's weights; with one head a scaled dot-product attention."""

    def split(x: Tensor, part: str) -> Float[Tensor, "head row width"]:
        projected: Tensor = x @ parameters[f"{name}.{part}"].T
        return projected.reshape(len(x), heads, -1).transpose(0, 1)

    read, weights = dot_product_attention(split(query, "query"), split(key, "key"), split(key, "value"), choose)
    return read.transpose(0, 1).flatten(1) @ parameters[f"{name}.output"].T, weights


def self_attention(
    parameters: Mapping[str, Tensor], name: str, x: Float[Tensor, "sample inputs"], heads: int
) -> tuple[Float[Tensor, "sample units"], Float[Tensor, "head sample sample"]]:
    """Soft multi-head attention of a set to itself: the order of its samples is kept, and does not matter."""
    return multi_head_attention(parameters, name, x, x, heads, soft)


def layer_norm(x: Float[Tensor, "*sample width"]) -> Float[Tensor, "*sample width"]:
    """Mean 0 and variance 1 over each sample's own values (arXiv 1607.06450), without learned scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)
