"""Reptile (Nichol, Achiam, Schulman 2018, arXiv 1803.02999).

    φ = θ after k inner steps of Adam (β₁ = 0) or SGD on minibatches of the task,   meta-gradient = Σ_episodes (θ − φ)

Support and query samples together are the task's training data. Minibatches pass over them without replacement, in
an order drawn once by key and shared by all tasks (an episode's own samples are random already). The meta-gradient is
a ``surrogate``: an outer SGD step of size ε moves θ to θ + ε (φ − θ). Departs from the authors' code: Adam's second
moments start anew for each task instead of leaking from the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from cluster import keys
from cluster.episodes.types import Episodes
from cluster.flat import Tensors
from cluster.messages import BatchNorm
from metaworker.inner_loop import InnerLoss, minibatch_descent
from metaworker.learners.base import Context, GradientKind, ShardResult, Task
from metaworker.learners.normalisation import commit_running_statistics, given_statistics
from metaworker.learners.objective import Objective
from metaworker.learners.vectorise import concatenate
from metaworker.models.base import Backbone


@dataclass(frozen=True)
class Reptile:
    """Reptile on a backbone with a head."""

    backbone: Backbone
    objective: Objective
    batch_norm: BatchNorm
    inner_lr: float
    inner_steps: int
    eval_steps: int
    inner_batch: int
    eval_inner_batch: int
    adam: bool

    @property
    def kind(self) -> GradientKind:
        """A ``surrogate``: no loss has θ − φ as its gradient."""
        return "surrogate"

    @property
    def transductive(self) -> bool:
        """Whether queries share batch statistics."""
        return self.batch_norm == "transductive" and bool(self.backbone.statistics())

    def meta_parameters(self, seed: int) -> Tensors:
        """The backbone's initial parameters."""
        return self.backbone.parameters(lambda name, shape: keys.tensor_normals(seed, "init", name, shape))

    def initial_state(self) -> Tensors:
        """Running batch statistics."""
        return self.backbone.statistics()

    def adapt(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        support_x: Float[Tensor, "support *sample"],
        support_y: Tensor,
        metadata: Mapping[str, Tensor],
    ) -> Sequence[Task]:
        """``eval_steps`` inner steps on minibatches of the support set."""
        given = given_statistics(self.batch_norm, state, training=False)
        parts = _parts(support_x, support_y, self.eval_inner_batch, self.eval_steps)
        losses = [self._loss(part_x, part_y, given) for part_x, part_y in parts]
        trajectory = minibatch_descent(losses, theta, self.inner_lr, self.adam)
        return [{"parameters": p, "statistics": self._query_statistics(p, support_x, given)} for p in trajectory]

    def predict(self, task: Task, query_x: Float[Tensor, "query *sample"]) -> Tensor:
        """The adapted network's outputs."""
        return self.backbone(task["parameters"], query_x, task["statistics"])[0]

    def contribute(
        self, theta: Mapping[str, Tensor], state: Mapping[str, Tensor], episodes: Episodes, context: Context
    ) -> ShardResult:
        """Sum θ − φ over the episodes."""
        vectorised = vmap(self._episode, in_dims=(None, 0, 0))
        gradient = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
        losses, metrics, proposals = [], [], []
        with torch.no_grad():
            for start in range(0, len(episodes), context.chunk):
                part = episodes.chunk(start, start + context.chunk)
                x = torch.cat([part.support_x, part.query_x], dim=1)
                y = torch.cat([part.support_y, part.query_y], dim=1)
                displacement, loss, metric, observed = vectorised(theta, x, y)
                gradient = {name: total + displacement[name].sum(0) for name, total in gradient.items()}
                losses.append(loss)
                metrics.append(metric)
                proposals.append(observed)
        return ShardResult(gradient, len(episodes), concatenate(proposals), torch.cat(losses), torch.cat(metrics))

    def commit_state(
        self, state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Update the running batch statistics."""
        return commit_running_statistics(state, proposals)

    def _episode(self, theta: Mapping[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensors, Tensor, Tensor, Tensors]:
        """θ − φ of one task, and φ's loss, metric and batch statistics on the last minibatch.

        All of the samples would say it with less noise, at a quarter more of the time.
        """
        parts = _parts(x, y, self.inner_batch, self.inner_steps)
        losses = [self._loss(part_x, part_y, None) for part_x, part_y in parts]
        adapted = minibatch_descent(losses, theta, self.inner_lr, self.adam)[-1]
        last_x, last_y = parts[-1]
        outputs, observed = self.backbone(adapted, last_x, None)
        displacement = {name: theta[name] - adapted[name] for name in theta}
        return displacement, self.objective.loss(outputs, last_y), self.objective.metric(outputs, last_y), observed

    def _loss(self, x: Tensor, y: Tensor, given: Mapping[str, Tensor] | None) -> InnerLoss:
        """The loss on one minibatch."""
        return lambda parameters: self.objective.loss(self.backbone(parameters, x, given)[0], y)

    def _query_statistics(
        self, parameters: Mapping[str, Tensor], support_x: Tensor, given: Mapping[str, Tensor] | None
    ) -> Mapping[str, Tensor] | None:
        """Statistics to normalise the query set with; ``None`` for its own."""
        if self.batch_norm == "support":
            return self.backbone(parameters, support_x, None)[1] or None
        return given


def _parts(x: Tensor, y: Tensor, batch: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """The samples and labels of each minibatch."""
    return [(x[rows], y[rows]) for rows in (each.to(x.device) for each in minibatches(x.shape[0], batch, steps))]


def minibatches(samples: int, batch: int, steps: int) -> list[Tensor]:
    """Indices of ``steps`` minibatches out of ``samples``, each ``[min(batch, samples)]``.

    They run through fresh permutations of the samples, one pass after another, drawn by key; a batch that would
    cross the end of a pass starts the next one instead.
    """
    size = min(batch, samples)
    a_pass = samples // size
    rows: list[Tensor] = []
    for number in range(-(-steps // a_pass)):
        words = keys.words(0, "reptile minibatches", str(samples), np.array([number]), samples)
        order = torch.from_numpy(np.ascontiguousarray(keys.choose(words, samples)[0]))
        rows += [order[start * size : (start + 1) * size] for start in range(a_pass)]
    return rows[:steps]
