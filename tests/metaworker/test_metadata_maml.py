"""Metadata-augmented MAML: MAML without metadata, another initialisation with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.learners import build_learner
from metaworker.learners.base import Context, Learner
from metaworker.learners.metadata_maml import MetadataMAML
from metaworker.metadata import encode, task_features

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]
STEPS = {"inner_lr": 0.05, "inner_steps": 2, "eval_steps": 3}
SHAPE = sections.EpisodeShape(way=1, shot=6, query=9)


def config_of(section: Any) -> RunConfig:
    return RunConfig(learner=section, model=sections.MLP(hidden=(8,)), data=sections.SinusoidData(), episode=SHAPE)


def learner_of(*columns: str) -> MetadataMAML:
    made = build_learner(config_of(learners.MetadataMAML(columns=columns, width=4, **STEPS)), (1,))
    assert isinstance(made, MetadataMAML)
    return made


def told(episodes: Episodes, amplitude: list[float]) -> Episodes:
    return replace(episodes, metadata={"amplitude": np.array(amplitude)})


def own(theta: Tensors) -> Tensors:
    """The network's parameters."""
    return {name: tensor for name, tensor in theta.items() if not name.startswith("task/")}


@pytest.mark.parametrize("amplitudes", [[np.nan] * 3, [1.0, 2.0, 3.0]], ids=["missing", "not asked for"])
def test_without_metadata_it_is_maml(amplitudes: list[float], waves: Draw, perturbed: Perturbed) -> None:
    learner = learner_of("amplitude" if np.isnan(amplitudes[0]) else "phase")
    maml = build_learner(config_of(learners.MAML(**STEPS)), (1,))
    (theta, state), episodes = perturbed(learner), told(waves(3), amplitudes)
    found = learner.contribute(theta, state, episodes, Context(0, 3))
    expected = maml.contribute(own(theta), state, episodes, Context(0, 3))
    assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    for name, gradient in expected.gradient.items():
        assert_close(found.gradient[name], gradient, rtol=1e-12, atol=1e-12)


def test_metadata_moves_the_initialisation_by_its_equation(waves: Draw, perturbed: Perturbed) -> None:
    learner = learner_of("amplitude")
    (theta, _), episodes = perturbed(learner), told(waves(1), [2.5])
    metadata = {name: rows[0] for name, rows in encode(episodes.metadata, episodes.support_x).items()}
    m = task_features(metadata, ("amplitude",), episodes.support_x)
    assert m[0] == 2.5 and m[-1] == 1
    z = torch.tanh(theta["task/deep"] @ torch.tanh(theta["task/mix"] @ m))
    found = learner.initialisation(theta, m)
    for unit in range(8):
        assert_close(found["weight.0"][unit], theta["weight.0"][unit] * (1 + theta["task/on/weight.0"][unit] @ z))
        assert_close(found["bias.0"][unit], theta["bias.0"][unit] + theta["task/on/bias.0"][unit] @ z)


def test_the_meta_gradient_is_that_of_plain_autograd(waves: Draw, perturbed: Perturbed) -> None:
    learner, episodes = learner_of("amplitude"), told(waves(2), [0.5, 2.0])
    theta, state = perturbed(learner)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    total = torch.zeros((), dtype=torch.float64)
    for e in range(2):
        m = torch.zeros(33, dtype=torch.float64)
        m[0], m[-1] = float(episodes.metadata["amplitude"][e]), 1
        z = torch.tanh(leaves["task/deep"] @ torch.tanh(leaves["task/mix"] @ m))
        phi: dict[str, Tensor] = {}
        for name in own(theta):
            by = leaves[f"task/on/{name}"] @ z
            phi[name] = leaves[name] * (1 + by[:, None]) if name.startswith("weight") else leaves[name] + by
        for _ in range(2):
            loss = (net(phi, episodes.support_x[e]) - episodes.support_y[e]).square().mean()
            steps = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {name: at - 0.05 * step for (name, at), step in zip(phi.items(), steps, strict=True)}
        total = total + (net(phi, episodes.query_x[e]) - episodes.query_y[e]).square().mean()
    expected = torch.autograd.grad(total, list(leaves.values()))
    found = learner.contribute(theta, state, episodes, Context(0, 2)).gradient
    for name, gradient in zip(leaves, expected, strict=True):
        assert_close(found[name], gradient, rtol=1e-10, atol=1e-10)


def net(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.relu(x @ parameters["weight.0"].T + parameters["bias.0"])
    return hidden @ parameters["weight.1"].T + parameters["bias.1"]
