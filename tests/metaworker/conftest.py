"""What the learners' tests share: episodes of small pictures, and networks written plainly, independent of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.config import sections
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.learners.base import Learner

SIDE = 12
"""Height and width of the pictures, where no other is asked for."""

PlainNet = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(parameters, x, statistics to normalise with or ``None``) -> (outputs, the batch statistics of every block)."""


@pytest.fixture(scope="session")
def pictures() -> Callable[..., Episodes]:
    """Episodes of one-channel pictures: a pattern for each class of each episode, with noise."""

    def draw(
        episodes: int, way: int = 5, shot: int = 1, query: int = 3, noise: float = 0.7, side: int = SIDE, seed: int = 0
    ) -> Episodes:
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randn(episodes, way, 1, 1, side, side, generator=generator, dtype=torch.float64)

        def samples(count: int) -> tuple[Tensor, Tensor]:
            drawn = torch.randn(episodes, way, count, 1, side, side, generator=generator, dtype=torch.float64)
            labels = torch.arange(way).repeat_interleave(count).repeat(episodes, 1)
            return (patterns + noise * drawn).flatten(1, 2), labels

        return Episodes(np.arange(100, 100 + episodes), way, *samples(shot), *samples(query), {})

    return draw


@pytest.fixture(scope="session")
def waves() -> Callable[..., Episodes]:
    """Regression episodes: sinusoids of any amplitude and phase on [−5, 5]."""

    def draw(episodes: int, shot: int = 6, query: int = 9) -> Episodes:
        generator = torch.Generator().manual_seed(0)
        amplitude = torch.rand(episodes, 1, 1, generator=generator, dtype=torch.float64) * 3 + 0.5
        phase = torch.rand(episodes, 1, 1, generator=generator, dtype=torch.float64) * 3

        def samples(count: int) -> tuple[Tensor, Tensor]:
            x = torch.rand(episodes, count, 1, generator=generator, dtype=torch.float64) * 10 - 5
            return x, amplitude * torch.sin(x - phase)

        return Episodes(np.arange(episodes), 1, *samples(shot), *samples(query), {})

    return draw


@pytest.fixture(scope="session")
def perturbed() -> Callable[[Learner], tuple[Tensors, Tensors]]:
    """Parameters and state of a learner in float64, moved off the zeros and ones that they start with."""

    def draw(learner: Learner) -> tuple[Tensors, Tensors]:
        generator = torch.Generator().manual_seed(3)

        def noise(tensor: Tensor) -> Tensor:
            return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

        theta = {name: tensor.double() + 0.1 * noise(tensor) for name, tensor in learner.meta_parameters(3).items()}
        state = learner.initial_state()
        # Variances stay positive, and a net that is normalised by such statistics stays alive.
        averages = {name: 0.2 * tensor.double() + 0.02 * noise(tensor) for name, tensor in state.items()}
        kept = {name: tensor.double() + noise(tensor) for name, tensor in state.items() if name.startswith("head/")}
        counts = {name: torch.full_like(kept[name], 2.0) for name in kept if name == "head/written"}
        return theta, averages | kept | counts

    return draw


@pytest.fixture(scope="session")
def plain_net() -> Callable[[sections.Model], PlainNet]:
    """The forward pass of a configured model by ``torch.nn.functional``, from the papers and the parameters' names."""

    def net(model: sections.Model) -> PlainNet:
        if isinstance(model, sections.Conv4Pool):
            return partial(_pooled, pools=model.pools)
        return _mlp if isinstance(model, sections.MLP) else _strided

    return net


def _strided(parameters: Mapping[str, Tensor], x: Tensor, statistics: Mapping[str, Tensor] | None = None):
    seen: dict[str, Tensor] = {}
    for block in range(4):
        x = F.conv2d(x, parameters[f"conv.{block}"], stride=2, padding=1)
        x = F.relu(_batch_norm(parameters, x, block, statistics, seen))
    return _head(parameters, F.adaptive_avg_pool2d(x, 1).flatten(1)), seen


def _pooled(
    parameters: Mapping[str, Tensor], x: Tensor, statistics: Mapping[str, Tensor] | None = None, pools: int = 4
):
    seen: dict[str, Tensor] = {}
    for block in range(4):
        x = F.conv2d(x, parameters[f"conv.{block}"], padding=1)
        x = F.relu(_batch_norm(parameters, x, block, statistics, seen))
        # The 12 × 12 pictures of these tests are 1 × 1 behind the third pool.
        x = F.max_pool2d(x, 2) if block < min(pools, 3) else x
    return _head(parameters, x.flatten(1)), seen


def _mlp(parameters: Mapping[str, Tensor], x: Tensor, statistics: Mapping[str, Tensor] | None = None):
    layers = sum(name.startswith("weight.") for name in parameters)
    x = x.flatten(1)
    for layer in range(layers):
        x = F.linear(x, parameters[f"weight.{layer}"], parameters[f"bias.{layer}"])
        x = F.relu(x) if layer < layers - 1 else x
    return x, {}


def _head(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, parameters["head.weight"], parameters["head.bias"]) if "head.weight" in parameters else x


def _batch_norm(
    parameters: Mapping[str, Tensor],
    x: Tensor,
    block: int,
    statistics: Mapping[str, Tensor] | None,
    seen: dict[str, Tensor],
) -> Tensor:
    scale, shift = parameters[f"scale.{block}"], parameters[f"shift.{block}"]
    rows = x.transpose(0, 1).flatten(1)
    seen[f"mean.{block}"], seen[f"variance.{block}"] = rows.mean(1), rows.var(1, unbiased=False)
    if statistics is None:
        return F.batch_norm(x, None, None, scale, shift, training=True)
    # F.batch_norm gives its running statistics no gradient; those of a support set have one.
    mean, variance = (statistics[f"{name}.{block}"].reshape(-1, 1, 1) for name in ("mean", "variance"))
    return (x - mean) / torch.sqrt(variance + 1e-5) * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
