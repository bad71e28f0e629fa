"""The internal-memory network against its equations, one sample and one slot after another, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from cluster import keys
from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.learners import build_learner
from metaworker.learners.base import Context, Learner
from metaworker.learners.embedding import EmbeddingLearner
from metaworker.learners.memory import CARRY, Memory

FEW, MANY = 2, 5
"""Query samples a class of the 5: below and above where episodes are scored one by one instead of vectorised."""
MODEL = sections.MLP(hidden=(8,))

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(model: sections.Model = MODEL, **options: Any) -> EmbeddingLearner:
    section = learners.InternalMemory(**({"slots": 7, "width": 6, "heads": 2} | options))
    learner = build_learner(RunConfig(learner=section, model=model), (1, 12, 12))
    assert isinstance(learner, EmbeddingLearner)
    return learner


def order_of(episode: int, support: int) -> Tensor:
    """The order in which training presents an episode's support set."""
    drawn = keys.uniforms(0, "head noise", "train", torch.tensor([episode]).numpy(), support)
    return torch.from_numpy(drawn)[0].double().argsort()


def layer(theta: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, theta[f"head/{name}.weight"], theta[f"head/{name}.bias"])


def plain_memory(theta: Mapping[str, Tensor], support: Tensor, labels: Tensor) -> Tensor:
    """The memory, slot by slot, after each sample in turn."""
    slots = list(theta["head/initial"])
    for e, label in zip(support, labels, strict=True):
        x = layer(theta, "feature", F.layer_norm(e, e.shape)) + theta["head/name"][label]
        place = F.softmax(torch.stack([a @ x for a in theta["head/address"]]), 0)
        updated = []
        for slot, share in zip(slots, place, strict=True):
            gate = 1 - share * torch.sigmoid(layer(theta, "gate.memory", slot) + layer(theta, "gate.sample", x))
            candidate = layer(theta, "candidate.memory", slot) + layer(theta, "candidate.sample", x)
            updated.append(gate * slot + (1 - gate) * (x + torch.tanh(candidate)))
        slots = updated
    return torch.stack(slots)


def plain_logits(theta: Mapping[str, Tensor], memory: Tensor, query: Tensor, heads: int = 2) -> Tensor:
    """What each query reads of the memory, and the scores that it gives."""
    width = memory.shape[1]
    task = torch.tanh(layer(theta, "task", memory.reshape(-1)))
    rows = []
    for e in query:
        q = layer(theta, "feature", F.layer_norm(e, e.shape))
        q = (1 + layer(theta, "scale", task)) * q + layer(theta, "shift", task)
        parts = zip(q.chunk(heads), memory.chunk(heads, 1), strict=True)
        read = torch.cat([F.softmax(m @ part / math.sqrt(width / heads), 0) @ m for part, m in parts])
        hidden = F.relu(layer(theta, "hidden", torch.cat([read, q])))
        rows.append(theta["head/name"] @ read / math.sqrt(width) + layer(theta, "output", hidden))
    return torch.stack(rows)


@pytest.mark.parametrize("query", [FEW, MANY])
@pytest.mark.parametrize("model", [MODEL, sections.Conv4Strided(channels=4)], ids=lambda m: m.type)
@pytest.mark.parametrize("init", ["random", "zero"])
def test_meta_gradient_is_that_of_plain_autograd(
    init: str, model: sections.Model, query: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(model, init=init), plain_net(model)
    (theta, state), episodes = perturbed(learner), pictures(2, shot=2, query=query)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    losses, metrics = [], []
    for e in range(len(episodes)):
        embedded, _ = net(leaves, torch.cat([episodes.support_x[e], episodes.query_x[e]]), None)
        order = order_of(int(episodes.ids[e]), 10)
        memory = plain_memory(leaves, embedded[:10][order], episodes.support_y[e][order])
        logits = plain_logits(leaves, memory, embedded[10:])
        losses.append(F.cross_entropy(logits, episodes.query_y[e]))
        metrics.append((logits.argmax(1) == episodes.query_y[e]).double().mean())
    gradient = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    for chunk in (2, 1):
        result = learner.contribute(theta, state, episodes, Context(0, chunk))
        close(dict(result.gradient), dict(zip(leaves, gradient, strict=True)))
        close((result.loss, result.metric), (torch.stack(losses).detach(), torch.stack(metrics)))


def test_predictions_read_the_support_set_in_the_order_given(
    pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(), plain_net(MODEL)
    (theta, state), episodes = perturbed(learner), pictures(1, shot=2)
    embedded, _ = net(theta, torch.cat([episodes.support_x[0], episodes.query_x[0]]), None)
    memory = plain_memory(theta, embedded[:10], episodes.support_y[0])
    (task,) = learner.adapt(theta, state, episodes.support_x[0], episodes.support_y[0], {})
    close(learner.predict(task, episodes.query_x[0]), plain_logits(theta, memory, embedded[10:]))


@pytest.mark.parametrize("init", ["random", "zero"])
def test_gradient_flows_through_all_writes_to_every_slot_of_the_initial_memory(init: str, pictures: Draw) -> None:
    learner = learner_of(init=init)
    episodes = pictures(2, shot=5).to(torch.device("cpu"))
    result = learner.contribute(learner.meta_parameters(0), learner.initial_state(), episodes, Context(0, 2))
    assert (result.gradient["head/initial"].abs().sum(1) > 0).all()
    assert all(gradient.any() for gradient in result.gradient.values())


def test_the_initial_memory_is_a_meta_parameter_that_starts_as_configured() -> None:
    zero, random = (learner_of(init=init).meta_parameters(0) for init in ("zero", "random"))
    assert not zero["head/initial"].any()
    assert random["head/initial"].unique().numel() == random["head/initial"].numel()
    assert all(torch.equal(zero[name], random[name]) for name in zero if name != "head/initial")


def test_writing_leaves_the_initial_memory_and_earlier_memories_alone(pictures: Draw, perturbed: Perturbed) -> None:
    head = learner_of().head
    assert isinstance(head, Memory)
    theta, _ = perturbed(learner_of())
    own = {name.removeprefix("head/"): tensor for name, tensor in theta.items()}
    before = own["initial"].clone()
    support, labels = torch.randn(5, 64, dtype=torch.float64), torch.arange(5)
    first = head.written(own, support[:1], labels[:1])
    copy = first.clone()
    head.written(own, support, labels)
    assert torch.equal(own["initial"], before) and torch.equal(first, copy)


def test_each_label_starts_with_a_slot_of_its_own() -> None:
    learner = learner_of(slots=16, width=64)
    own = {name.removeprefix("head/"): t for name, t in learner.meta_parameters(0).items()}
    assert isinstance(learner.head, Memory)
    change = [
        learner.head.written(own, torch.zeros(1, 64), torch.tensor([label])) - own["initial"] for label in range(5)
    ]
    assert [int(c.abs().sum(1).argmax()) for c in change] == list(range(5))


def test_ablated_predictions_know_nothing_of_the_support_set_and_training_is_the_same(
    pictures: Draw, perturbed: Perturbed
) -> None:
    whole, ablated = learner_of(), learner_of(ablate=True)
    at, episodes = perturbed(whole), pictures(2, shot=2)
    close(*(dict(one.contribute(*at, episodes, Context(0, 2)).gradient) for one in (whole, ablated)))
    queries = episodes.query_x[0]

    def predictions(learner: Learner, episode: int) -> Tensor:
        (task,) = learner.adapt(*at, episodes.support_x[episode], episodes.support_y[episode], {})
        return learner.predict(task, queries)

    assert (predictions(whole, 0) - predictions(ablated, 0)).abs().max() > 1e-3
    assert (predictions(whole, 0) - predictions(whole, 1)).abs().max() > 1e-3
    close(predictions(ablated, 0), predictions(ablated, 1))
    assert whole.ordered and not ablated.ordered


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValidationError, match=r"multiple of learner\.heads = 3, got 64"):
        learners.InternalMemory(heads=3)


def test_what_tasks_wrote_is_carried_on_to_later_ones(pictures: Draw, perturbed: Perturbed, plain_net: Any) -> None:
    learner, episodes = learner_of(carry=True), pictures(3, shot=2)
    theta, state = perturbed(learner)
    state["head/carried"] = torch.zeros_like(theta["head/initial"])
    proposed = learner.contribute(theta, state, episodes, Context(0, 2)).proposals
    wrote = []
    for e in range(3):
        embedded, _ = plain_net(MODEL)(theta, torch.cat([episodes.support_x[e], episodes.query_x[e]]), None)
        wrote.append(plain_memory(theta, embedded[:10], episodes.support_y[e]) - theta["head/initial"])
    close(proposed["head/carried"], torch.stack(wrote))

    before = {name: tensor.numpy() for name, tensor in state.items()}
    rows = {name: tensor.numpy() for name, tensor in proposed.items()}
    halves = [{name: part[at] for name, part in rows.items()} for at in (slice(0, 1), slice(1, 3))]
    after = learner.commit_state(before, halves)
    close(torch.from_numpy(after["head/carried"]), CARRY * torch.stack(wrote).mean(0))

    later = {name: torch.from_numpy(array) for name, array in after.items()}
    moved = theta | {"head/initial": theta["head/initial"] + later["head/carried"]}
    support = (episodes.support_x[0], episodes.support_y[0], {})
    without = learner_of()
    close(
        learner.predict(learner.adapt(theta, later, *support)[0], episodes.query_x[0]),
        without.predict(without.adapt(moved, {}, *support)[0], episodes.query_x[0]),
    )
    again = learner.contribute(theta, later, episodes, Context(0, 2)).proposals
    embedded, _ = plain_net(MODEL)(theta, torch.cat([episodes.support_x[0], episodes.query_x[0]]), None)
    close(again["head/carried"][0], plain_memory(moved, embedded[:10], episodes.support_y[0]) - moved["head/initial"])
