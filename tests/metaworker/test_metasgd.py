"""Meta-SGD against its equation by nested autograd in float64, and against MAML, which it starts as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.learners import build_learner
from metaworker.learners.base import Context, Learner

STRIDED, POOLED = sections.Conv4Strided(channels=4), sections.Conv4Pool(channels=4)
MLP = sections.MLP(hidden=(8, 6))
FEW, MANY = 2, 5
"""Query samples a class of the 5: below and above where episodes are scored one by one instead of vectorised."""

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(section: learners.Learner, model: sections.Model, mode: str = "transductive", way: int = 5) -> Learner:
    model = model if isinstance(model, sections.MLP) else model.model_copy(update={"batch_norm": mode})
    shape = sections.EpisodeShape(way=way, shot=1, query=FEW)
    data = sections.GlyphsData() if way > 1 else sections.SinusoidData()
    return build_learner(
        RunConfig(learner=section, model=model, episode=shape, data=data), (1, 12, 12) if way > 1 else (1,)
    )


def check(learner: Learner, net: Any, theta: Tensors, episodes: Episodes, steps: int, mode: str) -> None:
    """The meta-gradient as it stands in the paper, one episode after another."""
    score = F.mse_loss if episodes.way == 1 else F.cross_entropy
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    losses = []
    for e in range(len(episodes)):
        fast = {name: tensor for name, tensor in leaves.items() if "rate" not in name}
        for _ in range(steps):
            loss = score(net(fast, episodes.support_x[e])[0], episodes.support_y[e])
            found = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {n: t - leaves[f"rate/{n}"] * g for (n, t), g in zip(fast.items(), found, strict=True)}
        given = net(fast, episodes.support_x[e])[1] or None if mode == "support" else None
        losses.append(score(net(fast, episodes.query_x[e], given)[0], episodes.query_y[e]))
    gradient = dict(zip(leaves, torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values())), strict=True))
    assert all(g.any() for name, g in gradient.items() if name.startswith("rate/"))
    for chunk in (len(episodes), 1, 2):
        result = learner.contribute(theta, {}, episodes, Context(0, chunk))
        close(dict(result.gradient), gradient)
        close(result.loss, torch.stack(losses).detach())


@pytest.mark.parametrize("query", [FEW, MANY])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("mode", ["transductive", "support", "running"])
@pytest.mark.parametrize("model", [STRIDED, POOLED, MLP], ids=lambda m: m.type)
def test_meta_gradient_is_that_of_nested_autograd(
    model: sections.Model, mode: str, steps: int, query: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner = learner_of(learners.MetaSGD(inner_lr=0.2, inner_steps=steps), model, mode)
    (theta, _), episodes = perturbed(learner), pictures(3, shot=2, query=query)
    check(learner, plain_net(model), theta, episodes, steps, mode)


def test_meta_gradient_of_regression(waves: Draw, plain_net: Any, perturbed: Perturbed) -> None:
    learner = learner_of(learners.MetaSGD(inner_lr=0.02), MLP, way=1)
    theta, _ = perturbed(learner)
    theta |= {name: 0.1 * tensor for name, tensor in theta.items() if name.startswith("rate/")}
    check(learner, plain_net(MLP), theta, waves(4), 1, "transductive")


@pytest.mark.parametrize("mode", ["transductive", "support", "running"])
def test_it_starts_as_maml(mode: str, pictures: Draw, perturbed: Perturbed) -> None:
    options = {"inner_lr": 0.2, "inner_steps": 2, "eval_steps": 3}
    meta_sgd, maml = (learner_of(kind(**options), STRIDED, mode) for kind in (learners.MetaSGD, learners.MAML))
    (theta, state), episodes = perturbed(maml), pictures(2, shot=2)
    # 0.2 in float32 is not 0.2.
    rates = {n: torch.full_like(t, 0.2, dtype=torch.float64) for n, t in meta_sgd.meta_parameters(0).items()}
    both = theta | {name: tensor for name, tensor in rates.items() if name not in theta}
    assert all((t == 0.2).all() for n, t in meta_sgd.meta_parameters(0).items() if n not in theta)
    ours, theirs = (
        meta_sgd.contribute(both, {}, episodes, Context(0, 2)),
        maml.contribute(theta, {}, episodes, Context(0, 2)),
    )
    close({name: ours.gradient[name] for name in theta}, dict(theirs.gradient))
    adapted = [
        lr.adapt(at, state, episodes.support_x[0], episodes.support_y[0], {})
        for lr, at in ((meta_sgd, both), (maml, theta))
    ]
    for mine, other in zip(*adapted, strict=True):
        close(meta_sgd.predict(mine, episodes.query_x[0]), maml.predict(other, episodes.query_x[0]))


def test_an_element_with_rate_zero_stays(pictures: Draw, perturbed: Perturbed) -> None:
    learner = learner_of(learners.MetaSGD(), STRIDED)
    (theta, state), episodes = perturbed(learner), pictures(1)
    theta["rate/conv.1"] = torch.zeros_like(theta["rate/conv.1"])
    theta["rate/conv.1"][0, 0, 0, 0] = -0.5
    adapted = learner.adapt(theta, state, episodes.support_x[0], episodes.support_y[0], {})[-1]["parameters"]
    moved = adapted["conv.1"] != theta["conv.1"]
    assert moved.sum() == 1 and moved[0, 0, 0, 0]
    assert set(adapted) == {name for name in theta if not name.startswith("rate/")}
