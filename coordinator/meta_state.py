"""What a run has learned at one version: θ, the learner state and the optimizer state, immutable, with its digest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cluster.config.run import RunConfig
from cluster.flat import FlatSpec, Tensors, tensors_digest
from cluster.messages import Published
from coordinator.outer_optimizer import OuterOptimizer
from metaworker.learners.base import Learner


@dataclass(frozen=True)
class MetaState:
    """One version of a run."""

    version: int
    layout: FlatSpec
    theta: Tensor
    """Flat meta-parameters, float32 ``[parameters]``."""
    state: Mapping[str, np.ndarray]
    """Learner state."""
    optimizer: Tensors
    """Optimizer state."""

    @staticmethod
    def initial(config: RunConfig, learner: Learner) -> MetaState:
        """Version 0: parameters drawn by key from the run's seed."""
        theta = learner.meta_parameters(config.seed)
        layout = FlatSpec.of(theta)
        state = {name: tensor.numpy() for name, tensor in learner.initial_state().items()}
        return MetaState(0, layout, layout.flatten(theta), state, {})

    @cached_property
    def digest(self) -> str:
        """The run digest at this version (design, section 2)."""
        groups = {
            "theta": self.layout.unflatten(self.theta),
            "state": {name: torch.from_numpy(rows) for name, rows in self.state.items()},
            "optimizer": self.optimizer,
        }
        return tensors_digest(groups, self.version)

    @cached_property
    def published(self) -> Published:
        """What workers get of this version."""
        return Published(self.version, self.theta.numpy(), self.state)

    def apply(
        self,
        gradient: np.ndarray,
        proposals: Sequence[Mapping[str, np.ndarray]],
        learner: Learner,
        optimizer: OuterOptimizer,
    ) -> tuple[MetaState, float]:
        """The next version, and the meta-gradient's norm before clipping.

        Args:
            gradient: aggregated meta-gradient, float32 ``[parameters]``.
            proposals: for the learner state, in commit order.
            learner: commits the proposals.
            optimizer: makes the step.
        """
        clipped, norm = optimizer.clip(gradient)
        theta, after = optimizer.step(self.theta, self.optimizer, clipped, self.version)
        # NumPy makes scalars of arrays without dimensions at the first arithmetic; the state stays arrays.
        state = {name: np.asarray(rows) for name, rows in learner.commit_state(self.state, proposals).items()}
        return MetaState(self.version + 1, self.layout, theta, state, after), norm
