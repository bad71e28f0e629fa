"""iMAML against the exact implicit gradient by a dense solve, against finite differences, and its memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.episodes.types import Episodes
from cluster.flat import FlatSpec, Tensors
from metaworker.inner_loop import gradient_descent, last, proximal_descent
from metaworker.learners import build_learner
from metaworker.learners.base import Context, Learner, ShardResult
from metaworker.learners.imaml import conjugate_gradient

STRIDED, POOLED = sections.Conv4Strided(channels=2), sections.Conv4Pool(channels=2)
MLP = sections.MLP(hidden=(3,))
MODES = ("transductive", "support", "running")
STRENGTH = 2.0

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(model: sections.Model, mode: str = "transductive", way: int = 5, **options: Any) -> Learner:
    model = model if isinstance(model, sections.MLP) else model.model_copy(update={"batch_norm": mode})
    config = RunConfig(
        learner=learners.IMAML(**({"inner_lr": 0.1, "inner_steps": 4, "proximal_strength": STRENGTH} | options)),
        model=model,
        episode=sections.EpisodeShape(way=way, shot=1, query=2),
        data=sections.GlyphsData() if way > 1 else sections.SinusoidData(),
    )
    return build_learner(config, (1, 12, 12) if way > 1 else (1,))


def plain_descent(
    net: Any, theta: Mapping[str, Tensor], x: Tensor, y: Tensor, steps: int, lr: float, given: Any = None
) -> list[Tensors]:
    """SGD of PyTorch on the inner problem."""
    score = F.mse_loss if y.is_floating_point() else F.cross_entropy
    phi = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    optimizer = torch.optim.SGD(phi.values(), lr=lr)
    trajectory = [{name: tensor.detach().clone() for name, tensor in phi.items()}]
    for _ in range(steps):
        optimizer.zero_grad()
        distance = torch.stack([(phi[name] - theta[name]).square().sum() for name in phi]).sum()
        (score(net(phi, x, given)[0], y) + STRENGTH / 2 * distance).backward()
        optimizer.step()
        trajectory.append({name: tensor.detach().clone() for name, tensor in phi.items()})
    return trajectory


def dense_implicit_gradient(
    net: Any, theta: Tensors, episodes: Episodes, e: int, steps: int, lr: float, mode: str, damping: float = 0.0
) -> tuple[Tensors, Tensor]:
    """(I + H/(λ + δ))⁻¹ ∇L_query at the inner solution, with the whole Hessian of a task, and the query loss."""
    score = F.mse_loss if episodes.way == 1 else F.cross_entropy
    x, y, query_x, query_y = (
        t[e] for t in (episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y)
    )
    phi = plain_descent(net, theta, x, y, steps, lr)[-1]
    layout = FlatSpec.of(phi)

    def support_loss(flat: Tensor) -> Tensor:
        return score(net(layout.unflatten(flat), x)[0], y)

    def query_loss(flat: Tensor) -> Tensor:
        parameters = layout.unflatten(flat)
        given = net(parameters, x)[1] or None if mode == "support" else None
        return score(net(parameters, query_x, given)[0], query_y)

    at = layout.flatten(phi)
    hessian = torch.autograd.functional.hessian(support_loss, at)
    (target,) = torch.autograd.grad(query_loss(leaf := at.clone().requires_grad_()), leaf)
    system = torch.eye(layout.size, dtype=torch.float64) + hessian / (STRENGTH + damping)
    return layout.unflatten(torch.linalg.solve(system, target)), query_loss(at)


@pytest.mark.parametrize("query", [2, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", [STRIDED, POOLED], ids=lambda m: m.type)
def test_solved_to_the_end_it_is_the_implicit_gradient(
    model: sections.Model, mode: str, query: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(model, mode, cg_steps=60), plain_net(model)
    (theta, _), episodes = perturbed(learner), pictures(2, shot=2, query=query)
    found = [dense_implicit_gradient(net, theta, episodes, e, 4, 0.1, mode) for e in range(2)]
    expected = {name: sum(gradient[name] for gradient, _ in found) for name in theta}
    for chunk in (2, 1):
        result = learner.contribute(theta, {}, episodes, Context(0, chunk))
        close(dict(result.gradient), expected, 1e-6)
        close(result.loss, torch.stack([loss for _, loss in found]))


@pytest.mark.parametrize("damping", [0.0, 1.5])
def test_implicit_gradient_of_regression(damping: float, waves: Draw, plain_net: Any, perturbed: Perturbed) -> None:
    learner, net = learner_of(MLP, way=1, inner_lr=0.01, cg_steps=40, cg_damping=damping), plain_net(MLP)
    (theta, _), episodes = perturbed(learner), waves(3)
    found = [dense_implicit_gradient(net, theta, episodes, e, 4, 0.01, "transductive", damping) for e in range(3)]
    result = learner.contribute(theta, {}, episodes, Context(0, 3))
    close(dict(result.gradient), {name: sum(gradient[name] for gradient, _ in found) for name in theta}, 1e-6)
    close(result.loss, torch.stack([loss for _, loss in found]))


def test_gradient_is_that_of_finite_differences_where_the_inner_problem_is_solved(
    waves: Draw, perturbed: Perturbed
) -> None:
    def slopes(inner_steps: int) -> tuple[Tensor, Tensor]:
        """Of the query loss along a direction: by the learner, and by finite differences."""
        learner = learner_of(MLP, way=1, inner_lr=0.01, inner_steps=inner_steps, cg_steps=40)
        (theta, _), episodes = perturbed(learner), waves(2)
        generator = torch.Generator().manual_seed(1)
        along = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in theta.items()}
        gradient = learner.contribute(theta, {}, episodes, Context(0, 2)).gradient
        ends = [
            learner.contribute({n: theta[n] + d * along[n] for n in theta}, {}, episodes, Context(0, 2)).loss.sum()
            for d in (1e-6, -1e-6)
        ]
        return torch.stack([(gradient[n] * along[n]).sum() for n in theta]).sum(), (ends[0] - ends[1]) / 2e-6

    assert_close(*slopes(600), rtol=1e-5, atol=1e-7)
    biased, true = slopes(3)
    assert abs(biased - true) > 1e-2 * abs(true), "which is why it is called a surrogate"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", [STRIDED, MLP], ids=lambda m: m.type)
def test_evaluation_is_descent_on_the_inner_problem(
    model: sections.Model, mode: str, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(model, mode, eval_steps=3), plain_net(model)
    (theta, state), episodes = perturbed(learner), pictures(1, shot=2)
    x, y, query_x = episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    kept = state or None if mode == "running" else None
    trajectory = plain_descent(net, theta, x, y, 3, 0.1, kept)
    expected = [net(p, query_x, (net(p, x)[1] or None) if mode == "support" else kept)[0] for p in trajectory]
    close([learner.predict(task, query_x) for task in learner.adapt(theta, state, x, y, {})], expected)


# -------------------------------------------------------------------------------------------------------------- memory


@dataclass(eq=False)
class Kept:
    """A tensor that some graph keeps for its backward pass."""

    tensor: Tensor


def most_kept(work: Callable[[], object]) -> int:
    """Bytes that graphs keep for their backward passes at most at once."""
    held, most = 0, 0

    def keep(tensor: Tensor) -> Kept:
        nonlocal held, most
        kept, size = Kept(tensor), tensor.numel() * tensor.element_size()
        weakref.finalize(kept, drop, size)
        held += size
        most = max(most, held)
        return kept

    def drop(size: int) -> None:
        nonlocal held
        held -= size

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        work()
    return most


def test_memory_does_not_grow_with_inner_steps(pictures: Draw, plain_net: Any) -> None:
    episodes, net = pictures(1), plain_net(STRIDED)
    theta = {name: tensor.double() for name, tensor in learner_of(STRIDED).meta_parameters(0).items()}
    support, query = (episodes.support_x[0], episodes.support_y[0]), (episodes.query_x[0], episodes.query_y[0])

    def implicit(steps: int) -> ShardResult:
        learner = learner_of(STRIDED, inner_steps=steps, cg_steps=2)
        return learner.contribute(theta, {}, episodes, Context(0, 1))

    def unrolled(steps: int) -> Tensor:
        """What MAML differentiates; its own learner runs under `torch.func`, where savings cannot be watched."""

        def gradient(parameters: Mapping[str, Tensor]) -> Tensors:
            loss = F.cross_entropy(net(parameters, support[0])[0], support[1])
            found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            return dict(zip(parameters, found, strict=True))

        leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
        adapted = last(gradient_descent(gradient, leaves, 0.01, steps, first_order=False))[0]
        return F.cross_entropy(net(adapted, query[0])[0], query[1])

    ours, theirs = ([most_kept(partial(way, steps)) for steps in (1, 5, 20)] for way in (implicit, unrolled))
    assert ours[0] > 0 and ours[0] == ours[1] == ours[2]
    assert theirs[1] > 2 * theirs[0] and theirs[2] > 3 * theirs[1]


# --------------------------------------------------------------------------------------------------- parts of the loop


def test_conjugate_gradient_solves_each_tasks_system() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    matrices = root @ root.mT + torch.eye(4, dtype=torch.float64)
    target = {n: torch.randn(3, *s, generator=generator, dtype=torch.float64) for n, s in (("b", (1,)), ("a", (3, 1)))}
    flat = torch.cat([target["b"], target["a"].flatten(1)], 1)

    def system(v: Tensors) -> Tensors:
        image = (matrices @ torch.cat([v["b"], v["a"].flatten(1)], 1)[:, :, None])[:, :, 0]
        return {"b": image[:, :1], "a": image[:, 1:].reshape(3, 3, 1)}

    for iterations in (4, 30):
        found = conjugate_gradient(system, target, iterations)
        expected = torch.linalg.solve(matrices, flat)
        close(torch.cat([found["b"], found["a"].flatten(1)], 1), expected, 1e-9)
    nothing = conjugate_gradient(system, {name: torch.zeros_like(t) for name, t in target.items()}, 3)
    assert not any(tensor.any() for tensor in nothing.values())


def test_one_iteration_is_a_step_of_the_best_length_along_the_target() -> None:
    found = conjugate_gradient(lambda v: {"w": 4 * v["w"]}, {"w": torch.tensor([[1.0, 2.0]])}, 1)
    close(found["w"], torch.tensor([[0.25, 0.5]]))


def test_proximal_descent_follows_its_closed_form() -> None:
    theta = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64).requires_grad_()}
    # loss ½ ‖φ‖²: each step takes φ a fixed share of the way to λ θ / (1 + λ).
    points = list(proximal_descent(lambda p: {"w": p["w"]}, theta, step_size=0.1, steps=6, strength=3.0))
    goal = 0.75 * theta["w"].detach()
    close([p["w"] for p in points], [goal + 0.6**t * (theta["w"].detach() - goal) for t in range(7)])
    assert not any(p["w"].requires_grad for p in points)
