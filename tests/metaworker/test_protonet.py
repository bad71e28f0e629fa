"""Prototypical Networks against their equation, one episode and one class after another, in float64."""

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

MODELS = (sections.Conv4Strided(channels=4), sections.Conv4Pool(channels=4), sections.MLP(hidden=(8,)))
MODES = ("transductive", "support", "running")
FEW, MANY = 2, 5
"""Query samples a class of the 5: below and above where episodes are scored one by one instead of vectorised."""

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(model: sections.Model, mode: str = "transductive", way: int | None = None) -> Learner:
    model = model if isinstance(model, sections.MLP) else model.model_copy(update={"batch_norm": mode})
    return build_learner(RunConfig(learner=learners.ProtoNet(), model=model), (1, 12, 12), way=way)


def plain_logits(
    net: Any, theta: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor, query_x: Tensor, given: Any, way: int
) -> tuple[Tensor, Tensors]:
    """−‖f(q) − c‖² for every query and class, and the batch statistics that normalised them."""
    embedded, seen = net(theta, torch.cat([support_x, query_x]), given)
    support, queries = embedded[: len(support_x)], embedded[len(support_x) :]
    centres = [support[support_y == c].mean(0) for c in range(way)]
    rows = [torch.stack([-((query - centre) ** 2).sum() for centre in centres]) for query in queries]
    return torch.stack(rows), seen if given is None else given


@pytest.mark.parametrize("query", [FEW, MANY])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.type)
def test_meta_gradient_is_that_of_plain_autograd(
    model: sections.Model, mode: str, query: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(model, mode), plain_net(model)
    (theta, state), episodes = perturbed(learner), pictures(3, shot=2, query=query)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    losses, metrics, seen = [], [], []
    for e in range(len(episodes)):
        support_x, support_y = episodes.support_x[e], episodes.support_y[e]
        given = net(leaves, support_x)[1] if mode == "support" and not isinstance(model, sections.MLP) else None
        logits, statistics = plain_logits(net, leaves, support_x, support_y, episodes.query_x[e], given, way=5)
        losses.append(F.cross_entropy(logits, episodes.query_y[e]))
        metrics.append((logits.argmax(1) == episodes.query_y[e]).double().mean())
        seen.append(statistics)
    gradient = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    for chunk in (3, 1, 2):
        result = learner.contribute(theta, state, episodes, Context(0, chunk))
        close(dict(result.gradient), dict(zip(leaves, gradient, strict=True)))
        close(result.loss, torch.stack(losses).detach())
        close(result.metric, torch.stack(metrics))
        close(dict(result.proposals), {name: torch.stack([s[name].detach() for s in seen]) for name in seen[0]})


@pytest.mark.parametrize("way", [5, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.type)
def test_evaluation_compares_distances_in_each_batch_norm_mode(
    model: sections.Model, mode: str, way: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(model, mode, way), plain_net(model)
    (theta, state), episodes = perturbed(learner), pictures(1, way=way, shot=2)
    support_x, support_y, query_x = episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    given = {"support": net(theta, support_x)[1], "running": state, "transductive": None}[mode]
    expected, _ = plain_logits(net, theta, support_x, support_y, query_x, given or None, way)
    assert expected.softmax(1).std(0).min() > 1e-3, "a dead net would agree with anything"
    (task,) = learner.adapt(theta, state, support_x, support_y, {})
    logits = learner.predict(task, query_x)
    close(logits.softmax(1), expected.softmax(1))
    # Of the distances themselves the part that all classes share may be missing.
    close(logits - logits[:, :1], expected - expected[:, :1])


@pytest.mark.parametrize("mode", MODES)
def test_renaming_classes_renames_the_outputs(mode: str, pictures: Draw, perturbed: Perturbed) -> None:
    learner = learner_of(MODELS[0], mode)
    (theta, state), episodes = perturbed(learner), pictures(2, shot=2)
    # Class c is called names[c] now.
    names = torch.tensor([3, 0, 4, 1, 2])
    renamed = replace(episodes, support_y=names[episodes.support_y], query_y=names[episodes.query_y])
    outputs = []
    for given in (episodes, renamed):
        (task,) = learner.adapt(theta, state, given.support_x[0], given.support_y[0], {})
        outputs.append(learner.predict(task, given.query_x[0]))
    close(outputs[1], outputs[0][:, names.argsort()])
    first, second = (learner.contribute(theta, state, given, Context(0, 2)) for given in (episodes, renamed))
    close(dict(second.gradient), dict(first.gradient))
    close((second.loss, second.metric), (first.loss, first.metric))


@pytest.mark.parametrize("mode", MODES)
def test_order_of_support_samples_does_not_matter(mode: str, pictures: Draw, perturbed: Perturbed) -> None:
    learner = learner_of(MODELS[1], mode)
    (theta, state), episodes = perturbed(learner), pictures(2, shot=2)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    shuffled = replace(episodes, support_x=episodes.support_x[:, order], support_y=episodes.support_y[:, order])
    outputs = []
    for given in (episodes, shuffled):
        (task,) = learner.adapt(theta, state, given.support_x[0], given.support_y[0], {})
        outputs.append(learner.predict(task, given.query_x[0]))
    close(outputs[1], outputs[0])
    first, second = (learner.contribute(theta, state, given, Context(0, 2)) for given in (episodes, shuffled))
    close(dict(second.gradient), dict(first.gradient))


def test_classes_of_different_sizes_have_prototypes_of_their_own_samples(pictures: Draw, perturbed: Perturbed) -> None:
    learner = learner_of(sections.MLP(hidden=()), way=2)
    (theta, _), episodes = perturbed(learner), pictures(1, way=3)
    weight, bias = theta["weight.0"], theta["bias.0"]
    embedded = episodes.support_x[0].flatten(1) @ weight.T + bias
    query = episodes.query_x[0].flatten(1) @ weight.T + bias
    centres = torch.stack([embedded[0], (embedded[1] + embedded[2]) / 2])
    (task,) = learner.adapt(theta, {}, episodes.support_x[0], torch.tensor([0, 1, 1]), {})
    logits = learner.predict(task, episodes.query_x[0])
    distances = (query[:, None] - centres).square().sum(2)
    close(logits[:, 0] - logits[:, 1], distances[:, 1] - distances[:, 0])
