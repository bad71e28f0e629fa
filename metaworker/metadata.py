"""Episode metadata as tensors: numbers as they are, words and text by hashing, what is missing as zeros.

Text has no vocabulary that training could miss: it becomes the sum of its character trigrams, each hashed to a
coordinate and a sign (feature hashing, Weinberger et al. 2009, arXiv 0902.2206), scaled to length 1. Equal categories
so get equal vectors, similar texts similar ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cluster.episodes.types import Episodes
from cluster.flat import Tensors

TEXT_WIDTH = 32
"""Coordinates of an encoded text."""

KNOWN = "/known"
"""Suffix of the column that says which values there are."""


def encode(metadata: Mapping[str, np.ndarray], like: Tensor) -> Tensors:
    """Each column twice: its values ``[episode, *per, width]``, and, as ``name/known``, 1 or 0 ``[episode, *per]``.

    Args:
        metadata: columns ``[episode]`` or ``[episode, way]``: numbers, of which NaN is missing (width 1), or text, of
            which "" is missing (width `TEXT_WIDTH`).
        like: gives the device and the dtype.
    """
    encoded: Tensors = {}
    for name, column in metadata.items():
        if column.dtype.kind == "U":
            known, values = column != "", _texts(column)
        else:
            numbers = column.astype(np.float64)
            known = np.isfinite(numbers)
            values = np.where(known, numbers, 0.0)[..., None]
        encoded[name] = torch.from_numpy(values).to(like)
        encoded[name + KNOWN] = torch.from_numpy(known).to(like)
    return encoded


def _texts(column: np.ndarray) -> np.ndarray:
    distinct, places = np.unique(column, return_inverse=True)
    return np.stack([_text(str(text)) for text in distinct])[places.reshape(column.shape)]


@lru_cache(maxsize=4096)
def _text(text: str) -> np.ndarray:
    vector = np.zeros(TEXT_WIDTH)
    padded = f"\x02{text.casefold()}\x03"
    for start in range(len(padded) - 2 if text else 0):
        digest = hashlib.sha256(padded[start : start + 3].encode()).digest()
        vector[digest[0] % TEXT_WIDTH] += 1.0 if digest[1] % 2 else -1.0
    length = np.linalg.norm(vector)
    return vector / length if length else vector


def episode_features(episodes: Episodes, columns: Sequence[str], like: Tensor) -> Float[Tensor, "episode features"]:
    """The `task_features` of each episode, on the device and in the dtype of ``like``."""
    metadata = encode(episodes.metadata, like)
    each = ({name: rows[e] for name, rows in metadata.items()} for e in range(len(episodes)))
    return torch.stack([task_features(one, columns, like) for one in each])


def features_width(columns: Sequence[str]) -> int:
    """Length of `task_features`."""
    return len(columns) * (TEXT_WIDTH + 1)


def task_features(metadata: Mapping[str, Tensor], columns: Sequence[str], like: Tensor) -> Float[Tensor, "features"]:
    """What is known of one task as a vector: each column's value, the mean over classes where they have one, and how
    much of it is known. A column that is missing, or that the task does not have, is zeros.

    Args:
        metadata: of one episode, as `encode` gives it.
        columns: which to take, in this order.
        like: gives the device and the dtype of columns that are not there.
    """
    parts = []
    for name in columns:
        if name not in metadata:
            parts.append(like.new_zeros(TEXT_WIDTH + 1))
            continue
        values, known = metadata[name], metadata[name + KNOWN]
        rows, there = values.reshape(-1, values.shape[-1]), known.reshape(-1)
        mean = rows.sum(0) / there.sum().clamp_min(1)
        parts += [mean, like.new_zeros(TEXT_WIDTH - len(mean)), there.mean()[None]]
    return torch.cat(parts) if parts else like.new_zeros(0)
