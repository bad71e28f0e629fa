"""The meta-gradient of a shard by differentiating the episodes' query losses, vectorised in chunks of episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.learners.base import ShardResult

EpisodeLoss = Callable[
    [Mapping[str, Tensor], Tensor, Tensor, Tensor, Tensor], tuple[Float[Tensor, ""], Float[Tensor, ""], Tensors]
]
"""One episode: (θ, support x, support y, query x, query y) -> (query loss, metric, proposals)."""


def differentiate(loss: EpisodeLoss, theta: Mapping[str, Tensor], episodes: Episodes, chunk: int) -> ShardResult:
    """Σ over episodes of ∂loss/∂θ.

    θ enters ``vmap`` unbatched: all episodes share the first forward pass's weights, and autograd sums the
    gradients without ever holding one per episode. Chunks are added in the order of episode ids.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
    vectorised = vmap(loss, in_dims=(None, 0, 0, 0, 0))
    gradient: list[Tensor] = []
    losses, metrics, proposals = [], [], []
    for start in range(0, len(episodes), chunk):
        part = episodes.chunk(start, start + chunk)
        values, scores, proposed = vectorised(leaves, part.support_x, part.support_y, part.query_x, part.query_y)
        found = torch.autograd.grad(values.sum(), list(leaves.values()))
        gradient = [a + b for a, b in zip(gradient, found, strict=True)] if gradient else list(found)
        losses.append(values.detach())
        metrics.append(scores.detach())
        proposals.append({name: rows.detach() for name, rows in proposed.items()})
    return ShardResult(
        gradient=dict(zip(leaves, gradient, strict=True)),
        episodes=len(episodes),
        proposals=concatenate(proposals),
        loss=torch.cat(losses),
        metric=torch.cat(metrics),
    )


def concatenate(parts: list[Tensors]) -> Tensors:
    """Chunks of named rows, joined along the episode dimension."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
