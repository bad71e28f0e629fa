"""Operations on memories, and the linear maps around them: elementary ones, which vectorise under ``vmap``.

A memory is a tensor ``[slot, width]`` that is computed anew at each write, never overwritten, so that gradients flow
through all that it held. Leading dimensions stand for memories side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from cluster.flat import Tensors
from metaworker.models.base import Initialiser

EPSILON = 1e-5
"""Length below which a vector counts as empty."""


def linear_parameters(name: str, inputs: int, outputs: int, normal: Initialiser, scale: float = 1) -> Tensors:
    """Weights of deviation ``scale`` / √inputs and biases 0."""
    weight = normal(f"{name}.weight", (outputs, inputs)) * (scale / math.sqrt(inputs))
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(outputs)}


def linear(
    parameters: Mapping[str, Tensor], name: str, x: Float[Tensor, "*batch inputs"]
) -> Float[Tensor, "*batch outputs"]:
    """``W x + b``."""
    return x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]


def one_hot(labels: Tensor, way: int, dtype: torch.dtype) -> Float[Tensor, "*batch way"]:
    """1 at the label and 0 elsewhere."""
    return (labels[..., None] == torch.arange(way, device=labels.device)).to(dtype)


def gated(gate: Tensor, memory: Tensor, candidate: Tensor) -> Tensor:
    """``g ⊙ m + (1 − g) ⊙ f``: 1 keeps the memory, 0 replaces it by the candidate."""
    return gate * memory + (1 - gate) * candidate


def read_by_attention(
    queries: Float[Tensor, "*batch query width"], memory: Float[Tensor, "*batch slot width"], heads: int
) -> Float[Tensor, "*batch query width"]:
    """Scaled dot-product attention to the slots, which are keys and values; each head has its part of ``width``."""
    q, m = (part.reshape(*part.shape[:-1], heads, -1).transpose(-3, -2) for part in (queries, memory))
    weights = torch.softmax(q @ m.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
    return torch.flatten((weights @ m).transpose(-3, -2), -2)


def cosine_addresses(
    keys: Float[Tensor, "*#batch read width"], memory: Float[Tensor, "*#batch slot width"], strength: float
) -> Float[Tensor, "*#batch read slot"]:
    """Softmax over the slots of ``strength`` times the cosine between key and slot; an empty slot's cosine is 0."""
    key_length, slot_length = ((x.square().sum(-1) + EPSILON**2).sqrt() for x in (keys, memory))
    products = keys @ memory.transpose(-1, -2)
    return (strength * products / (key_length[..., :, None] * slot_length[..., None, :])).softmax(-1)


def least_used(usage: Float[Tensor, "*batch slot"], count: int) -> Float[Tensor, "*batch count slot"]:
    """The ``count`` least used slots, one-hot, the least first; of equal ones the first. No gradient."""
    order = usage.detach().argsort(dim=-1, stable=True)[..., :count]
    return one_hot(order, usage.shape[-1], usage.dtype)
