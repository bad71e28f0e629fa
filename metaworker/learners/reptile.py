"""Reptile (Nichol, Achiam, Schulman 2018, arXiv 1803.02999).

    φ = θ after k inner steps of Adam (β₁ = 0) or SGD on minibatches of the task,   meta-gradient = Σ_episodes (θ − φ)

φ has θ's names and shapes, ``[episode, …]`` for a chunk of episodes; its minibatches are
``[episode, step, batch, *sample]``, the network's outputs on one ``[episode, batch, way]``.

Support and query samples together are the task's training data. Minibatches pass over them without replacement, in
an order drawn by (seed, episode id). The last of them stands for queries in what is reported: it is scored before the
step on it, so in the first pass on samples that the task has not trained on. The meta-gradient is a ``surrogate``: an
outer SGD step of size ε moves θ to θ + ε (φ − θ). Departs from the authors' code: Adam's second moments start anew for
each task instead of leaking from the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from cluster import keys
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from metaworker.inner_loop import last, minibatch_descent
from metaworker.learners.base import Context, GradientKind, ShardResult, Task
from metaworker.learners.gradient_based import GradientBased, Network
from metaworker.learners.stacked import Scores, Stack, repeat, shard_result


@dataclass(frozen=True)
class Reptile(GradientBased):
    """Reptile on a network."""

    network: Network
    inner_lr: float
    inner_steps: int
    eval_steps: int
    inner_batch: int
    eval_inner_batch: int
    adam: bool
    seed: int
    """Of the minibatches."""

    @property
    def kind(self) -> GradientKind:
        """A ``surrogate``: no loss has θ − φ as its gradient."""
        return "surrogate"

    @property
    def ordered(self) -> bool:
        """Minibatches are drawn by place."""
        return True

    def meta_parameters(self, seed: int) -> Tensors:
        """The network's initial parameters."""
        return self.network.parameters(seed)

    def adapt(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        support_x: Shaped[Tensor, "support *sample"],
        support_y: Tensor,
        metadata: Mapping[str, Tensor],
    ) -> Sequence[Task]:
        """``eval_steps`` inner steps on minibatches of the support set, in an order that all tasks share."""
        given = self.network.evaluation_statistics(state)
        rows = minibatches(self.seed, "adapt", [0], len(support_x), self.eval_inner_batch, self.eval_steps)[0]
        rows = rows.to(support_x.device)
        steps = [self.network.gradient(x, y, given) for x, y in zip(support_x[rows], support_y[rows], strict=True)]
        trajectory = minibatch_descent(steps, theta, self.inner_lr, self.adam)
        return [self.network.task(parameters, support_x, given) for parameters in trajectory]

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Sum θ − φ over the episodes."""
        stack = Stack(self.network.backbone, self.network.objective)
        gradient = {name: tensor.new_zeros(tensor.shape) for name, tensor in theta.items()}
        scores: list[Scores] = []
        for start in range(0, len(episodes), context.chunk):
            x, y = self._minibatches(episodes.chunk(start, start + context.chunk))
            steps = [stack.gradient(*minibatch) for minibatch in zip(x.unbind(1), y.unbind(1), strict=True)]
            trajectory = minibatch_descent(steps, repeat(theta, len(x)), self.inner_lr, self.adam)
            before, adapted = last(trajectory, 2)
            # Scoring all samples with φ would say little more, at a quarter more of the time.
            scores.append(stack.score(before, x[:, -1], y[:, -1]))
            gradient = {name: total + (theta[name] - adapted[name]).sum(0) for name, total in gradient.items()}
        return shard_result(gradient, scores)

    def _minibatches(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Samples and labels, each ``[episode, step, batch, …]``."""
        x = torch.cat([episodes.support_x, episodes.query_x], dim=1)
        y = torch.cat([episodes.support_y, episodes.query_y], dim=1)
        rows = minibatches(self.seed, "train", episodes.ids, x.shape[1], self.inner_batch, self.inner_steps)
        rows = rows.to(x.device)
        each = torch.arange(len(x), device=x.device)[:, None, None]
        return x[each, rows], y[each, rows]


def minibatches(
    seed: int, split: str, ids: Int64[np.ndarray, "episode"] | list[int], samples: int, batch: int, steps: int
) -> Int64[Tensor, "episode step size"]:
    """Which samples are in each of ``steps`` minibatches of each episode; ``size`` is min(batch, samples).

    They run through fresh permutations of the samples, one pass after another, drawn by (seed, split, episode id); a
    batch that would cross the end of a pass starts the next one instead.
    """
    size = min(batch, samples)
    a_pass = samples // size
    passes = []
    for number in range(-(-steps // a_pass)):
        words = keys.words(seed, f"reptile minibatches/{number}", split, np.asarray(ids), samples)
        passes.append(keys.choose(words, samples)[:, : a_pass * size].reshape(len(words), a_pass, size))
    return torch.from_numpy(np.concatenate(passes, axis=1)[:, :steps])
