"""Prototypical Networks (Snell, Swersky, Zemel 2017, arXiv 1703.05175).

    c_k = mean of f_θ(x) over the support samples of class k,   p(y = k | x) = softmax_k(−‖f_θ(x) − c_k‖²)

f_θ(x) is ``[support, embedding]`` of the way · shot support samples and ``[query, embedding]`` of the queries, c
``[way, embedding]``, logits ``[query, way]``.

The meta-gradient is ``exact``: the query cross-entropy's gradient with respect to θ. Computing the prototypes is all
the adaptation there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from metaworker.learners.embedding import Head, members


@dataclass(frozen=True)
class Prototypes(Head):
    """Negative squared distances to the classes' means."""

    way: int

    def logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """−‖q − c‖² without ‖q‖², which every class shares."""
        member = members(labels, self.way, support.dtype)
        prototypes = (member @ support) / member.sum(1, keepdim=True)
        return 2 * query @ prototypes.T - prototypes.square().sum(1)
