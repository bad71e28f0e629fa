"""Any encoder fits the learners that embed: here a recurrent one over sequences of tokens, which are integers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.episodes.types import Episodes
from cluster.errors import ConfigError
from cluster.flat import Tensors
from metaworker.learners import build_learner
from metaworker.learners.base import Context
from metaworker.learners.embedding import EmbeddingLearner
from metaworker.models.base import Initialiser, Statistics
from metaworker.models.memory import one_hot
from metaworker.models.recurrent import lstm, lstm_parameters
from metaworker.shard_worker import evaluate_episodes

WAY, VOCABULARY, LENGTH = 5, 12, 6
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "matching": [{"full_context": True}],
    "attention": [{"hard": True}, {"columns": ("topic",)}],
    "memory": [{"carry": True}],
    "episodic": [{"columns": ("topic",)}],
}


@dataclass(frozen=True)
class TokenEncoder:
    """The last hidden state of an LSTM over one-hot tokens ``[sample, position]``."""

    output_size: int

    def fused(self) -> TokenEncoder:
        return self

    def stacked(self, parameters: Mapping[str, Tensor], x: Tensor, *, observe: bool) -> tuple[Tensor, Statistics]:
        raise NotImplementedError

    def parameters(self, normal: Initialiser) -> Tensors:
        return lstm_parameters("lstm", VOCABULARY, self.output_size, normal)

    def statistics(self) -> Statistics:
        return {}

    def __call__(
        self, parameters: Mapping[str, Tensor], x: Tensor, statistics: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Statistics]:
        steps = [one_hot(x[:, at], VOCABULARY, parameters["lstm.weight"].dtype) for at in range(LENGTH)]
        return lstm(parameters, "lstm", steps, self.output_size)[-1] * math.sqrt(self.output_size), {}


def embedding_learners() -> list[learners.Learner]:
    """Every registered learner that embeds and compares vectors, and the options that read something besides."""
    found: list[learners.Learner] = []
    for section in get_args(get_args(learners.Learner)[0]):
        kind = section.model_fields["type"].default
        try:
            learner = build_learner(RunConfig(learner=section(), model=sections.MLP(hidden=(16,))), (1, 12, 12))
        except ConfigError:
            continue  # it compares maps
        if isinstance(learner, EmbeddingLearner):
            found += [section(**options) for options in [{}, *VARIANTS.get(kind, [])]]
    return found


def learner_of(section: learners.Learner) -> EmbeddingLearner:
    learner = build_learner(RunConfig(learner=section, model=sections.MLP(hidden=(16,))), (1, 12, 12))
    assert isinstance(learner, EmbeddingLearner)
    return replace(learner, backbone=TokenEncoder(learner.backbone.output_size))


def sentences(episodes: int, query: int) -> Episodes:
    """Each class has a sequence of its own, of which every sample has one token changed."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(VOCABULARY, (episodes, WAY, 1, LENGTH), generator=generator)

    def samples(count: int) -> tuple[Tensor, Tensor]:
        x = patterns.repeat(1, 1, count, 1)
        at = torch.randint(LENGTH, (episodes, WAY, count, 1), generator=generator)
        x.scatter_(3, at, torch.randint(VOCABULARY, at.shape, generator=generator))
        return x.flatten(1, 2), torch.arange(WAY).repeat_interleave(count).repeat(episodes, 1)

    topics = np.repeat(np.array(["weather", "banking", ""])[np.arange(episodes) % 3][:, None], WAY, 1)
    return Episodes(np.arange(episodes), WAY, *samples(1), *samples(query), {"topic": topics})


every_embedding_learner = pytest.mark.parametrize(
    "section",
    embedding_learners(),
    ids=lambda section: "-".join([section.type, *section.model_dump(exclude_defaults=True)]),
)


@every_embedding_learner
@pytest.mark.parametrize("query", [2, 5])
def test_learners_that_embed_take_tokens(section: learners.Learner, query: int) -> None:
    learner, episodes = learner_of(section), sentences(6, query)
    theta, state = learner.meta_parameters(0), learner.initial_state()
    whole = learner.contribute(theta, state, episodes, Context(0, 6))
    alone = [learner.contribute(theta, state, episodes.chunk(e, e + 1), Context(0, 1)) for e in range(6)]
    assert_close(whole.loss, torch.cat([one.loss for one in alone]))
    assert whole.gradient["lstm.weight"].abs().max() > 1e-5
    loss, confusion = evaluate_episodes(learner, theta, state, episodes, regression=False)
    assert np.isfinite(loss).all() and confusion.sum() == episodes.query_y.numel()


@every_embedding_learner
def test_sequences_of_tokens_come_in_a_drawn_order(section: learners.Learner) -> None:
    """The noise that draws it has the precision of the parameters, not of the samples, where it would be all zeros."""
    learner, episodes = learner_of(section), sentences(3, 2)
    theta, state = learner.meta_parameters(0), learner.initial_state()
    if not learner.head.noise(WAY, 2 * WAY):
        return
    one, other = (replace(learner, seed=seed).contribute(theta, state, episodes, Context(0, 3)) for seed in (0, 1))
    assert (one.loss - other.loss).abs().max() > 1e-7
