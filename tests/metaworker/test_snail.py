"""SNAIL against the paper's listing: every query at the end of a whole sequence of its own, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from cluster import keys
from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.learners import build_learner
from metaworker.learners.base import Context, Learner
from metaworker.learners.snail import SNAIL, Steps, causal_attention, causal_convolution

MODELS = (sections.Conv4Strided(channels=4), sections.MLP(hidden=(8,)))
SEED = 11

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(model: sections.Model, shot: int, filters: int = 8) -> Learner:
    shape = sections.EpisodeShape(way=5, shot=shot, query=3)
    config = RunConfig(learner=learners.SNAIL(filters=filters), model=model, episode=shape, seed=SEED)
    return build_learner(config, (1, 12, 12))


def plain_attention(p: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """AttentionBlock of the listing, a step at a time; x is ``[step, channel]``."""
    q, k, v = (F.linear(x, p[f"{name}.{part}.weight"], p[f"{name}.{part}.bias"]) for part in ("query", "key", "value"))
    reads = [F.softmax(k[: t + 1] @ q[t] / math.sqrt(k.shape[1]), 0) @ v[: t + 1] for t in range(len(x))]
    return torch.cat([x, torch.stack(reads)], 1)


def plain_dense(p: Mapping[str, Tensor], name: str, x: Tensor, dilation: int) -> Tensor:
    """DenseBlock of the listing, by PyTorch's convolution."""
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    kernel = torch.stack(weight.chunk(2, 1), 2)
    padded = F.pad(x.T[None], (dilation, 0))
    xf, xg = F.conv1d(padded, kernel, bias, dilation=dilation)[0].T.chunk(2, 1)
    return torch.cat([x, torch.tanh(xf) * torch.sigmoid(xg)], 1)


def plain_logits(theta: Mapping[str, Tensor], support: Tensor, labels: Tensor, query: Tensor, steps: int) -> Tensor:
    p = {name.removeprefix("head/"): tensor for name, tensor in theta.items()}
    rows = []
    for last in query:
        embedded = torch.cat([support, last[None]])
        names = torch.cat([F.one_hot(labels, 5).double(), torch.zeros(1, 5, dtype=torch.float64)])
        x = torch.cat([F.layer_norm(embedded, embedded.shape[1:]), names], 1)
        for block in range(3):
            x = plain_attention(p, f"attention.{block}", x)
            for i in range(math.ceil(math.log2(steps)) if block < 2 else 0):
                x = plain_dense(p, f"temporal.{block}.{i}", x, 2**i)
        rows.append(F.linear(x[-1], p["output.weight"], p["output.bias"]))
    return torch.stack(rows)


@pytest.mark.parametrize("shot", [1, 2])
@pytest.mark.parametrize("query", [1, 4])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.type)
def test_meta_gradient_is_that_of_plain_autograd(
    model: sections.Model, query: int, shot: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(model, shot), plain_net(model)
    (theta, state), episodes = perturbed(learner), pictures(2, shot=shot, query=query)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    uniforms = torch.from_numpy(keys.uniforms(SEED, "head noise", "train", episodes.ids, 5 * shot))
    losses = []
    for e in range(len(episodes)):
        embedded, _ = net(leaves, torch.cat([episodes.support_x[e], episodes.query_x[e]]))
        order = uniforms[e].argsort()
        support, labels = embedded[: 5 * shot][order], episodes.support_y[e][order]
        logits = plain_logits(leaves, support, labels, embedded[5 * shot :], 5 * shot + 1)
        losses.append(F.cross_entropy(logits, episodes.query_y[e]))
    gradient = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    result = learner.contribute(theta, state, episodes, Context(0, 2))
    close(dict(result.gradient), dict(zip(leaves, gradient, strict=True)))
    close(result.loss, torch.stack(losses).detach())


@pytest.mark.parametrize("shot", [1, 4])
def test_evaluation_reads_the_support_set_in_its_own_order(
    shot: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    """Also where evaluation has more shots than the training that the temporal blocks were made for."""
    learner, net = learner_of(MODELS[1], shot=1), plain_net(MODELS[1])
    (theta, _), episodes = perturbed(learner), pictures(1, shot=shot)
    embedded, _ = net(theta, torch.cat([episodes.support_x[0], episodes.query_x[0]]))
    (task,) = learner.adapt(theta, {}, episodes.support_x[0], episodes.support_y[0], {})
    expected = plain_logits(theta, embedded[: 5 * shot], episodes.support_y[0], embedded[5 * shot :], steps=6)
    assert expected.std(0).min() > 1e-3
    close(learner.predict(task, episodes.query_x[0]), expected)


def test_the_sizes_are_the_papers_at_128_filters() -> None:
    head = SNAIL(way=5, size=64, steps=6, filters=128)
    assert head.attention_sizes == ((64, 32), (256, 128), (512, 256))
    assert head.dilations == (1, 2, 4)
    assert SNAIL(way=20, size=64, steps=101, filters=128).dilations == (1, 2, 4, 8, 16, 32, 64)
    shapes = {name: t.shape for name, t in head.parameters(lambda name, shape: torch.zeros(shape)).items()}
    # 64 + 5 inputs, then 32 values, 3 × 128 filters, 128 values, 3 × 128 filters, 256 values.
    assert shapes["output.weight"] == (5, 69 + 32 + 384 + 128 + 384 + 256)


@pytest.mark.parametrize("changed", range(6))
def test_no_step_sees_a_later_one(changed: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parameters = {"c.weight": draw(8, 6), "c.bias": draw(8)}
    for part in ("query", "key", "value"):
        parameters |= {f"a.{part}.weight": draw(4, 3), f"a.{part}.bias": draw(4)}
    x = draw(6, 3)
    other = x.clone()
    other[changed] += 1

    def run(x: Tensor) -> list[Tensor]:
        steps = Steps(x[:5], x[5:])
        found = [causal_attention(parameters, "a", steps)]
        found += [causal_convolution(parameters, "c", steps, dilation) for dilation in (1, 2, 7)]
        return [torch.cat(part) for part in found]

    for name, before, after in zip(("attention", 1, 2, 7), run(x), run(other), strict=True):
        moved = (before != after).any(1).nonzero().flatten().tolist()
        seen = range(changed, 6) if name == "attention" else [t for t in (changed, changed + int(name)) if t < 6]
        assert moved == list(seen)
