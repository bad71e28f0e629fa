"""R2D2: a ridge regression on the embeddings, solved in closed form (Bertinetto et al. 2019, arXiv 1805.08136).

    W = argmin ‖X W − Y‖² + λ‖W‖² = Xᵀ (X Xᵀ + λ I)⁻¹ Y,   logits = α q W + β

X ``[support, embedding + 1]`` holds the support embeddings and a column of ones (the bias, regularised as the weights
are, as in the authors' code), Y ``[support, way]`` is one-hot, q ``[query, embedding + 1]``. By Woodbury's identity the
system to solve is of the size of the support set, not of the embedding's; where there are more support samples than
coordinates it is W = (Xᵀ X + λ I)⁻¹ Xᵀ Y, as in the authors' code: the other is all but singular then. λ > 0 (its
logarithm is learned), scale α and shift β are meta-parameters; as all classes share β, the cross-entropy leaves it
where it starts.

The meta-gradient is ``exact``: autograd goes through the solve. Departs from the authors' code: no division of X and Y
by √support, which λ and α make up for at a given number of support samples.
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
from metaworker.models.base import Initialiser
from metaworker.models.memory import one_hot


@dataclass(frozen=True)
class RidgeRegression(Head):
    """Regressed one-hot labels as logits.

    Attributes:
        way: classes.
        regularisation: initial λ.
        scale: initial α.
    """

    way: int
    regularisation: float
    scale: float

    def parameters(self, normal: Initialiser) -> Tensors:
        """The logarithm of λ, α and β."""
        initial = {"log_lambda": math.log(self.regularisation), "scale": self.scale, "shift": 0.0}
        return {name: torch.full((1,), value) for name, value in initial.items()}

    def logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """α q W + β."""
        x, q = (F.pad(embedded, (0, 1), value=1.0) for embedded in (support, query))
        y, penalty = one_hot(labels, self.way, x.dtype), parameters["log_lambda"].exp()
        identity = torch.eye(min(x.shape), dtype=x.dtype, device=x.device)
        if len(x) <= x.shape[1]:
            weights: Tensor = x.T @ torch.linalg.solve(x @ x.T + penalty * identity, y)
        else:
            weights = torch.linalg.solve(x.T @ x + penalty * identity, x.T @ y)
        return parameters["scale"] * (q @ weights) + parameters["shift"]
