"""Inner-loop optimizers as pure functions of named parameters, for one task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cluster.flat import Tensors

InnerLoss = Callable[[Mapping[str, Tensor]], Float[Tensor, ""]]

ADAM_BETA2, ADAM_EPSILON = 0.999, 1e-8


def gradient_descent(
    loss: InnerLoss, theta: Mapping[str, Tensor], step_size: float, steps: int, first_order: bool
) -> list[Tensors]:
    """``θ(t+1) = θ(t) − α ∇loss(θ(t))``: the parameters before and after each step, ``steps`` + 1 of them.

    Args:
        loss: the task's loss as a function of the parameters.
        theta: where to start.
        step_size: α.
        steps: how many steps, at least 0.
        first_order: whether gradients are constants in an outer differentiation; no graph is kept for them then.
    """
    trajectory: list[Tensors] = [dict(theta)]
    for _ in range(steps):
        here = trajectory[-1]
        point = {name: tensor.detach() for name, tensor in here.items()} if first_order else here
        gradient = torch.func.grad(loss)(point)
        trajectory.append({name: here[name] - step_size * gradient[name] for name in here})
    return trajectory


def minibatch_descent(
    losses: Sequence[InnerLoss], theta: Mapping[str, Tensor], step_size: float, adam: bool
) -> list[Tensors]:
    """One step for each of ``losses`` by SGD, or by Adam with β₁ = 0: parameters before and after each step.

    Adam's second moments start at zero for each task and are bias-corrected. Nothing is kept for an outer
    differentiation.
    """
    trajectory: list[Tensors] = [{name: tensor.detach() for name, tensor in theta.items()}]
    moments = {name: torch.zeros_like(tensor) for name, tensor in trajectory[0].items()}
    for step, loss in enumerate(losses, start=1):
        here = trajectory[-1]
        gradient = torch.func.grad(loss)(here)
        if adam:
            moments = {n: ADAM_BETA2 * m + (1 - ADAM_BETA2) * gradient[n] * gradient[n] for n, m in moments.items()}
            correction = 1 - ADAM_BETA2**step
            gradient = {n: g / ((moments[n] / correction).sqrt() + ADAM_EPSILON) for n, g in gradient.items()}
        trajectory.append({name: here[name] - step_size * gradient[name] for name in here})
    return trajectory
