"""The outer optimizer as a pure function over one flat buffer, computed by torch's own dense implementations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.config.run import RunConfig
from cluster.config.sections import SGD, Adam
from cluster.flat import Tensors
from coordinator.schedules import factor


@dataclass(frozen=True)
class OuterOptimizer:
    """Step size schedule, gradient clipping and torch's Adam(W) or SGD, on one thread.

    The optimizer's state is named tensors: ``step`` ``[]``, ``exp_avg`` and ``exp_avg_sq`` ``[parameters]`` for Adam,
    ``momentum_buffer`` ``[parameters]`` for SGD with momentum.
    """

    config: RunConfig

    def clip(self, gradient: np.ndarray) -> tuple[np.ndarray, float]:
        """The gradient ``[parameters]`` scaled down to ``clip_norm`` if it is longer, and its norm before that."""
        norm = float(np.sqrt(np.square(gradient, dtype=np.float64).sum()))
        limit = self.config.clip_norm
        if limit is None or norm <= limit:
            return gradient, norm
        return gradient * gradient.dtype.type(limit / norm), norm

    def step(self, theta: Tensor, state: Tensors, gradient: np.ndarray, version: int) -> tuple[Tensor, Tensors]:
        """θ and optimizer state after one step; the arguments are left as they are.

        Args:
            theta: flat meta-parameters ``[parameters]``.
            state: optimizer state after ``version`` steps; empty before the first.
            gradient: clipped meta-gradient ``[parameters]``.
            version: updates made so far.
        """
        parameter = torch.nn.Parameter(theta.clone())
        parameter.grad = torch.from_numpy(np.array(gradient))
        optimizer = self._make(parameter, version)
        if state:
            optimizer.state[parameter] = {name: tensor.clone() for name, tensor in state.items()}
        optimizer.step()
        after = {n: t for n, t in optimizer.state[parameter].items() if isinstance(t, Tensor)}
        return parameter.detach(), after

    def _make(self, parameter: torch.nn.Parameter, version: int) -> torch.optim.Optimizer:
        scale = factor(self.config.schedule, version, self.config.steps)
        match self.config.optimizer:
            case Adam(lr=lr, betas=betas, eps=eps, weight_decay=decay):
                return torch.optim.AdamW(
                    [parameter], lr * scale, betas, eps, decay, foreach=False, fused=False, capturable=False
                )
            case SGD(lr=lr, momentum=momentum):
                return torch.optim.SGD([parameter], lr * scale, momentum, foreach=False, fused=False)
