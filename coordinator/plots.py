"""The pictures of a run, as PNG: how it learned, and what each adaptation step brings on held-out episodes.

Figures are drawn without pyplot and its global state, on the Agg canvas, so that they need no display and may be drawn
anywhere. Importing this module imports matplotlib, so callers import it where they draw.

What is drawn never hides what was measured: single versions are faint behind their running mean (as the range within
each of a thousand stretches where there are too many), and every held-out score has its 95 % confidence interval.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float64, Int64
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from coordinator.history import History, ValidationRecord
from metaworker.scores import MetricName, format_score

TRAINING: Final = "#1f5fa8"
HELD_OUT: Final = "#d9590c"
GREY: Final = "#6b6b6b"

STRETCHES: Final = 1000
"""Stretches that a run of more than four times as many versions is summarised in: about one per pixel."""

FEW: Final = 40
"""Up to so many points are drawn as markers with error bars, more as a line with a band."""

UNITS: Final[dict[MetricName, tuple[float, str]]] = {
    "accuracy": (100.0, "accuracy (%)"),
    "mse": (1.0, "mean squared error"),
}
"""Factor to the unit shown, and its name on the axis."""


def learning_curve(history: History, path: Path, *, title: str, metric: MetricName = "accuracy") -> None:
    """Write the learning curve of a run to ``path``: training loss and score over versions, validations with intervals.

    For regression whose loss is the mean squared error itself, the one panel shows both.

    Args:
        history: what the run recorded; may be short, and empty.
        path: the PNG to write.
        title: one line on what run this is.
        metric: what ``history.metric`` and the validations are.
    """
    same = metric == "mse" and np.allclose(history.loss, history.metric, rtol=1e-5, equal_nan=True)
    panels = ["metric"] if same else ["loss", "metric"]
    figure, axes = _figure(title, len(panels))
    scale, label = UNITS[metric]
    if not same:
        _training(axes[0], history.version, history.loss)
        axes[0].set_ylabel("query loss")
    _training(axes[-1], history.version, scale * history.metric)
    _validations(axes[-1], history.validations, scale)
    for panel in axes:
        for number, version in enumerate(history.resumes):
            panel.axvline(version, color=GREY, linewidth=0.8, linestyle=":", label=None if number else "resumed")
        _legend(panel)
    axes[-1].set_ylabel(f"query {label}")
    axes[-1].set_xlabel("version (outer updates)")
    _save(figure, path)


def adaptation_curve(
    steps: Sequence[float | None],
    ci95: Sequence[float | None],
    path: Path,
    *,
    title: str,
    metric: MetricName = "accuracy",
    chance: float | None = None,
) -> None:
    """Write the held-out score before and after each adaptation step, with its 95 % interval, to ``path``.

    Args:
        steps: accuracy (fraction) or mean squared error, the first before any adaptation; ``None`` where not finite.
        ci95: half-widths of the 95 % confidence intervals.
        path: the PNG to write.
        title: one line on what was evaluated.
        metric: what ``steps`` are.
        chance: accuracy (fraction) of guessing, 1 / way; ``None`` for no line.
    """
    scale, label = UNITS[metric]
    score, half = (scale * np.array(values, dtype=np.float64) for values in (steps, ci95))
    figure, (axes,) = _figure(title, 1)
    _with_interval(axes, np.arange(len(score)), score, half, "mean over episodes")
    if chance is not None:
        axes.axhline(scale * chance, color=GREY, linewidth=1, linestyle="--", label=f"chance ({scale * chance:g} %)")
    before, after = (format_score(metric, steps[at], ci95[at]) for at in (0, -1))
    outcome = f"{before} before adaptation, {after} after {_steps(len(score) - 1)}" if len(score) > 1 else after
    axes.set_title(outcome, loc="left", fontsize=10.5, pad=24)
    if len(score) <= 12:
        axes.set_xticks(range(len(score)))
    axes.set_xlim(-0.2 - 0.02 * len(score), len(score) - 0.8 + 0.02 * len(score))
    axes.set_xlabel("adaptation steps on the support set")
    axes.set_ylabel(f"held-out {label}")
    _legend(axes)
    _save(figure, path)


# -------------------------------------------------------------------------------------------------------------- pieces


def running_mean(values: Float64[np.ndarray, " version"], window: int) -> Float64[np.ndarray, " version"]:
    """The mean over the ``window`` versions around each one, fewer at the ends; NaN values are left out."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    reach = window // 2
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    count = counts[high] - counts[low]
    mean = np.full(len(values), np.nan)
    np.divide(sums[high] - sums[low], count, out=mean, where=count > 0)
    return mean


def _training(axes: Axes, version: Int64[np.ndarray, " version"], values: Float64[np.ndarray, " version"]) -> None:
    """Single versions faint, their running mean over a fiftieth of the run strong."""
    if len(values) <= 12:
        axes.set_xticks(version)
    if len(values) == 0:
        axes.text(0.5, 0.5, "no versions recorded", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return
    window = len(values) // 50
    if window < 2:
        axes.plot(version, values, color=TRAINING, marker="o", markersize=4, linewidth=1.5, label="training")
        return
    mean = running_mean(values, window)
    if len(values) > 4 * STRETCHES:
        low, high, middle = _ranges(version, values)
        axes.fill_between(middle, low, high, color=TRAINING, alpha=0.2, linewidth=0, label="training, range")
    else:
        axes.plot(version, values, color=TRAINING, alpha=0.25, linewidth=0.8, label="training, each version")
    axes.plot(version, mean, color=TRAINING, linewidth=1.8, label=f"training, mean over {window:,} versions")
    _limits(axes, values, mean)


def _ranges(version: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lowest and highest value and middle version of ``STRETCHES`` stretches of about equal length."""
    starts = np.linspace(0, len(values), STRETCHES, endpoint=False).astype(np.int64)
    return (
        np.fmin.reduceat(values, starts),
        np.fmax.reduceat(values, starts),
        version[starts + len(values) // (2 * STRETCHES)],
    )


def _limits(axes: Axes, values: np.ndarray, mean: np.ndarray) -> None:
    """Show all of the mean and all but the outermost single versions: one wild version must not flatten the rest."""
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return
    low, high = np.percentile(finite, [0.5, 99.5])
    low, high = min(low, np.nanmin(mean)), max(high, np.nanmax(mean))
    if low > 0 and np.nanmax(mean) > 30 * np.nanmin(mean):
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
    elif high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _validations(axes: Axes, validations: Sequence[ValidationRecord], scale: float) -> None:
    """The final adaptation step of every validation, with its interval."""
    if not validations:
        return
    version = np.array([validation.version for validation in validations])
    score = scale * np.array([validation.steps[-1] for validation in validations], dtype=np.float64)
    half = scale * np.array([validation.ci95[-1] for validation in validations], dtype=np.float64)
    bottom, top = axes.get_ylim()
    _with_interval(axes, version, score, half, "validation")
    shown = np.concatenate([score - np.nan_to_num(half), score + np.nan_to_num(half)])
    shown = shown[np.isfinite(shown)]
    if len(shown):
        pad = 0.0 if axes.get_yscale() == "log" else 0.03 * (top - bottom)
        axes.set_ylim(min(bottom, shown.min() - pad), max(top, shown.max() + pad))


def _with_interval(axes: Axes, x: np.ndarray, score: np.ndarray, half: np.ndarray, label: str) -> None:
    if len(x) <= FEW:
        label += " ± 95 % interval"
        axes.errorbar(x, score, half, color=HELD_OUT, marker="o", markersize=4, capsize=3, linewidth=1.5, label=label)
    else:
        axes.plot(x, score, color=HELD_OUT, linewidth=1.5, label=label)
        axes.fill_between(x, score - half, score + half, color=HELD_OUT, alpha=0.25, linewidth=0, label="95 % interval")


def _figure(title: str, panels: int) -> tuple[Figure, list[Axes]]:
    """An empty figure with a title and panels that share the horizontal axis."""
    figure = Figure(figsize=(8.5, 4.6 if panels == 1 else 7.0), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, 85), x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))
        panel.margins(x=0.02)
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure, axes


def _legend(axes: Axes) -> None:
    """A legend above the panel, where no curve can run under it."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=5,
            frameon=False,
            fontsize=8.5,
            borderaxespad=0.2,
            borderpad=0.2,
            handlelength=1.6,
            columnspacing=1.4,
        )


def _save(figure: Figure, path: Path) -> None:
    # No date and no version inside: the same history gives the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"
