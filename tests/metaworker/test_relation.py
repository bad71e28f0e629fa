"""Relation Networks against the paper's formula, one pair of a query and a class after another, in float64."""

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
from cluster.errors import ConfigError
from cluster.flat import Tensors
from metaworker.learners import build_learner
from metaworker.learners.base import Context, Learner

CHANNELS, SIDE = 3, 16
"""Of the encoder's maps, and of pictures: two pools leave 4 × 4 maps, the head's two blocks 1 × 1."""
RELATION = learners.Relation(channels=6)
MODEL = sections.Conv4Pool(channels=CHANNELS, pools=2)
FEW, MANY = 2, 5
"""Query samples a class of the 5: below and above where episodes are scored one by one instead of vectorised."""

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(mode: str = "transductive", way: int | None = None, side: int = SIDE, pools: int = 2) -> Learner:
    model = sections.Conv4Pool.model_validate(MODEL.model_dump() | {"batch_norm": mode, "pools": pools})
    return build_learner(RunConfig(learner=RELATION, model=model), (1, side, side), way=way)


def plain_score(theta: Mapping[str, Tensor], of_class: Tensor, of_query: Tensor) -> Tensor:
    """g_φ of a class's map and a query's, before the sigmoid."""
    x = torch.cat([of_class, of_query])[None]
    for block in range(2):
        x = F.conv2d(x, theta[f"head/conv.{block}"], padding=1)
        x = F.group_norm(x, 1, theta[f"head/scale.{block}"], theta[f"head/shift.{block}"], eps=1e-5)
        x = F.max_pool2d(F.relu(x), 2)
    x = F.relu(F.linear(x.flatten(), theta["head/weight.0"], theta["head/bias.0"]))
    return F.linear(x, theta["head/weight.1"], theta["head/bias.1"])[0]


def plain_scores(
    net: Any, theta: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor, query_x: Tensor, given: Any, way: int
) -> tuple[Tensor, Tensors]:
    """Scores of every query and class, and the batch statistics."""
    embedded, seen = net(theta, torch.cat([support_x, query_x]), given)
    maps = embedded.view(len(embedded), CHANNELS, SIDE // 4, SIDE // 4)
    support, queries = maps[: len(support_x)], maps[len(support_x) :]
    classes = [support[support_y == k].sum(0) for k in range(way)]
    rows = [torch.stack([plain_score(theta, of_class, query) for of_class in classes]) for query in queries]
    return torch.stack(rows), seen if given is None else given


@pytest.mark.parametrize("query", [FEW, MANY])
@pytest.mark.parametrize("mode", ["transductive", "support"])
def test_meta_gradient_is_that_of_plain_autograd(
    mode: str, query: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(mode), plain_net(MODEL)
    (theta, state), episodes = perturbed(learner), pictures(2, shot=2, query=query, side=SIDE)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    losses, metrics, seen = [], [], []
    for e in range(len(episodes)):
        support_x, support_y, query_y = episodes.support_x[e], episodes.support_y[e], episodes.query_y[e]
        given = net(leaves, support_x)[1] if mode == "support" else None
        scores, statistics = plain_scores(net, leaves, support_x, support_y, episodes.query_x[e], given, way=5)
        losses.append(F.mse_loss(scores.sigmoid(), F.one_hot(query_y, 5).double()))
        metrics.append((scores.argmax(1) == query_y).double().mean())
        seen.append(statistics)
    gradient = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    for chunk in (2, 1):
        result = learner.contribute(theta, state, episodes, Context(0, chunk))
        close(dict(result.gradient), dict(zip(leaves, gradient, strict=True)))
        close(result.loss, torch.stack(losses).detach())
        close(result.metric, torch.stack(metrics))
        close(dict(result.proposals), {name: torch.stack([s[name].detach() for s in seen]) for name in seen[0]})


@pytest.mark.parametrize("way", [5, 2])
@pytest.mark.parametrize("mode", ["transductive", "support", "running"])
def test_evaluation_scores_any_number_of_classes(
    mode: str, way: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(mode, way), plain_net(MODEL)
    (theta, state), episodes = perturbed(learner), pictures(1, way=way, shot=3, side=SIDE)
    support_x, support_y, query_x = episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    given = {"support": net(theta, support_x)[1], "running": state, "transductive": None}[mode]
    expected, _ = plain_scores(net, theta, support_x, support_y, query_x, given, way)
    assert expected.std(0).min() > 1e-4, "a dead net would agree with anything"
    (task,) = learner.adapt(theta, state, support_x, support_y, {})
    close(learner.predict(task, query_x), expected)


def test_parameters_do_not_depend_on_the_number_of_classes() -> None:
    few, many = (learner_of(way=way).meta_parameters(0) for way in (2, 20))
    assert {name: tensor.shape for name, tensor in few.items()} == {name: t.shape for name, t in many.items()}


def test_small_maps_are_not_pooled_away(pictures: Draw) -> None:
    learner = learner_of(side=8)
    theta, episodes = learner.meta_parameters(0), pictures(1, side=8).to(torch.device("cpu"))
    assert theta["head/weight.0"].shape == (8, RELATION.channels)
    (task,) = learner.adapt(theta, {}, episodes.support_x[0], episodes.support_y[0], {})
    assert learner.predict(task, episodes.query_x[0]).shape == (15, 5)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (sections.Conv4Strided(), "model.type must be conv4_pool .* for learner relation, got conv4_strided"),
        (sections.MLP(), "model.type must be conv4_pool .* for learner relation, got mlp"),
        (sections.Conv4Pool(), "model.pools must .* got 4, which leaves 1 × 1: use 2"),
    ],
    ids=lambda value: getattr(value, "type", ""),
)
def test_models_without_a_map_are_refused_in_one_line(model: sections.Model, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        build_learner(RunConfig(learner=RELATION, model=model), (1, 28, 28))
    assert "\n" not in str(refusal.value)
