"""A multilayer perceptron with ReLU: the sinusoid regressor of MAML (two hidden layers of 40 units)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from cluster.flat import Tensors
from metaworker.models.base import Initialiser, Statistics


@dataclass(frozen=True)
class MLP:
    """Layers ``inputs -> hidden … -> outputs``; the last one is linear. Inputs of any shape are flattened."""

    inputs: int
    hidden: tuple[int, ...]
    outputs: int

    @property
    def output_size(self) -> int:
        """Width of the last layer."""
        return self.outputs

    def fused(self) -> MLP:
        """Itself."""
        return self

    def stacked(
        self, parameters: Mapping[str, Tensor], x: Float[Tensor, "task sample *shape"], *, observe: bool
    ) -> tuple[Float[Tensor, "task sample output"], Statistics]:
        """Each task's own network on its own samples."""
        outputs: Tensor = vmap(lambda mine, samples: self(mine, samples, None)[0])(dict(parameters), x)
        return outputs, {}

    def parameters(self, normal: Initialiser) -> Tensors:
        """He-initialised weights (variance 2 / fan in; 1 / fan in for the last layer) and zero biases."""
        widths = (self.inputs, *self.hidden, self.outputs)
        result: Tensors = {}
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            gain = 2.0 if layer < len(self.hidden) else 1.0
            result[f"weight.{layer}"] = normal(f"weight.{layer}", (fan_out, fan_in)) * math.sqrt(gain / fan_in)
            result[f"bias.{layer}"] = torch.zeros(fan_out)
        return result

    def statistics(self) -> Statistics:
        """None: there is no batch-norm."""
        return {}

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        x: Float[Tensor, "sample *shape"],
        statistics: Mapping[str, Tensor] | None,
    ) -> tuple[Float[Tensor, "sample output"], Statistics]:
        """Outputs of the last layer; the statistics are empty."""
        x = x.flatten(1)
        for layer in range(len(self.hidden) + 1):
            x = x @ parameters[f"weight.{layer}"].T + parameters[f"bias.{layer}"]
            if layer < len(self.hidden):
                x = torch.relu(x)
        return x, {}
