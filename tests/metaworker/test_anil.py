"""ANIL against its equation by nested autograd in float64, and what sets it apart from MAML."""

from __future__ import annotations

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

STRIDED, POOLED = sections.Conv4Strided(channels=4), sections.Conv4Pool(channels=4)
MLP = sections.MLP(hidden=(8, 6))
MODES = ("transductive", "support", "running")
FEW, MANY = 2, 5
"""Query samples a class of the 5: below and above where episodes are scored one by one instead of vectorised."""

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(model: sections.Model, mode: str = "transductive", regression: bool = False, **options: Any) -> Learner:
    model = model if isinstance(model, sections.MLP) else model.model_copy(update={"batch_norm": mode})
    config = RunConfig(
        learner=learners.ANIL(**({"inner_lr": 0.3, "inner_steps": 3} | options)),
        model=model,
        episode=sections.EpisodeShape(way=1 if regression else 5, shot=1, query=FEW),
        data=sections.SinusoidData() if regression else sections.GlyphsData(),
    )
    return build_learner(config, (1,) if regression else (1, 12, 12))


def head_of(model: sections.Model) -> list[str]:
    layer = len(model.hidden) if isinstance(model, sections.MLP) else 0
    return [f"weight.{layer}", f"bias.{layer}"] if isinstance(model, sections.MLP) else ["head.weight", "head.bias"]


def plain_steps(
    net: Any,
    theta: Mapping[str, Tensor],
    names: list[str],
    score: Any,
    x: Tensor,
    y: Tensor,
    steps: int,
    lr: float = 0.3,
    first_order: bool = False,
    given: Any = None,
) -> list[Tensors]:
    """All parameters before and after each step on those called ``names``, the whole net each time."""
    trajectory = [dict(theta)]
    for _ in range(steps):
        fast = trajectory[-1]
        loss = score(net(fast, x, given)[0], y)
        found = torch.autograd.grad(loss, [fast[name] for name in names], create_graph=not first_order)
        trajectory.append(fast | {name: fast[name] - lr * g for name, g in zip(names, found, strict=True)})
    return trajectory


def check(
    model: sections.Model, learner: Learner, net: Any, theta: Tensors, episodes: Episodes, **options: Any
) -> None:
    mode = options.pop("mode", "transductive")
    score = F.mse_loss if episodes.way == 1 else F.cross_entropy
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    losses, hits = [], []
    for e in range(len(episodes)):
        x, y = episodes.support_x[e], episodes.support_y[e]
        fast = plain_steps(net, leaves, head_of(model), score, x, y, **options)[-1]
        given = net(fast, x)[1] if mode == "support" else None
        outputs = net(fast, episodes.query_x[e], given or None)[0]
        losses.append(score(outputs, episodes.query_y[e]))
        hits.append((outputs.argmax(1) == episodes.query_y[e]).double().mean() if episodes.way > 1 else losses[-1])
    gradient = dict(zip(leaves, torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values())), strict=True))
    for chunk in (len(episodes), 1, 2):
        result = learner.contribute(theta, {}, episodes, Context(0, chunk))
        close(dict(result.gradient), gradient)
        close((result.loss, result.metric), (torch.stack(losses).detach(), torch.stack(hits).detach()))


@pytest.mark.parametrize("query", [FEW, MANY])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", [STRIDED, POOLED, MLP, sections.MLP(hidden=())], ids=lambda m: m.type)
def test_meta_gradient_is_that_of_nested_autograd(
    model: sections.Model,
    mode: str,
    first_order: bool,
    query: int,
    pictures: Draw,
    plain_net: Any,
    perturbed: Perturbed,
) -> None:
    learner = learner_of(model, mode, first_order=first_order)
    (theta, _), episodes = perturbed(learner), pictures(3, shot=2, query=query)
    check(model, learner, plain_net(model), theta, episodes, steps=3, first_order=first_order, mode=mode)


def test_meta_gradient_of_regression(waves: Draw, plain_net: Any, perturbed: Perturbed) -> None:
    learner = learner_of(MLP, regression=True, inner_lr=0.01)
    (theta, _), episodes = perturbed(learner), waves(4)
    check(MLP, learner, plain_net(MLP), theta, episodes, steps=3, lr=0.01)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", [STRIDED, POOLED, MLP], ids=lambda m: m.type)
def test_evaluation_moves_the_head_alone(
    model: sections.Model, mode: str, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(model, mode, eval_steps=4), plain_net(model)
    (theta, state), episodes = perturbed(learner), pictures(1, shot=2)
    x, y, query_x = episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    kept = state or None if mode == "running" else None
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    trajectory = plain_steps(net, leaves, head_of(model), F.cross_entropy, x, y, steps=4, given=kept)
    expected = [net(p, query_x, (net(p, x)[1] or None) if mode == "support" else kept)[0].detach() for p in trajectory]
    assert expected[-1].std(0).min() > 1e-3, "a dead net would agree with anything"
    tasks = learner.adapt(theta, state, x, y, {})
    close([learner.predict(task, query_x) for task in tasks], expected)
    for task in tasks:
        changed = {name for name in theta if not torch.equal(task["parameters"][name], theta[name])}
        assert changed <= set(head_of(model))
    assert changed == set(head_of(model))


def test_second_order_reaches_the_encoder_through_the_head(pictures: Draw, perturbed: Perturbed) -> None:
    exact, first = learner_of(STRIDED), learner_of(STRIDED, first_order=True)
    assert (exact.kind, first.kind) == ("exact", "surrogate")
    theta, _ = perturbed(exact)
    gradients = [lr.contribute(theta, {}, pictures(2), Context(0, 2)).gradient["conv.0"] for lr in (exact, first)]
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()
