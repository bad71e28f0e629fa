"""Layers as pure functions that vectorise under ``torch.func.vmap`` and can be differentiated twice.

`batch_norm` is written from elementary operations. PyTorch's fused kernel must not be used in its place: under
``vmap`` its *second* derivative is wrong (measured with torch 2.15: meta-gradients off by 4e-3 where these agree with
plain nested autograd to 1e-10 in float64). Outside ``vmap`` the kernel is right to second order, and faster for large
batches: `fused_batch_norm`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-5
"""Added to the variance before its square root, as in PyTorch and the papers' code."""


def conv3x3(
    x: Float[Tensor, "sample inputs height width"],
    weight: Float[Tensor, "outputs group_inputs 3 3"],
    stride: int,
    groups: int = 1,
) -> Float[Tensor, "sample outputs out_height out_width"]:
    """3×3 convolution with padding 1 and no bias (batch-norm's shift stands behind it)."""
    return F.conv2d(x, weight, stride=stride, padding=1, groups=groups)


def batch_norm(
    x: Float[Tensor, "sample channel height width"],
    scale: Float[Tensor, "channel"],
    shift: Float[Tensor, "channel"],
    given: tuple[Float[Tensor, "channel"], Float[Tensor, "channel"]] | None,
) -> tuple[Float[Tensor, "sample channel height width"], Float[Tensor, "channel"], Float[Tensor, "channel"]]:
    """``(x − mean) / √(variance + ε) · scale + shift``, and the mean and biased variance of each channel.

    These are ``given``, or else the batch's own over samples and positions; all three results are differentiable.
    """
    # Sums times 1/count, and one centred copy for both uses: full-size passes over memory are what this layer costs.
    inverse_count = 1 / (x.shape[0] * x.shape[2] * x.shape[3])
    mean = x.sum((0, 2, 3)) * inverse_count if given is None else given[0]
    centred = x - mean[None, :, None, None]
    variance = (centred * centred).sum((0, 2, 3)) * inverse_count if given is None else given[1]
    factor = torch.rsqrt(variance + EPSILON) * scale
    return centred * factor[None, :, None, None] + shift[None, :, None, None], mean, variance


def fused_batch_norm(
    x: Float[Tensor, "sample channel height width"], scale: Float[Tensor, "channel"], shift: Float[Tensor, "channel"]
) -> tuple[Float[Tensor, "sample channel height width"], Float[Tensor, "channel"], Float[Tensor, "channel"]]:
    """`batch_norm` by the batch's own statistics with PyTorch's kernel: not under ``vmap``, statistics detached."""
    y, mean, inverse_deviation = native_batch_norm(x, scale, shift)
    return y, mean, variance_of(inverse_deviation)


def native_batch_norm(
    x: Float[Tensor, "sample channel height width"], scale: Float[Tensor, "channel"], shift: Float[Tensor, "channel"]
) -> tuple[Float[Tensor, "sample channel height width"], Float[Tensor, "channel"], Float[Tensor, "channel"]]:
    """PyTorch's kernel: normalised samples, and of each channel the mean and 1 / √(variance + ε), both detached."""
    # Not with channels last, though the kernel is faster so: the convolutions that follow then lose three digits
    # (float32 meta-gradients 5e-3 off instead of 1e-6, measured with torch 2.15 on a CPU with AVX-512).
    # Of maps of 1×1 its gradient is wrong where a scale has gaps between its elements, as rows out of `vmap` may have
    # (torch 2.15).
    scale, shift = scale.contiguous(), shift.contiguous()
    y, mean, inverse_deviation = torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, EPSILON)
    return y, mean.detach(), inverse_deviation.detach()


def variance_of(inverse_deviation: Float[Tensor, "channel"]) -> Float[Tensor, "channel"]:
    """The variance in 1 / √(variance + ε)."""
    return (inverse_deviation**-2 - EPSILON).clamp_min(0)


def cross_entropy(logits: Float[Tensor, "sample way"], labels: Tensor) -> Float[Tensor, ""]:
    """Mean cross-entropy (nats) of integer ``labels`` ``[sample]``."""
    return -torch.log_softmax(logits, dim=-1).gather(-1, labels[:, None]).mean()
