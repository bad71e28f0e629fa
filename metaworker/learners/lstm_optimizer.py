"""An LSTM that optimizes the learner (Ravi & Larochelle, ICLR 2017; Andrychowicz et al. 2016, arXiv 1606.04474).

One small LSTM, shared by all coordinates θ of the network, sees each coordinate's gradient (p = 10):

    prep(x) = (max(log|x| / p, −1), min(max(eᵖ x, −1), 1))

    ``cell``:    hₜ = LSTM(prep(∇ₜ), prep(lossₜ)),   θₜ = fₜ ⊙ θₜ₋₁ − iₜ ⊙ ∇ₜ,
                 iₜ = σ(W_I [hₜ, θₜ₋₁, iₜ₋₁] + b_I),   fₜ = σ(W_F [hₜ, θₜ₋₁, fₜ₋₁] + b_F):
                 θ is the cell of a second LSTM, whose candidate is −∇
    ``hidden``:  hₜ = w · LSTM(prep(∇ₜ)),   θₜ = θₜ₋₁ − α hₜ

∇ₜ and lossₜ are those of the whole support set at θₜ₋₁. Meta-parameters are θ₀, the weights of the LSTM and those of
the gates, or w and α; the meta-gradient is ∇ Σ_episodes L_query(θ_T). As in the papers, ∇ₜ and lossₜ count as constants
there: a ``surrogate``; with their derivatives it is ``exact``. Batch statistics are those of the set at hand, or as the
batch-norm mode says: none passes from one episode to another.

States are ``[*task, coordinate]`` and ``[*task, coordinate, hidden]``. Depart from the papers: both forms start as
gradient descent on a common step size; ``hidden`` has one layer of LSTM instead of two and learns θ₀ as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from cluster import keys
from cluster.episodes.types import Episodes
from cluster.flat import FlatSpec, Tensors
from metaworker.learners.base import Context, GradientKind, ShardResult, Task
from metaworker.learners.gradient_based import GradientBased, Network
from metaworker.learners.stacked import Scores, Stack, shard_result
from metaworker.learners.vectorise import differentiate
from metaworker.models.base import Initialiser
from metaworker.models.recurrent import lstm_cell, lstm_parameters

P = 10.0
"""Gradients and losses below e⁻ᵖ are small."""
FORGET_BIAS = 5.0
"""b_F at first: the forget gates are 0.993."""
GATE_DEVIATION = 0.01
"""Standard deviation of the initial W_I and W_F; published code draws them uniformly within ±0.01."""
BLOCK = 4096
"""Coordinates that the LSTM takes at once outside ``vmap``: their gates stay in a CPU core's cache."""
RULE = "optimizer/"
"""Prefix of the rule's meta-parameters; the others are θ₀."""

State = tuple[Tensor, ...]
"""A rule's state of every coordinate; the first tensor is θ itself, ``[*task, coordinate]``."""


@runtime_checkable
class Rule(Protocol):
    """How one coordinate is updated, the same for all."""

    def parameters(self, normal: Initialiser) -> Tensors:
        """Initial weights, drawn by key."""
        ...

    def start(self, theta: Float[Tensor, "*task coordinate"]) -> State:
        """The state before the first step."""
        ...

    def step(
        self,
        weights: Mapping[str, Tensor],
        state: State,
        gradient: Float[Tensor, "*task coordinate"],
        loss: Float[Tensor, "*task coordinate"],
    ) -> State:
        """The state after a step, given the gradient and loss at its θ."""
        ...


@dataclass(frozen=True)
class CellRule:
    """The learner's parameters are the cell of the meta-LSTM; its state is (θ, h, c, i, f)."""

    hidden: int
    initial_step: float
    """Input gate at first."""

    def parameters(self, normal: Initialiser) -> Tensors:
        """Gates that make gradient descent at first, but for small random weights."""
        result = lstm_parameters("lstm", 4, self.hidden, normal)
        for name, bias in (("input", math.log(self.initial_step / (1 - self.initial_step))), ("forget", FORGET_BIAS)):
            result[f"{name}.weight"] = normal(f"{name}.weight", (self.hidden + 2,)) * GATE_DEVIATION
            result[f"{name}.bias"] = torch.full((1,), bias)
        return result

    def start(self, theta: Float[Tensor, "*task coordinate"]) -> State:
        """θ₀ and zeros."""
        zeros = torch.zeros_like(theta)
        wide = zeros[..., None].expand(*theta.shape, self.hidden)
        return theta, wide, wide, zeros, zeros

    def step(
        self,
        weights: Mapping[str, Tensor],
        state: State,
        gradient: Float[Tensor, "*task coordinate"],
        loss: Float[Tensor, "*task coordinate"],
    ) -> State:
        """θ ← f θ − i ∇."""
        theta, h, c, i, f = state
        h, c = lstm_cell(weights, "lstm", torch.cat([preprocessed(gradient), preprocessed(loss)], -1), (h, c))

        def gate(name: str, before: Tensor) -> Tensor:
            inputs = torch.cat([h, theta[..., None], before[..., None]], -1)
            return torch.sigmoid(inputs @ weights[f"{name}.weight"] + weights[f"{name}.bias"])

        i, f = gate("input", i), gate("forget", f)
        return f * theta - i * gradient, h, c, i, f


@dataclass(frozen=True)
class HiddenRule:
    """The LSTM's output is the update; its state is (θ, h, c)."""

    hidden: int
    initial_step: float
    """α at first."""

    def parameters(self, normal: Initialiser) -> Tensors:
        """Random units, and a first one that is read alone and passes the gradient on, clipped softly at e².

        Its input gate is σ(log|∇| − 2), its candidate the sign; its forget gate is nearly closed, its output gate open.
        """
        result = lstm_parameters("lstm", 2, self.hidden, normal)
        weight, bias = result["lstm.weight"].clone(), result["lstm.bias"].clone()
        rows = torch.arange(4) * self.hidden
        weight[rows], bias[rows] = 0.0, torch.tensor([-2.0, -3.0, 0.0, 3.0])
        weight[0, 0], weight[2 * self.hidden, 1] = P, 3.0
        read = torch.zeros(self.hidden)
        read[0] = math.exp(2) / (math.tanh(3) * torch.sigmoid(torch.tensor(3.0)))
        step = torch.full((1,), self.initial_step)
        return {"lstm.weight": weight, "lstm.bias": bias, "read.weight": read, "step": step}

    def start(self, theta: Float[Tensor, "*task coordinate"]) -> State:
        """θ₀ and zeros."""
        wide = torch.zeros_like(theta)[..., None].expand(*theta.shape, self.hidden)
        return theta, wide, wide

    def step(
        self,
        weights: Mapping[str, Tensor],
        state: State,
        gradient: Float[Tensor, "*task coordinate"],
        loss: Float[Tensor, "*task coordinate"],
    ) -> State:
        """θ ← θ − α w · h; the loss is not looked at."""
        theta, h, c = state
        h, c = lstm_cell(weights, "lstm", preprocessed(gradient), (h, c))
        return theta - weights["step"] * (h @ weights["read.weight"]), h, c


def preprocessed(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any 2"]:
    """(log|x| / p, sign x) for |x| ≥ e⁻ᵖ and (−1, eᵖ x) below, which is continuous."""
    size = torch.log(x.abs().clamp_min(math.exp(-P))) / P
    return torch.stack([size, (x * math.exp(P)).clamp(-1, 1)], -1)


@dataclass(frozen=True)
class LSTMOptimizer(GradientBased):
    """A learned rule that optimizes a network from a learned start."""

    network: Network
    rule: Rule
    inner_steps: int
    eval_steps: int
    first_order: bool

    @property
    def kind(self) -> GradientKind:
        """``exact`` in second order."""
        return "surrogate" if self.first_order else "exact"

    def meta_parameters(self, seed: int) -> Tensors:
        """The network's initial parameters and the rule's."""
        weights = self.rule.parameters(lambda name, shape: keys.tensor_normals(seed, "init", RULE + name, shape))
        return self.network.parameters(seed) | {RULE + name: tensor for name, tensor in weights.items()}

    def adapt(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        support_x: Shaped[Tensor, "support *sample"],
        support_y: Tensor,
        metadata: Mapping[str, Tensor],
    ) -> Sequence[Task]:
        """``eval_steps`` steps of the rule on the support set."""
        given = self.network.evaluation_statistics(state)
        trajectory = self._trajectory(theta, support_x, support_y, given, self.eval_steps)
        return [self.network.task(parameters, support_x, given) for parameters in trajectory]

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Differentiate the query loss after ``inner_steps`` steps."""
        if not self.first_order:
            fused = self.network.fused()
            looped = fused.score if fused else None
            return differentiate(theta, episodes, context.chunk, self.network.score, self._adapt, looped)
        gradient = {name: tensor.new_zeros(tensor.shape) for name, tensor in theta.items()}
        scores: list[Scores] = []
        for start in range(0, len(episodes), context.chunk):
            found, score = self._first_order(theta, episodes.chunk(start, start + context.chunk))
            gradient = {name: total + found[name] for name, total in gradient.items()}
            scores.append(score)
        return shard_result(gradient, scores)

    def _first_order(self, theta: Mapping[str, Tensor], episodes: Episodes) -> tuple[Tensors, Scores]:
        """The meta-gradient of some episodes side by side: backpropagation through the rule's steps alone.

        What is kept of a step is its state, gradient and loss; the rule is computed once more on the way back.
        """
        theta = {name: tensor.detach() for name, tensor in theta.items()}
        layout, weights, start = self._split(theta)
        stack = Stack(self.network.backbone, self.network.objective)
        states: list[State] = [self.rule.start(start.expand(len(episodes), -1))]
        seen: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.inner_steps):
            found, score = stack.differentiate(_named(layout, states[-1][0]), episodes.support_x, episodes.support_y)
            gradient = _joined(found, tasks=True)
            seen.append((gradient, score.loss[:, None].expand_as(gradient)))
            states.append(_step(self.rule, weights, states[-1], *seen[-1]))
        found, score = self._query_gradient(stack, _named(layout, states[-1][0]), episodes)
        along: State = (_joined(found, tasks=True), *(torch.zeros_like(tensor) for tensor in states[-1][1:]))
        total = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        for before, (gradient, loss) in zip(states[-2::-1], seen[::-1], strict=True):
            along, of_weights = _step_backward(self.rule, weights, before, gradient, loss, along)
            total = {name: tensor + of_weights[name] for name, tensor in total.items()}
        return layout.unflatten(along[0].sum(0)) | {RULE + name: tensor for name, tensor in total.items()}, score

    def _query_gradient(self, stack: Stack, phi: Tensors, episodes: Episodes) -> tuple[Tensors, Scores]:
        """The gradient of each task's query loss at its adapted parameters, and the scores."""
        if self.network.batch_norm != "support":
            return stack.differentiate(phi, episodes.query_x, episodes.query_y)

        def loss(adapted: Mapping[str, Tensor], *data: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensors]]:
            scored = self.network.score(adapted, *data)
            return scored[0], scored

        data = (episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y)
        found, (losses, metrics, observed) = vmap(grad(loss, has_aux=True))(phi, *data)
        return found, Scores(losses, metrics, observed)

    def _adapt(self, theta: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor) -> Tensors:
        """Parameters after ``inner_steps`` training steps."""
        return self._trajectory(theta, support_x, support_y, None, self.inner_steps)[-1]

    def _trajectory(
        self,
        theta: Mapping[str, Tensor],
        support_x: Tensor,
        support_y: Tensor,
        given: Mapping[str, Tensor] | None,
        steps: int,
    ) -> list[Tensors]:
        """One task's parameters before and after each step."""
        layout, weights, start = self._split(theta)

        def loss(flat: Tensor) -> Float[Tensor, ""]:
            outputs = self.network.backbone(_named(layout, flat), support_x, given)[0]
            return self.network.objective.loss(outputs, support_y)

        state = self.rule.start(start)
        trajectory = [start]
        for _ in range(steps):
            gradient, value = grad_and_value(loss)(state[0])
            state = self.rule.step(weights, state, gradient, value.expand_as(gradient))
            trajectory.append(state[0])
        return [_named(layout, flat) for flat in trajectory]

    def _split(self, theta: Mapping[str, Tensor]) -> tuple[FlatSpec, Tensors, Float[Tensor, "coordinate"]]:
        """The layout of the network's coordinates, the rule's weights, and θ₀."""
        start = {name: tensor for name, tensor in theta.items() if not name.startswith(RULE)}
        weights = {name.removeprefix(RULE): tensor for name, tensor in theta.items() if name.startswith(RULE)}
        return FlatSpec.of(start), weights, _joined(start, tasks=False)


def _joined(tensors: Mapping[str, Tensor], *, tasks: bool) -> Float[Tensor, "*task coordinate"]:
    """All coordinates in a row, for one task or for each of several; differentiable."""
    return torch.cat([tensor.flatten(1 if tasks else 0) for tensor in tensors.values()], -1)


def _named(layout: FlatSpec, flat: Float[Tensor, "*task coordinate"]) -> Tensors:
    """What ``_joined`` joined, as views."""
    parts = torch.split(flat, [math.prod(shape) for shape in layout.shapes], -1)
    return {
        name: part.view(*part.shape[:-1], *shape)
        for name, shape, part in zip(layout.names, layout.shapes, parts, strict=True)
    }


def _step(rule: Rule, weights: Tensors, state: State, gradient: Tensor, loss: Tensor) -> State:
    """``rule.step`` of stacked tasks, block by block of coordinates."""
    blocks = zip(*(torch.split(tensor, BLOCK, 1) for tensor in (gradient, loss, *state)), strict=True)
    after = [rule.step(weights, tuple(before), g, value) for g, value, *before in blocks]
    return tuple(torch.cat(parts, 1) for parts in zip(*after, strict=True))


def _step_backward(
    rule: Rule, weights: Tensors, state: State, gradient: Tensor, loss: Tensor, along: State
) -> tuple[State, Tensors]:
    """From the derivatives by a step's result: those by the state before it, and by the weights."""
    leaves = {name: tensor.requires_grad_() for name, tensor in ((n, t.detach()) for n, t in weights.items())}
    total = [torch.zeros_like(tensor) for tensor in weights.values()]
    found_states = []
    for g, value, *rest in zip(*(torch.split(t, BLOCK, 1) for t in (gradient, loss, *state, *along)), strict=True):
        before = [tensor.detach().requires_grad_() for tensor in rest[: len(state)]]
        with torch.enable_grad():
            after = rule.step(leaves, tuple(before), g, value)
            found = torch.autograd.grad(after, [*leaves.values(), *before], rest[len(state) :])
        total = [a + b for a, b in zip(total, found[: len(total)], strict=True)]
        found_states.append(found[len(total) :])
    joined = tuple(torch.cat(parts, 1) for parts in zip(*found_states, strict=True))
    return joined, dict(zip(weights, total, strict=True))
