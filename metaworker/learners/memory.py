"""Internal-memory network: a learned memory that the support samples change through gates and that queries read.

    x(t)   = W_e e_t + W_y y_t                               e = f_θ(x), normalised; y one-hot
    g      = 1 − softmax_slots(a · x(t)) ⊙ σ(U_g m(t) + V_g x(t) + b_g)
    m(t+1) = g ⊙ m(t) + (1 − g) ⊙ f(m(t), x(t)),   f = x(t) + tanh(U_f m(t) + V_f x(t) + b_f)
    z      = tanh(W_z m(T)),   q = (1 + γ(z)) ⊙ W_e e + β(z) task adaptation: FiLM of the query's features
    r      = Σ_slots softmax(q · m(T) / √d) m(T)             each query reads the memory by attention, in heads
    logits = W_yᵀ r / √width + MLP([r, q])

m is ``[slot, width]``. With ``carry``, m(0) is the learned content plus what tasks wrote on average, m(T) − m(0), which
is learner state: a version's episodes move it by `CARRY` towards their mean; no gradient passes from task to task.

m(0) and the slots' addresses a, by which samples find their slots, are parts of θ of the same
shape. The memory is state that gradients flow through, from the query loss to m(0): the meta-gradient is ``exact``. In
training the samples come in an order drawn by key. With ``ablate`` predictions see m(0) in place of m(T), in task
adaptation and in reads: what the network knows without what the support set wrote. Training is the same.

It takes its parts from memory networks that read by attention (arXiv 1503.08895), gated updates of addressed slots
(arXiv 1612.03969) and feature-wise modulation (FiLM, arXiv 1709.07871). Queries and samples share W_e and names are
read out by W_y, so that from the start what a query reads names the samples like it; without that, training stays at
chance for long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cluster.flat import Tensors
from metaworker.learners.embedding import SequentialHead
from metaworker.learners.normalisation import running_averages
from metaworker.models.attention import layer_norm
from metaworker.models.base import Initialiser
from metaworker.models.memory import gated, linear, linear_parameters, one_hot, read_by_attention

CARRY = 0.05
"""Share of a version's mean writings in what is carried on."""
RESIDUAL = 0.1
"""Initial scale of the layers that modify what passes beside them."""


@dataclass(frozen=True)
class Memory(SequentialHead):
    """Writes the support set into a memory and answers queries by reading it.

    Attributes:
        random_start: whether the memory starts training as small random numbers, or else as zeros.
        ablate: whether predictions are made from the initial memory.
        carry: whether what tasks wrote is carried on to later tasks.
        carried: what tasks wrote on average, where it is.
    """

    way: int
    embedding: int
    slots: int
    width: int
    heads: int
    random_start: bool
    ablate: bool
    carry: bool
    carried: Float[Tensor, "slot width"] | None = None

    @property
    def ordered(self) -> bool:
        """Samples are written one after another, where what they write is read."""
        return not self.ablate

    def parameters(self, normal: Initialiser) -> Tensors:
        """The initial memory, the slots' addresses, the labels' vectors and the layers."""
        width, memory = self.width, (self.slots, self.width)
        found: Tensors = {
            "initial": RESIDUAL * normal("initial", memory) if self.random_start else torch.zeros(memory),
            "address": normal("address", memory) / math.sqrt(width),
            "name": normal("name", (self.way, width)),
            **linear_parameters("feature", self.embedding, width, normal),
            **linear_parameters("gate.memory", width, width, normal),
            **linear_parameters("gate.sample", width, width, normal),
            **linear_parameters("candidate.memory", width, width, normal, RESIDUAL),
            **linear_parameters("candidate.sample", width, width, normal, RESIDUAL),
            **linear_parameters("task", self.slots * width, width, normal),
            **linear_parameters("scale", width, width, normal, RESIDUAL),
            **linear_parameters("shift", width, width, normal, RESIDUAL),
            **linear_parameters("hidden", 2 * width, width, normal),
            **linear_parameters("output", width, self.way, normal, RESIDUAL),
        }
        # At first each label has a slot, if there are enough, and what a sample finds there goes.
        labelled = min(self.way, self.slots)
        found["address"][:labelled] += 8 / width * found["name"][:labelled]
        found["gate.sample.bias"] += 2
        return found

    def training_logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """What the queries read of the memory after the support set, also where it is ablated."""
        return self.read(parameters, self.written(parameters, support, labels), query)

    def logits(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """What the queries read of the memory after the support set, or of the initial one."""
        memory = self.initial(parameters) if self.ablate else self.written(parameters, support, labels)
        return self.read(parameters, memory, query)

    def initial_state(self) -> Tensors:
        """Nothing carried on yet."""
        return {"carried": torch.zeros(self.slots, self.width)} if self.carry else {}

    def given(self, state: Mapping[str, Tensor], features: Float[Tensor, "features"]) -> Memory:
        """With what is carried on."""
        return replace(self, carried=state["carried"]) if self.carry else self

    def proposal(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
        query: Float[Tensor, "query embedding"],
        query_labels: Int[Tensor, "query"],
    ) -> Tensors:
        """What the support set, in the sampler's order, wrote."""
        if not self.carry:
            return {}
        return {"carried": self.written(parameters, support, labels) - self.initial(parameters)}

    def commit(
        self, state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """A step towards the mean of what was written."""
        return running_averages(state, proposals, CARRY)

    def initial(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, "slot width"]:
        """m(0)."""
        return parameters["initial"] if self.carried is None else parameters["initial"] + self.carried

    def written(
        self,
        parameters: Mapping[str, Tensor],
        support: Float[Tensor, "support embedding"],
        labels: Int[Tensor, "support"],
    ) -> Float[Tensor, "slot width"]:
        """The memory after the support samples, one after another."""
        names = one_hot(labels, self.way, support.dtype) @ parameters["name"]
        samples = linear(parameters, "feature", layer_norm(support)) + names
        places = (samples @ parameters["address"].T).softmax(1)
        memory = self.initial(parameters)
        for sample, place in zip(samples, places, strict=True):
            change = place[:, None] * torch.sigmoid(self._mixed(parameters, "gate", memory, sample))
            candidate = sample + torch.tanh(self._mixed(parameters, "candidate", memory, sample))
            memory = gated(1 - change, memory, candidate)
        return memory

    def _mixed(
        self, parameters: Mapping[str, Tensor], layer: str, memory: Tensor, sample: Tensor
    ) -> Float[Tensor, "slot width"]:
        """A layer of each slot and the sample."""
        return linear(parameters, f"{layer}.memory", memory) + linear(parameters, f"{layer}.sample", sample)

    def read(
        self,
        parameters: Mapping[str, Tensor],
        memory: Float[Tensor, "slot width"],
        query: Float[Tensor, "query embedding"],
    ) -> Float[Tensor, "query way"]:
        """Task adaptation, attention and the output layers."""
        task = torch.tanh(linear(parameters, "task", memory.flatten()))
        features = linear(parameters, "feature", layer_norm(query))
        features = (1 + linear(parameters, "scale", task)) * features + linear(parameters, "shift", task)
        read = read_by_attention(features, memory, self.heads)
        hidden = torch.relu(linear(parameters, "hidden", torch.cat([read, features], 1)))
        return read @ parameters["name"].T / math.sqrt(self.width) + linear(parameters, "output", hidden)
