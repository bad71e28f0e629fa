"""What an episode source is and what it gives: episodes of one shard as tensors ready for a learner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from cluster.messages import SplitName

TENSORS: Final = ("support_x", "support_y", "query_x", "query_y")
"""The tensor fields of ``Episodes``."""


@dataclass(frozen=True)
class Episodes:
    """Consecutive episodes of one split, stacked along a leading episode dimension.

    Samples are ordered class by class: support sample ``c * shot + k`` is the k-th shot of class ``c``.
    """

    ids: np.ndarray
    """Episode ids, int64 ``[episode]``."""
    way: int
    """Classes an episode; 1 for regression."""
    support_x: Tensor
    """float32 ``[episode, way·shot, *sample]``; images lie in [0, 1] with shape ``channel height width``."""
    support_y: Tensor
    """Labels 0 … way − 1, int64 ``[episode, way·shot]``; or targets, float32 ``[episode, shot, 1]``."""
    query_x: Tensor
    """float32 ``[episode, way·query, *sample]``."""
    query_y: Tensor
    """As ``support_y``."""
    metadata: Mapping[str, np.ndarray]
    """Episode metadata, each ``[episode]`` (a sinusoid's amplitude and phase) or ``[episode, way]`` (class columns)."""

    def __len__(self) -> int:
        return len(self.ids)

    def chunk(self, start: int, stop: int) -> Episodes:
        """Episodes ``start … stop − 1`` of these, as views."""
        cut: dict[str, Any] = {name: getattr(self, name)[start:stop] for name in ("ids", *TENSORS)}
        return replace(self, **cut, metadata={name: rows[start:stop] for name, rows in self.metadata.items()})

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Episodes:
        """These episodes on ``device``, floating tensors as ``dtype``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        moved: dict[str, Any] = {name: move(getattr(self, name)) for name in TENSORS}
        return replace(self, **moved)


@runtime_checkable
class EpisodeSource(Protocol):
    """Where episodes come from: an episode store with a split, or an embedded generator.

    ``(seed, split, episode id)`` decides an episode completely, on any machine.
    """

    @property
    def digest(self) -> str:
        """Digest of the data (the store digest), SHA-256 hex."""
        ...

    @property
    def split_digest(self) -> str:
        """Digest of which class belongs to which split, SHA-256 hex."""
        ...

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one input sample: ``(channel, height, width)`` or ``(features,)``."""
        ...

    @property
    def regression(self) -> bool:
        """Whether targets are real numbers instead of class labels."""
        ...

    def empty(self, split: SplitName) -> bool:
        """Whether a split has nothing to make episodes of."""
        ...

    def check(self, split: SplitName, way: int, shot: int, query: int, within: str | None = None) -> None:
        """Refuse episodes that this source cannot give.

        Raises:
            SplitError: more classes than the split (or any of its groups) has, more samples than its smallest class
                has, or no such column.
        """
        ...

    def sample(
        self,
        split: SplitName,
        first_episode: int,
        episodes: int,
        way: int,
        shot: int,
        query: int,
        within: str | None = None,
    ) -> Episodes:
        """Episodes ``first_episode … first_episode + episodes − 1`` of ``split``.

        All classes of an episode share their value of the class metadata column ``within``, where one is given.
        """
        ...
