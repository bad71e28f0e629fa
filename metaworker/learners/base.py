"""What a learner is: meta-parameters, optional learner state, and pure functions on them.

``adapt`` and ``predict`` are written for one episode and vectorised by their callers with ``torch.func.vmap``;
``contribute`` takes the episodes of a shard and vectorises itself in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from cluster.episodes.types import Episodes
from cluster.flat import Tensors

GradientKind = Literal["exact", "surrogate", "estimator"]
"""How a learner's meta-gradient is to be judged: against finite differences of the query loss, against an independent
implementation of its formula, or with its noise fixed."""

Task = Mapping[str, Any]
"""An adapted model of one episode: a (nested) mapping of tensors that ``predict`` understands."""


@dataclass(frozen=True)
class Context:
    """What a contribution may depend on besides θ, state and episodes."""

    version: int
    """Version of θ."""
    chunk: int
    """Episodes vectorised at once."""


@dataclass(frozen=True)
class ShardResult:
    """What a learner makes of a shard."""

    gradient: Tensors
    """Meta-gradient summed over the episodes, named and shaped as the meta-parameters."""
    episodes: int
    proposals: Tensors
    """Proposals for the learner state, each ``[episode, …]`` in the order of episode ids; empty for most learners."""
    loss: Float[Tensor, "episode"]
    """Query loss after adaptation."""
    metric: Float[Tensor, "episode"]
    """Query accuracy (fraction) or mean squared error after adaptation."""


@runtime_checkable
class Learner(Protocol):
    """A meta-learning algorithm; see the module's docstring."""

    @property
    def kind(self) -> GradientKind:
        """What the meta-gradient claims to be."""
        ...

    @property
    def transductive(self) -> bool:
        """Whether a query's prediction may depend on the other queries."""
        ...

    @property
    def ordered(self) -> bool:
        """Whether the order of the support samples may matter."""
        ...

    @property
    def names_matter(self) -> bool:
        """Whether it may matter which label which class has."""
        ...

    def meta_parameters(self, seed: int) -> Tensors:
        """Initial meta-parameters θ, drawn by key."""
        ...

    def initial_state(self) -> Tensors:
        """Initial learner state; empty for most learners."""
        ...

    def adapt(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        support_x: Tensor,
        support_y: Tensor,
        metadata: Mapping[str, Tensor],
    ) -> Sequence[Task]:
        """The task's models before and after each evaluation step; the last one is the adapted model.

        Args:
            theta: meta-parameters.
            state: learner state of the same version.
            support_x: ``[support, *sample]``.
            support_y: labels ``[support]`` or targets ``[support, 1]``.
            metadata: what is known of the task besides its samples, as `metaworker.metadata.encode` gives it, for this
                one episode; may be empty.
        """
        ...

    def predict(self, task: Task, query_x: Tensor) -> Tensor:
        """Logits ``[query, way]`` or regressed values ``[query, 1]`` for queries ``[query, *sample]``."""
        ...

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """The shard's summed meta-gradient, its proposals and statistics."""
        ...

    def commit_state(
        self, state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """The next learner state from this one and the proposals of a commit, in their order. Pure."""
        ...
