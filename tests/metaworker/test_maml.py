"""MAML against its equation by nested autograd in float64, against ``higher``, and what its mathematics makes equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import higher
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.episodes.sinusoid import SinusoidSource
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.learners import build_learner
from metaworker.learners.base import Context, Learner
from metaworker.shard_worker import evaluate_episodes

STRIDED, POOLED = sections.Conv4Strided(channels=4), sections.Conv4Pool(channels=4)
MLP = sections.MLP(hidden=(8, 8))
FEW, MANY = 2, 5
"""Query samples a class of the 5: below and above where episodes are scored one by one instead of vectorised."""

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(model: sections.Model, way: int = 5, **options: Any) -> Learner:
    config = RunConfig(
        learner=learners.MAML(**({"inner_lr": 0.2} | options)),
        model=model,
        episode=sections.EpisodeShape(way=way, shot=1, query=FEW),
        data=sections.GlyphsData() if way > 1 else sections.SinusoidData(),
    )
    return build_learner(config, (1, 12, 12) if way > 1 else (1,))


@dataclass(frozen=True)
class Expected:
    gradient: Tensors
    loss: Tensor
    metric: Tensor
    proposals: Tensors


def nested_autograd(
    net: Any, theta: Mapping[str, Tensor], episodes: Episodes, lr: float, steps: int, first_order: bool, mode: str
) -> Expected:
    """MAML's meta-gradient as it stands in the paper, one episode after another."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    score = F.mse_loss if episodes.way == 1 else F.cross_entropy
    losses, metrics, seen, total = [], [], [], [torch.zeros_like(t) for t in leaves.values()]
    for e in range(len(episodes)):
        fast = dict(leaves)
        for _ in range(steps):
            loss = score(net(fast, episodes.support_x[e])[0], episodes.support_y[e])
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order)
            fast = {name: tensor - lr * g for (name, tensor), g in zip(fast.items(), gradients, strict=True)}
        of_support = net(fast, episodes.support_x[e])[1]
        outputs, of_query = net(fast, episodes.query_x[e], of_support if mode == "support" else None)
        loss = score(outputs, episodes.query_y[e])
        total = [t + g for t, g in zip(total, torch.autograd.grad(loss, list(leaves.values())), strict=True)]
        hits = (outputs.argmax(1) == episodes.query_y[e]).double().mean() if episodes.way > 1 else loss
        losses.append(loss.detach())
        metrics.append(hits.detach())
        seen.append(of_support if mode == "support" else of_query)
    proposals = {name: torch.stack([s[name].detach() for s in seen]) for name in seen[0]}
    return Expected(dict(zip(leaves, total, strict=True)), torch.stack(losses), torch.stack(metrics), proposals)


def check(learner: Learner, theta: Tensors, episodes: Episodes, expected: Expected) -> None:
    for chunk in (len(episodes), 1, 2):
        result = learner.contribute(theta, {}, episodes, Context(0, chunk))
        close(result.gradient, expected.gradient)
        close(result.loss, expected.loss)
        close(result.metric, expected.metric)
        close(result.proposals, expected.proposals)


@pytest.mark.parametrize("query", [FEW, MANY])
@pytest.mark.parametrize(("steps", "first_order"), [(1, False), (3, False), (2, True)])
@pytest.mark.parametrize("model", [STRIDED, POOLED], ids=lambda m: m.type)
def test_meta_gradient_is_that_of_nested_autograd(
    model: sections.Model,
    steps: int,
    first_order: bool,
    query: int,
    pictures: Draw,
    plain_net: Any,
    perturbed: Perturbed,
) -> None:
    learner = learner_of(model, inner_steps=steps, first_order=first_order)
    (theta, _), episodes = perturbed(learner), pictures(3, query=query)
    expected = nested_autograd(plain_net(model), theta, episodes, 0.2, steps, first_order, "transductive")
    check(learner, theta, episodes, expected)


@pytest.mark.parametrize("query", [FEW, MANY])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("mode", ["support", "running"])
@pytest.mark.parametrize("model", [STRIDED, POOLED], ids=lambda m: m.type)
def test_meta_gradient_by_batch_norm_mode(
    model: sections.Conv4Strided | sections.Conv4Pool,
    mode: Any,
    first_order: bool,
    query: int,
    pictures: Draw,
    plain_net: Any,
    perturbed: Perturbed,
) -> None:
    learner = learner_of(model.model_copy(update={"batch_norm": mode}), inner_steps=2, first_order=first_order)
    (theta, _), episodes = perturbed(learner), pictures(3, shot=2, query=query)
    expected = nested_autograd(plain_net(model), theta, episodes, 0.2, 2, first_order, mode)
    check(learner, theta, episodes, expected)


@pytest.mark.parametrize("query", [9, 30])
@pytest.mark.parametrize(("steps", "first_order"), [(1, False), (3, False), (3, True)])
def test_meta_gradient_of_regression(
    steps: int, first_order: bool, query: int, waves: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner = learner_of(MLP, way=1, inner_lr=0.02, inner_steps=steps, first_order=first_order)
    (theta, _), episodes = perturbed(learner), waves(5, query=query)
    expected = nested_autograd(plain_net(MLP), theta, episodes, 0.02, steps, first_order, "transductive")
    check(learner, theta, episodes, expected)


class Conv4Module(nn.Module):
    """The strided Conv-4 as anyone would write it in PyTorch."""

    def __init__(self, channels: int, way: int) -> None:
        super().__init__()
        self.conv = nn.ModuleList(
            nn.Conv2d(1 if block == 0 else channels, channels, 3, stride=2, padding=1, bias=False) for block in range(4)
        )
        self.norm = nn.ModuleList(nn.BatchNorm2d(channels, track_running_stats=False) for _ in range(4))
        self.head = nn.Linear(channels, way)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.conv, self.norm, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("steps", "first_order"), [(1, False), (3, False), (1, True), (3, True)])
def test_meta_gradient_is_that_of_higher(steps: int, first_order: bool, pictures: Draw, perturbed: Perturbed) -> None:
    learner = learner_of(STRIDED, inner_steps=steps, first_order=first_order)
    (theta, _), episodes = perturbed(learner), pictures(3)
    module = Conv4Module(channels=4, way=5).double()
    ours = {f"conv.{b}.weight": f"conv.{b}" for b in range(4)} | {f"norm.{b}.weight": f"scale.{b}" for b in range(4)}
    ours |= {f"norm.{b}.bias": f"shift.{b}" for b in range(4)} | {n: n for n in ("head.weight", "head.bias")}
    module.load_state_dict({theirs: theta[name] for theirs, name in ours.items()})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    total = [torch.zeros_like(p) for p in module.parameters()]
    for e in range(len(episodes)):
        with higher.innerloop_ctx(
            module, optimizer, copy_initial_weights=False, track_higher_grads=not first_order
        ) as (fast, inner):
            for _ in range(steps):
                inner.step(F.cross_entropy(fast(episodes.support_x[e]), episodes.support_y[e]))
            loss = F.cross_entropy(fast(episodes.query_x[e]), episodes.query_y[e])
            # Untracked, higher cuts the graph at each step: what is left is the gradient at the adapted parameters.
            at = fast.parameters() if first_order else fast.parameters(time=0)
            total = [t + g for t, g in zip(total, torch.autograd.grad(loss, list(at)), strict=True)]
    gradient = learner.contribute(theta, {}, episodes, Context(0, 3)).gradient
    assert set(ours.values()) == set(gradient)
    close({ours[n]: g for (n, _), g in zip(module.named_parameters(), total, strict=True)}, dict(gradient))


@pytest.mark.parametrize("mode", ["transductive", "support", "running"])
@pytest.mark.parametrize("model", [STRIDED, POOLED], ids=lambda m: m.type)
def test_evaluation_is_gradient_descent_in_each_batch_norm_mode(
    model: sections.Conv4Strided | sections.Conv4Pool, mode: Any, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner = learner_of(model.model_copy(update={"batch_norm": mode}), eval_steps=3)
    (theta, state), episodes, net = perturbed(learner), pictures(1, shot=2), plain_net(model)
    support_x, support_y, query_x = episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    kept = state if mode == "running" else None
    fast = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    expected = []
    for step in range(4):
        given = net(fast, support_x)[1] if mode == "support" else kept
        expected.append(net(fast, query_x, given)[0].detach())
        if step < 3:
            loss = F.cross_entropy(net(fast, support_x, kept)[0], support_y)
            gradients = torch.autograd.grad(loss, list(fast.values()))
            fast = {
                n: (t - 0.2 * g).detach().requires_grad_() for (n, t), g in zip(fast.items(), gradients, strict=True)
            }
    assert all(outputs.std(0).min() > 1e-3 for outputs in expected), "a dead net would agree with anything"
    models = learner.adapt(theta, state, support_x, support_y, {})
    close([learner.predict(task, query_x) for task in models], expected)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("mode", ["transductive", "support", "running"])
def test_order_of_support_samples_does_not_matter(
    mode: Any, first_order: bool, pictures: Draw, perturbed: Perturbed
) -> None:
    learner = learner_of(
        STRIDED.model_copy(update={"batch_norm": mode}), inner_steps=2, eval_steps=3, first_order=first_order
    )
    (theta, state), episodes = perturbed(learner), pictures(2, shot=2)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    shuffled = replace(episodes, support_x=episodes.support_x[:, order], support_y=episodes.support_y[:, order])
    results = [learner.contribute(theta, state, given, Context(0, 2)) for given in (episodes, shuffled)]
    close(dict(results[1].gradient), dict(results[0].gradient))
    outputs = []
    for given in (episodes, shuffled):
        adapted = learner.adapt(theta, state, given.support_x[0], given.support_y[0], {})[-1]
        outputs.append(learner.predict(adapted, episodes.query_x[0]))
    close(outputs[1], outputs[0])


def test_renamed_classes_and_heads_rename_the_outputs(pictures: Draw, perturbed: Perturbed) -> None:
    learner = learner_of(POOLED, eval_steps=3)
    (theta, _), episodes = perturbed(learner), pictures(1, shot=2)
    # Class c is called names[c] now, and its row of the head moves there.
    names = torch.tensor([3, 0, 4, 1, 2])
    rows = names.argsort()
    renamed = theta | {name: theta[name][rows] for name in ("head.weight", "head.bias")}
    before = learner.adapt(theta, {}, episodes.support_x[0], episodes.support_y[0], {})
    after = learner.adapt(renamed, {}, episodes.support_x[0], names[episodes.support_y[0]], {})
    for old, new in zip(before, after, strict=True):
        close(learner.predict(new, episodes.query_x[0]), learner.predict(old, episodes.query_x[0])[:, rows])


def test_meta_training_on_sinusoids_learns_to_adapt() -> None:
    steps, lr = 3, 0.003
    learner = learner_of(sections.MLP(), way=1, inner_lr=lr, inner_steps=steps, eval_steps=steps)
    source = SinusoidSource(sections.SinusoidData(), seed=0)
    unseen = source.sample("val", 0, 200, way=1, shot=10, query=10)
    theta = learner.meta_parameters(0)
    optimizer = torch.optim.Adam(theta.values(), lr=1e-2)
    start = evaluate_episodes(learner, theta, {}, unseen, regression=True)[1].mean(0)
    for version in range(150):
        episodes = source.sample("train", version * 25, 25, way=1, shot=10, query=10)
        result = learner.contribute(theta, {}, episodes, Context(version, 25))
        for name, tensor in theta.items():
            tensor.grad = result.gradient[name] / result.episodes
        optimizer.step()
    end = evaluate_episodes(learner, theta, {}, unseen, regression=True)[1].mean(0)
    assert end[-1] < 0.5 * start.min()
    assert (np.diff(end) < 0).all() and end[-1] < 0.75 * end[0], "adaptation itself must be what was learned"
