"""The LSTM optimizer against its equations by plain autograd with ``nn.LSTMCell`` in float64, and what it starts as."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.learners import build_learner, lstm_optimizer
from metaworker.learners.base import Context, Learner
from metaworker.learners.lstm_optimizer import RULE, preprocessed

STRIDED, POOLED = sections.Conv4Strided(channels=4), sections.Conv4Pool(channels=4)
MLP = sections.MLP(hidden=(8, 8))
HIDDEN = 6
forms = pytest.mark.parametrize("form", ["cell", "hidden"])
modes = pytest.mark.parametrize("mode", ["transductive", "support", "running"])

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(model: sections.Model, way: int = 5, **options: Any) -> Learner:
    config = RunConfig(
        learner=learners.LSTMOptimizer(**({"hidden": HIDDEN} | options)),
        model=model,
        episode=sections.EpisodeShape(way=way, shot=1, query=2),
        data=sections.GlyphsData() if way > 1 else sections.SinusoidData(),
    )
    return build_learner(config, (1, 12, 12) if way > 1 else (1,))


def prep(x: Tensor) -> Tensor:
    """The paper's case distinction, element by element: ``[n]`` -> ``[n, 2]``."""
    rows = []
    for value in x:
        large = abs(value.item()) >= math.exp(-10)
        rows.append(
            torch.stack(
                [value.abs().log() / 10, value.sign()] if large else [-value.new_ones(()), value * math.exp(10)]
            )
        )
    return torch.stack(rows)


def plain_steps(
    theta: Mapping[str, Tensor], support_loss: Callable[[Tensors], Tensor], form: str, steps: int, first_order: bool
) -> list[Tensors]:
    """The network's parameters before and after each step, by the papers' equations."""
    names = [name for name in theta if not name.startswith(RULE)]
    weight = {name.removeprefix(RULE): theta[name] for name in theta if name.startswith(RULE)}
    inputs = 4 if form == "cell" else 2
    cell = nn.LSTMCell(inputs, HIDDEN).double()
    lstm = {
        "weight_ih": weight["lstm.weight"][:, :inputs],
        "weight_hh": weight["lstm.weight"][:, inputs:],
        "bias_ih": weight["lstm.bias"],
        "bias_hh": torch.zeros(4 * HIDDEN, dtype=torch.float64),
    }
    fast = {name: theta[name] for name in names}
    h = {name: torch.zeros(fast[name].numel(), HIDDEN, dtype=torch.float64) for name in names}
    c, i, f = dict(h), {n: h[n][:, 0] for n in names}, {n: h[n][:, 0] for n in names}
    trajectory = [fast]
    for _ in range(steps):
        loss = support_loss(fast)
        gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order, retain_graph=True)
        loss = loss.detach() if first_order else loss
        after = {}
        for name, gradient in zip(names, gradients, strict=True):
            g, old = gradient.flatten(), fast[name].flatten()
            seen = torch.cat([prep(g), prep(loss[None]).repeat(len(g), 1)], 1) if form == "cell" else prep(g)
            h[name], c[name] = torch.func.functional_call(cell, lstm, (seen, (h[name], c[name])))
            if form == "cell":
                of_i, of_f = weight["input.weight"], weight["forget.weight"]
                fixed_i, fixed_f = h[name] @ of_i[:HIDDEN], h[name] @ of_f[:HIDDEN]
                i[name] = torch.sigmoid(fixed_i + of_i[-2] * old + of_i[-1] * i[name] + weight["input.bias"])
                f[name] = torch.sigmoid(fixed_f + of_f[-2] * old + of_f[-1] * f[name] + weight["forget.bias"])
                new = f[name] * old - i[name] * g
            else:
                new = old - weight["step"] * (h[name] @ weight["read.weight"])
            after[name] = new.reshape(fast[name].shape)
        fast = after
        trajectory.append(fast)
    return trajectory


@dataclass(frozen=True)
class Expected:
    gradient: Tensors
    loss: Tensor
    metric: Tensor
    proposals: Tensors


def plain_autograd(
    net: Any, theta: Mapping[str, Tensor], episodes: Episodes, form: str, steps: int, first_order: bool, mode: str
) -> Expected:
    """The meta-gradient, one episode after another."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    score = F.mse_loss if episodes.way == 1 else F.cross_entropy
    losses, metrics, seen, total = [], [], [], [torch.zeros_like(t) for t in leaves.values()]
    for e in range(len(episodes)):
        x, y = episodes.support_x[e], episodes.support_y[e]
        fast = plain_steps(leaves, lambda p, x=x, y=y: score(net(p, x)[0], y), form, steps, first_order)[-1]
        of_support = net(fast, x)[1]
        outputs, of_query = net(fast, episodes.query_x[e], of_support if mode == "support" else None)
        loss = score(outputs, episodes.query_y[e])
        total = [t + g for t, g in zip(total, torch.autograd.grad(loss, list(leaves.values())), strict=True)]
        hits = (outputs.argmax(1) == episodes.query_y[e]).double().mean() if episodes.way > 1 else loss
        losses.append(loss.detach())
        metrics.append(hits.detach())
        seen.append(of_support if mode == "support" else of_query)
    proposals = {name: torch.stack([s[name].detach() for s in seen]) for name in seen[0]}
    return Expected(dict(zip(leaves, total, strict=True)), torch.stack(losses), torch.stack(metrics), proposals)


def check(learner: Learner, theta: Tensors, episodes: Episodes, expected: Expected, tolerance: float = 1e-10) -> None:
    assert all(gradient.any() for gradient in expected.gradient.values())
    for chunk in (len(episodes), 1, 2):
        result = learner.contribute(theta, {}, episodes, Context(0, chunk))
        close(dict(result.gradient), expected.gradient, tolerance)
        close((result.loss, result.metric), (expected.loss, expected.metric))
        close(dict(result.proposals), expected.proposals)


@forms
@modes
@pytest.mark.parametrize("model", [STRIDED, POOLED], ids=lambda m: m.type)
def test_meta_gradient_is_that_of_plain_autograd(
    model: Any, mode: Any, form: Any, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner = learner_of(model.model_copy(update={"batch_norm": mode}), form=form, inner_steps=3)
    (theta, _), episodes = perturbed(learner), pictures(3, shot=2)
    check(learner, theta, episodes, plain_autograd(plain_net(model), theta, episodes, form, 3, True, mode))


@forms
@pytest.mark.parametrize("query", [2, 5])
def test_second_order_meta_gradient(
    form: Any, query: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner = learner_of(STRIDED, form=form, inner_steps=2, first_order=False)
    (theta, _), episodes = perturbed(learner), pictures(3, query=query)
    expected = plain_autograd(plain_net(STRIDED), theta, episodes, form, 2, False, "transductive")
    first = plain_autograd(plain_net(STRIDED), theta, episodes, form, 2, True, "transductive")
    # Derivatives of log|x| and of eᵖ x are as large as eᵖ.
    check(learner, theta, episodes, expected, 1e-8)
    assert (first.gradient["conv.0"] - expected.gradient["conv.0"]).norm() > 1e-3 * expected.gradient["conv.0"].norm()


@forms
def test_meta_gradient_of_regression(form: Any, waves: Draw, plain_net: Any, perturbed: Perturbed) -> None:
    learner = learner_of(MLP, way=1, form=form, initial_step=0.02, inner_steps=4)
    (theta, _), episodes = perturbed(learner), waves(3)
    check(learner, theta, episodes, plain_autograd(plain_net(MLP), theta, episodes, form, 4, True, "transductive"))


@forms
def test_blocks_of_coordinates_do_not_change_the_contribution(
    form: Any, pictures: Draw, perturbed: Perturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, episodes = learner_of(STRIDED, form=form), pictures(2)
    at = perturbed(learner)
    whole = learner.contribute(*at, episodes, Context(0, 2))
    monkeypatch.setattr(lstm_optimizer, "BLOCK", 37)
    blocks = learner.contribute(*at, episodes, Context(0, 2))
    close(dict(blocks.gradient), dict(whole.gradient))
    close(blocks.loss, whole.loss)


@forms
@modes
def test_evaluation_takes_the_steps_of_training(
    form: Any, mode: Any, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner = learner_of(STRIDED.model_copy(update={"batch_norm": mode}), form=form, eval_steps=3)
    (theta, state), episodes, net = perturbed(learner), pictures(1, shot=2), plain_net(STRIDED)
    x, y, query_x = episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    kept = state if mode == "running" else None
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    trajectory = plain_steps(leaves, lambda p: F.cross_entropy(net(p, x, kept)[0], y), form, 3, True)
    given = [net(p, x)[1] if mode == "support" else kept for p in trajectory]
    expected = [net(p, query_x, used)[0].detach() for p, used in zip(trajectory, given, strict=True)]
    assert all(outputs.std(0).min() > 1e-3 for outputs in expected), "a dead net would agree with anything"
    close([learner.predict(task, query_x) for task in learner.adapt(theta, state, x, y, {})], expected)


@pytest.mark.parametrize(("form", "tolerance"), [("cell", 0.05), ("hidden", 0.1)])
def test_the_rule_starts_as_gradient_descent(form: Any, tolerance: float, pictures: Draw) -> None:
    learner = learner_of(POOLED, form=form, initial_step=0.05, eval_steps=1)
    theta = {name: tensor.double() for name, tensor in learner.meta_parameters(0).items()}
    maml = learners.MAML(inner_lr=0.05, eval_steps=1)
    other = build_learner(RunConfig(learner=maml, model=POOLED), (1, 12, 12))
    episodes = pictures(1, shot=3)
    x, y = episodes.support_x[0], episodes.support_y[0]
    before, after = (task["parameters"] for task in learner.adapt(theta, {}, x, y, {}))
    descended = other.adapt({n: t for n, t in theta.items() if not n.startswith(RULE)}, {}, x, y, {})[-1]["parameters"]
    for name in descended:
        step, expected = (
            after[name] - (0.9933 if form == "cell" else 1.0) * before[name],
            descended[name] - before[name],
        )
        assert (step - expected).norm() < tolerance * expected.norm() + 1e-3 * before[name].norm(), name


def test_preprocessing_is_continuous_and_survives_zero() -> None:
    x = torch.tensor([0.0, 1e-300, -1e-6, math.exp(-10), -math.exp(-10), 0.5, -2.0], dtype=torch.float64)
    close(preprocessed(x), prep(x))
    inside, outside = (preprocessed(torch.tensor(s * math.exp(-10), dtype=torch.float64)) for s in (1 - 1e-9, 1 + 1e-9))
    close(inside, outside, 1e-8)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.grad(preprocessed(leaf).sum(), leaf)[0].isfinite().all()


@forms
def test_meta_training_lowers_the_loss_on_unseen_episodes(form: Any, pictures: Draw) -> None:
    learner, drawn = learner_of(STRIDED, form=form, inner_steps=3), pictures(40).to(torch.device("cpu"))
    theta = learner.meta_parameters(0)
    optimizer = torch.optim.Adam(theta.values(), lr=1e-2)
    losses = []
    for version in range(30):
        losses.append(learner.contribute(theta, {}, drawn.chunk(30, 40), Context(version, 10)).loss.mean())
        result = learner.contribute(theta, {}, drawn.chunk(0, 30), Context(version, 30))
        for name, tensor in theta.items():
            tensor.grad = result.gradient[name] / result.episodes
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
