"""Matching Networks against the paper's equations, one sample after another, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
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
from metaworker.learners.matching import CosineAttention

MODELS = (sections.Conv4Strided(channels=4), sections.Conv4Pool(channels=4), sections.MLP(hidden=(8,)))
SCALE = 7.0
READS = 3
FEW, MANY = 2, 5
"""Query samples a class of the 5: below and above where episodes are scored one by one instead of vectorised."""
SIMPLE, FULL = learners.Matching(scale=SCALE), learners.Matching(scale=SCALE, full_context=True, reads=READS)
both = pytest.mark.parametrize("learner", [SIMPLE, FULL], ids=["simple", "full_context"])

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(
    learner: learners.Matching, model: sections.Model, mode: str = "transductive", way: int | None = None
) -> Learner:
    model = model if isinstance(model, sections.MLP) else model.model_copy(update={"batch_norm": mode})
    return build_learner(RunConfig(learner=learner, model=model), (1, 12, 12), way=way)


def lstm_step(theta: Mapping[str, Tensor], name: str, x: Tensor, recurrent: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(h, c) from the input, what is fed back (of any width) and the cell."""
    gates = F.linear(torch.cat([x, recurrent]), theta[f"head/{name}.weight"], theta[f"head/{name}.bias"])
    i, f, g, o = gates.view(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def plain_g(theta: Mapping[str, Tensor], embedded: list[Tensor]) -> list[Tensor]:
    """g(x_i) = →h_i + ←h_i + g'(x_i)."""
    zeros = torch.zeros_like(embedded[0])
    found = [e.clone() for e in embedded]
    for name, order in (("forward", range(len(embedded))), ("backward", range(len(embedded) - 1, -1, -1))):
        h, c = zeros, zeros
        for i in order:
            h, c = lstm_step(theta, name, embedded[i], h, c)
            found[i] = found[i] + h
    return found


def plain_f(theta: Mapping[str, Tensor], embedded: Tensor, g: list[Tensor], reads: int) -> Tensor:
    """h_K of the attention LSTM, for one query."""
    hidden, c = torch.zeros_like(embedded), torch.zeros_like(embedded)
    for _ in range(reads):
        h = hidden + embedded
        weights = torch.stack([h.dot(x) for x in g]).exp()
        read = sum(w * x for w, x in zip(weights / weights.sum(), g, strict=True))
        hidden, c = lstm_step(theta, "attention", embedded, torch.cat([h, read]), c)
    return hidden + embedded


def plain_probabilities(
    learner: learners.Matching, net: Any, theta: Mapping[str, Tensor], given: Any, way: int, *data: Tensor
) -> tuple[Tensor, Tensors]:
    """p(y = k | q) for every query and class, and the batch statistics."""
    support_x, support_y, query_x = data
    embedded, seen = net(theta, torch.cat([support_x, query_x]), given)
    support, queries = list(embedded[: len(support_x)]), list(embedded[len(support_x) :])
    if learner.full_context:
        support = plain_g(theta, support)
        queries = [plain_f(theta, query, support, learner.reads) for query in queries]
    rows = []
    for query in queries:
        # ε as in the learner: near 0 the cosine is no longer that of the paper.
        cosines = [query.dot(x) / ((query.dot(query) + 1e-5) * (x.dot(x) + 1e-5)).sqrt() for x in support]
        attention = (learner.scale * torch.stack(cosines)).softmax(0)
        rows.append(torch.stack([attention[support_y == k].sum() for k in range(way)]))
    return torch.stack(rows), seen if given is None else given


@pytest.mark.parametrize("query", [FEW, MANY])
@pytest.mark.parametrize("mode", ["transductive", "support"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.type)
@both
def test_meta_gradient_is_that_of_plain_autograd(
    learner: learners.Matching,
    model: sections.Model,
    mode: str,
    query: int,
    pictures: Draw,
    plain_net: Any,
    perturbed: Perturbed,
) -> None:
    ours, net = learner_of(learner, model, mode), plain_net(model)
    (theta, state), episodes = perturbed(ours), pictures(2, shot=2, query=query)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    losses, metrics = [], []
    for e in range(len(episodes)):
        data = episodes.support_x[e], episodes.support_y[e], episodes.query_x[e]
        given = net(leaves, data[0])[1] if mode == "support" and not isinstance(model, sections.MLP) else None
        p, _ = plain_probabilities(learner, net, leaves, given, 5, *data)
        losses.append(F.nll_loss(p.log(), episodes.query_y[e]))
        metrics.append((p.argmax(1) == episodes.query_y[e]).double().mean())
    gradient = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    for chunk in (2, 1):
        result = ours.contribute(theta, state, episodes, Context(0, chunk))
        close(dict(result.gradient), dict(zip(leaves, gradient, strict=True)))
        close(result.loss, torch.stack(losses).detach())
        close(result.metric, torch.stack(metrics))


@pytest.mark.parametrize("way", [5, 3])
@pytest.mark.parametrize("mode", ["transductive", "support", "running"])
@both
def test_evaluation_gives_the_logarithms_of_the_probabilities(
    learner: learners.Matching, mode: str, way: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    model = MODELS[0]
    ours, net = learner_of(learner, model, mode, way), plain_net(model)
    (theta, state), episodes = perturbed(ours), pictures(1, way=way, shot=2)
    data = episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    given = {"support": net(theta, data[0])[1], "running": state, "transductive": None}[mode]
    expected, _ = plain_probabilities(learner, net, theta, given, way, *data)
    assert expected.std(0).min() > 1e-4, "a dead net would agree with anything"
    (task,) = ours.adapt(theta, state, data[0], data[1], {})
    p = ours.predict(task, data[2]).exp()
    close(p, expected)
    close(p.sum(1), torch.ones(len(p), dtype=torch.float64))


@both
def test_what_order_does_is_declared(learner: learners.Matching, pictures: Draw, perturbed: Perturbed) -> None:
    ours = learner_of(learner, MODELS[2])
    assert (ours.ordered, ours.names_matter) == (learner.full_context, False)
    (theta, state), episodes = perturbed(ours), pictures(2, shot=2)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    shuffled = replace(episodes, support_x=episodes.support_x[:, order], support_y=episodes.support_y[:, order])
    usual, other = (ours.contribute(theta, state, given, Context(0, 2)).loss for given in (episodes, shuffled))
    assert torch.allclose(usual, other, rtol=1e-10) == (not learner.full_context)


def test_full_context_changes_what_a_query_is(pictures: Draw, perturbed: Perturbed) -> None:
    """With context, a class's odds against another depend on the samples of the rest."""
    episodes = pictures(1, way=3)
    x, y, queries = episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    other = torch.cat([x[:2], 2 * x[2:] + 1])
    for learner in (SIMPLE, FULL):
        ours = learner_of(learner, MODELS[2], way=3)
        at = perturbed(ours)
        first, second = (ours.predict(ours.adapt(*at, given, y, {})[0], queries) for given in (x, other))
        difference = ((first[:, 0] - first[:, 1]) - (second[:, 0] - second[:, 1])).abs()
        assert (difference.max() > 1e-3) if learner.full_context else (difference.max() < 1e-10)


def test_improbable_classes_keep_finite_logits_and_gradients() -> None:
    head = CosineAttention(way=2, scale=500.0, context=None)
    support = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    logits = head.logits({}, support, torch.tensor([0, 1]), torch.tensor([[3.0, 0.0]]))
    close(logits, torch.tensor([[0.0, -1000.0]]), 0.1)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([1])), support)
    assert gradient.isfinite().all()


def test_embeddings_of_zeros_keep_finite_gradients() -> None:
    head = CosineAttention(way=2, scale=SCALE, context=None)
    support = torch.zeros(2, 3, requires_grad=True)
    logits = head.logits({}, support, torch.tensor([0, 1]), torch.zeros(1, 3))
    close(logits.exp(), torch.full((1, 2), 0.5), 1e-6)
    (gradient,) = torch.autograd.grad(logits.sum(), support)
    assert gradient.isfinite().all()


def test_votes_of_a_class_add_up() -> None:
    """Three samples of a class at one place get three votes."""
    head = CosineAttention(way=2, scale=SCALE, context=None)
    support, query = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).expand(4, 4), torch.ones(1, 4)
    close(head.logits({}, support, torch.tensor([0, 1, 1, 1]), query).exp(), torch.tensor([[0.25, 0.75]]), 1e-6)
