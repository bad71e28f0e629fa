"""Reptile against PyTorch's own optimizers on plain modules in float64, and its minibatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.learners import build_learner
from metaworker.learners.base import Context, Learner
from metaworker.learners.reptile import minibatches

STRIDED, POOLED = sections.Conv4Strided(channels=4), sections.Conv4Pool(channels=4)
MLP = sections.MLP(hidden=(8, 8))
RATES = {"sgd": 0.1, "adam": 1e-3}
"""Small for Adam: where a gradient is zero but for rounding, Adam magnifies that by 1e8 times the step size."""
MODES = ("transductive", "support", "running")

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(model: sections.Model, optimizer: Any, way: int = 5, **options: Any) -> Learner:
    reptile = learners.Reptile(**({"inner_optimizer": optimizer, "inner_lr": RATES[optimizer]} | options))
    data = sections.GlyphsData() if way > 1 else sections.SinusoidData()
    config = RunConfig(learner=reptile, model=model, episode=sections.EpisodeShape(way=way), data=data)
    return build_learner(config, (1, 12, 12) if way > 1 else (1,))


def trained(
    net: Any, theta: Tensors, x: Tensor, y: Tensor, rows: Sequence[Tensor], optimizer: str, lr: float, state: Any = None
) -> list[Tensors]:
    """θ before and after each of PyTorch's optimizer steps on the samples ``rows``."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    score = F.cross_entropy if y.ndim == 1 else F.mse_loss
    adam = torch.optim.Adam(leaves.values(), lr=lr, betas=(0.0, 0.999), eps=1e-8, foreach=False)
    steps = adam if optimizer == "adam" else torch.optim.SGD(leaves.values(), lr=lr, foreach=False)
    trajectory = [dict(theta)]
    for batch in rows:
        steps.zero_grad()
        score(net(leaves, x[batch], state)[0], y[batch]).backward()
        steps.step()
        trajectory.append({name: leaf.detach().clone() for name, leaf in leaves.items()})
    return trajectory


def check_contribution(
    learner: Learner, theta: Tensors, net: Any, episodes: Episodes, orders: Tensor, optimizer: str, lr: float
) -> None:
    total = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    losses, metrics, seen = [], [], []
    for e in range(len(episodes)):
        x = torch.cat([episodes.support_x[e], episodes.query_x[e]])
        y = torch.cat([episodes.support_y[e], episodes.query_y[e]])
        rows = orders[e]
        before, adapted = trained(net, theta, x, y, rows, optimizer, lr)[-2:]
        total = {name: total[name] + theta[name] - adapted[name] for name in theta}
        outputs, statistics = net(before, x[rows[-1]])
        labels = y[rows[-1]]
        losses.append(F.mse_loss(outputs, labels) if episodes.way == 1 else F.cross_entropy(outputs, labels))
        metrics.append(losses[-1] if episodes.way == 1 else (outputs.argmax(1) == labels).double().mean())
        seen.append(statistics)
    for chunk in (len(episodes), 1, 2):
        result = learner.contribute(theta, {}, episodes, Context(0, chunk))
        close(result.gradient, total)
        close((result.loss, result.metric), (torch.stack(losses), torch.stack(metrics)))
        close(result.proposals, {name: torch.stack([s[name] for s in seen]) for name in seen[0]})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("model", [STRIDED, POOLED], ids=lambda m: m.type)
def test_meta_gradient_is_the_way_of_full_batch_training(
    model: sections.Conv4Strided | sections.Conv4Pool,
    optimizer: str,
    mode: str,
    pictures: Draw,
    plain_net: Any,
    perturbed: Perturbed,
) -> None:
    chosen = model.model_copy(update={"batch_norm": mode})
    learner = learner_of(chosen, optimizer, inner_steps=3, inner_batch=20)
    everything = torch.arange(20).expand(3, 3, 20)
    check_contribution(
        learner, perturbed(learner)[0], plain_net(model), pictures(3), everything, optimizer, RATES[optimizer]
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_meta_gradient_is_the_way_of_minibatch_training(
    optimizer: str, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner = learner_of(STRIDED, optimizer, inner_steps=5, inner_batch=8)
    episodes = pictures(3)
    rows = minibatches(0, "train", episodes.ids, 20, 8, 5)
    check_contribution(learner, perturbed(learner)[0], plain_net(STRIDED), episodes, rows, optimizer, RATES[optimizer])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_meta_gradient_of_regression(optimizer: str, waves: Draw, plain_net: Any, perturbed: Perturbed) -> None:
    learner = learner_of(MLP, optimizer, way=1, inner_steps=4, inner_batch=5, inner_lr=0.01)
    episodes = waves(5)
    rows = minibatches(0, "train", episodes.ids, 15, 5, 4)
    check_contribution(learner, perturbed(learner)[0], plain_net(MLP), episodes, rows, optimizer, 0.01)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_evaluation_trains_on_the_support_set_in_each_batch_norm_mode(
    optimizer: str, mode: str, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    model = STRIDED.model_copy(update={"batch_norm": mode})
    learner = learner_of(model, optimizer, eval_steps=5, eval_inner_batch=4)
    (theta, state), episodes, net = perturbed(learner), pictures(1, shot=2), plain_net(model)
    support_x, support_y, query_x = episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    kept = state if mode == "running" else None
    rows = minibatches(0, "adapt", [0], 10, 4, 5)[0]
    expected = []
    for point in trained(net, theta, support_x, support_y, rows, optimizer, RATES[optimizer], kept):
        given = net(point, support_x)[1] if mode == "support" else kept
        expected.append(net(point, query_x, given)[0])
    assert all(outputs.std(0).min() > 1e-3 for outputs in expected), "a dead net would agree with anything"
    models = learner.adapt(theta, state, support_x, support_y, {})
    close([learner.predict(task, query_x) for task in models], expected)


def test_second_moments_start_anew_for_each_task(pictures: Draw, perturbed: Perturbed) -> None:
    learner = learner_of(STRIDED, "adam", inner_steps=4, inner_batch=10)
    (theta, _), episodes = perturbed(learner), pictures(2)
    together = learner.contribute(theta, {}, episodes, Context(0, 1)).gradient
    apart = [learner.contribute(theta, {}, episodes.chunk(e, e + 1), Context(0, 1)).gradient for e in range(2)]
    close(dict(together), {name: apart[0][name] + apart[1][name] for name in theta})


@given(samples=st.integers(1, 40), batch=st.integers(1, 50), steps=st.integers(1, 30))
def test_minibatches_pass_over_the_samples_without_replacement(samples: int, batch: int, steps: int) -> None:
    ids = [3, 2**40]
    found = minibatches(0, "train", ids, samples, batch, steps)
    size = min(batch, samples)
    assert found.shape == (2, steps, size)
    a_pass = samples // size
    for rows in found:
        for start in range(0, steps, a_pass):
            used = rows[start : start + a_pass].flatten().tolist()
            assert len(set(used)) == len(used) and set(used) <= set(range(samples))
    assert torch.equal(found, minibatches(0, "train", ids, samples, batch, steps + 7)[:, :steps])
    assert torch.equal(found[1:], minibatches(0, "train", ids[1:], samples, batch, steps))


def test_minibatches_differ_between_passes_episodes_splits_and_seeds() -> None:
    found = minibatches(0, "train", [0, 1], 20, 20, 3)
    others = [minibatches(seed, split, [0], 20, 20, 1)[0, 0] for seed, split in ((0, "adapt"), (1, "train"))]
    orders = [torch.arange(20), *found.flatten(0, 1), *others]
    assert len({tuple(order.tolist()) for order in orders}) == 1 + 6 + 2


def test_no_class_has_a_place_of_its_own_in_the_minibatches() -> None:
    """Samples lie class by class: an order that all tasks shared would push the head's bias the same way each time."""
    labels = torch.arange(5).repeat_interleave(10)
    last = labels[minibatches(0, "train", list(range(2000)), 50, 10, 5)[:, -1]]
    share = torch.stack([(last == label).double().mean() for label in range(5)])
    assert (share - 0.2).abs().max() < 0.01
