"""Operations on memories against their formulas, one slot and one read after another."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from metaworker.models.memory import cosine_addresses, gated, least_used, one_hot, read_by_attention

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def test_addresses_are_a_softmax_of_cosines() -> None:
    keys, memory = random(2, 4), random(6, 4)
    for strength in (1.0, 10.0):
        rows = [F.softmax(strength * F.cosine_similarity(key[None], memory), 0) for key in keys]
        assert_close(cosine_addresses(keys, memory, strength), torch.stack(rows), rtol=1e-8, atol=1e-8)


def test_an_empty_slot_is_neither_like_nor_unlike_and_its_gradient_is_finite() -> None:
    memory = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    weights = cosine_addresses(random(1, 4), memory, 10.0)
    assert_close(weights, torch.full((1, 3), 1 / 3, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(weights[0, 0], memory)
    assert gradient.isfinite().all()


def test_many_queries_address_one_memory() -> None:
    keys, memory = random(5, 2, 4), random(6, 4)
    together = cosine_addresses(keys, memory, 3.0)
    assert_close(together, torch.stack([cosine_addresses(key, memory, 3.0) for key in keys]))


def test_least_used_slots_come_in_order_and_the_first_of_equal_ones_first() -> None:
    usage = torch.tensor([0.5, 0.1, 0.0, 0.1, 0.0], requires_grad=True)
    chosen = least_used(usage, 3)
    assert chosen.argmax(1).tolist() == [2, 4, 1]
    assert_close(chosen.sum(1), torch.ones(3))
    assert not chosen.requires_grad
    many = torch.func.vmap(lambda u: least_used(u, 3))(torch.stack([usage.detach(), usage.detach().flip(0)]))
    assert many.argmax(2).tolist() == [[2, 4, 1], [0, 2, 1]]


@pytest.mark.parametrize("heads", [1, 2])
def test_each_head_reads_its_part_of_the_slots(heads: int) -> None:
    queries, memory = random(3, 4), random(6, 4)
    width = 4 // heads
    parts = []
    for head in range(heads):
        q, m = (x[:, head * width : (head + 1) * width] for x in (queries, memory))
        parts.append(torch.stack([F.softmax(m @ row / math.sqrt(width), 0) @ m for row in q]))
    assert_close(read_by_attention(queries, memory, heads), torch.cat(parts, 1))


def test_the_gate_keeps_where_it_is_one() -> None:
    memory, candidate = random(2, 3), random(2, 3)
    gate = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    assert_close(gated(gate, memory, candidate), torch.stack([memory[0], candidate[1]]))
    assert_close(gated(torch.full_like(memory, 0.25), memory, candidate), 0.25 * memory + 0.75 * candidate)


def test_one_hot_labels() -> None:
    labels = torch.tensor([2, 0])
    assert_close(one_hot(labels, 3, torch.float64), F.one_hot(labels, 3).double())
