"""Prototypical Networks with an external episodic memory: a bank of past tasks, looked up by task metadata.

    entry    k = the features of a past task's metadata,   v = [mean of its prototypes, their spread, spread in classes]
    read     a = softmax over entries of ⟨W k_now, W k⟩ / √d,   r = Σ a v,   z = tanh(M r)
    fused    e' = e ⊙ (1 + G z) + B z for every embedding e of the new task, then distances to its prototypes

The bank is learner state: each episode proposes its entry, the coordinator writes them in the order of episode ids over
the oldest, and workers read the bank of their version of θ. Entries come without gradients (the tasks are past), so
that the meta-gradient with respect to encoder, W, M, G and B is ``exact`` for the bank as it is. G and B start at zero:
the untrained learner, one with an empty bank, and one with ``use_bank`` off are Prototypical Networks (arXiv
1703.05175). Keys are fixed features of the metadata (`metaworker.metadata`) and W is applied when they are read, so
that old keys stay valid; values age with the encoder that made them, which the capacity bounds. No paper's: the bank of
tasks follows the idea of memory-augmented networks (arXiv 1605.06065), with tasks instead of samples in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cluster import keys
from cluster.config.sections import BatchNorm
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.learners.base import Context, GradientKind, ShardResult, Task
from metaworker.learners.embedding import members
from metaworker.learners.normalisation import commit_running_statistics, given_statistics
from metaworker.learners.objective import CLASSIFICATION
from metaworker.learners.protonet import Prototypes
from metaworker.learners.vectorise import Score, differentiate
from metaworker.metadata import episode_features, features_width, task_features
from metaworker.models.base import Backbone

KEYS, VALUES, WRITTEN = "bank.keys", "bank.values", "bank.written"
"""Learner state: keys ``[capacity, features]``, values ``[capacity, 3 · embedding]``, how many were written ``[1]``."""
BANK = (KEYS, VALUES, WRITTEN)

MIX = 32
"""Width through which what was read reaches the embeddings."""

Bank = Mapping[str, Tensor]
Rows = TypeVar("Rows", Tensor, np.ndarray)


@dataclass(frozen=True)
class EpisodicMemory:
    """Prototypes of embeddings that are modulated by what the bank holds on similar tasks."""

    backbone: Backbone
    batch_norm: BatchNorm
    way: int
    columns: tuple[str, ...]
    capacity: int
    key_width: int
    use_bank: bool

    @property
    def kind(self) -> GradientKind:
        """The gradient of the query loss, the bank given."""
        return "exact"

    @property
    def transductive(self) -> bool:
        """Whether queries share batch statistics."""
        return self.batch_norm == "transductive" and bool(self.backbone.statistics())

    @property
    def ordered(self) -> bool:
        """All support samples count alike."""
        return False

    @property
    def names_matter(self) -> bool:
        """Classes are compared by prototypes."""
        return False

    def meta_parameters(self, seed: int) -> Tensors:
        """The encoder's, W, M, G and B."""

        def normal(name: str, shape: tuple[int, ...]) -> Tensor:
            return keys.tensor_normals(seed, "init", name, shape)

        width, features = self.backbone.output_size, features_width(self.columns)
        lookup = normal("bank/key", (self.key_width, features)) / math.sqrt(max(1, features))
        mix = normal("bank/mix", (MIX, 3 * width)) / math.sqrt(3 * width)
        zeros = {f"bank/{name}": torch.zeros(width, MIX) for name in ("scale", "shift")}
        return self.backbone.parameters(normal) | {"bank/key": lookup, "bank/mix": mix} | zeros

    def initial_state(self) -> Tensors:
        """Running batch statistics and an empty bank."""
        features, width = features_width(self.columns), 3 * self.backbone.output_size
        bank = {KEYS: torch.zeros(self.capacity, features), VALUES: torch.zeros(self.capacity, width)}
        return self.backbone.statistics() | bank | {WRITTEN: torch.zeros(1)}

    def adapt(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        support_x: Float[Tensor, "support *sample"],
        support_y: Int[Tensor, "support"],
        metadata: Mapping[str, Tensor],
    ) -> Sequence[Task]:
        """One task model: θ, the support set, and what the bank holds on such tasks."""
        given = given_statistics(self.batch_norm, _statistics(state), training=False)
        if self.batch_norm == "support":
            given = self.backbone(theta, support_x, None)[1] or None
        read = self._read(theta, state, task_features(metadata, self.columns, support_x))
        samples = {"support_x": support_x, "support_y": support_y}
        return [{"parameters": theta, "statistics": given, "read": read, **samples}]

    def predict(self, task: Task, query_x: Float[Tensor, "query *sample"]) -> Float[Tensor, "query way"]:
        """Negative squared distances to the prototypes."""
        x = torch.cat([task["support_x"], query_x])
        embedded, _ = self.backbone(task["parameters"], x, task["statistics"])
        return self._logits(task["parameters"], task["read"], embedded, task["support_y"])

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Differentiate the query cross-entropy; propose an entry of the bank for each episode."""
        features = episode_features(episodes, self.columns)
        bank = {name: state[name] for name in BANK}
        looped = None
        if self.batch_norm != "support":  # fused kernels give no gradient to statistics that others use
            looped = replace(self, backbone=self.backbone.fused())._scorer(bank)
        return differentiate(theta, episodes, context.chunk, self._scorer(bank), looped_score=looped, extra=features)

    def commit_state(
        self, state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Update the running batch statistics, and write the proposed entries over the oldest, in their order."""
        statistics = [{n: rows for n, rows in p.items() if n not in BANK} for p in proposals]
        following = commit_running_statistics(_statistics(state), statistics)
        bank = {name: state[name].copy() for name in BANK}
        for proposal in proposals:
            for key, value in zip(proposal[KEYS], proposal[VALUES], strict=True):
                place = int(bank[WRITTEN][0]) % self.capacity
                bank[KEYS][place], bank[VALUES][place] = key, value
                bank[WRITTEN] += 1
        return {name: (following | bank)[name] for name in state}

    def _scorer(self, bank: Bank) -> Score:
        def score(
            theta: Mapping[str, Tensor],
            support_x: Tensor,
            support_y: Tensor,
            query_x: Tensor,
            query_y: Tensor,
            features: Tensor,
        ) -> tuple[Tensor, Tensor, Tensors]:
            given = self.backbone(theta, support_x, None)[1] or None if self.batch_norm == "support" else None
            embedded, observed = self.backbone(theta, torch.cat([support_x, query_x]), given)
            logits = self._logits(theta, self._read(theta, bank, features), embedded, support_y)
            value = self._value(embedded.detach(), torch.cat([support_y, query_y]))
            proposed = observed | {KEYS: features, VALUES: value}
            return CLASSIFICATION.loss(logits, query_y), CLASSIFICATION.metric(logits, query_y), proposed

        return score

    def _read(
        self, theta: Mapping[str, Tensor], bank: Bank, features: Float[Tensor, "features"]
    ) -> Float[Tensor, "value"]:
        """What the bank holds on tasks with such features; zeros while it is empty."""
        if not self.use_bank:
            return bank[VALUES].new_zeros(bank[VALUES].shape[1])
        lookup = theta["bank/key"]
        scores = (bank[KEYS] @ lookup.T) @ (lookup @ features) / math.sqrt(self.key_width)
        there = torch.arange(self.capacity, device=scores.device) < bank[WRITTEN]
        weights = torch.softmax(torch.where(there, scores, scores.new_tensor(-1e9)), 0)
        return (weights * there) @ bank[VALUES]

    def _value(self, embedded: Float[Tensor, "sample embedding"], labels: Int[Tensor, "sample"]) -> Tensor:
        """What is kept of a task: the mean and the spread of its prototypes, and the spread within its classes."""
        member = members(labels, self.way, embedded.dtype)
        prototypes = (member @ embedded) / member.sum(1, keepdim=True)
        centre = prototypes.mean(0)
        between = (prototypes - centre).square().mean(0)
        within = (embedded - member.T @ prototypes).square().mean(0)
        return torch.cat([centre, between, within])

    def _logits(
        self, theta: Mapping[str, Tensor], read: Tensor, embedded: Float[Tensor, "sample embedding"], labels: Tensor
    ) -> Float[Tensor, "query way"]:
        mixed = torch.tanh(theta["bank/mix"] @ read)
        fused = embedded * (1 + theta["bank/scale"] @ mixed) + theta["bank/shift"] @ mixed
        return Prototypes(self.way).logits({}, fused[: len(labels)], labels, fused[len(labels) :])


def _statistics(state: Mapping[str, Rows]) -> dict[str, Rows]:
    """The running batch statistics in the state."""
    return {name: rows for name, rows in state.items() if name not in BANK}
