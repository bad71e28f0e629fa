"""Prototypical Networks with an external episodic memory: a bank of past tasks, looked up by task metadata.

    entry    k = the features of a past task's metadata,   v = [mean of its prototypes, their spread, spread in classes]
    read     a = softmax over entries of ⟨W k_now, W k⟩ / √d,   r = Σ a v,   z = tanh(M r)
    fused    e' = e ⊙ (1 + G z) + B z for every embedding e of the new task, then distances to its prototypes

k is ``[features]``, v and r ``[3 · embedding]``, a ``[capacity]``, z ``[mix]``, e ``[sample, embedding]``; W is
``[d, features]``, M ``[mix, 3 · embedding]``, G and B ``[embedding, mix]``; logits are ``[query, way]``.

The bank is learner state: each episode proposes its entry, the coordinator writes them in the order of episode ids over
the oldest, and workers read the bank of their version of θ. Entries come without gradients (the tasks are past), so
that the meta-gradient with respect to encoder, W, M, G and B is ``exact`` for the bank as it is. G and B start at zero:
the untrained learner, one with an empty bank, and one with ``use_bank`` off are Prototypical Networks (arXiv
1703.05175). Keys are fixed features of the metadata (`metaworker.metadata`) and W is applied when they are read, so
that old keys stay valid. A past task's labels enter as what they say of its samples, the means and spreads of its
classes: its names for them mean nothing in another task. Values age with the encoder that made them, which the capacity
bounds. No paper's: the bank of tasks follows the idea of memory-augmented networks (arXiv 1605.06065), with tasks
instead of samples in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cluster.flat import Tensors
from metaworker.learners.embedding import Head, members
from metaworker.learners.protonet import Prototypes
from metaworker.metadata import features_width
from metaworker.models.base import Initialiser

KEYS, VALUES, WRITTEN = "keys", "values", "written"
"""The bank: keys ``[capacity, features]``, values ``[capacity, 3 · embedding]``, how many were written, ``[1]``;
once it is full, ``capacity`` and how many since its first place was written last."""

MIX = 32
"""Width through which what was read reaches the embeddings."""


@dataclass(frozen=True)
class EpisodicMemory(Head):
    """Prototypes of embeddings that are modulated by what the bank holds on similar tasks.

    Attributes:
        bank: the learner state, where the head is that of one task.
        features: what metadata say of that task.
    """

    way: int
    embedding: int
    task_columns: tuple[str, ...]
    capacity: int
    key_width: int
    use_bank: bool
    bank: Mapping[str, Tensor] = field(default_factory=dict)
    features: Float[Tensor, "features"] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """What tasks are looked up by."""
        return self.task_columns

    def parameters(self, normal: Initialiser) -> Tensors:
        """W, M, G and B."""
        features = features_width(self.columns)
        lookup = normal("lookup", (self.key_width, features)) / math.sqrt(max(1, features))
        mix = normal("mix", (MIX, 3 * self.embedding)) / math.sqrt(3 * self.embedding)
        return {"lookup": lookup, "mix": mix} | {name: torch.zeros(self.embedding, MIX) for name in ("scale", "shift")}

    def initial_state(self) -> Tensors:
        """An empty bank."""
        keys = torch.zeros(self.capacity, features_width(self.columns))
        return {KEYS: keys, VALUES: torch.zeros(self.capacity, 3 * self.embedding), WRITTEN: torch.zeros(1)}

    def given(self, state: Mapping[str, Tensor], features: Float[Tensor, "features"]) -> EpisodicMemory:
        """With the bank, and what to look up in it."""
        return replace(self, bank=state, features=features)

    def logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """Negative squared distances to the prototypes."""
        z = torch.tanh(parameters["mix"] @ self._read(parameters["lookup"]))
        scale, shift = 1 + parameters["scale"] @ z, parameters["shift"] @ z
        return Prototypes(self.way).logits({}, support * scale + shift, labels, query * scale + shift)

    def proposal(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
        query_labels: Int[Tensor, "query"],
    ) -> Tensors:
        """The task's metadata; the mean and the spread of its prototypes, and the spread within its classes."""
        assert self.features is not None
        embedded = torch.cat([support, query])
        member = members(torch.cat([labels, query_labels]), self.way, query.dtype)
        prototypes = (member @ embedded) / member.sum(1, keepdim=True)
        centre = prototypes.mean(0)
        between = (prototypes - centre).square().mean(0)
        within = (embedded - member.T @ prototypes).square().mean(0)
        return {KEYS: self.features, VALUES: torch.cat([centre, between, within])}

    def commit(
        self, state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Write the proposed entries over the oldest, in their order."""
        bank = {name: rows.copy() for name, rows in state.items()}
        for proposal in proposals:
            for key, value in zip(proposal[KEYS], proposal[VALUES], strict=True):
                place = int(bank[WRITTEN][0]) % self.capacity
                bank[KEYS][place], bank[VALUES][place] = key, value
                # Beyond the capacity only the place counts: float32 would stop counting at 2²⁴.
                bank[WRITTEN][0] = place + 1 + (self.capacity if bank[WRITTEN] >= self.capacity else 0)
        return bank

    def _read(self, lookup: Float[Tensor, "key features"]) -> Float[Tensor, "value"]:
        """What the bank holds on tasks with such features; zeros while it is empty or not used."""
        assert self.features is not None
        scores = (self.bank[KEYS] @ lookup.T) @ (lookup @ self.features) / math.sqrt(self.key_width)
        there = torch.arange(self.capacity, device=scores.device) < self.bank[WRITTEN] * self.use_bank
        weights = torch.softmax(torch.where(there, scores, scores.new_tensor(-1e9)), 0)
        return (weights * there) @ self.bank[VALUES]
