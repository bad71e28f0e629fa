"""The bank of past tasks: what is written, what is read, and what it does to predictions, against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.testing import assert_close

from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.learners import build_learner, episodic
from metaworker.learners.base import Context, Learner
from metaworker.learners.embedding import PREFIX
from metaworker.metadata import TEXT_WIDTH, encode

WAY, CAPACITY = 5, 4
KEYS, VALUES, WRITTEN = (PREFIX + name for name in (episodic.KEYS, episodic.VALUES, episodic.WRITTEN))
MODEL = sections.Conv4Pool(channels=4)
Draw = Callable[..., Episodes]
Perturbed = Callable[[Learner], tuple[Tensors, Tensors]]


def learner_of(**options: Any) -> Learner:
    section = learners.EpisodicMemory(columns=("script",), capacity=CAPACITY, key_width=3, **options)
    return build_learner(RunConfig(learner=section, model=MODEL), (1, 12, 12))


def told(episodes: Episodes, *scripts: str) -> Episodes:
    """The episodes with a script each."""
    return replace(episodes, metadata={"script": np.array([[script] * WAY for script in scripts])})


def outputs(learner: Learner, theta: Tensors, state: Tensors, episodes: Episodes, episode: int = 0) -> Tensor:
    metadata = {name: rows[episode] for name, rows in encode(episodes.metadata, episodes.support_x).items()}
    task = learner.adapt(theta, state, episodes.support_x[episode], episodes.support_y[episode], metadata)[-1]
    return learner.predict(task, episodes.query_x[episode])


def filled(state: Tensors, entries: int) -> Tensors:
    """The state with entries in its bank."""
    generator = torch.Generator().manual_seed(4)
    drawn = {n: torch.randn(state[n].shape, generator=generator, dtype=torch.float64) for n in (KEYS, VALUES)}
    return state | drawn | {WRITTEN: torch.tensor([float(entries)], dtype=torch.float64)}


def test_each_episode_proposes_its_metadata_and_what_its_classes_are_like(
    pictures: Draw, perturbed: Perturbed, plain_net: Any
) -> None:
    learner, episodes = learner_of(), told(pictures(2, shot=2), "Greek", "Lao")
    theta, state = perturbed(learner)
    proposals = learner.contribute(theta, state, episodes, Context(0, 2)).proposals
    encoded = encode(episodes.metadata, episodes.support_x)["script"]
    for e in range(2):
        assert_close(proposals[KEYS][e], torch.cat([encoded[e].mean(0), torch.ones(1, dtype=torch.float64)]))
        x = torch.cat([episodes.support_x[e], episodes.query_x[e]])
        y = torch.cat([episodes.support_y[e], episodes.query_y[e]])
        embedded = plain_net(MODEL)(theta, x)[0]
        centres = torch.stack([embedded[y == c].mean(0) for c in range(WAY)])
        within = torch.stack([(z - centres[c]) ** 2 for z, c in zip(embedded, y, strict=True)]).mean(0)
        expected = torch.cat([centres.mean(0), centres.var(0, unbiased=False), within])
        assert_close(proposals[VALUES][e], expected, rtol=1e-10, atol=1e-10)


def test_the_oldest_entries_give_way_in_the_order_of_the_proposals() -> None:
    learner = learner_of()
    state = {name: tensor.numpy() for name, tensor in learner.initial_state().items()}
    width = state[VALUES].shape[1]

    def proposal(*numbers: int) -> dict[str, np.ndarray]:
        rows = np.array(numbers, dtype=np.float32)[:, None]
        averages = {n: np.repeat(a[None], len(numbers), 0) for n, a in state.items() if n.startswith(("mean", "var"))}
        return averages | {KEYS: rows * np.ones(TEXT_WIDTH + 1, np.float32), VALUES: rows * np.ones(width, np.float32)}

    one = learner.commit_state(state, [proposal(1, 2)])
    assert one[KEYS][:, 0].tolist() == [1, 2, 0, 0] and one[WRITTEN].tolist() == [2]
    two = learner.commit_state(one, [proposal(3), proposal(4, 5, 6)])
    assert two[VALUES][:, 0].tolist() == [5, 6, 3, 4] and two[WRITTEN].tolist() == [6]
    assert one[KEYS][:, 0].tolist() == [1, 2, 0, 0], "what is published stays"


def test_predictions_read_the_entries_of_similar_tasks(pictures: Draw, perturbed: Perturbed, plain_net: Any) -> None:
    learner, episodes = learner_of(), told(pictures(1, shot=2), "Greek")
    theta, state = perturbed(learner)
    state = filled(state, 3)
    features = torch.cat([encode(episodes.metadata, episodes.support_x)["script"][0, 0], torch.ones(1).double()])
    now = theta["head/lookup"] @ features
    scores = torch.stack([(theta["head/lookup"] @ state[KEYS][i]) @ now / 3**0.5 for i in range(3)])
    read = sum(w * state[VALUES][i] for i, w in enumerate(torch.softmax(scores, 0)))
    z = torch.tanh(theta["head/mix"] @ read)
    shots = len(episodes.support_y[0])
    embedded = plain_net(MODEL)(theta, torch.cat([episodes.support_x[0], episodes.query_x[0]]))[0]
    fused = embedded * (1 + theta["head/scale"] @ z) + theta["head/shift"] @ z
    centres = torch.stack([fused[:shots][episodes.support_y[0] == c].mean(0) for c in range(WAY)])
    distances = -((fused[shots:, None] - centres) ** 2).sum(-1)
    found = outputs(learner, theta, state, episodes)
    assert_close(torch.softmax(found, -1), torch.softmax(distances, -1), rtol=1e-10, atol=1e-10)


def test_without_the_bank_or_with_an_empty_one_it_is_a_prototypical_network(
    pictures: Draw, perturbed: Perturbed
) -> None:
    learner, episodes = learner_of(), told(pictures(1), "Greek")
    theta, state = perturbed(learner)
    empty = state | {WRITTEN: torch.zeros(1, dtype=torch.float64)}
    prototypes = build_learner(RunConfig(learner=learners.ProtoNet(), model=MODEL), (1, 12, 12))
    expected = outputs(prototypes, theta, state, episodes)
    assert_close(outputs(learner, theta, empty, episodes), expected)
    assert_close(outputs(learner_of(use_bank=False), theta, filled(state, 3), episodes), expected)
    assert (outputs(learner, theta, filled(state, 3), episodes) - expected).abs().max() > 1e-6


def test_another_script_reads_something_else(pictures: Draw, perturbed: Perturbed) -> None:
    learner, episodes = learner_of(), pictures(1)
    theta, state = perturbed(learner)
    state = filled(state, 4)
    greek, lao, unknown = (outputs(learner, theta, state, told(episodes, name)) for name in ("Greek", "Lao", ""))
    assert (greek - lao).abs().max() > 1e-6 and (greek - unknown).abs().max() > 1e-6
