"""R2D2 against ridge regression by its normal equations, one episode after another, in float64."""

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
from metaworker.learners.ridge import RidgeRegression

MODELS = (sections.Conv4Strided(channels=4), sections.Conv4Pool(channels=4), sections.MLP(hidden=(8,)))
SHOTS = (1, 4)
"""5 support samples and 20: more and fewer than the 4 channels of the embedding and the bias."""

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(model: sections.Model, way: int | None = None, **options: float) -> Learner:
    return build_learner(RunConfig(learner=learners.Ridge(**options), model=model), (1, 12, 12), way=way)


def plain_logits(parameters: Mapping[str, Tensor], support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
    """(XᵀX + λ I) W = Xᵀ Y, in as many unknowns a class as the embedding has numbers, and a bias."""
    regularisation, scale, shift = (parameters[f"head/{name}"] for name in ("log_lambda", "scale", "shift"))
    x = torch.cat([support, torch.ones(len(support), 1, dtype=torch.float64)], 1)
    normal = x.T @ x + torch.exp(regularisation) * torch.eye(x.shape[1], dtype=torch.float64)
    columns = [torch.linalg.inv(normal) @ x.T @ (labels == c).double() for c in range(way)]
    return torch.stack([scale * (query @ w[:-1] + w[-1]) + shift for w in columns], 1)


@pytest.mark.parametrize("shot", SHOTS)
@pytest.mark.parametrize("query", [2, 5])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.type)
def test_meta_gradient_is_that_of_plain_autograd(
    model: sections.Model, query: int, shot: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(model), plain_net(model)
    (theta, state), episodes = perturbed(learner), pictures(2, shot=shot, query=query)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    losses = []
    for e in range(len(episodes)):
        embedded, _ = net(leaves, torch.cat([episodes.support_x[e], episodes.query_x[e]]))
        support, queries = embedded[: 5 * shot], embedded[5 * shot :]
        logits = plain_logits(leaves, support, episodes.support_y[e], queries, way=5)
        losses.append(F.cross_entropy(logits, episodes.query_y[e]))
    gradient = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    assert gradient[list(leaves).index("head/log_lambda")].abs().item() > 1e-4
    result = learner.contribute(theta, state, episodes, Context(0, 2))
    close(dict(result.gradient), dict(zip(leaves, gradient, strict=True)), 1e-8)
    close(result.loss, torch.stack(losses).detach())


@pytest.mark.parametrize("way", [5, 3])
def test_evaluation_solves_for_any_number_of_classes(
    way: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(MODELS[2], way), plain_net(MODELS[2])
    (theta, state), episodes = perturbed(learner), pictures(1, way=way, shot=2)
    embedded, _ = net(theta, torch.cat([episodes.support_x[0], episodes.query_x[0]]))
    (task,) = learner.adapt(theta, state, episodes.support_x[0], episodes.support_y[0], {})
    expected = plain_logits(theta, embedded[: 2 * way], episodes.support_y[0], embedded[2 * way :], way)
    assert expected.std(0).min() > 1e-3
    close(learner.predict(task, episodes.query_x[0]), expected)


def test_little_regularisation_fits_the_support_set(pictures: Draw) -> None:
    learner = learner_of(sections.MLP(hidden=()), regularisation=1e-8, scale=1.0)
    episodes = pictures(1, shot=2)
    theta = {name: tensor.double() for name, tensor in learner.meta_parameters(0).items()}
    (task,) = learner.adapt(theta, {}, episodes.support_x[0], episodes.support_y[0], {})
    fitted = learner.predict(task, episodes.support_x[0])
    close(fitted, F.one_hot(episodes.support_y[0], 5).double(), 1e-5)


def test_the_configured_penalty_and_scale_are_where_learning_starts() -> None:
    theta = learner_of(MODELS[2], regularisation=0.25, scale=3.0).meta_parameters(0)
    assert_close(theta["head/log_lambda"].exp(), torch.tensor([0.25]))
    assert theta["head/scale"].item() == 3.0 and theta["head/shift"].item() == 0.0


def test_many_support_samples_keep_their_digits_in_float32() -> None:
    """With more of them than coordinates, Woodbury's system is all but singular."""
    generator = torch.Generator().manual_seed(0)
    support, query = (10 * torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (100, 20))
    labels, head = torch.arange(20).repeat(5), RidgeRegression(20, 0.1, 1.0)
    parameters = head.parameters(lambda name, shape: torch.zeros(shape))
    exact = head.logits({n: t.double() for n, t in parameters.items()}, support, labels, query)
    single = head.logits(parameters, support.float(), labels, query.float())
    assert (single - exact).norm() < 1e-4 * exact.norm()
