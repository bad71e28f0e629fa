"""Random affine distortion of training images, decided by key like everything else of an episode.

    p = F⁻¹ (p′ − t)    where the pixel at p′ of a distorted image comes from,  F = s · R(θ) · [1 tan φ; 0 1]

about the image's centre, bilinear, zeros outside. Five numbers a sample, uniform in [−1, 1): θ, s − 1, the two parts of
t and φ as shares of their limits; purpose "augment", one lane a class slot, ten words a sample. So growing ``query`` or
``way`` changes no sample that was there, and neither does another limit change the other numbers.

Matrices are float64, rounded to float32; from there on every pixel is computed by itself, so an image's bits do not
depend on those beside it. ``cos``, ``sin`` and ``tan`` may differ between platforms in the last bit of float64.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn.functional import grid_sample

from cluster import keys
from cluster.config.sections import Augment

OFF = Augment()
"""No distortion: nothing is drawn and nothing computed."""
NUMBERS = 5
"""Turn, change of size, shift to the right, shift down, shear."""


def draw(
    seed: int, split: str, episode_ids: Int64[np.ndarray, " episode"], way: int, samples: int
) -> Float64[np.ndarray, "episode way sample 5"]:
    """The ``NUMBERS`` of every sample, uniform in [−1, 1), float64 ``[episode, way, sample, 5]``."""
    words = keys.lane_words(seed, "augment", split, episode_ids, way, 2 * NUMBERS * samples)
    return 2.0 * keys.to_uniforms(words).reshape(len(episode_ids), way, samples, NUMBERS) - 1.0


def inverse_maps(
    limits: Augment, numbers: Float64[np.ndarray, "*n 5"], height: int, width: int
) -> Float32[np.ndarray, "*n 2 3"]:
    """Where each pixel of a distorted image comes from: x = ax′ + by′ + c and y = dx′ + ey′ + f.

    Each map is [[a, b, c], [d, e, f]]. Coordinates go from −1 to 1 over the image's ``width`` and ``height``, y
    downwards; positive turns are counter-clockwise.
    """
    turn, size, right, down, shear = np.moveaxis(numbers, -1, 0)
    cosine, sine = np.cos(np.radians(limits.rotate) * turn), np.sin(np.radians(limits.rotate) * turn)
    slant = np.tan(np.radians(limits.shear) * shear)
    scale = 1.0 + limits.scale * size
    a, b = (cosine - slant * sine) / scale, -(sine + slant * cosine) / scale * (height / width)
    d, e = sine / scale * (width / height), cosine / scale
    x, y = 2.0 * limits.shift * right, 2.0 * limits.shift * down
    rows = [[a, b, -(a * x + b * y)], [d, e, -(d * x + e * y)]]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2).astype(np.float32)


def distort(
    images: Float[Tensor, "image channel height width"], maps: Float[Tensor, "image 2 3"]
) -> Float[Tensor, "image channel height width"]:
    """Each image in [0, 1] distorted by its inverse map (see ``inverse_maps``); values stay in [0, 1]."""
    height, width = images.shape[2:]
    across, along, offset = maps[:, :, :, None, None].unbind(2)
    # Not affine_grid, which multiplies matrices: that takes ten times as long, and a product's bits may vary by batch.
    grid = across * _centres(width) + (along * _centres(height)[:, None] + offset)
    sampled = grid_sample(images, grid.permute(0, 2, 3, 1), "bilinear", "zeros", align_corners=False)
    return sampled.clamp_(max=1)


def _centres(pixels: int) -> Float[Tensor, " pixel"]:
    """The middles of ``pixels`` equal parts of [−1, 1]."""
    return ((2.0 * torch.arange(pixels, dtype=torch.float64) + 1.0) / pixels - 1.0).to(torch.float32)
