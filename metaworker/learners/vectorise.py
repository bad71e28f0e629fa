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

Adapt = Callable[..., Tensors]
"""One episode: (θ, support x, support y[, extra]) -> adapted parameters."""

Score = Callable[..., tuple[Float[Tensor, ""], Float[Tensor, ""], Tensors]]
"""One episode: (parameters, support x, support y, query x, query y[, extra]) -> (query loss, metric, proposals)."""

Rows = Tensor | Tensors
"""Of all episodes of a chunk, or of one; by name, or not."""

LOOPED_FROM = 20
"""Query samples an episode from which one episode fills the CPU's kernels: looping is faster than vectorising then."""


def differentiate(
    theta: Mapping[str, Tensor],
    episodes: Episodes,
    chunk: int,
    score: Score,
    adapt: Adapt | None = None,
    looped_score: Score | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> ShardResult:
    """Σ over episodes of ∂ score(adapt(θ)) / ∂θ.

    θ enters ``vmap`` unbatched: the episodes share what is computed of θ itself, and autograd sums the gradients
    without ever holding one per episode. Chunks are added in the order of episode ids.

    Args:
        theta: meta-parameters.
        episodes: the shard's.
        chunk: episodes vectorised at once.
        score: the query loss of one episode, given its adapted parameters.
        adapt: how one episode adapts θ; not at all when not given.
        looped_score: ``score`` by kernels that are faster but work outside ``vmap`` only.
        extra: what ``adapt``, or ``score`` where there is no ``adapt``, takes besides, each ``[episode, …]``.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
    loop = looped_score if episodes.query_x.shape[1] >= LOOPED_FROM and not episodes.query_x.is_cuda else None
    gradient: list[Tensor] = []
    losses, metrics, proposals = [], [], []
    for start in range(0, len(episodes), chunk):
        part = episodes.chunk(start, start + chunk)
        besides = () if extra is None else ({name: rows[start : start + chunk] for name, rows in extra.items()},)
        data: tuple[Rows, ...] = (part.support_x, part.support_y, part.query_x, part.query_y)
        adapted = None
        if adapt is None:
            data = (*data, *besides)
        else:
            inputs = (part.support_x, part.support_y, *besides)
            adapted = vmap(adapt, in_dims=(None, *(0 for _ in inputs)))(leaves, *inputs)
        if loop is None:
            dims = (None if adapted is None else 0, *(0 for _ in data))
            values, scores, proposed = vmap(score, in_dims=dims)(leaves if adapted is None else adapted, *data)
        else:
            values, scores, proposed = _one_by_one(loop, leaves, adapted, data)
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


def _one_by_one(
    score: Score, theta: Mapping[str, Tensor], adapted: Mapping[str, Tensor] | None, data: tuple[Rows, ...]
) -> tuple[Tensor, Tensor, Tensors]:
    """What ``vmap(score)`` gives, by a loop over the episodes."""
    episodes = range(len(data[0]))
    tasks = [theta for _ in episodes]
    if adapted is not None:
        # unbind, not indexing: its backward is one stack instead of a full-size zero-filled gradient per episode.
        split = {name: rows.unbind(0) for name, rows in adapted.items()}
        tasks = [{name: rows[e] for name, rows in split.items()} for e in episodes]
    scored = [score(tasks[e], *(_row(part, e) for part in data)) for e in episodes]
    proposals = {name: torch.stack([s[2][name] for s in scored]) for name in scored[0][2]}
    return torch.stack([s[0] for s in scored]), torch.stack([s[1] for s in scored]), proposals


def _row(rows: Rows, episode: int) -> Rows:
    """One episode's, of what may be named."""
    return rows[episode] if isinstance(rows, Tensor) else {name: part[episode] for name, part in rows.items()}


def concatenate(parts: list[Tensors]) -> Tensors:
    """Chunks of named rows, joined along the episode dimension."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
