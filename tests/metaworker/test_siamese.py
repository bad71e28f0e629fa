"""Siamese networks against their equation, one pair after another, in float64."""

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
from metaworker.learners.siamese import WeightedL1

MODELS = (sections.Conv4Strided(channels=4), sections.Conv4Pool(channels=4), sections.MLP(hidden=(8,)))
UNITS = 4
FEW, MANY = 2, 5
"""Query samples a class of the 5: below and above where episodes are scored one by one instead of vectorised."""

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(model: sections.Model, mode: str = "transductive", way: int | None = None) -> Learner:
    model = model if isinstance(model, sections.MLP) else model.model_copy(update={"batch_norm": mode})
    return build_learner(RunConfig(learner=learners.Siamese(units=UNITS), model=model), (1, 12, 12), way=way)


def plain_pairs(
    net: Any, theta: Mapping[str, Tensor], support_x: Tensor, query_x: Tensor, given: Any
) -> list[list[Tensor]]:
    """Σ_j α_j |h_j(x) − h_j(x')| + β by query and support sample."""
    embedded, _ = net(theta, torch.cat([support_x, query_x]), given)
    h = F.linear(embedded, theta["head/weight"], theta["head/bias"]).sigmoid()
    support, queries = h[: len(support_x)], h[len(support_x) :]
    alpha, beta = theta["head/alpha"], theta["head/beta"]
    return [[sum(alpha[j] * (q[j] - s[j]).abs() for j in range(UNITS)) + beta[0] for s in support] for q in queries]


@pytest.mark.parametrize("query", [FEW, MANY])
@pytest.mark.parametrize("mode", ["transductive", "support"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.type)
def test_meta_gradient_is_that_of_plain_autograd(
    model: sections.Model, mode: str, query: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(model, mode), plain_net(model)
    (theta, state), episodes = perturbed(learner), pictures(2, shot=2, query=query)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    losses, metrics = [], []
    for e in range(len(episodes)):
        support_x, support_y, query_y = episodes.support_x[e], episodes.support_y[e], episodes.query_y[e]
        given = net(leaves, support_x)[1] if mode == "support" and not isinstance(model, sections.MLP) else None
        pairs = plain_pairs(net, leaves, support_x, episodes.query_x[e], given)
        kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
        right = 0
        for row, label in zip(pairs, query_y, strict=True):
            for score, other in zip(row, support_y, strict=True):
                kinds[int(label == other)].append(score)
            right += int(support_y[int(torch.stack(row).argmax())] == label)
        different, same = (torch.stack(kind) for kind in kinds)
        of_two = F.binary_cross_entropy_with_logits(different, torch.zeros_like(different))
        of_one = F.binary_cross_entropy_with_logits(same, torch.ones_like(same))
        losses.append((of_one + of_two) / 2)
        metrics.append(right / len(query_y))
    gradient = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    for chunk in (2, 1):
        result = learner.contribute(theta, state, episodes, Context(0, chunk))
        close(dict(result.gradient), dict(zip(leaves, gradient, strict=True)))
        close(result.loss, torch.stack(losses).detach())
        close(result.metric, torch.tensor(metrics, dtype=torch.float64))


@pytest.mark.parametrize("way", [5, 3])
@pytest.mark.parametrize("mode", ["transductive", "support", "running"])
def test_a_class_scores_as_its_best_pair(
    mode: str, way: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(MODELS[0], mode, way), plain_net(MODELS[0])
    (theta, state), episodes = perturbed(learner), pictures(1, way=way, shot=3)
    support_x, support_y, query_x = episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    given = {"support": net(theta, support_x)[1], "running": state, "transductive": None}[mode]
    pairs = plain_pairs(net, theta, support_x, query_x, given)
    expected = [[max(s for s, y in zip(row, support_y, strict=True) if y == k) for k in range(way)] for row in pairs]
    (task,) = learner.adapt(theta, state, support_x, support_y, {})
    logits = learner.predict(task, query_x)
    assert logits.std(0).min() > 1e-4, "a dead net would agree with anything"
    close(logits, torch.stack([torch.stack(row) for row in expected]))


def test_both_kinds_of_pairs_weigh_the_same() -> None:
    """Pairs of two classes, however many, do not outweigh those of one: indifferent odds are the best constant."""
    head = WeightedL1(way=9, size=3, units=UNITS)
    parameters = head.parameters(lambda name, shape: torch.zeros(shape))
    parameters["beta"] = torch.zeros(1, requires_grad=True)
    loss, _ = head.loss(parameters, torch.randn(9, 3), torch.arange(9), torch.randn(9, 3), torch.arange(9), None)
    (gradient,) = torch.autograd.grad(loss, parameters["beta"])
    close(loss.item(), torch.tensor(2.0).log().item(), 1e-6)
    close(gradient, torch.zeros(1), 1e-6)


def test_before_training_the_nearest_sample_is_the_most_similar() -> None:
    learner = learner_of(MODELS[2], way=3)
    theta = learner.meta_parameters(0)
    x = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    (task,) = learner.adapt(theta, {}, x, torch.arange(3), {})
    logits = learner.predict(task, x)
    assert logits.argmax(1).tolist() == [0, 1, 2]
    close(logits.diagonal(), theta["head/beta"].expand(3), 1e-5)


def test_the_number_of_units_is_configured() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in learner_of(MODELS[2]).meta_parameters(0).items()}
    assert shapes["head/weight"] == (UNITS, 64)
    assert shapes["head/alpha"] == shapes["head/bias"] == (UNITS,)
