"""Inner-loop optimizers as pure functions of named parameters, for one task.

They give the parameters before and after each step one by one and keep none but the last: what an outer differentiation
needs of the others, its graph holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cluster.flat import Tensors

InnerGradient = Callable[[Mapping[str, Tensor]], Tensors]
"""The gradient of the task's loss at given parameters, named and shaped as they are."""

ADAM_BETA2, ADAM_EPSILON = 0.999, 1e-8


Rates = Mapping[str, Tensor | float]
"""Step sizes by parameter: a number, or a tensor of one for all or one for each of its elements."""


def gradient_descent(
    gradient: InnerGradient, theta: Mapping[str, Tensor], step_size: float, steps: int, first_order: bool
) -> Iterator[Tensors]:
    """``θ(t+1) = θ(t) − α ∇loss(θ(t))``: the parameters before and after each step, ``steps`` + 1 of them.

    Args:
        gradient: ∇loss.
        theta: where to start.
        step_size: α.
        steps: how many steps, at least 0.
        first_order: whether gradients are constants in an outer differentiation; no graph is kept for them then.
    """
    return rated_descent([gradient] * steps, theta, [dict.fromkeys(theta, step_size)] * steps, first_order)


def rated_descent(
    gradients: Sequence[InnerGradient], theta: Mapping[str, Tensor], rates: Sequence[Rates], first_order: bool
) -> Iterator[Tensors]:
    """``θ(t+1) = θ(t) − α(t) ∘ ∇loss(t)(θ(t))``: the parameters before and after each step.

    Args:
        gradients: ∇loss of each step.
        theta: where to start.
        rates: α of each step.
        first_order: as in `gradient_descent`. The rates are differentiated all the same.
    """
    here = dict(theta)
    yield here
    for gradient, rate in zip(gradients, rates, strict=True):
        point = {name: tensor.detach() for name, tensor in here.items()} if first_order else here
        found = gradient(point)
        if first_order:
            found = {name: tensor.detach() for name, tensor in found.items()}
        here = {name: here[name] - rate[name] * found[name] for name in here}
        yield here


def proximal_descent(
    gradient: InnerGradient, theta: Mapping[str, Tensor], step_size: float, steps: int, strength: float
) -> Iterator[Tensors]:
    """Gradient descent on ``loss(φ) + λ/2 ‖φ − θ‖²`` from θ: the parameters before and after each step.

    Nothing is kept for an outer differentiation.

    Args:
        gradient: ∇loss.
        theta: where to start, and what φ is held to.
        step_size: α.
        steps: how many steps, at least 0.
        strength: λ.
    """
    anchor = {name: tensor.detach() for name, tensor in theta.items()}
    here = anchor
    yield here
    for _ in range(steps):
        found = gradient(here)
        here = {
            name: at - step_size * (found[name].detach() + strength * (at - anchor[name])) for name, at in here.items()
        }
        yield here


def minibatch_descent(
    gradients: Sequence[InnerGradient], theta: Mapping[str, Tensor], step_size: float, adam: bool
) -> Iterator[Tensors]:
    """One step by each of ``gradients`` with SGD, or by Adam with β₁ = 0: parameters before and after each step.

    Adam's second moments start at zero for each task and are bias-corrected. Nothing is kept for an outer
    differentiation.
    """
    here = {name: tensor.detach() for name, tensor in theta.items()}
    moments = {name: torch.zeros_like(tensor) for name, tensor in here.items()}
    yield here
    for step, gradient in enumerate(gradients, start=1):
        found = gradient(here)
        if adam:
            moments = {n: ADAM_BETA2 * m + (1 - ADAM_BETA2) * found[n] * found[n] for n, m in moments.items()}
            correction = 1 - ADAM_BETA2**step
            found = {n: g / ((moments[n] / correction).sqrt() + ADAM_EPSILON) for n, g in found.items()}
        here = {name: here[name] - step_size * found[name] for name in here}
        yield here


def last(points: Iterable[Tensors], count: int = 1) -> list[Tensors]:
    """The last ``count`` of some points, fewer if there are fewer, without holding the others."""
    return list(deque(points, maxlen=count))
