"""``metafleet attention`` on a run that was trained for a few versions; how its pictures look was judged by eye."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.config.loading import load_recipe, resolve, save_resolved
from cluster.config.run import RunConfig
from cluster.episodes import open_source
from cluster.messages import EvaluationTask, SplitName
from coordinator import checkpoint as checkpoints
from coordinator.attention import EpisodeAttention
from coordinator.attention_picture import attention_figure, attention_picture, heated, shown_queries, shown_samples
from coordinator.cli import main
from coordinator.meta_state import MetaState
from metaworker.shard_worker import ShardWorker
from tests.coordinator.harness import drive

Report = dict[str, Any]


def tiny() -> RunConfig:
    """The recipe with spatial attention, a small net and few versions."""
    settings = {
        "steps": 12,
        "learner.spatial": True,
        "learner.units": 16,
        "model.pools": 2,
        "model.channels": 8,
        "model.batch_norm": "support",
    }
    settings |= {
        "evaluation.every": 5,
        "evaluation.val_episodes": 4,
        "evaluation.query": 4,
        "evaluation.shot": 2,
        "episode.way": 5,
        "execution.checkpoint_every": 5,
    }
    return resolve(load_recipe("glyphs-attention"), [(key, str(value)) for key, value in settings.items()])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    drive(tiny(), path)
    return path


@pytest.fixture
def attention(capsys: pytest.CaptureFixture[str]) -> Callable[..., Report]:
    """The command's JSON."""

    def command(run: Path, *argv: str | Path) -> Report:
        assert main(["attention", str(run), *map(str, argv), "--json"]) == 0
        report: Report = json.loads(capsys.readouterr().out)
        return report

    return command


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    assert main(["attention", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


# ---------------------------------------------------------------------------------------------------------- the report


def test_each_querys_weights_sum_to_one_and_say_what_the_right_class_gets(
    run: Path, attention: Callable[..., Report]
) -> None:
    report = attention(run)
    weights, support, query = (np.array(report[key]) for key in ("weights", "support_labels", "query_labels"))
    assert weights.shape == (20, 10) and report["queries"] == 20
    assert weights.sum(1) == pytest.approx(np.ones(20), abs=1e-5) and (weights >= 0).all()
    right = [weights[q, support == label].sum() for q, label in enumerate(query)]
    assert report["on_right_class"] == pytest.approx(np.mean(right))
    assert report["chance"] == pytest.approx(1 / 5)
    assert len(report["classes"]) == len(set(report["classes"])) == 5


def test_it_looks_at_the_episode_and_model_that_evaluate_judges(run: Path, attention: Callable[..., Report]) -> None:
    config = tiny()
    worker, shape = ShardWorker(config, open_source(config)), config.evaluation_shape
    layout = MetaState.initial(config, worker.learner).layout
    state = checkpoints.load(checkpoints.list_checkpoints(run / "checkpoints")[-1], layout).state
    cases: list[tuple[SplitName, int]] = [("test", 0), ("test", 6), ("val", 6)]
    for split, episode in cases:
        task = EvaluationTask(split, episode, 1, shape.way, shape.shot, shape.query, None, state.version)
        judged = worker.evaluate(state.published, task).confusion
        assert judged is not None
        report = attention(run, "--split", split, "--episode", str(episode), "--checkpoint", "last")
        assert (report["version"], report["digest"]) == (12, state.digest)
        seen = np.zeros((5, 5), dtype=int)
        np.add.at(seen, (report["query_labels"], report["predicted_labels"]), 1)
        assert seen.tolist() == judged[0, -1].tolist()
        assert report["accuracy"] == pytest.approx(np.trace(seen) / 20)


def test_the_same_episode_gives_the_same_report_and_picture(
    run: Path, tmp_path: Path, attention: Callable[..., Report]
) -> None:
    reports = [attention(run, "--picture", tmp_path / name) for name in ("a.png", "b.png")]
    assert [report.pop("picture") for report in reports] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert reports[0] == reports[1]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert attention(run, "--episode", "1")["weights"] != reports[0]["weights"]


def test_people_get_one_line_and_the_picture_in_the_run_directory(
    run: Path, capsys: pytest.CaptureFixture[str], attention: Callable[..., Report]
) -> None:
    share = 100 * attention(run)["on_right_class"]
    (run / "attention.png").unlink()
    assert main(["attention", str(run)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"the right class gets {share:.1f} % of the attention on average over the 20 queries (chance 20 %)",
        str(run / "attention.png"),
    ]
    assert err == ""
    with Image.open(run / "attention.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000 and picture.height > 1000
        red, green, blue = np.asarray(picture.convert("RGB")).astype(int).reshape(-1, 3).T
    assert ((green > 120) & (red < 50) & (blue < 80)).sum() > 2000  # five frames
    assert ((red > blue + 100) & (red > green + 50)).sum() > 2000  # bars and places


def test_where_no_validation_named_a_best_checkpoint_it_looks_at_the_last(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "best").unlink()
    assert main(["attention", str(tmp_path / "run"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "no validation has named a best checkpoint: looking at the last one\n"
    assert (json.loads(out)["checkpoint"], json.loads(out)["version"]) == ("last", 12)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_run_of_another_learner_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_resolved(resolve(load_recipe("glyphs-protonet")), tmp_path / "config.toml")
    assert refused(capsys, tmp_path) == (
        f"error: {tmp_path} was trained with learner.type protonet, and only learner.type attention shows where it "
        "looks: train one, say by `metafleet train glyphs-attention`\n"
    )


def test_a_picture_that_cannot_be_written_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"--picture {tmp_path} is a folder" in refused(capsys, run, "--picture", tmp_path)
    missing = tmp_path / "missing" / "a.png"
    assert f"{missing}: No such file or directory" in refused(capsys, run, "--picture", missing)
    assert "(see metafleet attention --help)" in refused(capsys, run, "--episode", "-1")


# ---------------------------------------------------------------------------------------------------------- the picture


def seen(way: int, shot: int, side: int = 7, name: str = "U+05DA HEBREW LETTER FINAL KAF {}") -> EpisodeAttention:
    """An episode of noise with three queries a class; the first class's last query is taken for the last class."""
    rng = np.random.default_rng(0)
    queries, supports = 3 * way, shot * way
    maps = rng.random((queries, supports, side, side))
    own = rng.random((queries, side, side))
    labels = np.arange(way).repeat(3)
    predicted = labels.copy()
    predicted[2] = way - 1
    return EpisodeAttention(
        classes=tuple(name.format(label) for label in range(way)),
        support_x=rng.random((supports, 1, 28, 28), dtype=np.float32),
        support_y=np.arange(way).repeat(shot),
        query_x=rng.random((queries, 1, 28, 28), dtype=np.float32),
        query_y=labels,
        predicted=predicted,
        support_maps=maps / maps.sum((1, 2, 3), keepdims=True),
        query_maps=own / own.sum((1, 2), keepdims=True),
    )


@pytest.mark.parametrize(("way", "shot", "side"), [(2, 1, 7), (5, 1, 1), (20, 5, 7)])
@pytest.mark.parametrize(
    "name", ["U+05DA HEBREW LETTER FINAL KAF {}", "Bengali/character3{}", "x" * 200 + "{}", "$_$ {}"]
)
def test_texts_lie_inside_the_picture_and_apart(way: int, shot: int, side: int, name: str) -> None:
    figure = attention_figure(seen(way, shot, side, name), "glyphs-attention · test episode 0 · 20-way 5-shot")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [text.get_window_extent(renderer) for text in figure.texts]
    others = [part.get_window_extent(renderer) for part in (*figure.axes, *figure.artists)]
    for box in texts + others:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert not [text for at, text in enumerate(texts) if any(text.overlaps(box) for box in texts[:at] + others)]


def test_rows_say_what_was_predicted_and_which_samples_are_shown() -> None:
    episode = seen(2, 8)
    texts = [text.get_text() for text in attention_figure(episode, "title").texts]
    assert texts[:3] == [
        "title",
        "the right class gets "
        f"{100 * episode.on_right_class.mean():.1f} % of the attention on average over the 6 queries (chance 50 %)",
        "green: the right class · orange: where the query looks · of 16 support samples, the 10 with most attention",
    ]
    assert texts.count("predicted: right") == 5
    assert texts[texts.index("predicted: wrong, it says") + 1].startswith("U+05DA")
    shares = [f"{100 * share:.1f} %" for share in np.sort(episode.samples[0])[-10:]]
    assert (
        set(shares) <= set(texts)
        and f"{100 * np.sort(episode.samples[0])[5]:.1f} %" not in texts[: texts.index("query") + 40]
    )


def test_queries_shown_are_spread_over_the_classes() -> None:
    for way, each in ((2, 3), (3, 2), (4, 1), (5, 1), (6, 1)):
        rows = shown_queries(15 * way, way)
        assert np.bincount(rows // 15, minlength=way).tolist() == [each] * way
    assert len(set(shown_queries(300, 20) // 15)) == len(shown_queries(300, 20)) == 6
    assert shown_queries(4, 2).tolist() == [0, 1, 2, 3]


def test_samples_shown_are_those_with_most_attention_in_their_order() -> None:
    assert shown_samples(np.array([0.1, 0.4, 0.1, 0.3, 0.1]), 3).tolist() == [0, 1, 3]
    assert shown_samples(np.array([0.5, 0.5]), 10).tolist() == [0, 1]


@pytest.mark.parametrize("channels", [1, 3])
def test_heat_colours_its_own_place_and_leaves_the_rest(channels: int) -> None:
    image = np.random.default_rng(0).random((channels, 28, 28))
    plain = np.broadcast_to(image, (3, 28, 28)).transpose(1, 2, 0)
    assert np.array_equal(heated(image, np.zeros((7, 7))), plain)
    heat = np.zeros((7, 7))
    heat[1, 5] = 1
    changed = np.abs(heated(image, heat) - plain).max(2) > 1e-6
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 9, 18, 25)
    assert heated(np.zeros((channels, 28, 28)), heat)[5:7, 21:23].argmax(2).tolist() == [[0, 0], [0, 0]]


def test_a_failed_write_leaves_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        attention_picture(seen(2, 1), tmp_path / "a.png", title="title")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
