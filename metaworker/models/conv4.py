"""Both Conv-4 backbones: four blocks of 3×3 convolution, batch-norm, ReLU, with strides or with max-pooling.

``conv4_strided`` (MAML arXiv 1703.03400, Reptile): stride 2, then the mean over space and a linear head.
``conv4_pool`` (Prototypical Networks arXiv 1703.05175, Matching Networks): 2×2 max-pool; flattened, with a linear head
where the learner needs logits. Convolutions carry no bias: batch-norm's shift stands right behind them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cluster.flat import Tensors
from metaworker.models.base import Initialiser, Statistics
from metaworker.models.layers import batch_norm, conv3x3, fused_batch_norm, native_batch_norm, variance_of

BLOCKS = 4


@dataclass(frozen=True)
class Conv4:
    """A Conv-4 for ``sample_shape`` = (channel, height, width).

    Attributes:
        pools: how many of the first blocks max-pool; ``None`` for stride 2 and the mean over space instead.
        outputs: width of the linear head, or ``None`` for the embedding itself.
        fused_kernels: see ``fused``.
    """

    sample_shape: tuple[int, int, int]
    channels: int
    pools: int | None
    outputs: int | None
    fused_kernels: bool = False

    @property
    def strided(self) -> bool:
        """Whether strides shrink the maps, instead of max-pooling."""
        return self.pools is None

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """Channel, height and width of what the embedding is flattened from."""
        _, height, width = self.sample_shape
        if self.pools is None:
            return self.channels, 1, 1
        for _ in range(self.pools):
            if min(height, width) > 1:
                height, width = height // 2, width // 2
        return self.channels, height, width

    @property
    def embedding_size(self) -> int:
        """Width of what the head sees."""
        return math.prod(self.map_shape)

    @property
    def output_size(self) -> int:
        """Logits, or the embedding's width without a head."""
        return self.embedding_size if self.outputs is None else self.outputs

    def fused(self) -> Conv4:
        """The same function with PyTorch's batch-norm kernel."""
        return replace(self, fused_kernels=True)

    def parameters(self, normal: Initialiser) -> Tensors:
        """Normal weights of Glorot's variance 2 / (fan in + fan out), scales 1, shifts and bias 0."""
        result: Tensors = {}
        inputs = self.sample_shape[0]
        for block in range(BLOCKS):
            deviation = math.sqrt(2 / (9 * (inputs + self.channels)))
            result[f"conv.{block}"] = normal(f"conv.{block}", (self.channels, inputs, 3, 3)) * deviation
            result[f"scale.{block}"] = torch.ones(self.channels)
            result[f"shift.{block}"] = torch.zeros(self.channels)
            inputs = self.channels
        if self.outputs is not None:
            deviation = math.sqrt(2 / (self.embedding_size + self.outputs))
            result["head.weight"] = normal("head.weight", (self.outputs, self.embedding_size)) * deviation
            result["head.bias"] = torch.zeros(self.outputs)
        return result

    def statistics(self) -> Statistics:
        """Running statistics before training: mean 0, variance 1."""
        means = {f"mean.{block}": torch.zeros(self.channels) for block in range(BLOCKS)}
        return means | {f"variance.{block}": torch.ones(self.channels) for block in range(BLOCKS)}

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        x: Float[Tensor, "sample channel height width"],
        statistics: Mapping[str, Tensor] | None,
    ) -> tuple[Float[Tensor, "sample output"], Statistics]:
        """Logits (or embeddings) and the batch statistics that normalised them."""
        used: Statistics = {}
        for block in range(BLOCKS):
            x = conv3x3(x, parameters[f"conv.{block}"], stride=2 if self.strided else 1)
            scale, shift = parameters[f"scale.{block}"], parameters[f"shift.{block}"]
            if self.fused_kernels and statistics is None:
                x, mean, variance = fused_batch_norm(x, scale, shift)
            else:
                given = None if statistics is None else (statistics[f"mean.{block}"], statistics[f"variance.{block}"])
                x, mean, variance = batch_norm(x, scale, shift, given)
            used[f"mean.{block}"], used[f"variance.{block}"] = mean, variance
            x = self._activate(x, block)
        x = x.mean((2, 3)) if self.strided else x.flatten(1)
        if self.outputs is not None:
            x = x @ parameters["head.weight"].T + parameters["head.bias"]
        return x, used

    def stacked(
        self, parameters: Mapping[str, Tensor], x: Float[Tensor, "task sample channel height width"], *, observe: bool
    ) -> tuple[Float[Tensor, "task sample output"], Statistics]:
        """Tasks side by side as groups of channels: the layout in which both kernels take many tasks without a copy."""
        tasks, samples = x.shape[:2]
        used: Statistics = {}
        x = x.transpose(0, 1).flatten(1, 2)
        for block in range(BLOCKS):
            weight = parameters[f"conv.{block}"].flatten(0, 1)
            x = conv3x3(x, weight, stride=2 if self.strided else 1, groups=tasks)
            scale, shift = parameters[f"scale.{block}"].flatten(), parameters[f"shift.{block}"].flatten()
            x, mean, inverse_deviation = native_batch_norm(x, scale, shift)
            if observe:
                used[f"mean.{block}"] = mean.view(tasks, -1)
                used[f"variance.{block}"] = variance_of(inverse_deviation).view(tasks, -1)
            x = self._activate(x, block, in_place=True)
        x = x.mean((2, 3)) if self.strided else x.flatten(1)
        x = x.view(samples, tasks, -1).transpose(0, 1)
        if self.outputs is not None:
            x = torch.baddbmm(parameters["head.bias"][:, None], x, parameters["head.weight"].transpose(1, 2))
        return x, used

    def _activate(self, x: Tensor, block: int, in_place: bool = False) -> Tensor:
        """ReLU, and max-pooling in the first blocks while there is something to pool."""
        x = F.relu(x, inplace=in_place)
        return F.max_pool2d(x, 2) if block < (self.pools or 0) and min(x.shape[-2:]) > 1 else x
