"""The recurrent relational network against its equations, one query, node and edge after another, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.learners import build_learner
from metaworker.learners.base import Context, Learner

FEW, MANY = 1, 4
"""Query samples a class of the 5: below and above where episodes are scored one by one instead of vectorised."""
MODEL = sections.MLP(hidden=(8,))
HIDDEN = 5

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(model: sections.Model = MODEL, **options: Any) -> Learner:
    section = learners.Relational(**({"hidden": HIDDEN, "message_steps": 2} | options))
    return build_learner(RunConfig(learner=section, model=model), (1, 12, 12))


def layer(theta: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, theta[f"head/{name}.weight"], theta[f"head/{name}.bias"])


def mlp(theta: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return layer(theta, f"{name}.out", F.silu(layer(theta, name, x)))


def normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape)


def plain_outputs(theta: Mapping[str, Tensor], support: Tensor, labels: Tensor, query: Tensor, steps: int) -> Tensor:
    """Outputs of one query after each step, ``[step, way]``."""
    e = [normalised(x) for x in [*support, query]]
    names = [*F.one_hot(labels, 5).double(), torch.zeros(5, dtype=torch.float64)]
    asked = [torch.tensor([float(i == len(support))], dtype=torch.float64) for i in range(len(e))]
    x = [normalised(mlp(theta, "node", torch.cat(parts))) for parts in zip(e, names, asked, strict=True)]
    hidden, cell = x, [torch.zeros_like(h) for h in x]
    weight, bias = theta["head/memory.weight"], theta["head/memory.bias"]
    outputs = []
    for _ in range(steps):
        following = []
        for j in range(len(x)):
            received = torch.zeros(HIDDEN, dtype=torch.float64)
            for i in range(len(x)):
                if i != j:
                    alike = theta["head/alike"] * (e[i] @ e[j]) / math.sqrt(len(e[i]))
                    first = layer(theta, "sender", hidden[i]) + layer(theta, "receiver", hidden[j]) + alike
                    received = received + F.silu(layer(theta, "message", F.silu(first)))
            message = normalised(layer(theta, "message.out", received))
            inputs = mlp(theta, "update", torch.cat([x[j], message]))[None]
            state = hidden[j][None], cell[j][None]
            zero = torch.zeros_like(bias)
            following.append(torch.lstm_cell(inputs, state, weight[:, :HIDDEN], weight[:, HIDDEN:], bias, zero))
        hidden, cell = [h[0] for h, _ in following], [c[0] for _, c in following]
        outputs.append(mlp(theta, "output", hidden[-1]))
    return torch.stack(outputs)


@pytest.mark.parametrize("query", [FEW, MANY])
@pytest.mark.parametrize("model", [MODEL, sections.Conv4Strided(channels=4)], ids=lambda m: m.type)
def test_meta_gradient_is_that_of_plain_autograd(
    model: sections.Model, query: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(model), plain_net(model)
    (theta, state), episodes = perturbed(learner), pictures(2, query=query)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    losses, metrics = [], []
    for e in range(len(episodes)):
        embedded, _ = net(leaves, torch.cat([episodes.support_x[e], episodes.query_x[e]]), None)
        outputs = [plain_outputs(leaves, embedded[:5], episodes.support_y[e], one, 2) for one in embedded[5:]]
        asked = zip(outputs, episodes.query_y[e], strict=True)
        losses.append(torch.stack([F.cross_entropy(steps, y.expand(2)) for steps, y in asked]).mean())
        last = torch.stack([steps[-1] for steps in outputs])
        metrics.append((last.argmax(1) == episodes.query_y[e]).double().mean())
    gradient = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    for chunk in (2, 1):
        result = learner.contribute(theta, state, episodes, Context(0, chunk))
        close(dict(result.gradient), dict(zip(leaves, gradient, strict=True)))
        close((result.loss, result.metric), (torch.stack(losses).detach(), torch.stack(metrics)))


def test_the_last_step_s_outputs_are_the_prediction(pictures: Draw, plain_net: Any, perturbed: Perturbed) -> None:
    learner, net = learner_of(message_steps=3), plain_net(MODEL)
    (theta, state), episodes = perturbed(learner), pictures(1, shot=2)
    embedded, _ = net(theta, torch.cat([episodes.support_x[0], episodes.query_x[0]]), None)
    expected = [plain_outputs(theta, embedded[:10], episodes.support_y[0], one, 3)[-1] for one in embedded[10:]]
    (task,) = learner.adapt(theta, state, episodes.support_x[0], episodes.support_y[0], {})
    close(learner.predict(task, episodes.query_x[0]), torch.stack(expected))


def test_every_parameter_gets_a_gradient(pictures: Draw) -> None:
    learner, episodes = learner_of(), pictures(2).to(torch.device("cpu"))
    result = learner.contribute(learner.meta_parameters(0), learner.initial_state(), episodes, Context(0, 2))
    assert all(gradient.any() for gradient in result.gradient.values())
