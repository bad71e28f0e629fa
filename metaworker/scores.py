"""From the parts of an evaluation to its scores: means over episodes with 95 % confidence intervals, for every step.

Definitions, all per adaptation step (index 0 is before any adaptation) and then averaged over episodes:

    accuracy    trace(confusion) / sum(confusion)
    precision   mean over the episode's classes of TP / (TP + FP)           (macro)
    recall      mean over the episode's classes of TP / (TP + FN)           (macro)
    F1          mean over the episode's classes of 2 TP / (2 TP + FP + FN)  (macro)
    mse         mean squared error over the episode's queries
    ci95        half-width 1.96 · sd / √n over the n episodes, sd with n − 1

A ratio whose denominator is 0 (a class that was never predicted has no precision) counts as 0, as scikit-learn's
``zero_division=0`` does. Parts are concatenated in the order of episode ids before anything is reduced, so the numbers
do not depend, in any bit, on how the episodes were spread over workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Num

from cluster.messages import EvaluationPart

MetricName = Literal["accuracy", "mse"]
"""What an evaluation is judged by: accuracy (fraction, higher is better) or mean squared error (lower is better)."""

Steps = tuple[float, ...]
"""One value per adaptation step, the first before any."""


@dataclass(frozen=True)
class EvaluationScores:
    """Means over ``episodes`` episodes, one value per adaptation step, the first before any.

    Classification fills ``accuracy``, ``precision``, ``recall`` and ``f1`` (fractions), regression fills ``mse``; the
    others are ``None``. ``ci95`` is the half-width of the accuracy's (or the mse's) 95 % confidence interval.
    """

    episodes: int
    loss: Steps
    ci95: Steps
    accuracy: Steps | None = None
    precision: Steps | None = None
    recall: Steps | None = None
    f1: Steps | None = None
    mse: Steps | None = None

    @property
    def metric(self) -> MetricName:
        """Which of the two the evaluation is judged by."""
        return "mse" if self.accuracy is None else "accuracy"

    @property
    def steps(self) -> Steps:
        """The accuracy or the mean squared error, per adaptation step."""
        steps = self.mse if self.accuracy is None else self.accuracy
        if steps is None:
            raise ValueError("scores hold neither accuracy nor mse")
        return steps

    def to_json(self) -> dict[str, Any]:
        """Plain data: the final step's value under each metric's name, all steps under ``steps`` and ``steps_ci95``.

        A value that is not finite (a diverged adaptation) becomes ``None``: JSON has no NaN.
        """
        final = {"accuracy": self.accuracy, "mse": self.mse, "ci95": self.ci95}
        final |= {"precision": self.precision, "recall": self.recall, "f1": self.f1, "loss": self.loss}
        plain: dict[str, Any] = {name: _plain(steps[-1]) for name, steps in final.items() if steps is not None}
        plain["steps"] = [_plain(value) for value in self.steps]
        plain["steps_ci95"] = [_plain(value) for value in self.ci95]
        plain["episodes"] = self.episodes
        return plain


def combine(parts: Sequence[EvaluationPart]) -> EvaluationScores:
    """The scores of all episodes of ``parts``, which may come in any order.

    Raises:
        ValueError: no parts, fewer than 2 episodes, episodes missing or twice between parts, or parts that do not
            belong together (another version, classification and regression, another number of steps or classes).
    """
    ordered = sorted(parts, key=lambda part: part.first_episode)
    _check(ordered)
    loss = _concatenate([part.loss for part in ordered])
    if ordered[0].squared_error is not None:
        errors = _concatenate([part.squared_error for part in ordered if part.squared_error is not None])
        return EvaluationScores(episodes=len(loss), loss=_mean(loss), ci95=_ci95(errors), mse=_mean(errors))
    confusion = _concatenate([part.confusion for part in ordered if part.confusion is not None])
    accuracy, precision, recall, f1 = episode_scores(confusion)
    return EvaluationScores(
        episodes=len(loss),
        loss=_mean(loss),
        ci95=_ci95(accuracy),
        accuracy=_mean(accuracy),
        precision=_mean(precision),
        recall=_mean(recall),
        f1=_mean(f1),
    )


def episode_scores(
    confusion: Num[np.ndarray, "episode step way way"],
) -> tuple[
    Float64[np.ndarray, "episode step"],
    Float64[np.ndarray, "episode step"],
    Float64[np.ndarray, "episode step"],
    Float64[np.ndarray, "episode step"],
]:
    """Accuracy and macro precision, recall and F1 of every episode and step, as fractions.

    ``confusion`` counts queries by (true class, predicted class).
    """
    hits = np.einsum("escc->esc", confusion).astype(np.float64)
    predicted = confusion.sum(axis=2, dtype=np.float64)
    actual = confusion.sum(axis=3, dtype=np.float64)
    accuracy = _ratio(hits.sum(axis=2), actual.sum(axis=2))
    precision = _ratio(hits, predicted).mean(axis=2)
    recall = _ratio(hits, actual).mean(axis=2)
    f1 = _ratio(2 * hits, predicted + actual).mean(axis=2)
    return accuracy, precision, recall, f1


def format_score(metric: MetricName, value: float | None, ci95: float | None = None) -> str:
    """A score for people: ``83.1 ± 0.9 %`` (accuracy) or ``0.352 ± 0.012`` (mse); ``–`` when there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    scale, decimals, unit = (100, 1, " %") if metric == "accuracy" else (1, _decimals(value), "")
    width = "" if ci95 is None or not math.isfinite(ci95) else f" ± {scale * ci95:.{decimals}f}"
    return f"{scale * value:.{decimals}f}{width}{unit}"


def _decimals(value: float) -> int:
    """Decimals that show three significant digits of ``value``, at most 8."""
    return 3 if value == 0 else min(8, max(0, 2 - math.floor(math.log10(abs(value)))))


def _check(ordered: Sequence[EvaluationPart]) -> None:
    """Refuse parts that do not make one evaluation of consecutive episodes."""
    if not ordered:
        raise ValueError("no evaluation parts to combine: an evaluation needs at least one")
    following = ordered[0].first_episode
    for part in ordered:
        if part.first_episode != following:
            what = "missing" if part.first_episode > following else "given twice"
            raise ValueError(f"evaluation episodes are {what}: expected {following} next, got {part.first_episode}")
        scores = part.squared_error if part.confusion is None else part.confusion
        if scores is None or (part.confusion is not None and part.squared_error is not None):
            raise ValueError(f"evaluation part {part.part} must hold either confusion counts or squared errors")
        if part.loss.ndim != 2 or scores.shape[:2] != part.loss.shape:
            raise ValueError(
                f"evaluation part {part.part}: loss has shape {part.loss.shape}, scores {scores.shape}; "
                "both start with [episode, step]"
            )
        following += len(part.loss)
    kinds = {(part.version, part.confusion is None, part.loss.shape[1], _way(part)) for part in ordered}
    if len(kinds) > 1:
        raise ValueError(f"evaluation parts differ in (version, regression, steps, way): {sorted(kinds)}")
    if following - ordered[0].first_episode < 2:
        raise ValueError("an evaluation of 1 episode has no confidence interval: use at least 2")


def _way(part: EvaluationPart) -> int:
    return 1 if part.confusion is None else int(part.confusion.shape[-1])


def _concatenate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    # float64 holds every count exactly, and one dtype and layout make the reductions independent of the parts.
    return np.concatenate([array.astype(np.float64) for array in arrays])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    ratio = np.zeros_like(whole)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _mean(values: Float64[np.ndarray, "episode step"]) -> Steps:
    return tuple(float(mean) for mean in values.mean(axis=0))


def _ci95(values: Float64[np.ndarray, "episode step"]) -> Steps:
    # Infinities of a diverged adaptation have no deviation: their interval is NaN.
    with np.errstate(invalid="ignore", over="ignore"):
        deviation = values.std(axis=0, ddof=1)
    return tuple(float(half) for half in 1.96 * deviation / np.sqrt(len(values)))


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
