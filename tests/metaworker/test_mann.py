"""MANN against the paper's equations, one sample, head and slot after another, in float64."""

from __future__ import annotations

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

FEW, MANY = 2, 5
"""Query samples a class of the 5: below and above where episodes are scored one by one instead of vectorised."""
MODEL = sections.MLP(hidden=(8,))
HIDDEN, WIDTH, READS = 9, 4, 2

Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def close(actual: Any, expected: Any, tolerance: float = 1e-8) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def learner_of(model: sections.Model = MODEL, **options: Any) -> Learner:
    section = learners.MANN(**({"controller": HIDDEN, "slots": 6, "width": WIDTH, "reads": READS} | options))
    return build_learner(RunConfig(learner=section, model=model), (1, 12, 12))


def order_of(episode: int, support: int) -> Tensor:
    """The order in which training presents an episode's support set."""
    drawn = keys.uniforms(0, "head noise", "train", torch.tensor([episode]).numpy(), support)
    return torch.from_numpy(drawn)[0].double().argsort()


def plain_control(theta: Mapping[str, Tensor], x: Tensor, name: Tensor, read: Tensor, h: Tensor, c: Tensor) -> Any:
    """Hidden state and cell by PyTorch's cell, the keys and the gates."""
    given = torch.cat([F.layer_norm(x, x.shape), name])
    inputs = torch.cat([given, read])
    weight, bias = theta["head/controller.weight"], theta["head/controller.bias"]
    recurrent = weight[:, len(inputs) :]
    h, c = torch.lstm_cell(inputs[None], (h, c), weight[:, : len(inputs)], recurrent, bias, torch.zeros_like(bias))
    flat = F.linear(torch.cat([h[0], given]), theta["head/key.weight"], theta["head/key.bias"])
    gates = torch.sigmoid(F.linear(h[0], theta["head/gate.weight"], theta["head/gate.bias"]))
    return h, c, torch.tanh(flat).view(READS, WIDTH), gates


def plain_read(key: Tensor, memory: Tensor, strength: float) -> Tensor:
    """Softmax of the cosines; the lengths are of each vector and a 1e-5 at right angles to it."""
    lengths = [torch.sqrt((slot**2).sum() + 1e-10) for slot in [key, *memory]]
    cosines = [key @ slot / (lengths[0] * length) for slot, length in zip(memory, lengths[1:], strict=True)]
    return F.softmax(strength * torch.stack(cosines), 0)


def plain_logits(
    theta: Mapping[str, Tensor], support: Tensor, labels: Tensor, query: Tensor, strength: float, slots: int = 6
) -> Tensor:
    """Outputs of each query from copies of the state after the support set."""
    double = {"dtype": torch.float64}
    h = c = torch.zeros(1, HIDDEN, **double)
    memory, usage = torch.zeros(slots, WIDTH, **double), [0.0] * slots
    weights, read = [torch.zeros(slots, **double)] * READS, torch.zeros(READS * WIDTH, **double)
    for x, label in zip(support, labels, strict=True):
        h, c, found, gates = plain_control(theta, x, F.one_hot(label, 5).double(), read, h, c)
        unused = sorted(range(slots), key=lambda slot: (usage[slot], slot))[:READS]
        written = [
            gates[head] * weights[head] + (1 - gates[head]) * F.one_hot(torch.tensor(unused[head]), slots)
            for head in range(READS)
        ]
        rows = [memory[slot] * (slot not in unused) for slot in range(slots)]
        rows = [rows[i] + sum(written[head][i] * found[head] for head in range(READS)) for i in range(slots)]
        memory = torch.stack(rows)
        weights = [plain_read(key, memory, strength) for key in found]
        read = torch.cat([w @ memory for w in weights])
        usage = [0.95 * usage[i] + sum(w[i].item() for w in [*weights, *written]) for i in range(slots)]
    outputs = []
    for x in query:
        hidden, _, found, _ = plain_control(theta, x, torch.zeros(5, **double), read, h, c)
        reads = torch.cat([plain_read(key, memory, strength) @ memory for key in found])
        outputs.append(F.linear(torch.cat([hidden[0], reads]), theta["head/output.weight"], theta["head/output.bias"]))
    return torch.stack(outputs)


@pytest.mark.parametrize("query", [FEW, MANY])
@pytest.mark.parametrize("strength", [1.0, 10.0])
@pytest.mark.parametrize("model", [MODEL, sections.Conv4Strided(channels=4)], ids=lambda m: m.type)
def test_meta_gradient_is_that_of_plain_autograd(
    model: sections.Model, strength: float, query: int, pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(model, strength=strength), plain_net(model)
    (theta, state), episodes = perturbed(learner), pictures(2, shot=2, query=query)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    losses, metrics = [], []
    for e in range(len(episodes)):
        embedded, _ = net(leaves, torch.cat([episodes.support_x[e], episodes.query_x[e]]), None)
        order = order_of(int(episodes.ids[e]), 10)
        logits = plain_logits(leaves, embedded[:10][order], episodes.support_y[e][order], embedded[10:], strength)
        losses.append(F.cross_entropy(logits, episodes.query_y[e]))
        metrics.append((logits.argmax(1) == episodes.query_y[e]).double().mean())
    gradient = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    for chunk in (2, 1):
        result = learner.contribute(theta, state, episodes, Context(0, chunk))
        close(dict(result.gradient), dict(zip(leaves, gradient, strict=True)))
        close((result.loss, result.metric), (torch.stack(losses).detach(), torch.stack(metrics)))


def test_predictions_follow_the_support_set_in_the_order_given(
    pictures: Draw, plain_net: Any, perturbed: Perturbed
) -> None:
    learner, net = learner_of(), plain_net(MODEL)
    (theta, state), episodes = perturbed(learner), pictures(1, shot=2)
    embedded, _ = net(theta, torch.cat([episodes.support_x[0], episodes.query_x[0]]), None)
    expected = plain_logits(theta, embedded[:10], episodes.support_y[0], embedded[10:], 10.0)
    (task,) = learner.adapt(theta, state, episodes.support_x[0], episodes.support_y[0], {})
    close(learner.predict(task, episodes.query_x[0]), expected)


def test_a_memory_with_room_remembers_every_sample_and_a_small_one_the_last(pictures: Draw) -> None:
    """With the initial parameters: what fits into the memory is told apart, what was overwritten is not."""
    episodes = pictures(60, noise=0.3).to(torch.device("cpu"))
    accuracy = {}
    for slots in (40, READS):
        learner = learner_of(controller=200, width=40, slots=slots)
        at = learner.meta_parameters(0), learner.initial_state()
        right = []
        for x, y, query, names in zip(
            episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True
        ):
            (task,) = learner.adapt(*at, x, y, {})
            right.append((learner.predict(task, query).argmax(1) == names).double())
        accuracy[slots] = torch.stack(right).view(60, 5, 3).mean((0, 2))
    assert accuracy[40].min() > 0.5
    assert accuracy[READS][:3].max() < 0.3 and accuracy[READS][4] > 0.5


def test_every_parameter_gets_a_gradient(pictures: Draw) -> None:
    learner, episodes = learner_of(), pictures(2, shot=2).to(torch.device("cpu"))
    result = learner.contribute(learner.meta_parameters(0), learner.initial_state(), episodes, Context(0, 2))
    assert all(gradient.any() for gradient in result.gradient.values())


def test_the_memory_has_a_slot_for_every_head() -> None:
    with pytest.raises(ValidationError, match=r"at least learner\.reads = 4, got 3"):
        learners.MANN(slots=3)
