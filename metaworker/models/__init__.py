"""Backbones: one family per file, each a pure function of named parameters (``base.Backbone``)."""

from __future__ import annotations

import math

from cluster.config.sections import MLP as MLPConfig
from cluster.config.sections import Conv4Pool, Conv4Strided, Model
from cluster.errors import ConfigError
from metaworker.models.base import Backbone
from metaworker.models.conv4 import Conv4
from metaworker.models.mlp import MLP

EMBEDDING = 64
"""Embedding width of an MLP whose learner takes no logits."""


def build_backbone(model: Model, sample_shape: tuple[int, ...], outputs: int | None) -> Backbone:
    """The backbone that ``model`` describes, for samples of ``sample_shape``.

    Args:
        outputs: width of the head (classes, or 1 for scalar regression), or ``None`` for an embedding.

    Raises:
        ConfigError: an image backbone for samples that are no images.
    """
    if isinstance(model, MLPConfig):
        return MLP(math.prod(sample_shape), model.hidden, EMBEDDING if outputs is None else outputs)
    if len(sample_shape) != 3:
        raise ConfigError(f"model.type {model.type} takes images, the samples have shape {sample_shape}: use mlp")
    assert isinstance(model, Conv4Strided | Conv4Pool)
    channel, height, width = sample_shape
    pools = None if isinstance(model, Conv4Strided) else model.pools
    return Conv4((channel, height, width), model.channels, pools, outputs)
