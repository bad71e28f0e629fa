"""The two rivals of the inner loop: MAML one episode after another, by plain autograd and by the ``higher`` package.

Both train the strided Conv-4 of ``metaworker.models.conv4`` (3×3 convolutions of stride 2 without bias, batch-norm on
batch statistics, ReLU, mean over space, linear head), written with PyTorch's native kernels. They give the
meta-gradient summed over the episodes, ``Σ ∇_θ L_query(φ_T)`` with ``φ ← φ − α ∇L_support(φ)``, as one flat tensor in
the order of the worker's parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import higher
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.episodes.types import Episodes

BLOCKS = 4


def plain_gradient(
    theta: Sequence[Tensor], episodes: Episodes, inner_lr: float, inner_steps: int, first_order: bool
) -> Tensor:
    """By ``torch.autograd.grad``.

    Args:
        theta: for each block convolution weight, scale and shift; then the head's weight and bias.
        episodes: to differentiate.
        inner_lr: α.
        inner_steps: T.
        first_order: whether the inner gradients are constants.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in theta]
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for e in range(len(episodes)):
        adapted = list(leaves)
        for _ in range(inner_steps):
            loss = F.cross_entropy(_forward(adapted, episodes.support_x[e]), episodes.support_y[e])
            gradient = torch.autograd.grad(loss, adapted, create_graph=not first_order)
            adapted = [p - inner_lr * g for p, g in zip(adapted, gradient, strict=True)]
            if first_order:
                adapted = [p.detach().requires_grad_() for p in adapted]
        loss = F.cross_entropy(_forward(adapted, episodes.query_x[e]), episodes.query_y[e])
        found = torch.autograd.grad(loss, adapted if first_order else leaves)
        for sum_, part in zip(total, found, strict=True):
            sum_ += part
    return torch.cat([part.reshape(-1) for part in total])


def _forward(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    for block in range(BLOCKS):
        weight, scale, shift = parameters[3 * block : 3 * block + 3]
        x = F.conv2d(x, weight, stride=2, padding=1)
        x = torch.relu(F.batch_norm(x, None, None, scale, shift, training=True))
    return F.linear(x.mean((2, 3)), parameters[-2], parameters[-1])


def module(theta: Sequence[Tensor]) -> nn.Module:
    """The network as a module, for ``higher``, with these parameters."""
    layers: list[nn.Module] = []
    for block in range(BLOCKS):
        outputs, inputs = theta[3 * block].shape[:2]
        layers.append(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False))
        layers += [nn.BatchNorm2d(outputs, track_running_stats=False), nn.ReLU()]
    way, width = theta[-2].shape
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, way)).to(theta[0].dtype)
    with torch.no_grad():
        for parameter, tensor in zip(network.parameters(), theta, strict=True):
            parameter.copy_(tensor)
    return network


def higher_gradient(
    network: nn.Module, episodes: Episodes, inner_lr: float, inner_steps: int, first_order: bool
) -> Tensor:
    """By ``higher``; arguments as for ``plain_gradient``."""
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=inner_lr)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for e in range(len(episodes)):
        with higher.innerloop_ctx(
            network, optimizer, copy_initial_weights=False, track_higher_grads=not first_order
        ) as (functional, inner):
            for _ in range(inner_steps):
                inner.step(F.cross_entropy(functional(episodes.support_x[e]), episodes.support_y[e]))
            loss = F.cross_entropy(functional(episodes.query_x[e]), episodes.query_y[e])
            found = torch.autograd.grad(loss, list(functional.parameters()) if first_order else parameters)
        for sum_, part in zip(total, found, strict=True):
            sum_ += part
    return torch.cat([part.reshape(-1) for part in total])
