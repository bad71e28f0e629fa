"""Triplet loss on episodes (Schroff, Kalenichenko, Philbin 2015, arXiv 1503.03832; mining as in arXiv 1703.07737).

    d(q, x) = ‖f_θ(q) − f_θ(x)‖²,   L = mean over queries q of max(0, d(q, x⁺) − d(q, x⁻) + margin)

f_θ is ``[query, embedding]`` of queries and ``[support, embedding]`` of support samples, d ``[query, support]``, logits
``[query, way]``; with ``all`` the hinges are ``[query, support, support]``.

Queries are the anchors; x⁺ and x⁻ come from the support set. ``hard`` mining takes for each query the farthest sample
of its own class and the nearest one of any other; ``all`` takes the mean over all triplets of an episode that violate
the margin. A query's prediction is the class of its nearest support sample, and a class's logit the negative distance
to its nearest sample. The meta-gradient is ``exact``: that of L, almost everywhere (with ``all``, L jumps where a
triplet begins to violate the margin).

Departs from the papers: anchors are queries alone, since training and prediction compare queries with support samples;
embeddings are not of length 1 unless configured. On validation glyphs (400 episodes of a narrow net) margin 10 gave
92.7 % with ``all``, 91.3 % with ``hard``, and length 1 at best 88.1 % (``hard``, margin 0.1); on Omniglot's validation
split ``hard`` gave 96.7 %, ``all`` 96.1 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaworker.learners.embedding import Head, by_class, unit_length


@dataclass(frozen=True)
class NearestNeighbour(Head):
    """Negative squared distances to the nearest sample of each class, trained by triplets."""

    way: int
    margin: float
    normalise: bool
    mining: Literal["hard", "all"]

    def logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """−d of the nearest sample of each class."""
        return by_class(-self._distances(query, support), labels, self.way).amax(-1)

    def loss(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
        query_labels: Int[Tensor, "query"],
        noise: Float[Tensor, "noise"] | None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "query way"]]:
        """The hinge of mined triplets."""
        distances = self._distances(query, support)
        same = query_labels[:, None] == labels[None, :]
        hinge = self._hard(distances, same) if self.mining == "hard" else self._all(distances, same)
        return hinge, by_class(-distances, labels, self.way).amax(-1)

    def _hard(self, distances: Float[Tensor, "query support"], same: Tensor) -> Float[Tensor, ""]:
        """Farthest positive, nearest negative."""
        positive = distances.masked_fill(~same, -torch.inf).amax(1)
        negative = distances.masked_fill(same, torch.inf).amin(1)
        return torch.relu(positive - negative + self.margin).mean()

    def _all(self, distances: Float[Tensor, "query support"], same: Tensor) -> Float[Tensor, ""]:
        """Mean over the triplets (query, positive, negative) that violate the margin."""
        hinge = torch.relu(distances[:, :, None] - distances[:, None, :] + self.margin)
        hinge = hinge * (same[:, :, None] & ~same[:, None, :])
        return hinge.sum() / (hinge > 0).sum().clamp_min(1)

    def _distances(
        self, query: Float[Tensor, "query embedding"], support: Float[Tensor, "support embedding"]
    ) -> Float[Tensor, "query support"]:
        """d, of embeddings of length 1 if asked."""
        if self.normalise:
            query, support = unit_length(query), unit_length(support)
        return (query[:, None] - support[None]).square().sum(2)
