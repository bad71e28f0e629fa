"""Triplet loss against its definition, one triplet after another, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from metaworker.learners.triplet import NearestNeighbour

MODELS = (sections.Conv4Strided(channels=4), sections.Conv4Pool(channels=4), sections.MLP(hidden=(8,)))
FEW, MANY = 2, 5
"""Query samples a class of the 5: below and above where episodes are scored one by one instead of vectorised."""
LEARNERS = [
    learners.Triplet(margin=0.3, mining="hard"),
    learners.Triplet(margin=0.3, mining="all"),
    learners.Triplet(margin=0.3, mining="hard", normalise=True),
]
each_learner = pytest.mark.parametrize("section", LEARNERS, ids=lambda s: f"{s.mining}-{s.normalise}")

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(
    section: learners.Triplet, model: sections.Model, mode: str = "transductive", way: int | None = None
) -> Learner:
    model = model if isinstance(model, sections.MLP) else model.model_copy(update={"batch_norm": mode})
    return build_learner(RunConfig(learner=section, model=model), (1, 12, 12), way=way)


def plain_distance(section: learners.Triplet, a: Tensor, b: Tensor) -> Tensor:
    """‖a − b‖² of embeddings, or of their directions."""
    if section.normalise:
        a, b = (v / (v.dot(v) + 1e-5).sqrt() for v in (a, b))
    return ((a - b) ** 2).sum()


def plain_loss(section: learners.Triplet, distances: list[list[Tensor]], query_y: Tensor, support_y: Tensor) -> Tensor:
    """The hinge, from what its triplets are."""
    per_query, violated = [], []
    for row, label in zip(distances, query_y, strict=True):
        positive = [d for d, y in zip(row, support_y, strict=True) if y == label]
        negative = [d for d, y in zip(row, support_y, strict=True) if y != label]
        per_query.append((max(positive) - min(negative) + section.margin).clamp_min(0))
        hinges = [p - n + section.margin for p in positive for n in negative]
        violated += [hinge for hinge in hinges if hinge > 0]
    return torch.stack(violated if section.mining == "all" else per_query).mean()


@pytest.mark.parametrize("query", [FEW, MANY])
@pytest.mark.parametrize("mode", ["transductive", "support"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.type)
@each_learner
def test_meta_gradient_is_that_of_plain_autograd(
    section: learners.Triplet,
    model: sections.Model,
    mode: str,
    query: int,
    pictures: Draw,
    plain_net: Any,
    perturbed: Perturbed,
) -> None:
    learner, net = learner_of(section, model, mode), plain_net(model)
    (theta, state), episodes = perturbed(learner), pictures(2, shot=2, query=query)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    losses, metrics = [], []
    for e in range(len(episodes)):
        support_x, support_y, query_y = episodes.support_x[e], episodes.support_y[e], episodes.query_y[e]
        given = net(leaves, support_x)[1] if mode == "support" and not isinstance(model, sections.MLP) else None
        embedded, _ = net(leaves, torch.cat([support_x, episodes.query_x[e]]), given)
        support, queries = embedded[: len(support_x)], embedded[len(support_x) :]
        distances = [[plain_distance(section, q, s) for s in support] for q in queries]
        losses.append(plain_loss(section, distances, query_y, support_y))
        nearest = torch.stack([support_y[int(torch.stack(row).argmin())] for row in distances])
        metrics.append((nearest == query_y).double().mean())
    gradient = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    for chunk in (2, 1):
        result = learner.contribute(theta, state, episodes, Context(0, chunk))
        close(dict(result.gradient), dict(zip(leaves, gradient, strict=True)))
        close(result.loss, torch.stack(losses).detach())
        close(result.metric, torch.stack(metrics))


@pytest.mark.parametrize("way", [5, 3])
@pytest.mark.parametrize("mode", ["transductive", "support", "running"])
@each_learner
def test_a_class_is_as_near_as_its_nearest_sample(
    section: learners.Triplet, mode: str, way: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(section, MODELS[0], mode, way), plain_net(MODELS[0])
    (theta, state), episodes = perturbed(learner), pictures(1, way=way, shot=3)
    support_x, support_y, query_x = episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    given = {"support": net(theta, support_x)[1], "running": state, "transductive": None}[mode]
    embedded, _ = net(theta, torch.cat([support_x, query_x]), given)
    support, queries = embedded[: len(support_x)], embedded[len(support_x) :]
    expected = [
        torch.stack([-min(plain_distance(section, q, s) for s in support[support_y == k]) for k in range(way)])
        for q in queries
    ]
    (task,) = learner.adapt(theta, state, support_x, support_y, {})
    logits = learner.predict(task, query_x)
    assert logits.std(0).min() > 1e-4, "a dead net would agree with anything"
    close(logits, torch.stack(expected))


@pytest.mark.parametrize("mining", ["hard", "all"])
def test_queries_that_keep_the_margin_ask_for_nothing(mining: Any) -> None:
    head = NearestNeighbour(way=2, margin=1.0, normalise=False, mining=mining)
    support = torch.tensor([[0.0], [3.0]], requires_grad=True)
    # The first query keeps the margin, the second is 1 from its own class and 4 from the other, the third is wrong.
    query, labels = torch.tensor([[0.0], [2.0], [2.5]]), torch.tensor([0, 1, 0])
    loss, _ = head.loss({}, support, torch.tensor([0, 1]), query[:2], labels[:2], None)
    assert loss == 0
    assert not torch.autograd.grad(loss, support)[0].any()
    loss, logits = head.loss({}, support, torch.tensor([0, 1]), query, labels, None)
    violation = 2.5**2 - 0.5**2 + 1
    close(loss.item(), violation / (3 if mining == "hard" else 1), 1e-6)
    assert logits.argmax(1).tolist() == [0, 1, 1]


def test_embeddings_of_zeros_keep_finite_gradients() -> None:
    head = NearestNeighbour(way=2, margin=1.0, normalise=True, mining="hard")
    support = torch.zeros(2, 3, requires_grad=True)
    loss, _ = head.loss({}, support, torch.tensor([0, 1]), torch.zeros(2, 3), torch.tensor([0, 1]), None)
    assert torch.autograd.grad(loss, support)[0].isfinite().all()
