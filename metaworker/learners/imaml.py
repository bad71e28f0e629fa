"""Implicit MAML (iMAML; Rajeswaran, Finn, Kakade, Levine 2019, arXiv 1909.04630).

    φ* = argmin_φ L_support(φ) + λ/2 ‖φ − θ‖²,   dL_query(φ*)/dθ = (I + H/λ)⁻¹ ∇L_query(φ*),   H = ∇²L_support(φ*)

φ*, ∇L_query(φ*) and each product with H have θ's names and shapes, ``[task, …]`` for a chunk of tasks; samples are
``[task, support, *sample]`` and ``[task, query, *sample]``, the network's outputs ``[task, sample, way]``.

φ* is approached by a fixed number of gradient steps from θ, the inverse by a fixed number of conjugate-gradient
iterations, each one product of H with a vector. Nothing is differentiated through the inner steps: memory does not
depend on their number. The gradient is a ``surrogate``: it is that of the query loss where the inner problem and the
linear system are both solved, and as biased as they are not.

Away from a minimum H may have negative eigenvalues, for which conjugate gradients are not made. A ``damping`` δ, which
implementations have and the paper has not, makes the system I + H/(λ + δ), whose eigenvalues are nearer to 1: the more
of it, the nearer the gradient is to ∇L_query(φ*) itself, first-order MAML's after as many steps. So it is, too, where a
few steps fit the support set and the penalty has not pulled φ back yet: H is next to nothing there.

The authors' code is not the paper's method to the letter: its inner steps (16 of 0.1) are without the penalty, one step
of the penalty alone follows, its system is 2 I + H/(λ + 10), and it evaluates with λ = 0, after 20,000 meta-steps or
more. Its convolutions have a bias, which those here have not (batch-norm's shift does its work).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.func import vmap

from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.inner_loop import last, proximal_descent
from metaworker.learners.base import Context, GradientKind, ShardResult, Task
from metaworker.learners.gradient_based import GradientBased, Network
from metaworker.learners.stacked import Scores, Stack, repeat, shard_result

Map = Callable[[Tensors], Tensors]
"""A linear map for each task, from and to named ``[task, …]``."""


@dataclass(frozen=True)
class IMAML(GradientBased):
    """Implicit MAML on a network."""

    network: Network
    inner_lr: float
    inner_steps: int
    eval_steps: int
    strength: float
    """λ."""
    cg_steps: int
    damping: float = 0.0
    """δ."""

    @property
    def kind(self) -> GradientKind:
        """A ``surrogate``: two approximations stand between it and the query loss's gradient."""
        return "surrogate"

    def meta_parameters(self, seed: int) -> Tensors:
        """The network's initial parameters."""
        return self.network.parameters(seed)

    def adapt(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        support_x: Shaped[Tensor, "support *sample"],
        support_y: Tensor,
        metadata: Mapping[str, Tensor],
    ) -> Sequence[Task]:
        """``eval_steps`` steps on the inner problem."""
        given = self.network.evaluation_statistics(state)
        gradient = self.network.gradient(support_x, support_y, given)
        trajectory = proximal_descent(gradient, theta, self.inner_lr, self.eval_steps, self.strength)
        return [self.network.task(parameters, support_x, given) for parameters in trajectory]

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Sum the implicit gradients of the query losses at the inner solutions."""
        gradient = {name: tensor.new_zeros(tensor.shape) for name, tensor in theta.items()}
        scores: list[Scores] = []
        for start in range(0, len(episodes), context.chunk):
            part = episodes.chunk(start, start + context.chunk)
            phi = self._solve(theta, part)
            at_query, score = self._query_gradient(phi, part)
            found = conjugate_gradient(self._system(phi, part), at_query, self.cg_steps)
            gradient = {name: total + found[name].sum(0) for name, total in gradient.items()}
            scores.append(score)
        return shard_result(gradient, scores)

    def _solve(self, theta: Mapping[str, Tensor], episodes: Episodes) -> Tensors:
        """φ* of each task, ``[task, …]``."""
        stack = Stack(self.network.backbone, self.network.objective)
        gradient = stack.gradient(episodes.support_x, episodes.support_y)
        start = repeat(theta, len(episodes))
        return last(proximal_descent(gradient, start, self.inner_lr, self.inner_steps, self.strength))[0]

    def _query_gradient(self, phi: Tensors, episodes: Episodes) -> tuple[Tensors, Scores]:
        """∇L_query(φ*) of each task, and its scores."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in phi.items()}
        data = (episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y)
        with torch.enable_grad():
            loss, metric, observed = vmap(self.network.score)(leaves, *data)
            found = torch.autograd.grad(loss.sum(), list(leaves.values()))
        observed = {name: rows.detach() for name, rows in observed.items()}
        return dict(zip(leaves, found, strict=True)), Scores(loss.detach(), metric.detach(), observed)

    def _system(self, phi: Tensors, episodes: Episodes) -> Map:
        """The map v ↦ v + H v / (λ + δ) of each task. The graph of ∇L_support(φ*) is kept for every product."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in phi.items()}

        def loss(parameters: Tensors, x: Tensor, y: Tensor) -> Float[Tensor, ""]:
            return self.network.objective.loss(self.network.backbone(parameters, x, None)[0], y)

        with torch.enable_grad():
            total = vmap(loss)(leaves, episodes.support_x, episodes.support_y).sum()
            gradient = torch.autograd.grad(total, list(leaves.values()), create_graph=True)

        def system(vectors: Tensors) -> Tensors:
            products = torch.autograd.grad(
                gradient, list(leaves.values()), list(vectors.values()), retain_graph=True, materialize_grads=True
            )
            curbed = self.strength + self.damping
            return {name: vectors[name] + product / curbed for name, product in zip(leaves, products, strict=True)}

        return system


def conjugate_gradient(system: Map, target: Tensors, iterations: int) -> Tensors:
    """An approximate solution x of ``system(x) = target`` for each task, after as many iterations from x = 0."""
    solution = {name: torch.zeros_like(tensor) for name, tensor in target.items()}
    residual = direction = target
    square = _dot(residual, residual)
    for _ in range(iterations):
        image = system(direction)
        length = _ratio(square, _dot(direction, image))
        solution = _add(solution, length, direction)
        residual = _add(residual, -length, image)
        before, square = square, _dot(residual, residual)
        direction = _add(residual, _ratio(square, before), direction)
    return solution


def _dot(a: Tensors, b: Tensors) -> Float[Tensor, "task"]:
    return torch.stack([(a[name] * b[name]).flatten(1).sum(1) for name in a]).sum(0)


def _ratio(a: Float[Tensor, "task"], b: Float[Tensor, "task"]) -> Float[Tensor, "task"]:
    """The quotient a / b, and a where b is 0: the residual is gone there, and so is a."""
    return a / torch.where(b == 0, 1, b)


def _add(a: Tensors, factor: Float[Tensor, "task"], b: Tensors) -> Tensors:
    """The sum a + factor · b of each task."""
    return {name: a[name] + factor.view(-1, *(1 for _ in a[name].shape[1:])) * b[name] for name in a}
