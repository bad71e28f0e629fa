"""LSTM cells against PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from metaworker.models.recurrent import lstm, lstm_cell, lstm_parameters

INPUTS, HIDDEN = 3, 5


def normal(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_it_is_pytorch_s_lstm_in_both_directions() -> None:
    parameters = {name: tensor.double() for name, tensor in lstm_parameters("l", INPUTS, HIDDEN, normal).items()}
    theirs = torch.nn.LSTM(INPUTS, HIDDEN).double()
    weight = parameters["l.weight"]
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(weight[:, :INPUTS])
        theirs.weight_hh_l0.copy_(weight[:, INPUTS:])
        theirs.bias_ih_l0.copy_(parameters["l.bias"])
        theirs.bias_hh_l0.zero_()
    x = torch.randn(7, 2, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(torch.stack(lstm(parameters, "l", list(x), HIDDEN)), theirs(x)[0])
    backwards = torch.stack(lstm(parameters, "l", list(x), HIDDEN, backwards=True))
    assert_close(backwards, theirs(x.flip(0))[0].flip(0))


def test_the_forget_gate_starts_open() -> None:
    parameters = lstm_parameters("l", INPUTS, HIDDEN, lambda name, shape: torch.zeros(shape))
    _, cell = lstm_cell(parameters, "l", torch.zeros(INPUTS), (torch.zeros(HIDDEN), torch.ones(HIDDEN)))
    assert_close(cell, torch.full((HIDDEN,), torch.sigmoid(torch.tensor(1.0)).item()))
