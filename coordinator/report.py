"""The results of a run at its end: a table for people, and the same as plain data for ``--json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.metrics import shown_steps
from coordinator.view import format_duration
from metaworker.scores import MetricName, format_score

ROWS: Final = 12
"""Up to so many adaptation steps are all shown; of more, steps 0, 1, 2, 5, 10, 20, 50 … and the last."""


@dataclass(frozen=True)
class RunSummary:
    """What is said of a run when it ends."""

    run_dir: str
    recipe: str
    learner: str
    aggregator: str
    seed: int
    version: int
    """The version reached."""
    total: int
    """The versions of the whole run."""
    digest: str
    """The run digest, SHA-256 hex."""
    wall_seconds: float
    """Wall time of training, all attempts together."""
    episodes: int
    """Episodes committed."""
    tasks_per_second: float | None
    """Episodes a second over this attempt; ``None`` if it had nothing left to train."""
    workers: int
    """Workers alive at the end."""
    failures: Mapping[str, int]
    """How often each kind of failure happened; kinds that did not may be absent."""
    checkpoints: Sequence[int]
    """Versions of the checkpoints that are kept, ascending."""
    best: int | None = None
    """The version of the best checkpoint by validation."""
    goodput: Mapping[str, Any] = field(default_factory=dict)
    """``Goodput.to_json``: what was computed for nothing, and why."""
    mixed: bool = False
    """Whether workers of different hardware took part, which voids the promise of equal bits."""
    evaluation: Mapping[str, Any] | None = None
    """``EvaluationScores.to_json`` with split, way, shot, query, bn, checkpoint and version."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``, one key per field."""
        plain = dict(vars(self))
        plain["failures"] = dict(self.failures)
        plain["goodput"] = dict(self.goodput)
        plain["checkpoints"] = list(self.checkpoints)
        plain["evaluation"] = None if self.evaluation is None else dict(self.evaluation)
        return plain


def results_table(summary: RunSummary) -> RenderableType:
    """Everything in ``summary`` for a terminal of 80 columns or more, with the evaluation below if there is one."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(summary):
        table.add_row(name, Text(value))
    heading = Text(f"\n{summary.recipe}", style="bold")
    if summary.evaluation is None:
        return Group(heading, table)
    return Group(heading, table, Text(), evaluation_table(summary.evaluation))


def evaluation_table(evaluation: Mapping[str, Any]) -> RenderableType:
    """The held-out score before and after each adaptation step, and on what it was measured.

    Args:
        evaluation: as in ``RunSummary``; of the description (split, way, shot …) what is absent is left out.
    """
    metric: MetricName = "accuracy" if "accuracy" in evaluation else "mse"
    steps, ci95 = evaluation["steps"], evaluation["steps_ci95"]
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=f"held-out {metric}", title_justify="left"
    )
    table.title_style = "bold"
    table.add_column("adaptation steps", justify="right")
    table.add_column(f"{metric}, mean ± 95 % interval", justify="right")
    shown = _shown(len(steps))
    for step in shown:
        last = step == len(steps) - 1
        name = "0 (before)" if step == 0 and not last else str(step)
        table.add_row(name, format_score(metric, steps[step], ci95[step]), style="bold cyan" if last else "")
    notes = _description(evaluation)
    if len(shown) < len(steps):
        notes.append("steps left out above are in --json and in the adaptation curve")
    return Group(table, Text(), *(Text(note, style="dim") for note in notes))


def _rows(summary: RunSummary) -> list[tuple[str, str]]:
    checkpoints = ", ".join(map(str, summary.checkpoints)) or "none"
    best = f" (best by validation: {summary.best})" if summary.best is not None else ""
    failures = ", ".join(f"{kind} {count}" for kind, count in summary.failures.items() if count)
    speed = "–" if summary.tasks_per_second is None else f"{summary.tasks_per_second:,.1f}"
    bits = ["mixed hardware: equal bits are not promised"] if summary.mixed else []
    rows = [
        ("run", summary.run_dir),
        ("learner", f"{summary.learner}, {summary.aggregator}, seed {summary.seed}"),
        ("versions", f"{summary.version:,} of {summary.total:,}, {summary.episodes:,} episodes"),
        ("wall time", format_duration(summary.wall_seconds)),
        ("speed", f"{speed} tasks/s with {_workers(summary.workers)}"),
        ("failures", failures or "none"),
        *(("goodput", line) for line in _goodput(summary.goodput)),
        ("checkpoints", checkpoints + best),
        ("digest", summary.digest),
        *(("label", line) for line in bits),
    ]
    return rows


def _goodput(goodput: Mapping[str, Any]) -> list[str]:
    """How much of what was computed counted, and what the rest was lost to, in one line."""
    if not goodput:
        return []
    lost, seconds = goodput["lost_shards"], goodput["lost_seconds"]
    causes = ", ".join(f"{cause} {count} ({seconds.get(cause, 0.0):.1f} s)" for cause, count in lost.items())
    recovery = goodput["mean_recovery_seconds"]
    parts = [f"{goodput['goodput']:.1%} of the shards computed counted", *([f"lost to {causes}"] if causes else [])]
    parts += [] if recovery is None else [f"{goodput['recoveries']} recoveries, {recovery:.1f} s on average"]
    return ["; ".join(parts)]


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _description(evaluation: Mapping[str, Any]) -> list[str]:
    """What was evaluated, and the scores besides the main one."""
    known = {name: value for name, value in evaluation.items() if value is not None}
    regression = "accuracy" not in evaluation
    what = [f"{known['split']} split"] if "split" in known else []
    what += [f"{known['way']}-way"] if "way" in known and not regression else []
    what += [f"within one {known['within']}"] if "within" in known else []
    what += [f"{known['shot']}-shot"] if "shot" in known else []
    what += [f"{known['query']} queries" + ("" if regression else " a class")] if "query" in known else []
    what += [f"{known['episodes']:,} episodes"]
    how = [f"batch-norm {known['bn']}"] if "bn" in known else []
    how += [f"learner {', '.join(known['learner'])}"] if known.get("learner") else []
    at = f" (version {known['version']})" if "version" in known else ""
    how += [f"checkpoint {known['checkpoint']}{at}"] if "checkpoint" in known else []
    names = {"precision": "precision", "recall": "recall", "f1": "F1"}
    macro = [f"{title} {format_score('accuracy', known[name])}" for name, title in names.items() if name in known]
    lines = [", ".join(what), ", ".join(how), f"macro {', '.join(macro)}" if macro else ""]
    return [line for line in lines if line]


def _shown(count: int) -> list[int]:
    """Which of ``count`` steps have a row: all, or the series 1, 2, 5 with the first and the last."""
    if count <= ROWS:
        return list(range(count))
    return sorted({*shown_steps(count), count - 1})
