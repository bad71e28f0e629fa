"""The outer optimizer against plain torch.optim, bit for bit, and its purity."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from cluster.config.run import RunConfig
from cluster.config.sections import SGD, Adam, CosineSchedule, LinearSchedule, Optimizer, Schedule, StepSchedule
from coordinator.outer_optimizer import OuterOptimizer
from coordinator.schedules import factor

SIZE, STEPS = 1003, 7

Plain = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

CASES: dict[str, tuple[Optimizer, Plain, set[str]]] = {
    "adam": (
        Adam(lr=0.01, betas=(0.8, 0.99), eps=1e-6),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99), eps=1e-6),
        {"step", "exp_avg", "exp_avg_sq"},
    ),
    "adamw": (
        Adam(lr=0.02, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
        {"step", "exp_avg", "exp_avg_sq"},
    ),
    "sgd": (SGD(lr=0.3), lambda p: torch.optim.SGD(p, lr=0.3), set()),
    "momentum": (
        SGD(lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        {"momentum_buffer"},
    ),
}


def start() -> tuple[Tensor, list[np.ndarray]]:
    rng = np.random.default_rng(3)
    theta = torch.from_numpy(rng.standard_normal(SIZE).astype(np.float32))
    return theta, list((rng.standard_normal((STEPS, SIZE)) * 10.0 ** rng.integers(-3, 2, SIZE)).astype(np.float32))


def plain_steps(make: Plain, schedule: Schedule | None) -> list[Tensor]:
    """θ after every step of torch's optimizer, which lives through the run and whose lr is set before each step."""
    theta, gradients = start()
    parameter = torch.nn.Parameter(theta)
    optimizer = make([parameter])
    lr = optimizer.param_groups[0]["lr"]
    thetas = []
    for version, gradient in enumerate(gradients):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = lr * factor(schedule, version, STEPS)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        thetas.append(parameter.detach().clone())
    return thetas


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "schedule", [None, LinearSchedule(final=0.1), CosineSchedule(warmup=3), StepSchedule(every=2)], ids=str
)
@pytest.mark.parametrize("reload", [False, True], ids=["kept", "saved and loaded"])
def test_every_step_has_the_bits_of_torch_s_own(case: str, schedule: Schedule | None, reload: bool) -> None:
    section, make, names = CASES[case]
    config = RunConfig(steps=STEPS, optimizer=section)
    config = config if schedule is None else config.model_copy(update={"schedule": schedule})
    expected = plain_steps(make, schedule)
    theta, gradients = start()
    state: dict[str, Tensor] = {}
    for version, gradient in enumerate(gradients):
        theta, state = OuterOptimizer(config).step(theta, state, gradient, version)
        assert set(state) == names
        assert theta.dtype == torch.float32 and not theta.requires_grad
        assert theta.numpy().tobytes() == expected[version].numpy().tobytes(), f"version {version + 1}"
        if reload:
            state = load(save(state))
            theta = theta.clone()


@pytest.mark.filterwarnings("error:.*not writable")
@pytest.mark.parametrize("case", CASES)
def test_a_step_leaves_its_arguments_as_they_are(case: str) -> None:
    optimizer = OuterOptimizer(RunConfig(steps=STEPS, optimizer=CASES[case][0]))
    theta, gradients = start()
    state: dict[str, Tensor] = {}
    for version, gradient in enumerate(gradients[:3]):
        gradient.flags.writeable = False
        given = {"theta": theta, **state}
        copies = {name: tensor.clone() for name, tensor in given.items()}
        after, after_state = optimizer.step(theta, state, gradient, version)
        again, again_state = optimizer.step(theta, state, gradient, version)
        assert all(torch.equal(tensor, copies[name]) for name, tensor in given.items())
        assert torch.equal(after, again) and not torch.equal(after, theta)
        assert all(torch.equal(tensor, again_state[name]) for name, tensor in after_state.items())
        theta, state = after, after_state


def test_the_state_of_adam_holds_its_step_as_a_scalar_tensor() -> None:
    _, state = OuterOptimizer(RunConfig(steps=STEPS)).step(*_with_state(), 0)
    assert state["step"].shape == () and state["step"].item() == 1


def _with_state() -> tuple[Tensor, dict[str, Tensor], np.ndarray]:
    theta, gradients = start()
    return theta, {}, gradients[0]


def test_a_short_gradient_is_not_clipped() -> None:
    gradient = np.array([3.0, 4.0], dtype=np.float32)
    for limit in (None, 5.0, 6.0):
        clipped, norm = OuterOptimizer(RunConfig(clip_norm=limit)).clip(gradient)
        assert clipped is gradient and norm == 5.0


def test_a_long_gradient_is_scaled_to_the_limit() -> None:
    rng = np.random.default_rng(1)
    gradient = rng.standard_normal(1000).astype(np.float32)
    before = gradient.copy()
    clipped, norm = OuterOptimizer(RunConfig(clip_norm=0.25)).clip(gradient)
    exact = math.sqrt(math.fsum(float(value) ** 2 for value in gradient))
    assert norm == pytest.approx(exact, rel=1e-14)
    assert clipped.dtype == np.float32 and np.array_equal(gradient, before)
    assert np.linalg.norm(clipped.astype(np.float64)) == pytest.approx(0.25, rel=1e-6)
    assert np.allclose(clipped, gradient * (0.25 / exact), rtol=1e-6)
    reference = torch.nn.Parameter(torch.zeros(1000))
    reference.grad = torch.from_numpy(before.copy())
    torch.nn.utils.clip_grad_norm_([reference], 0.25)
    assert np.allclose(clipped, reference.grad.numpy(), rtol=1e-5)


def test_a_norm_that_overflows_float32_is_still_a_number() -> None:
    gradient = np.full(4, 1e30, dtype=np.float32)
    clipped, norm = OuterOptimizer(RunConfig(clip_norm=1.0)).clip(gradient)
    assert norm == pytest.approx(2e30, rel=1e-6)
    assert clipped == pytest.approx(np.full(4, 0.5), rel=1e-6)
