"""MAML++ against its equations by nested autograd in float64, its annealing, and MAML, which it holds as a case."""

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
from metaworker.learners.mamlpp import MAMLpp

STRIDED, POOLED = sections.Conv4Strided(channels=4), sections.Conv4Pool(channels=4)
MLP = sections.MLP(hidden=(8, 6))
MODES = ("transductive", "support", "running")
STEPS = 3
FEW, MANY = 2, 5
"""Query samples a class of the 5: below and above where episodes are scored one by one instead of vectorised."""

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(
    model: sections.Model,
    mode: str = "transductive",
    way: int = 5,
    section: type[Any] = learners.MAMLpp,
    **options: Any,
) -> Any:
    model = model if isinstance(model, sections.MLP) else model.model_copy(update={"batch_norm": mode})
    config = RunConfig(
        learner=section(**({"inner_lr": 0.2, "inner_steps": STEPS} | options)),
        model=model,
        episode=sections.EpisodeShape(way=way, shot=1, query=FEW),
        data=sections.GlyphsData() if way > 1 else sections.SinusoidData(),
    )
    return build_learner(config, (1, 12, 12) if way > 1 else (1,))


def at_step(theta: Mapping[str, Tensor], fast: Mapping[str, Tensor], step: int) -> Tensors:
    """The network with a step's batch-norm parameters; the last step's serve all that follow."""
    step = min(step, STEPS - 1)
    return dict(fast) | {n: t[step] for n, t in theta.items() if n.split(".")[0] in ("scale", "shift")}


def plain_trajectory(
    net: Any, theta: Mapping[str, Tensor], score: Any, x: Tensor, y: Tensor, steps: int, first_order: bool, given: Any
) -> list[Tensors]:
    """What is normalised and weighted at each step, from the paper's equations."""
    fast = {n: t for n, t in theta.items() if "rate" not in n and n.split(".")[0] not in ("scale", "shift")}
    trajectory = [at_step(theta, fast, 0)]
    for step in range(steps):
        loss = score(net(at_step(theta, fast, step), x, given)[0], y)
        found = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order, retain_graph=True)
        rate = {name: theta[f"rate/{name}"][min(step, STEPS - 1)] for name in fast}
        fast = {name: t - rate[name] * g for (name, t), g in zip(fast.items(), found, strict=True)}
        trajectory.append(at_step(theta, fast, step))
    return trajectory


def check(
    learner: MAMLpp,
    net: Any,
    theta: Tensors,
    episodes: Episodes,
    version: int,
    weights: list[float],
    first_order: bool = False,
    mode: str = "transductive",
) -> None:
    score = F.mse_loss if episodes.way == 1 else F.cross_entropy
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    losses, hits, seen = [], [], []
    for e in range(len(episodes)):
        x, y = episodes.support_x[e], episodes.support_y[e]
        trajectory = plain_trajectory(net, leaves, score, x, y, STEPS, first_order, None)
        loss = torch.zeros((), dtype=torch.float64)
        for weight, parameters in zip(weights, trajectory[1:], strict=True):
            of_support = net(parameters, x)[1] or None if mode == "support" else None
            outputs, of_query = net(parameters, episodes.query_x[e], of_support)
            loss = loss + weight * score(outputs, episodes.query_y[e])
        hits.append((outputs.argmax(1) == episodes.query_y[e]).double().mean() if episodes.way > 1 else None)
        losses.append(loss)
        seen.append(of_support if mode == "support" else of_query)
    gradient = torch.autograd.grad(
        torch.stack(losses).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    for chunk in (len(episodes), 1, 2):
        result = learner.contribute(theta, {}, episodes, Context(version, chunk))
        close(dict(result.gradient), dict(zip(leaves, gradient, strict=True)))
        close(result.loss, torch.stack(losses).detach())
        if episodes.way > 1:
            close(result.metric, torch.stack(hits))
        if result.proposals:
            close(dict(result.proposals), {n: torch.stack([s[n].detach() for s in seen]) for n in seen[0]})


@pytest.mark.parametrize("query", [FEW, MANY])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", [STRIDED, POOLED, MLP], ids=lambda m: m.type)
def test_meta_gradient_is_that_of_nested_autograd(
    model: sections.Model, mode: str, query: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner = learner_of(model, mode, anneal_versions=10)
    (theta, _), episodes = perturbed(learner), pictures(3, shot=2, query=query)
    check(learner, plain_net(model), theta, episodes, 4, [0.2, 0.2, 0.6], mode=mode)


@pytest.mark.parametrize(
    ("version", "weights", "first_order"),
    [(0, [1 / 3, 1 / 3, 1 / 3], True), (6, [0.4 / 3, 0.4 / 3, 2.2 / 3], False), (10, [0, 0, 1], False)],
)
def test_weights_and_derivatives_are_annealed(
    version: int, weights: list[float], first_order: bool, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner = learner_of(STRIDED, anneal_versions=10, first_order_versions=6)
    theta, _ = perturbed(learner)
    check(learner, plain_net(STRIDED), theta, pictures(2, shot=2), version, weights, first_order)


def test_meta_gradient_of_regression(waves: Draw, plain_net: Any, perturbed: Perturbed) -> None:
    learner = learner_of(MLP, way=1, anneal_versions=10)
    theta, _ = perturbed(learner)
    theta |= {name: 0.05 * tensor for name, tensor in theta.items() if name.startswith("rate/")}
    check(learner, plain_net(MLP), theta, waves(4), 5, [1 / 6, 1 / 6, 4 / 6])


def test_weights_start_equal_and_end_on_the_last_step() -> None:
    learner = learner_of(STRIDED, anneal_versions=100)
    weights = [learner.weights(version) for version in range(0, 130, 10)]
    for step in (1, 2):
        of_step = [w.get(step, 0) for w in weights]
        assert of_step == sorted(of_step, reverse=True)
    assert all(sum(w.values()) == pytest.approx(1) for w in weights)
    assert weights[0] == {step: pytest.approx(1 / 3) for step in (1, 2, 3)}
    assert all(w == {3: 1} for w in weights[10:])
    assert learner_of(STRIDED, anneal_versions=0).weights(0) == {3: 1}


def test_kind_depends_on_the_derivatives_that_are_dropped() -> None:
    assert learner_of(STRIDED).kind == "exact"
    assert learner_of(STRIDED, first_order_versions=1).kind == "surrogate"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", [STRIDED, POOLED, MLP], ids=lambda m: m.type)
def test_evaluation_goes_on_with_the_last_step(
    model: sections.Model, mode: str, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(model, mode, eval_steps=5), plain_net(model)
    (theta, state), episodes = perturbed(learner), pictures(1, shot=2)
    theta |= {name: 0.3 * tensor for name, tensor in theta.items() if name.startswith("rate/")}
    x, y, query_x = episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    kept = state or None if mode == "running" else None
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    trajectory = plain_trajectory(net, leaves, F.cross_entropy, x, y, 5, True, kept)
    expected = [net(p, query_x, (net(p, x)[1] or None) if mode == "support" else kept)[0].detach() for p in trajectory]
    assert expected[-1].std(0).min() > 1e-3, "a dead net would agree with anything"
    close([learner.predict(task, query_x) for task in learner.adapt(theta, state, x, y, {})], expected)


@pytest.mark.parametrize("first_order", [False, True])
def test_on_a_net_without_batch_norm_it_starts_as_maml(first_order: bool, pictures: Draw, perturbed: Perturbed) -> None:
    ours = learner_of(MLP, anneal_versions=0, first_order_versions=int(first_order))
    maml = learner_of(MLP, section=learners.MAML, first_order=first_order)
    theta, _ = perturbed(maml)
    started = ours.meta_parameters(0)
    assert [n for n in started if n not in theta] == [f"rate/{name}" for name in theta]
    # 0.2 in float32 is not 0.2.
    both = theta | {n: torch.full((STEPS,), 0.2, dtype=torch.float64) for n in started if n not in theta}
    episodes = pictures(2, shot=2)
    mine, other = (lr.contribute(at, {}, episodes, Context(0, 2)) for lr, at in ((ours, both), (maml, theta)))
    close({name: mine.gradient[name] for name in theta}, dict(other.gradient))
    close((mine.loss, mine.metric), (other.loss, other.metric))
    assert all(mine.gradient[f"rate/{name}"].any() for name in theta)
