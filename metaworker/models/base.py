"""What a backbone is: a pure function of named parameters, with batch statistics made explicit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from cluster.flat import Tensors

Statistics = dict[str, Tensor]
"""Batch-norm statistics by layer: ``mean.0``, ``variance.0`` …, each ``[channel]``; empty for nets without any."""

Initialiser = Callable[[str, tuple[int, ...]], Tensor]
"""Standard normal draws by key: (name, shape) -> float32 tensor."""


@runtime_checkable
class Backbone(Protocol):
    """A network as a pure function ``(parameters, x, statistics) -> (output, statistics used)``.

    It takes one episode's samples ``[sample, *shape]``; learners vectorise over episodes.
    """

    @property
    def output_size(self) -> int:
        """Width of the output: logits with a head, the embedding's size without one."""
        ...

    def fused(self) -> Backbone:
        """The same function by kernels that are faster, work outside ``vmap`` only, and detach the statistics."""
        ...

    def stacked(self, parameters: Mapping[str, Tensor], x: Tensor, *, observe: bool) -> tuple[Tensor, Statistics]:
        """Many tasks at once, each with parameters and batch statistics of its own, for first derivatives only.

        Args:
            parameters: each ``[task, …]``.
            x: ``[task, sample, *shape]``.
            observe: whether statistics are wanted.

        Returns:
            Outputs ``[task, sample, output_size]`` and detached statistics ``[task, channel]``, empty if not wanted.
        """
        ...

    def parameters(self, normal: Initialiser) -> Tensors:
        """Initial parameters, drawn by key."""
        ...

    def statistics(self) -> Statistics:
        """Initial running statistics: mean 0 and variance 1."""
        ...

    def __call__(
        self, parameters: Mapping[str, Tensor], x: Tensor, statistics: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Statistics]:
        """Outputs ``[sample, output_size]`` and the statistics that normalised them.

        Args:
            parameters: as from ``parameters``.
            x: ``[sample, *shape]``.
            statistics: given ones to normalise with, or ``None`` to take those of ``x`` itself.
        """
        ...
