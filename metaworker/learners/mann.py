"""Memory-augmented neural network, MANN (Santoro et al. 2016, arXiv 1605.06065).

    h, c  = LSTM([e_t, y_t, r_{t−1}], (h, c))               e = f_θ(x), normalised; y one-hot; r the last read
    k, α  = tanh(W_k [h, e_t, y_t]), W_α h                  a key and a gate for each of the read heads
    w^w   = σ(α) w^r_{t−1} + (1 − σ(α)) w^lu_{t−1}          written: where was read last, or a least used slot
    M     = M_{t−1} with the least used slots emptied, + Σ_heads w^w k
    w^r   = softmax_slots(strength · cos(k, M)),   r = w^r M
    w^u   = γ w^u_{t−1} + Σ_heads (w^r + w^w)               usage, which decides the w^lu of the next step
    logits = W_o [h, r]

M is ``[slot, width]``, the weights are ``[read, slot]``. The meta-gradient is ``exact``: which slots are least used is
piecewise constant and gets no gradient, as in the paper.

Departures. The paper presents one sequence and scores every sample of it, labels coming one step late; here support
samples come with their labels, in training in an order drawn by key, and then each query on its own, with zeros for
its label: it sees the state after the support set, never another query, and writes nothing, as nobody would read it.
Samples pass an encoder. Each head has a least used slot of its own, as in published code; in the paper the heads share
them. α is computed from the controller's output, one for each head, where the paper has one learned scalar. Keys see
the sample beside the controller's output, the label's part of them is where the output layer starts from, and cosines
are sharpened by ``strength`` (the paper: 1): training then leaves chance at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cluster.flat import Tensors
from metaworker.learners.embedding import SequentialHead
from metaworker.models.attention import layer_norm
from metaworker.models.base import Initialiser
from metaworker.models.memory import (
    cosine_addresses,
    least_used,
    linear,
    linear_parameters,
    one_hot,
)
from metaworker.models.recurrent import lstm_cell, lstm_parameters


class State(NamedTuple):
    """What is carried from sample to sample."""

    hidden: Float[Tensor, "*query hidden"]
    cell: Float[Tensor, "*query hidden"]
    memory: Float[Tensor, "*query slot width"]
    usage: Float[Tensor, "*query slot"]
    weights: Float[Tensor, "*query read slot"]
    """Of the last read."""
    read: Float[Tensor, "*query read_width"]
    """All heads' reads side by side."""


@dataclass(frozen=True)
class MemoryAugmented(SequentialHead):
    """An LSTM controller that reads by content and writes where it read last or where least is used."""

    way: int
    embedding: int
    controller: int
    slots: int
    width: int
    reads: int
    decay: float
    strength: float

    def parameters(self, normal: Initialiser) -> Tensors:
        """The controller, the heads' keys and gates, and the output layer."""
        read, inputs = self.reads * self.width, self.embedding + self.way
        found = (
            lstm_parameters("controller", inputs + read, self.controller, normal)
            | linear_parameters("key", self.controller + inputs, read, normal)
            | linear_parameters("gate", self.controller, self.reads, normal)
            | linear_parameters("output", self.controller + read, self.way, normal)
        )
        # A label is one feature beside many of the embedding; heads start by writing to the least used slots.
        names = found["key.weight"][:, -self.way :].mul_(math.sqrt(self.embedding) / 2)
        found["output.weight"][:, self.controller :] = names.T
        found["gate.bias"] -= 2
        return found

    def logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """Outputs for each query, as the sample after the support set."""
        names = one_hot(labels, self.way, support.dtype)
        state = self._start(support)
        for x in torch.cat([layer_norm(support), names], 1):
            state = self._step(parameters, x, state)
        asked = torch.cat([layer_norm(query), query.new_zeros(len(query), self.way)], 1)
        each = State(*(part.expand(len(query), *part.shape) for part in state))
        hidden, _, keys = self._control(parameters, asked, each)
        read = (cosine_addresses(keys, state.memory, self.strength) @ state.memory).flatten(-2)
        return linear(parameters, "output", torch.cat([hidden, read], 1))

    def _start(self, like: Tensor) -> State:
        """Nothing stored, nothing read, nothing used."""
        controller, slots = like.new_zeros(self.controller), like.new_zeros(self.slots)
        memory, weights = like.new_zeros(self.slots, self.width), like.new_zeros(self.reads, self.slots)
        return State(controller, controller, memory, slots, weights, like.new_zeros(self.reads * self.width))

    def _control(
        self, parameters: Mapping[str, Tensor], x: Float[Tensor, "*query inputs"], state: State
    ) -> tuple[Float[Tensor, "*query hidden"], Float[Tensor, "*query hidden"], Float[Tensor, "*query read width"]]:
        """The controller's hidden state and cell, and the heads' keys."""
        inputs = torch.cat([x, state.read], -1)
        hidden, cell = lstm_cell(parameters, "controller", inputs, (state.hidden, state.cell))
        keys = torch.tanh(linear(parameters, "key", torch.cat([hidden, x], -1)))
        return hidden, cell, keys.view(*keys.shape[:-1], self.reads, self.width)

    def _step(self, parameters: Mapping[str, Tensor], x: Float[Tensor, "inputs"], state: State) -> State:
        """Write, then read; see the module's docstring."""
        hidden, cell, keys = self._control(parameters, x, state)
        gate = torch.sigmoid(linear(parameters, "gate", hidden))[..., None]
        unused = least_used(state.usage, self.reads)
        written = gate * state.weights + (1 - gate) * unused
        memory = state.memory * (1 - unused.sum(-2))[..., None] + written.transpose(-1, -2) @ keys
        weights = cosine_addresses(keys, memory, self.strength)
        # Only the choice of slots depends on usage, and that has no gradient.
        usage = self.decay * state.usage + (weights + written).sum(-2).detach()
        return State(hidden, cell, memory, usage, weights, (weights @ memory).flatten(-2))
