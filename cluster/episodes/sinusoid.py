"""The regression source of the MAML paper: y = A sin(x − phase), a new amplitude and phase each episode.

Amplitude A ~ U[0.1, 5], phase ~ U[0, π], inputs x ~ U[−5, 5] (arXiv 1703.03400, section 5.1; the published code's
sign of the phase). Support and query inputs are separate streams, so the support set does not change with the number
of queries. Numbers are drawn in float64; x is rounded to float32 first, and y is the value at the rounded x.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from torch import Tensor

from cluster import keys
from cluster.config.sections import SinusoidData
from cluster.episodes.types import Episodes
from cluster.errors import SplitError
from cluster.messages import SplitName


class SinusoidSource:
    """Sinusoid episodes; an ``EpisodeSource``. Splits are separate streams of the same distribution."""

    def __init__(self, data: SinusoidData, seed: int) -> None:
        self._data = data
        self._seed = seed
        spec = json.dumps(["sinusoid/1", "A sin(x - phase)", data.amplitude, data.phase, data.x])
        self._digest = hashlib.sha256(spec.encode()).hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the formula and its ranges."""
        return self._digest

    @property
    def split_digest(self) -> str:
        """SHA-256 (hex) of what splits are here: streams, not classes."""
        return hashlib.sha256(b"sinusoid/1: every split is a stream of its own").hexdigest()

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """One input: ``(1,)``."""
        return (1,)

    @property
    def regression(self) -> bool:
        """Targets are real numbers."""
        return True

    def empty(self, split: SplitName) -> bool:
        """No split is."""
        return False

    def check(self, split: SplitName, way: int, shot: int, query: int, within: str | None = None) -> None:
        """Refuse episodes with classes.

        Raises:
            SplitError: ``way`` is not 1, ``shot`` or ``query`` is below 1, or there is a ``within``.
        """
        if within is not None:
            raise SplitError(f"within {within}: sinusoid episodes have no classes to group; leave it out")
        if way != 1:
            raise SplitError(f"way {way}: sinusoid episodes are regression and have no classes; set way to 1")
        if shot < 1 or query < 1:
            raise SplitError(f"shot {shot}, query {query}: both must be at least 1")

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

        Inputs and targets are float32 ``[episode, shot or query, 1]``; metadata ``amplitude`` and ``phase`` (radians)
        float64 ``[episode]``: its own, NaN, another one's or the middle of the range, as configured.

        Raises:
            SplitError: as ``check``.
        """
        self.check(split, way, shot, query, within)
        ids = np.arange(first_episode, first_episode + episodes, dtype=np.int64)
        task = keys.uniforms(self._seed, "sinusoid task", split, ids, 2)
        amplitude = _between(self._data.amplitude, task[:, 0])
        phase = _between(self._data.phase, task[:, 1])

        def points(purpose: str, count: int) -> tuple[Tensor, Tensor]:
            drawn = keys.uniforms(self._seed, purpose, split, ids, count)
            x = _between(self._data.x, drawn).astype(np.float32)
            y = (amplitude[:, None] * np.sin(x - phase[:, None])).astype(np.float32)
            return torch.from_numpy(x)[..., None], torch.from_numpy(y)[..., None]

        support_x, support_y = points("sinusoid support", shot)
        query_x, query_y = points("sinusoid query", query)
        metadata = self._metadata(split, ids, amplitude, phase)
        return Episodes(ids, 1, support_x, support_y, query_x, query_y, metadata)

    def _metadata(
        self, split: SplitName, ids: np.ndarray, amplitude: np.ndarray, phase: np.ndarray
    ) -> dict[str, np.ndarray]:
        """What episodes say of themselves; nobody else's if shuffled, but as likely as somebody else's."""
        ranges = self._data.amplitude, self._data.phase
        if self._data.metadata == "hidden":
            amplitude, phase = np.full(len(ids), np.nan), np.full(len(ids), np.nan)
        elif self._data.metadata == "shuffled":
            other = keys.uniforms(self._seed, "sinusoid shuffled metadata", split, ids, 2)
            amplitude, phase = (_between(limits, column) for limits, column in zip(ranges, other.T, strict=True))
        elif self._data.metadata == "constant":
            amplitude, phase = (np.full(len(ids), sum(limits) / 2) for limits in ranges)
        return {"amplitude": amplitude, "phase": phase}


def _between(limits: tuple[float, float], uniform: np.ndarray) -> np.ndarray:
    low, high = limits
    return low + (high - low) * uniform
