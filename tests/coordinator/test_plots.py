"""What the pictures draw, read back from the figures; how they look was judged by eye."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from coordinator import plots
from coordinator.history import CommitRecord, History, ValidationRecord


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that were drawn; any warning (an empty slice, a layout that does not fit) is an error."""
    drawn: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (drawn.append(figure), save(figure, path))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Drivers that ended early in other tests closed nothing: that comes up whenever their garbage is collected.
        warnings.simplefilter("ignore", ResourceWarning)
        yield drawn


def history(versions: int, *, mse: bool = False, resumes: tuple[int, ...] = ()) -> History:
    rng = np.random.default_rng(0)
    loss = 0.4 + 2 * np.exp(-np.arange(versions) / (versions / 5)) * rng.gamma(9, 1 / 9, versions)
    metric = loss if mse else np.clip(1 - loss / 3 + rng.normal(0, 0.02, versions), 0, 1)
    commits = [
        CommitRecord(v + 1, float(loss[v]), float(metric[v]), 1.0, 32, v * 0.1, 320.0, 0.0, 4) for v in range(versions)
    ]
    every = max(1, versions // 5)
    validations = [
        ValidationRecord(v, (0.2, float(metric[v - 1])), (0.01, 0.02)) for v in range(every, versions + 1, every)
    ]
    return History.of(commits, validations, resumes)


def labels(figure: Figure, panel: int) -> list[str]:
    return figure.axes[panel].get_legend_handles_labels()[1]


def test_a_long_run_is_drawn_as_range_mean_and_validation(tmp_path: Path, figures: list[Figure]) -> None:
    run = history(70_000, resumes=(30_000, 50_000))
    plots.learning_curve(run, tmp_path / "a.png", title="run")
    (figure,) = figures
    assert labels(figure, 0) == ["training, range", "training, mean over 1,400 versions", "resumed"]
    assert labels(figure, 1) == [
        "training, range", "training, mean over 1,400 versions", "resumed", "validation ± 95 % interval",
    ]  # fmt: skip
    loss, accuracy = figure.axes
    (mean,) = (line for line in loss.lines if "mean" in str(line.get_label()))
    assert np.asarray(mean.get_ydata())[35_000] == pytest.approx(run.loss[34_300:35_701].mean())
    assert np.asarray(mean.get_xdata())[35_000] == 35_001
    assert accuracy.get_ylabel() == "query accuracy (%)"
    assert accuracy.get_xlabel() == "version (outer updates)"
    (bars,) = accuracy.containers
    assert np.asarray(bars.lines[0].get_ydata()) == pytest.approx([100 * v.steps[-1] for v in run.validations])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1020, 840)


def test_a_short_run_is_drawn_as_it_is(tmp_path: Path, figures: list[Figure]) -> None:
    run = history(5)
    plots.learning_curve(run, tmp_path / "a.png", title="run")
    loss, accuracy = figures[0].axes
    assert labels(figures[0], 0) == ["training"]
    assert np.asarray(loss.lines[0].get_ydata()) == pytest.approx(run.loss)
    assert np.asarray(accuracy.lines[0].get_ydata()) == pytest.approx(100 * run.metric)


def test_regression_whose_loss_is_the_error_has_one_panel(tmp_path: Path, figures: list[Figure]) -> None:
    plots.learning_curve(history(300, mse=True), tmp_path / "a.png", title="run", metric="mse")
    (panel,) = figures[0].axes
    assert panel.get_ylabel() == "query mean squared error"
    assert labels(figures[0], 0)[:2] == ["training, each version", "training, mean over 6 versions"]


def test_one_wild_version_does_not_flatten_the_rest(tmp_path: Path, figures: list[Figure]) -> None:
    run = history(2000)
    run.loss[1234] = 1e3
    plots.learning_curve(run, tmp_path / "a.png", title="run")
    assert plots.running_mean(run.loss, 40).max() < figures[0].axes[0].get_ylim()[1] < 1e3 / 20


@pytest.mark.parametrize("versions", [0, 1, 2, 99, 100, 101, 4000, 4001])
def test_runs_of_any_length_are_drawn(versions: int, tmp_path: Path, figures: list[Figure]) -> None:
    plots.learning_curve(history(versions), tmp_path / "a.png", title="a title that needs two lines " * 5)
    assert (tmp_path / "a.png").stat().st_size > 5_000
    loss, _ = figures[0].axes
    assert [text.get_text() for text in loss.texts] == (["no versions recorded"] if versions == 0 else [])
    if versions < 13:
        assert loss.get_xticks().tolist() == list(range(1, versions + 1))
    title = figures[0]._suptitle  # type: ignore[attr-defined]
    assert title.get_window_extent().x1 < figures[0].bbox.x1


def test_what_is_not_finite_is_left_out_without_a_warning(tmp_path: Path, figures: list[Figure]) -> None:
    nan, inf = float("nan"), float("inf")
    for versions in (10, 300, 5000):
        commits = [CommitRecord(v, nan if v % 3 else inf, nan, nan, 1, 1.0, 1.0, 0.0, 1) for v in range(versions)]
        run = History.of(commits, [ValidationRecord(3, (0.1, nan), (0.1, nan)), ValidationRecord(4, (0.5,), (nan,))])
        plots.learning_curve(run, tmp_path / "a.png", title="run")
    plots.adaptation_curve([0.5, None, 0.7], [0.1, None, 0.1], tmp_path / "b.png", title="run", chance=0.2)


def test_the_running_mean_is_the_mean_around_each_version() -> None:
    values = np.random.default_rng(0).random(50)
    values[7] = np.nan
    for window in (2, 5, 10):
        reach = window // 2
        plain = [np.nanmean(values[max(0, at - reach) : at + reach + 1]) for at in range(50)]
        assert plots.running_mean(values, window) == pytest.approx(plain)
    assert np.isnan(plots.running_mean(np.full(5, np.nan), 3)).all()


@pytest.mark.parametrize("metric", ["accuracy", "mse"])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_adaptation_has_a_point_per_step_and_its_interval(
    steps: int, metric: plots.MetricName, tmp_path: Path, figures: list[Figure]
) -> None:
    score = np.linspace(0.2, 0.8, steps + 1)
    half = np.linspace(0.01, 0.03, steps + 1)
    chance = 0.2 if metric == "accuracy" else None
    path = tmp_path / "a.png"
    plots.adaptation_curve(score.tolist(), half.tolist(), path, title="run", metric=metric, chance=chance)
    (axes,) = figures[0].axes
    scale = 100 if metric == "accuracy" else 1
    assert np.asarray(axes.lines[0].get_ydata()) == pytest.approx(scale * score)
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == list(range(steps + 1))
    interval = axes.collections[0].get_datalim(axes.transData)
    assert (interval.y0, interval.y1) == pytest.approx((scale * (0.2 - 0.01), scale * (0.8 + 0.03)))
    assert ("chance (20 %)" in labels(figures[0], 0)) == (metric == "accuracy")
    before, after = ("20.0 ± 1.0 %", "80.0 ± 3.0 %") if metric == "accuracy" else ("0.200 ± 0.010", "0.800 ± 0.030")
    named = "1 step" if steps == 1 else f"{steps} steps"
    assert axes.get_title(loc="left") == f"{before} before adaptation, {after} after {named}"
    low, high = axes.get_xlim()
    assert low < 0
    assert high > steps


def test_a_learner_without_steps_has_one_point_and_no_before(tmp_path: Path, figures: list[Figure]) -> None:
    plots.adaptation_curve([0.97], [0.002], tmp_path / "a.png", title="run", chance=0.05)
    (axes,) = figures[0].axes
    assert axes.get_title(loc="left") == "97.0 ± 0.2 %"
    assert axes.get_xticks().tolist() == [0]


@pytest.mark.parametrize("versions", [5, 300, 70_000])
def test_texts_lie_inside_the_picture_and_apart(versions: int, tmp_path: Path, figures: list[Figure]) -> None:
    title = "glyphs-maml · maml · 5-way 1-shot · synchronous, 4 × 8 episodes a version · seed 0"
    run = history(versions, resumes=(versions // 2,))
    plots.learning_curve(run, tmp_path / "a.png", title=title)
    plots.adaptation_curve([0.2] * 51, [0.01] * 51, tmp_path / "b.png", title=title, chance=0.2)
    for figure in figures:
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        texts = [figure._suptitle]  # type: ignore[attr-defined]
        for axes in figure.axes:
            texts += [axes.get_legend(), axes.yaxis.label, axes.xaxis.label, axes.title, axes._left_title]
        boxes = [text.get_window_extent(renderer) for text in texts]
        boxes = [box for box in boxes if box.width > 1 and box.height > 1]
        assert len(boxes) >= 4
        for box in boxes:
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1
        pairs = [(a, b) for at, a in enumerate(boxes) for b in boxes[:at]]
        assert not [pair for pair in pairs if pair[0].overlaps(pair[1])]


def test_the_same_history_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plots.learning_curve(history(300), tmp_path / name, title="run")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
