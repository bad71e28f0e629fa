"""Batch-norm modes shared by the learners, and the running averages they keep as learner state.

In training, batch statistics are always those of data: of the set at hand (``transductive``, ``running``) or of the
support set (``support``). In evaluation, ``transductive`` still takes them from the set at hand, query set included;
``support`` from the support set, for support and query alike; ``running`` takes the averages that training kept.
Running averages are kept in every mode, so that a run can be evaluated in any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor

from cluster.config.sections import BatchNorm

MOMENTUM = 0.05
"""Share of a commit's mean statistics in the new running averages."""


def given_statistics(mode: BatchNorm, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """An evaluation's statistics of the support set: running averages where the mode says so, else its own (None)."""
    return state if mode == "running" and state else None


def commit_running_statistics(
    state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """`running_averages` of batch statistics."""
    return running_averages(state, proposals, MOMENTUM)


def running_averages(
    state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]], momentum: float
) -> dict[str, np.ndarray]:
    """``(1 − momentum) · state + momentum · mean over all proposed rows``, summed in the order of the proposals."""
    if not proposals:
        return dict(state)
    rows = sum(len(next(iter(p.values()))) for p in proposals if p)
    result: dict[str, np.ndarray] = {}
    for name, old in state.items():
        total = np.zeros_like(old)
        for proposal in proposals:
            total += proposal[name].sum(axis=0, dtype=old.dtype)
        result[name] = old + old.dtype.type(momentum) * (total / old.dtype.type(rows) - old)
    return cast(dict[str, np.ndarray[Any, Any]], result)
