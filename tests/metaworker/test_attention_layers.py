"""Attention against its formulas, one query and one key after another, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.testing import assert_close

from metaworker.models.attention import (
    additive_attention,
    additive_parameters,
    dot_product_attention,
    hard,
    layer_norm,
    multi_head_attention,
    multi_head_parameters,
    self_attention,
    soft,
)

GENERATOR = torch.Generator().manual_seed(0)
INPUTS, UNITS, HEADS = 6, 8, 2


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def moved(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() + 0.3 * normal(*tensor.shape) for name, tensor in parameters.items()}


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


ADDITIVE = moved(additive_parameters("a", INPUTS, UNITS, draw))
MULTI_HEAD = moved(multi_head_parameters("m", INPUTS, UNITS, draw))
QUERY, KEY = normal(3, INPUTS), normal(5, INPUTS)


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def plain_scores(kind: str, query: Tensor, key: Tensor) -> Tensor:
    """``[head, query, key]``, an entry at a time."""
    if kind == "additive":
        w, u, b, v = (ADDITIVE[f"a.{part}"] for part in ("query", "key", "bias", "energy"))
        return torch.stack([torch.stack([v @ torch.tanh(w @ q + u @ k + b) for k in key]) for q in query])[None]
    w, u = (MULTI_HEAD[f"m.{part}"].reshape(HEADS, UNITS // HEADS, INPUTS) for part in ("query", "key"))
    size = math.sqrt(UNITS // HEADS)
    return torch.stack(
        [torch.stack([torch.stack([(w[h] @ q) @ (u[h] @ k) / size for k in key]) for q in query]) for h in range(HEADS)]
    )


def plain_read(kind: str, weights: Tensor, key: Tensor) -> Tensor:
    if kind == "additive":
        values = F.linear(key, ADDITIVE["a.value"])
        return torch.stack(
            [sum((w * v for w, v in zip(row, values, strict=True)), 0 * values[0]) for row in weights[0]]
        )
    values = MULTI_HEAD["m.value"].reshape(HEADS, UNITS // HEADS, INPUTS)
    reads = [weights[h] @ torch.stack([values[h] @ k for k in key]) for h in range(HEADS)]
    return F.linear(torch.cat(reads, 1), MULTI_HEAD["m.output"])


def ours(kind: str, query: Tensor, key: Tensor, choose: Any) -> tuple[Tensor, Tensor]:
    if kind == "additive":
        read, weights = additive_attention(ADDITIVE, "a", query, key, choose)
        return read, weights[None]
    return multi_head_attention(MULTI_HEAD, "m", query, key, HEADS, choose)


both_kinds = pytest.mark.parametrize("kind", ["additive", "multihead"])


@both_kinds
def test_soft_attention_is_its_formula(kind: str) -> None:
    read, weights = ours(kind, QUERY, KEY, partial(soft, temperature=0.7))
    expected = F.softmax(plain_scores(kind, QUERY, KEY) / 0.7, 2)
    close(weights, expected)
    close(read, plain_read(kind, expected, KEY))


def test_dot_product_attention_is_that_of_pytorch() -> None:
    query, key, value = normal(2, 3, INPUTS), normal(2, 5, INPUTS), normal(2, 5, 4)
    read, weights = dot_product_attention(query, key, value, soft)
    close(read, F.scaled_dot_product_attention(query, key, value))
    close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    alone = [dot_product_attention(query[h], key[h], value[h], soft)[0] for h in range(2)]
    close(torch.stack(alone), read)


@both_kinds
def test_hard_attention_reads_the_key_of_the_highest_score(kind: str) -> None:
    read, weights = ours(kind, QUERY, KEY, hard)
    scores = plain_scores(kind, QUERY, KEY)
    expected = F.one_hot(scores.argmax(2), len(KEY)).double()
    assert torch.equal(weights, expected)
    close(read, plain_read(kind, expected, KEY))


def test_hard_choices_are_samples_of_the_softmax_at_any_temperature() -> None:
    scores, draws = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=torch.float64), 40_000
    uniforms = torch.rand(draws, 4, generator=GENERATOR, dtype=torch.float64)
    for temperature in (0.3, 2.0):
        chosen = hard(scores.expand(draws, 4), temperature, uniforms)
        assert set(chosen.unique().tolist()) == {0.0, 1.0} and torch.equal(chosen.sum(1), torch.ones(draws).double())
        # Four deviations of a share of 40,000 draws.
        assert_close(chosen.mean(0), scores.softmax(0), rtol=0, atol=4 * 0.5 / math.sqrt(draws))


def test_gradient_of_a_hard_choice_is_that_of_the_softmax_of_perturbed_scores() -> None:
    scores, uniforms, value = (
        normal(3, 5).requires_grad_(),
        torch.rand(3, 5, generator=GENERATOR).double(),
        normal(5, 2),
    )
    target = normal(3, 2)
    read = hard(scores, 0.6, uniforms) @ value
    (found,) = torch.autograd.grad((read - target).square().sum(), scores)
    expected = torch.zeros_like(scores)
    for q in range(3):
        perturbed = scores[q].detach() + torch.tensor([-math.log(-math.log(u)) for u in uniforms[q].tolist()]).double()
        relaxed = (perturbed / 0.6).softmax(0)
        chosen = value[perturbed.argmax()]
        of_weights = 2 * value @ (chosen - target[q])
        expected[q] = relaxed * (of_weights - relaxed @ of_weights) / 0.6
    close(found, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_uniforms_leave_everything_finite(dtype: torch.dtype) -> None:
    scores = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    uniforms = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]], dtype=dtype)
    chosen = hard(scores, 1.0, uniforms)
    assert chosen[0].tolist() == [0.0, 0.0, 1.0] and chosen.sum().item() == 2
    (gradient,) = torch.autograd.grad((chosen * torch.arange(3, dtype=dtype)).sum(), scores)
    assert gradient.isfinite().all()


@both_kinds
def test_untrained_attention_prefers_an_equal_key(kind: str) -> None:
    initial = additive_parameters("a", 64, 64, draw) | multi_head_parameters("a", 64, 64, draw)
    if kind == "additive":
        initial |= additive_parameters("a", 64, 64, draw)
    x = layer_norm(torch.randn(20, 64, generator=GENERATOR))
    near = layer_norm(x + 0.3 * torch.randn(20, 64, generator=GENERATOR))
    read = additive_attention if kind == "additive" else partial(multi_head_attention, heads=4)
    _, weights = read(initial, "a", near, x, choose=soft)
    per_head = weights.reshape(-1, 20, 20)
    assert (per_head.mean(0).argmax(1) == torch.arange(20)).float().mean() > 0.9


def test_self_attention_keeps_the_order_of_a_set() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    read, weights = self_attention(MULTI_HEAD, "m", KEY, HEADS)
    shuffled, reweighted = self_attention(MULTI_HEAD, "m", KEY[order], HEADS)
    close(shuffled, read[order])
    close(reweighted, weights[:, order][:, :, order])


@both_kinds
@pytest.mark.parametrize("choose", [soft, hard])
def test_attention_vectorises_over_episodes(kind: str, choose: Any) -> None:
    queries, keys = normal(4, 3, INPUTS), normal(4, 5, INPUTS)
    together = vmap(lambda q, k: ours(kind, q, k, choose))(queries, keys)
    for e in range(4):
        close(tuple(part[e] for part in together), ours(kind, queries[e], keys[e], choose))


def test_layer_norm_normalises_each_sample_by_itself() -> None:
    x = normal(3, 50) * 4 + 2
    y = layer_norm(x)
    close(y, (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + 1e-5))
