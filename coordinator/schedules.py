"""Outer step sizes as pure functions of the version, so that nothing callable needs to be stored."""

from __future__ import annotations

import math

from cluster.config.sections import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule, StepSchedule


def factor(schedule: Schedule, version: int, horizon: int) -> float:
    """What the optimizer's lr is multiplied by in the update that makes ``version`` + 1.

    Args:
        schedule: its configuration.
        version: updates made so far, 0 … horizon − 1.
        horizon: updates of the whole run.
    """
    done = version / max(1, horizon - 1)
    match schedule:
        case ConstantSchedule():
            return 1.0
        case LinearSchedule(final=final):
            return 1.0 + (final - 1.0) * done
        case CosineSchedule(final=final, warmup=warmup):
            if version < warmup:
                return (version + 1) / warmup
            rest = (version - warmup) / max(1, horizon - 1 - warmup)
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, rest)))
        case StepSchedule(every=every, factor=drop):
            return float(drop ** (version // every))
