"""The results table for people and the plain data for ``--json`` say the same."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import pytest
from rich.console import Console, RenderableType

from coordinator.report import RunSummary, evaluation_table, results_table

EVALUATION: dict[str, Any] = {
    "accuracy": 0.851, "ci95": 0.0087, "precision": 0.853, "recall": 0.852, "f1": 0.845, "loss": 0.4,
    "steps": [0.203, 0.71, 0.851], "steps_ci95": [0.004, 0.01, 0.0087], "episodes": 600,
    "split": "test", "way": 5, "shot": 1, "query": 15, "bn": "transductive", "checkpoint": "best", "version": 1500,
}  # fmt: skip

SUMMARY = RunSummary(
    run_dir="runs/[red]glyphs-maml-1",
    recipe="glyphs-maml",
    learner="maml",
    aggregator="sync",
    seed=7,
    version=1990,
    total=2000,
    digest="3fa9" * 16,
    wall_seconds=151.4,
    episodes=63_680,
    tasks_per_second=424.27,
    workers=4,
    failures={"worker_lost": 1, "stale": 0, "nonfinite": 2},
    checkpoints=[1600, 1800, 1990],
    best=1500,
    evaluation=EVALUATION,
)


def shown(renderable: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def test_the_table_shows_what_a_run_ended_with() -> None:
    rows = dict(line.split(maxsplit=1) for line in shown(results_table(SUMMARY)).splitlines() if len(line.split()) > 1)
    assert rows["run"] == "runs/[red]glyphs-maml-1"
    assert rows["learner"] == "maml, sync, seed 7"
    assert rows["versions"] == "1,990 of 2,000, 63,680 episodes"
    assert rows["wall"] == "time    2:31"
    assert rows["speed"] == "424.3 tasks/s with 4 workers"
    assert rows["failures"] == "worker_lost 1, nonfinite 2"
    assert rows["checkpoints"] == "1600, 1800, 1990 (best by validation: 1500)"
    assert rows["digest"] == SUMMARY.digest
    assert "mixed" not in shown(results_table(SUMMARY))


def test_the_table_says_what_did_not_happen_too() -> None:
    bare = dataclasses.replace(SUMMARY, failures={}, checkpoints=[], best=None, evaluation=None, workers=1, mixed=True)
    text = shown(results_table(bare))
    assert "failures     none" in text
    assert "checkpoints  none" in text
    assert "with 1 worker\n" in text
    assert "mixed hardware: equal bits are not promised" in text
    assert "http" not in text
    assert "held-out" not in text


def test_the_digest_is_whole_in_any_terminal() -> None:
    squeezed = "".join(shown(results_table(SUMMARY), width=40).split())
    assert SUMMARY.digest in squeezed


def test_the_evaluation_has_a_row_per_step_and_says_what_was_measured() -> None:
    lines = [" ".join(line.split()) for line in shown(evaluation_table(EVALUATION)).splitlines()]
    assert lines == [
        "held-out accuracy",
        "adaptation steps accuracy, mean ± 95 % interval",
        lines[2],
        "0 (before) 20.3 ± 0.4 %",
        "1 71.0 ± 1.0 %",
        "2 85.1 ± 0.9 %",
        "",
        "test split, 5-way, 1-shot, 15 queries a class, 600 episodes",
        "batch-norm transductive, checkpoint best (version 1500)",
        "macro precision 85.3 %, recall 85.2 %, F1 84.5 %",
    ]
    assert set(lines[2]) == {"─"}


def test_many_steps_are_thinned_out_but_never_the_first_or_the_last() -> None:
    steps = [3.0 - step / 20 for step in range(46)]
    text = shown(evaluation_table({"mse": 0.75, "steps": steps, "steps_ci95": [0.1] * 46, "episodes": 1000, "way": 1}))
    rows = [line.split()[0] for line in text.splitlines() if "±" in line and "mean" not in line]
    assert rows == ["0", "1", "2", "5", "10", "20", "45"]
    assert "held-out mse" in text
    assert "0.750 ± 0.100" in text
    assert "way" not in text
    assert "steps left out above are in --json" in text
    assert "left out" not in shown(evaluation_table(EVALUATION))


def test_a_score_that_is_not_finite_is_a_dash() -> None:
    evaluation = {"mse": None, "steps": [1.0, None], "steps_ci95": [0.1, None], "episodes": 2}
    assert shown(evaluation_table(evaluation)).splitlines()[4].split() == ["1", "–"]


def test_json_holds_every_field_as_plain_data() -> None:
    plain = json.loads(json.dumps(SUMMARY.to_json(), allow_nan=False))
    assert set(plain) == {field.name for field in dataclasses.fields(RunSummary)}
    assert plain["evaluation"] == EVALUATION
    assert plain["failures"] == {"worker_lost": 1, "stale": 0, "nonfinite": 2}
    assert plain["checkpoints"] == [1600, 1800, 1990]
    assert plain["digest"] == SUMMARY.digest
    assert json.loads(json.dumps(dataclasses.replace(SUMMARY, evaluation=None).to_json()))["evaluation"] is None


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(map(len, shown(results_table(SUMMARY), width).splitlines())) <= width
