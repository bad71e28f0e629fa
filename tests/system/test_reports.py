"""What a run shows: one JSON object, metrics while it runs, a history, curves; and what is said of it afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from coordinator.history import read_history
from tests.system.conftest import CLUSTER_CPUS, SMALL, STEPS, Pictures, Undisturbed
from tests.system.driving import Finished, entries_of

pytestmark = pytest.mark.ray

EVALUATION = {"accuracy", "ci95", "episodes", "steps", "bn", "checkpoint", "way", "shot", "split"}


def test_train_prints_one_json_object(undisturbed: Undisturbed) -> None:
    finished = undisturbed.finished
    assert finished.out.count("\n") == 1
    report = json.loads(finished.out)
    assert (report["version"], report["total"], report["workers"]) == (STEPS, STEPS, 2)
    assert report["digest"] == entries_of(undisturbed.run)[-1].digest
    assert report["failures"] == {}
    assert set(report["evaluation"]) > EVALUATION
    assert (report["evaluation"]["episodes"], report["evaluation"]["split"]) == (40, "test")
    assert len(report["evaluation"]["steps"]) == 4
    assert "validation" in finished.err and "\x1b" not in finished.err


def test_nothing_is_left_of_a_run_that_ended(undisturbed: Undisturbed) -> None:
    undisturbed.driver.must_leave_nothing()


def test_metrics_can_be_scraped_while_it_runs(undisturbed: Undisturbed) -> None:
    families = {family.name: family for family in text_string_to_metric_families(undisturbed.scraped)}
    wanted = {
        *("run_info", "episodes", "shards", "commits", "version", "loss", "accuracy_ratio", "gradient_norm"),
        *("staleness_versions", "shard_latency_seconds", "in_flight_shards", "workers_alive", "failures"),
        *("checkpoint_age_seconds", "published_bytes", "received_bytes", "worker_shards", "worker_idle_seconds"),
    }
    assert {f"metafleet_{name}" for name in wanted} <= set(families)

    def value(family: str) -> float:
        return families[f"metafleet_{family}"].samples[0].value

    assert 2 <= value("version") < STEPS
    assert value("workers_alive") >= 1
    assert value("episodes") >= 16 and 0 <= value("accuracy_ratio") <= 1
    slots = {sample.labels["worker"] for sample in families["metafleet_worker_shards"].samples}
    assert slots and slots <= {"0", "1"}


def test_the_run_directory_holds_history_and_curves(undisturbed: Undisturbed) -> None:
    history = read_history(undisturbed.run / "history.msgpack")
    assert history.version.tolist() == list(range(1, STEPS + 1))
    assert [validation.version for validation in history.validations] == [STEPS // 2, STEPS]
    for name in ("learning_curve.png", "adaptation_curve.png"):
        with Image.open(undisturbed.run / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300


def test_inspect(undisturbed: Undisturbed, here: Callable[..., Finished]) -> None:
    report = here("inspect", undisturbed.run, "--json").report
    assert (report["digest"], report["version"]) == (undisturbed.report["digest"], STEPS)
    assert report["config"]["model"]["channels"] == 8
    assert report["checkpoint_problems"] == []
    newest = here("inspect", undisturbed.run / "checkpoints" / report["checkpoints"][-1], "--json").report
    assert (newest["digest"], newest["version"]) == (report["digest"], STEPS)


def test_a_run_is_evaluated_with_other_options_of_its_learner(
    undisturbed: Undisturbed, cluster: str, here: Callable[..., Finished]
) -> None:
    trained = json.loads(undisturbed.finished.out)["evaluation"]
    argv = ("evaluate", undisturbed.run, "--address", cluster, "--workers", 1)
    report = here(*argv, "--learner", "eval_steps=5", "--json").report
    assert report["steps"][:4] == trained["steps"] and len(report["steps"]) == 6
    assert report["learner"] == ["eval_steps=5"]
    assert "learner.eval_step: no such key" in here(*argv, "--learner", "eval_step=5").error
    assert (
        "--learner type: a run is evaluated with the learner that it trained"
        in here(*argv, "--learner", "type=reptile").error
    )


def test_own_pictures_are_trained_on_and_evaluated(
    own_pictures: Pictures, cluster: str, here: Callable[..., Finished], tmp_path: Path
) -> None:
    argv = ("--steps", 4, "--evaluation.every", 0, "--address", cluster, "--run-dir", "run", "--json")
    argv = (*argv, "--execution.cpus_per_worker", CLUSTER_CPUS / 2)
    trained = here("train", *own_pictures.argv, *argv).report
    assert trained["version"] == 4

    again = here("evaluate", "run", "--address", cluster, "--checkpoint", "last", "--json").report
    assert set(again) > EVALUATION
    assert {name: again[name] for name in trained["evaluation"]} == trained["evaluation"]

    shape = ("--shot", 2, "--query", 1, "--episodes", 30, "--bn", "support", "--workers", 9)
    finished = here("evaluate", "run", "--address", cluster, "--store", own_pictures.store, *shape, "--json")
    other = finished.report
    assert "no validation has named a best checkpoint" in finished.err
    assert "9 workers were asked for, the free resources allow 4" in finished.err
    assert [other[name] for name in ("split", "way", "shot", "query", "episodes", "bn", "checkpoint", "store")] == [
        *("all", 5, 2, 1, 30, "support", "last", str(own_pictures.store))
    ]


def test_a_run_without_held_out_classes_whose_store_moves(
    own_pictures: Pictures, here: Callable[..., Finished], cluster: str, tmp_path: Path
) -> None:
    for suffix in ("", ".header"):
        shutil.copy(f"{own_pictures.store}{suffix}", tmp_path / f"store.arrow{suffix}")
    none = ("--data.split.val", 0, "--data.split.test", 0, "--evaluation.every", 0, "--steps", 4)
    argv = ("omniglot-maml", "--store", "store.arrow", *SMALL, "--data.split.type", "fractions", *none)
    trained = here("train", *argv, "--run-dir", "run", "--address", cluster, "--workers", 1, "--json")
    assert trained.report["evaluation"] is None and "split test has no classes" in trained.err
    (tmp_path / "elsewhere").mkdir()
    for suffix in ("", ".header"):
        (tmp_path / f"store.arrow{suffix}").rename(tmp_path / "elsewhere" / f"store.arrow{suffix}")
    assert "no such episode store" in here("replay", "run").error
    replayed = here("replay", "run", "--store", "elsewhere/store.arrow", "--json").report
    assert replayed["digest"] == trained.report["digest"]
    resumed = here(
        "train", "--resume", "run", "--store", "elsewhere/store.arrow", "--address", cluster, "--json"
    ).report
    assert (resumed["digest"], resumed["tasks_per_second"]) == (trained.report["digest"], None)
    assert here("replay", "run", "--json").report["digest"] == trained.report["digest"]
