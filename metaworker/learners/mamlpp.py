"""MAML++ (Antoniou, Edwards, Storkey 2019, arXiv 1810.09502).

    φₜ₊₁ = φₜ − αₜ ∇L_support(φₜ; γₜ, βₜ),   loss of an episode = Σₜ wₜ(version) L_query(φₜ; γₜ₋₁, βₜ₋₁),   t = 1 … T

Learned beside φ₀: αₜ, one step size for each parameter tensor and step (``rate/<name>`` ``[step]``), and batch-norm's
scale γₜ and shift βₜ for each step (``scale.0`` … ``[step, channel]``), which the inner loop leaves alone. The weights
wₜ start at 1/T and move linearly within ``anneal_versions`` to all on the last step. Before ``first_order_versions``
inner gradients are constants to the outer loop. The gradient of the weighted loss, which is what is reported, is
``exact`` where no version is of first order, a ``surrogate`` otherwise. Evaluation goes on with the last step's sizes,
scales and shifts when it takes more steps than T.

Depart from the paper: running batch statistics, which the mode "running" reads in evaluation, are those of the last
step for all steps (the authors' code never reads its own); no share of the weights stays with the early steps; the
outer learning rate's annealing is the run's schedule. A net without batch-norm has no scales and shifts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.inner_loop import rated_descent
from metaworker.learners.base import Context, GradientKind, ShardResult, Task
from metaworker.learners.gradient_based import RATE, GradientBased, Network
from metaworker.learners.vectorise import differentiate

PER_STEP = ("scale.", "shift.")
"""What the names of batch-norm's own parameters start with."""

Weights = Mapping[int, float]
"""By inner step 1 … T: the weight of the query loss after it. Steps without weight are left out."""


@dataclass(frozen=True)
class MAMLpp(GradientBased):
    """MAML++ on a network."""

    network: Network
    inner_lr: float
    """Of every layer and step, to start with."""
    inner_steps: int
    eval_steps: int
    anneal_versions: int
    first_order_versions: int

    @property
    def kind(self) -> GradientKind:
        """``exact`` without derivative-order annealing."""
        return "surrogate" if self.first_order_versions else "exact"

    def meta_parameters(self, seed: int) -> Tensors:
        """The network's initial parameters, batch-norm's once for each step, and the step sizes."""
        network, steps = self.network.parameters(seed), self.inner_steps
        theta = {n: t.expand(steps, *t.shape).clone() if n.startswith(PER_STEP) else t for n, t in network.items()}
        adapted = [name for name in network if not name.startswith(PER_STEP)]
        return theta | {RATE + name: torch.full((steps,), self.inner_lr) for name in adapted}

    def adapt(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        support_x: Shaped[Tensor, "support *sample"],
        support_y: Tensor,
        metadata: Mapping[str, Tensor],
    ) -> Sequence[Task]:
        """``eval_steps`` steps with the learned sizes."""
        given = self.network.evaluation_statistics(state)
        trajectory = self._descend(theta, support_x, support_y, given, self.eval_steps, first_order=True)
        return [self.network.task(parameters, support_x, given) for parameters in trajectory]

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Differentiate the query losses after the inner steps, weighted as of this version."""
        weights, fused = self.weights(context.version), self.network.fused()
        adapt = partial(self._adapt, weights, context.version < self.first_order_versions)
        looped = partial(_score, fused, weights) if fused else None
        return differentiate(theta, episodes, context.chunk, partial(_score, self.network, weights), adapt, looped)

    def weights(self, version: int) -> Weights:
        """Of the query losses at this version; their sum is 1."""
        left = max(0.0, 1 - version / self.anneal_versions) if self.anneal_versions else 0.0
        early = {step: left / self.inner_steps for step in range(1, self.inner_steps) if left}
        return early | {self.inner_steps: 1.0 - sum(early.values())}

    def _adapt(
        self, weights: Weights, first_order: bool, theta: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor
    ) -> Tensors:
        """Parameters after each training step that has a weight, as ``<step>/<name>``."""
        trajectory = self._descend(theta, support_x, support_y, None, self.inner_steps, first_order)
        return {f"{step}/{name}": tensor for step in weights for name, tensor in trajectory[step].items()}

    def _descend(
        self,
        theta: Mapping[str, Tensor],
        support_x: Tensor,
        support_y: Tensor,
        given: Mapping[str, Tensor] | None,
        steps: int,
        first_order: bool,
    ) -> list[Tensors]:
        """All of the network's parameters before and after each step."""
        numbers = [min(step, self.inner_steps - 1) for step in range(steps)]
        layers = [{name: t[number] for name, t in theta.items() if name.startswith(PER_STEP)} for number in numbers]
        start = {name: tensor for name, tensor in theta.items() if not name.startswith((*PER_STEP, RATE))}
        rates = [{name: theta[RATE + name][number] for name in start} for number in numbers]
        gradients = [self.network.gradient(support_x, support_y, given, fixed) for fixed in layers]
        trajectory = rated_descent(gradients, start, rates, first_order)
        return [adapted | fixed for adapted, fixed in zip(trajectory, [layers[0], *layers], strict=True)]


def _score(
    network: Network, weights: Weights, adapted: Mapping[str, Tensor], *data: Tensor
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Tensors]:
    """The weighted query loss, and metric and batch statistics after the last step."""
    total: Tensor | None = None
    for step, weight in weights.items():
        prefix = f"{step}/"
        parameters = {n.removeprefix(prefix): t for n, t in adapted.items() if n.startswith(prefix)}
        loss, metric, observed = network.score(parameters, *data)
        total = weight * loss if total is None else total + weight * loss
    assert total is not None
    return total, metric, observed
