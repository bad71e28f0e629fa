"""Recurrent cells from elementary operations, which vectorise under ``vmap`` and can be differentiated twice.

PyTorch's own LSTM and its fused cells do not go through ``vmap`` with a second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cluster.flat import Tensors
from metaworker.models.base import Initialiser

LSTMState = tuple[Tensor, Tensor]
"""Hidden state and cell, each ``[*batch, hidden]``."""


def lstm_parameters(name: str, inputs: int, hidden: int, normal: Initialiser) -> Tensors:
    """Weights of variance 1 / (inputs + hidden), biases 0 but 1 for the forget gates (Jozefowicz et al. 2015)."""
    deviation = 1 / math.sqrt(inputs + hidden)
    bias = torch.zeros(4 * hidden)
    bias[hidden : 2 * hidden] = 1
    weight = normal(f"{name}.weight", (4 * hidden, inputs + hidden)) * deviation
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def lstm_cell(
    parameters: Mapping[str, Tensor], name: str, x: Float[Tensor, "*batch inputs"], state: LSTMState
) -> LSTMState:
    """One step: gates i, f, o and candidate g from [x, h];  c ← σ(f) c + σ(i) tanh(g),  h ← σ(o) tanh(c)."""
    h, c = state
    gates = torch.cat([x, h], -1) @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm(
    parameters: Mapping[str, Tensor],
    name: str,
    steps: Sequence[Float[Tensor, "*batch inputs"]],
    hidden: int,
    *,
    backwards: bool = False,
) -> list[Float[Tensor, "*batch hidden"]]:
    """Hidden states after each step, in the order of ``steps``; from zero states, if asked from the last step on."""
    zeros = steps[0].new_zeros(*steps[0].shape[:-1], hidden)
    state, outputs = (zeros, zeros), []
    for x in reversed(steps) if backwards else steps:
        state = lstm_cell(parameters, name, x, state)
        outputs.append(state[0])
    return outputs[::-1] if backwards else outputs
