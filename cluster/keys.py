"""All randomness, drawn by key: (seed, split, episode id, purpose) decides every number, on any machine.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), counter-based:
a block of four 32-bit words is a pure function of a 64-bit key and a 128-bit counter, so streams need no state and
any episode is drawn without drawing those before it.

    key      the first 64 bits of SHA-256 over (seed, split, purpose)
    counter  (episode id low, episode id high, block, lane); a lane is an independent stream inside an episode,
             for instance one per class

Every stream is prefix-stable: asking for more words of it never changes the first ones. NumPy serves as an array
library only: its ``Generator`` methods may change their streams between versions, so they are not used.
The words are the same bits everywhere. ``normals`` goes through ``log``, ``sqrt``, ``cos`` and ``sin``, whose last bit
may differ between platforms in float64.

Parts: ``philox4x32`` (the generator), ``words`` / ``lane_words`` (streams), ``uniforms`` / ``normals`` / ``choose``
(numbers from them), ``tensor_uniforms`` / ``tensor_normals`` (named tensors, for initial parameters).
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt32
from torch import Tensor

_LOW32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
_WEYL_STEPS = np.arange(_ROUNDS, dtype=np.uint64)[:, None] * _WEYL
_TENSOR_ROW = 1024
"""Elements of a named tensor drawn under one counter "episode"; part of the stream's definition."""
_TENSOR_ROWS_AT_ONCE = 64
"""Keeps the temporaries of a large tensor in cache; does not change the numbers."""


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 over many counters at once.

    Args:
        counter: 32-bit words in uint64, ``[4, *n]``.
        key: 32-bit words in uint64, ``[2]``.

    Returns:
        32-bit words in uint64, ``[4, *n]``.
    """
    spread = (-1, 2) + (1,) * (counter.ndim - 1)
    schedule = ((key + _WEYL_STEPS) & _LOW32).reshape(spread)
    multipliers = _MULTIPLIERS.reshape(spread[1:])
    even, odd = counter[0::2], counter[1::2]
    for round_key in schedule:
        product = even * multipliers
        even = (product >> _SHIFT32)[::-1] ^ odd
        even ^= round_key
        product &= _LOW32
        odd = product[::-1]
    mixed = np.empty_like(counter)
    mixed[0::2], mixed[1::2] = even, odd
    return mixed


@lru_cache(maxsize=4096)
def stream_key(seed: int, split: str, purpose: str) -> tuple[int, int]:
    """The Philox key of a stream: two 32-bit words from SHA-256 over (seed, split, purpose).

    Two different triples share a key with probability 2⁻⁶⁴.
    """
    name = json.dumps(["metafleet.keys/1", seed, split, purpose])
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def lane_words(
    seed: int, purpose: str, split: str, episode_ids: Int64[np.ndarray, " episode"], lanes: int, count: int
) -> UInt32[np.ndarray, "episode lane count"]:
    """The first ``count`` words of lanes 0 … ``lanes`` − 1 of every episode, uint32 ``[episode, lane, count]``."""
    blocks = -(-count // 4)
    ids = np.asarray(episode_ids, dtype=np.int64).astype(np.uint64)[:, None, None]
    counter = np.empty((4, len(ids), lanes, blocks), dtype=np.uint64)
    counter[0] = ids & _LOW32
    counter[1] = ids >> _SHIFT32
    counter[2] = np.arange(blocks, dtype=np.uint64)
    counter[3] = np.arange(lanes, dtype=np.uint64)[:, None]
    mixed = philox4x32(counter, np.array(stream_key(seed, split, purpose), dtype=np.uint64))
    drawn = np.empty((len(ids), lanes, blocks, 4), dtype=np.uint32)
    drawn[...] = np.moveaxis(mixed, 0, -1)
    return drawn.reshape(len(ids), lanes, blocks * 4)[..., :count]


def words(
    seed: int, purpose: str, split: str, episode_ids: Int64[np.ndarray, " episode"], count: int
) -> UInt32[np.ndarray, "episode count"]:
    """The first ``count`` words of every episode's stream (its lane 0), uint32 ``[episode, count]``."""
    return lane_words(seed, purpose, split, episode_ids, 1, count)[:, 0]


def to_uniforms(pairs: UInt32[np.ndarray, "*n two_k"]) -> Float64[np.ndarray, "*n k"]:
    """Numbers in [0, 1) with 53 random bits, each from two consecutive words."""
    high, low = pairs[..., 0::2] >> np.uint32(5), pairs[..., 1::2] >> np.uint32(6)
    return (high * 67108864.0 + low) * 2.0**-53


def uniforms(
    seed: int, purpose: str, split: str, episode_ids: Int64[np.ndarray, " episode"], count: int
) -> Float64[np.ndarray, "episode count"]:
    """Uniform numbers in [0, 1) with 53 random bits, float64 ``[episode, count]``."""
    return to_uniforms(words(seed, purpose, split, episode_ids, 2 * count))


def normals(
    seed: int, purpose: str, split: str, episode_ids: Int64[np.ndarray, " episode"], count: int
) -> Float64[np.ndarray, "episode count"]:
    """Standard normal numbers by Box–Muller, float64 ``[episode, count]``.

    Numbers 2i and 2i + 1 are √(−2 ln(1 − u)) · (cos 2πv, sin 2πv) with (u, v) the stream's uniforms 2i and 2i + 1.
    """
    pairs = uniforms(seed, purpose, split, episode_ids, count + count % 2)
    radius, angle = np.sqrt(-2.0 * np.log1p(-pairs[:, 0::2])), 2.0 * math.pi * pairs[:, 1::2]
    drawn = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return drawn.reshape(len(pairs), -1)[:, :count]


def choose(drawn: UInt32[np.ndarray, "*row k"], n: np.ndarray | int) -> Int64[np.ndarray, "*row k"]:
    """``k`` distinct indices out of 0 … n − 1 per row, in random order; word i decides the i-th pick.

    Pick i is the ⌊word · (n − i) / 2³²⌋-th of the indices not picked yet, so fewer words give a prefix of the same
    picks. Each pick's probabilities are off by less than 2⁻³², which is n·2⁻³² of their value.

    Args:
        drawn: random words, uint32 ``[*row, k]``.
        n: how many indices there are, at least k and below 2³¹, int64 ``[*row]`` or a scalar.

    Raises:
        ValueError: some n is smaller than k.
    """
    k = drawn.shape[-1]
    left = np.asarray(n, dtype=np.int64)[..., None] - np.arange(k)
    if left.size and left.min() < 1:
        raise ValueError(f"cannot choose {k} distinct indices out of {int(left.min()) + k - 1}")
    ranks = (drawn.astype(np.uint64) * left.astype(np.uint64)) >> _SHIFT32
    picks = np.ascontiguousarray(np.moveaxis(ranks, -1, 0).astype(np.int64))
    # Pick i counts only what was left before it: undo that from the last pick to the first (a Lehmer code).
    for i in range(k - 2, -1, -1):
        later = picks[i + 1 :]
        later += later >= picks[i]
    return np.moveaxis(picks, 0, -1)


def tensor_uniforms(seed: int, purpose: str, name: str, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """A named float32 tensor, uniform in [low, high), decided by (seed, purpose, name)."""
    return _tensor(seed, purpose, name, shape, normal=False) * (high - low) + low


def tensor_normals(seed: int, purpose: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """A named float32 tensor of standard normal numbers, decided by (seed, purpose, name)."""
    return _tensor(seed, purpose, name, shape, normal=True)


def _tensor(seed: int, purpose: str, name: str, shape: tuple[int, ...], normal: bool) -> Tensor:
    """Rows of 1024 elements, row r drawn as episode id r, rounded to float32 and cut to ``shape``."""
    size = math.prod(shape)
    rows = -(-size // _TENSOR_ROW)
    flat = np.empty((rows, _TENSOR_ROW), dtype=np.float32)
    draw = normals if normal else uniforms
    for start in range(0, rows, _TENSOR_ROWS_AT_ONCE):
        ids = np.arange(start, min(start + _TENSOR_ROWS_AT_ONCE, rows), dtype=np.int64)
        flat[start : start + len(ids)] = draw(seed, purpose, f"tensor/{name}", ids, _TENSOR_ROW)
    return torch.from_numpy(flat.reshape(-1)[:size].reshape(shape))
