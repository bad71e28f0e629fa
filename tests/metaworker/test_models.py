"""Backbones against networks written plainly, and the layers' derivatives, vectorised or not, fused or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap
from torch.testing import assert_close

from cluster import keys
from cluster.config import sections
from cluster.errors import ConfigError
from cluster.flat import Tensors
from metaworker.learners.objective import CLASSIFICATION, REGRESSION, squared_error
from metaworker.models import build_backbone
from metaworker.models.base import Backbone
from metaworker.models.layers import batch_norm, conv3x3, cross_entropy, fused_batch_norm

STRIDED, POOLED = sections.Conv4Strided(channels=4), sections.Conv4Pool(channels=4)
MLP = sections.MLP(hidden=(8, 8))
MODELS = (STRIDED, POOLED, MLP)
every_model = pytest.mark.parametrize("model", MODELS, ids=lambda m: m.type)
both_convolutions = pytest.mark.parametrize("model", MODELS[:2], ids=lambda m: m.type)
with_and_without_head = pytest.mark.parametrize("outputs", [5, None])


def close(actual: Any, expected: Any, tolerance: float = 1e-11) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def initial(backbone: Backbone, seed: int = 0) -> Tensors:
    return backbone.parameters(lambda name, shape: keys.tensor_normals(seed, "init", name, shape))


def perturbed_parameters(backbone: Backbone) -> Tensors:
    return {name: t.double() + 0.1 * drawn(*t.shape, seed=i) for i, (name, t) in enumerate(initial(backbone).items())}


# ----------------------------------------------------------------------------------------------------------- backbones


@every_model
@with_and_without_head
def test_outputs_and_statistics_are_those_of_the_plain_net(
    model: sections.Model, outputs: int | None, plain_net: Any
) -> None:
    backbone = build_backbone(model, (1, 12, 12), outputs)
    theta, x = perturbed_parameters(backbone), drawn(7, 1, 12, 12, seed=50)
    expected, seen = plain_net(model)(theta, x)
    actual, used = backbone(theta, x, None)
    close(actual, expected)
    close(dict(used), seen)
    given = {name: 0.8 * statistic + 0.1 for name, statistic in seen.items()}
    expected, _ = plain_net(model)(theta, x, given or None)
    actual, used = backbone(theta, x, given or None)
    close(actual, expected)
    assert used.keys() == backbone.statistics().keys()
    assert all(torch.equal(used[name], given[name]) for name in used)


@every_model
@with_and_without_head
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 20), (2, 33, 17), (1, 1, 1)])
def test_output_size_is_the_width_of_the_output(
    model: sections.Model, outputs: int | None, shape: tuple[int, ...]
) -> None:
    backbone = build_backbone(model, shape, outputs)
    assert isinstance(backbone, Backbone)
    out, statistics = backbone(initial(backbone), torch.randn(2, *shape), None)
    assert out.shape == (2, backbone.output_size) and (outputs is None or backbone.output_size == outputs)
    running = backbone.statistics()
    assert {name: s.shape for name, s in statistics.items()} == {name: s.shape for name, s in running.items()}
    assert all((s == (0 if name.startswith("mean") else 1)).all() for name, s in running.items())


@pytest.mark.parametrize(
    ("model", "side", "embedding"),
    [
        (sections.Conv4Pool(), 28, 64),
        (sections.Conv4Pool(), 84, 1600),
        (sections.Conv4Strided(), 28, 64),
        (sections.Conv4Strided(), 84, 64),
        (MLP, 28, 64),
    ],
)
def test_embeddings_have_the_papers_widths(model: sections.Model, side: int, embedding: int) -> None:
    assert build_backbone(model, (1, side, side), None).output_size == embedding


def test_conv4_has_the_parameters_of_the_papers() -> None:
    shapes = {n: tuple(t.shape) for n, t in initial(build_backbone(sections.Conv4Strided(), (1, 28, 28), 5)).items()}
    expected: dict[str, tuple[int, ...]] = {}
    for block in range(4):
        expected |= {f"conv.{block}": (64, 64 if block else 1, 3, 3), f"scale.{block}": (64,), f"shift.{block}": (64,)}
    assert shapes == expected | {"head.weight": (5, 64), "head.bias": (5,)}
    assert list(shapes) == [*expected, "head.weight", "head.bias"]


def test_mlp_has_the_parameters_of_the_paper() -> None:
    shapes = {name: tuple(t.shape) for name, t in initial(build_backbone(sections.MLP(), (1,), 1)).items()}
    weights = {"weight.0": (40, 1), "weight.1": (40, 40), "weight.2": (1, 40)}
    assert shapes == weights | {"bias.0": (40,), "bias.1": (40,), "bias.2": (1,)}


def test_initial_weights_have_their_variance() -> None:
    conv = initial(build_backbone(sections.Conv4Strided(), (1, 28, 28), 64))
    mlp = initial(build_backbone(sections.MLP(hidden=(64, 64)), (1, 8, 8), 64))
    variances = {
        "conv.1": (conv["conv.1"], 2 / (9 * 64 + 9 * 64)),
        "head.weight": (conv["head.weight"], 2 / (64 + 64)),
        "weight.1": (mlp["weight.1"], 2 / 64),
        "weight.2": (mlp["weight.2"], 1 / 64),
    }
    for name, (weight, variance) in variances.items():
        assert_close(weight.var().item(), variance, rtol=0.08, atol=0, msg=name)
        assert abs(weight.mean().item()) < 4 * math.sqrt(variance / weight.numel())
    assert all((conv[f"scale.{b}"] == 1).all() and (conv[f"shift.{b}"] == 0).all() for b in range(4))
    assert not conv["head.bias"].any() and not any(mlp[f"bias.{layer}"].any() for layer in range(3))


@both_convolutions
@pytest.mark.parametrize("shape", [(1,), (28, 28)])
def test_convolutions_refuse_samples_that_are_no_images(model: sections.Model, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"model.type {model.type} takes images.*use mlp"):
        build_backbone(model, shape, 5)


def gradients(out: Tensor, theta: Mapping[str, Tensor], x: Tensor, graph: bool = False) -> list[Tensor]:
    direction = drawn(*out.shape, seed=9)
    return list(torch.autograd.grad((out * direction).sum(), [*theta.values(), x], create_graph=graph))


@every_model
@with_and_without_head
def test_fused_kernels_give_the_same_function_and_gradient(model: sections.Model, outputs: int | None) -> None:
    backbone = build_backbone(model, (1, 12, 12), outputs)
    theta = {name: tensor.requires_grad_() for name, tensor in perturbed_parameters(backbone).items()}
    x = drawn(7, 1, 12, 12, seed=50).requires_grad_()
    plain, statistics = backbone(theta, x, None)
    fused, of_fused = backbone.fused()(theta, x, None)
    close(fused, plain)
    close(dict(of_fused), {name: s.detach() for name, s in statistics.items()}, tolerance=1e-9)
    close(gradients(fused, theta, x), gradients(plain, theta, x))
    if statistics:
        given = {name: s.detach() + 0.1 for name, s in statistics.items()}
        close(backbone.fused()(theta, x, given)[0], backbone(theta, x, given)[0])


@every_model
@with_and_without_head
def test_stacked_tasks_are_tasks_one_by_one(model: sections.Model, outputs: int | None) -> None:
    backbone = build_backbone(model, (1, 12, 12), outputs)
    start = perturbed_parameters(backbone)
    theta = {name: torch.stack([tensor, 1.1 * tensor, tensor - 0.05]) for name, tensor in start.items()}
    theta = {name: tensor.requires_grad_() for name, tensor in theta.items()}
    x = drawn(3, 7, 1, 12, 12, seed=50).requires_grad_()
    stacked, observed = backbone.stacked(theta, x, observe=True)
    one_by_one = [backbone({name: tensor[task] for name, tensor in theta.items()}, x[task], None) for task in range(3)]
    close(stacked, torch.stack([out for out, _ in one_by_one]))
    expected = {name: torch.stack([used[name].detach() for _, used in one_by_one]) for name in observed}
    close(dict(observed), expected, tolerance=1e-9)
    assert set(observed) == set(backbone.statistics())
    close(gradients(stacked, theta, x), gradients(torch.stack([out for out, _ in one_by_one]), theta, x))
    assert backbone.stacked(theta, x, observe=False)[1] == {}


@every_model
@pytest.mark.parametrize("own_parameters", [True, False])
def test_second_derivatives_under_vmap_are_those_of_a_loop(
    model: sections.Model, own_parameters: bool, plain_net: Any
) -> None:
    """The trap that `metaworker.models.layers` tells of: fused kernels lose these under vmap."""
    backbone, net = build_backbone(model, (1, 12, 12), 5), plain_net(model)
    x = drawn(3, 7, 1, 12, 12, seed=50)
    theta = {
        name: torch.stack([t, 1.1 * t, t + 0.1]) if own_parameters else t
        for name, t in perturbed_parameters(backbone).items()
    }
    theta = {name: t.requires_grad_() for name, t in theta.items()}

    def length(forward: Callable[..., tuple[Tensor, Any]], parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        inner = torch.func.grad(lambda p: forward(p, x, None)[0].logsumexp(1).square().sum())(parameters)
        return sum(g.square().sum() for g in inner.values())

    dims = (dict.fromkeys(theta, 0 if own_parameters else None), 0)
    together = vmap(lambda p, x: length(backbone, p, x), in_dims=dims)(theta, x)
    alone = []
    for e in range(3):
        leaves = {name: t[e] if own_parameters else t for name, t in theta.items()}
        loss = net(leaves, x[e])[0].logsumexp(1).square().sum()
        inner = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        alone.append(sum(g.square().sum() for g in inner))
    close(together, torch.stack(alone))
    expected = torch.autograd.grad(torch.stack(alone).sum(), list(theta.values()))
    close(torch.autograd.grad(together.sum(), list(theta.values())), expected, tolerance=1e-9)


# -------------------------------------------------------------------------------------------------------------- layers


def leaf(*shape: int, seed: int) -> Tensor:
    return drawn(*shape, seed=seed).requires_grad_()


def positive(*shape: int, seed: int) -> Tensor:
    return drawn(*shape, seed=seed).exp().requires_grad_()


def test_batch_norm_can_be_differentiated_twice() -> None:
    inputs = (leaf(3, 2, 2, 3, seed=0), leaf(2, seed=1), leaf(2, seed=2))
    gradcheck(lambda x, scale, shift: batch_norm(x, scale, shift, None), inputs)
    gradgradcheck(lambda x, scale, shift: batch_norm(x, scale, shift, None), inputs)


def test_batch_norm_by_given_statistics_can_be_differentiated_twice() -> None:
    inputs = (leaf(3, 2, 2, 3, seed=0), leaf(2, seed=1), leaf(2, seed=2), leaf(2, seed=3), positive(2, seed=4))
    gradcheck(lambda x, scale, shift, mean, variance: batch_norm(x, scale, shift, (mean, variance))[0], inputs)
    gradgradcheck(lambda x, scale, shift, mean, variance: batch_norm(x, scale, shift, (mean, variance))[0], inputs)


def test_batch_norm_can_be_differentiated_twice_under_vmap() -> None:
    inputs = (leaf(2, 3, 2, 2, 2, seed=0), leaf(2, seed=1), leaf(2, 2, seed=2))
    vectorised = vmap(lambda x, scale, shift: batch_norm(x, scale, shift, None), in_dims=(0, None, 0))
    gradcheck(vectorised, inputs)
    gradgradcheck(vectorised, inputs)


def test_fused_batch_norm_can_be_differentiated_and_detaches_the_statistics() -> None:
    inputs = (leaf(3, 2, 2, 3, seed=0), leaf(2, seed=1), leaf(2, seed=2))
    gradcheck(lambda x, scale, shift: fused_batch_norm(x, scale, shift)[0], inputs)
    y, mean, variance = fused_batch_norm(*inputs)
    expected = batch_norm(*inputs, None)
    close((y, mean, variance), (expected[0], expected[1].detach(), expected[2].detach()), tolerance=1e-9)
    assert not mean.requires_grad and not variance.requires_grad


def test_statistics_of_a_constant_channel_are_finite() -> None:
    x = torch.full((2, 1, 3, 3), 4.0, requires_grad=True)
    for y, mean, variance in (
        batch_norm(x, torch.ones(1), torch.zeros(1), None),
        fused_batch_norm(x, torch.ones(1), torch.zeros(1)),
    ):
        (gradient,) = torch.autograd.grad(y.square().sum() + y.sum(), x)
        assert mean.item() == 4 and 0 <= variance.item() < 1e-6
        assert y.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_can_be_differentiated_twice(stride: int) -> None:
    inputs = (leaf(2, 2, 4, 3, seed=0), leaf(3, 2, 3, 3, seed=1))
    gradcheck(lambda x, weight: conv3x3(x, weight, stride), inputs)
    gradgradcheck(lambda x, weight: conv3x3(x, weight, stride), inputs)
    close(conv3x3(*inputs, stride), F.conv2d(*inputs, stride=stride, padding=1))


def test_cross_entropy_can_be_differentiated_twice() -> None:
    labels = torch.tensor([2, 0, 1, 2])
    inputs = (leaf(4, 3, seed=0),)
    gradcheck(lambda logits: cross_entropy(logits, labels), inputs)
    gradgradcheck(lambda logits: cross_entropy(logits, labels), inputs)
    close(cross_entropy(*inputs, labels), F.cross_entropy(*inputs, labels))
    assert cross_entropy(torch.tensor([[1e4, -1e4]]), torch.tensor([1])).item() == 2e4


def test_objectives_score_the_mean_over_samples() -> None:
    logits, labels = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 1.0]]), torch.tensor([0, 1, 1])
    assert CLASSIFICATION.metric(logits, labels).item() == pytest.approx(2 / 3)
    close(CLASSIFICATION.loss(logits, labels), F.cross_entropy(logits, labels), tolerance=1e-6)
    values, targets = torch.tensor([[1.0], [4.0]]), torch.tensor([[3.0], [4.0]])
    assert REGRESSION.loss(values, targets).item() == REGRESSION.metric(values, targets).item() == 2


def test_shapes_are_checked_while_tests_run() -> None:
    """What `tests/conftest.py` switches on: without it these shapes broadcast to a number that means nothing."""
    with pytest.raises(TypeCheckError):
        squared_error(torch.zeros(3, 1), torch.zeros(1, 1))


@pytest.mark.parametrize("side", [1, 4])
def test_fused_batch_norm_takes_scales_with_gaps_between_their_elements(side: int) -> None:
    x, aim, scale = leaf(30, 4, side, side, seed=0), leaf(30, 4, side, side, seed=1), positive(4, 2, seed=2)
    shift = torch.zeros(4, dtype=torch.float64)
    assert not scale[:, 0].is_contiguous()
    found = [
        torch.autograd.grad((fused_batch_norm(x, each, shift)[0] * aim).sum(), x)[0]
        for each in (scale[:, 0], scale[:, 0].contiguous())
    ]
    close(found[0], found[1])
