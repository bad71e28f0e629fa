"""Inner loops against closed forms on quadratics and PyTorch's optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.func import grad
from torch.testing import assert_close

from cluster.flat import Tensors
from metaworker.inner_loop import gradient_descent, last, minibatch_descent

STEP = 0.1


def close(actual: object, expected: object) -> None:
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def matrix() -> Tensor:
    """A symmetric positive definite 4 × 4 matrix."""
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return root @ root.T / 4 + torch.eye(4, dtype=torch.float64)


@pytest.fixture
def theta() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(2, generator=generator, dtype=torch.float64) for name in ("b", "a")}


def quadratic(matrix: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """½ φᵀ A φ with φ the two parameters in one vector."""

    def loss(parameters: Mapping[str, Tensor]) -> Tensor:
        point = torch.cat([parameters["b"], parameters["a"]])
        return point @ matrix @ point / 2

    return loss


def flat(parameters: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([parameters["b"], parameters["a"]])


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_gradient_descent_follows_its_closed_form(
    matrix: Tensor, theta: Tensors, steps: int, first_order: bool
) -> None:
    trajectory = list(gradient_descent(grad(quadratic(matrix)), theta, STEP, steps, first_order))
    shrink = torch.eye(4, dtype=torch.float64) - STEP * matrix
    assert len(trajectory) == steps + 1
    for t, point in enumerate(trajectory):
        assert list(point) == ["b", "a"], "names keep their order"
        close(flat(point), torch.linalg.matrix_power(shrink, t) @ flat(theta))


@pytest.mark.parametrize("steps", [1, 4])
def test_second_order_differentiates_through_the_steps(matrix: Tensor, theta: Tensors, steps: int) -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in theta.items()}
    end = flat(last(gradient_descent(grad(quadratic(matrix)), leaves, STEP, steps, first_order=False))[0])
    direction = torch.arange(4, dtype=torch.float64) + 1
    gradients = torch.autograd.grad(end @ direction, list(leaves.values()))
    shrink = torch.eye(4, dtype=torch.float64) - STEP * matrix
    close(torch.cat(gradients), torch.linalg.matrix_power(shrink, steps) @ direction)


@pytest.mark.parametrize("steps", [1, 4])
def test_first_order_takes_the_inner_gradients_for_constants(matrix: Tensor, theta: Tensors, steps: int) -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in theta.items()}
    end = flat(last(gradient_descent(grad(quadratic(matrix)), leaves, STEP, steps, first_order=True))[0])
    direction = torch.arange(4, dtype=torch.float64) + 1
    close(torch.cat(torch.autograd.grad(end @ direction, list(leaves.values()))), direction)


def test_gradients_are_found_where_recording_is_off(matrix: Tensor, theta: Tensors) -> None:
    with torch.no_grad():
        trajectory = list(gradient_descent(grad(quadratic(matrix)), theta, STEP, 1, first_order=True))
    close(flat(trajectory[1]), flat(theta) - STEP * matrix @ flat(theta))
    assert not any(tensor.requires_grad for point in trajectory for tensor in point.values())


@pytest.mark.parametrize("adam", [False, True])
def test_minibatch_descent_is_that_of_the_optimizers_of_pytorch(matrix: Tensor, theta: Tensors, adam: bool) -> None:
    losses = [quadratic(matrix), quadratic(3 * matrix), quadratic(matrix @ matrix)]
    trajectory = list(minibatch_descent([grad(loss) for loss in losses], theta, STEP, adam))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    optimizer: torch.optim.Optimizer = torch.optim.SGD(leaves.values(), lr=STEP)
    if adam:
        optimizer = torch.optim.Adam(leaves.values(), lr=STEP, betas=(0.0, 0.999), eps=1e-8)
    assert len(trajectory) == 4
    for point, loss in zip(trajectory, [*losses, losses[0]], strict=True):
        close(dict(point), {name: leaf.detach() for name, leaf in leaves.items()})
        optimizer.zero_grad()
        loss(leaves).backward()
        optimizer.step()


@pytest.mark.parametrize("adam", [False, True])
def test_minibatch_descent_keeps_nothing_for_an_outer_differentiation(
    matrix: Tensor, theta: Tensors, adam: bool
) -> None:
    before = flat(theta).clone()
    leaves = {name: tensor.requires_grad_() for name, tensor in theta.items()}
    trajectory = list(minibatch_descent([grad(quadratic(matrix))] * 2, leaves, STEP, adam))
    assert not any(tensor.requires_grad for point in trajectory for tensor in point.values())
    assert torch.equal(flat(theta).detach(), before)


def test_adam_stands_still_where_the_gradient_is_zero() -> None:
    theta = {"w": torch.tensor([1.0, 2.0])}
    first, last = minibatch_descent([lambda p: {"w": torch.tensor([0.0, 1.0])}], theta, STEP, adam=True)
    assert last["w"][0] == first["w"][0]
    # Bias-corrected, the first step has the length of the step size whatever the gradient's.
    assert_close(last["w"][1], torch.tensor(2.0 - STEP))
