"""The recorder: what is on the disk after each step, which checkpoints are kept, and who may write."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config.run import RunConfig
from cluster.errors import RunDirectoryError
from cluster.metrics import Metrics, RunInfo
from coordinator import checkpoint as checkpoints
from coordinator.checkpoint import Checkpoint
from coordinator.commit_log import Entry, read_log
from coordinator.history import CommitRecord, ValidationRecord, read_history
from coordinator.meta_state import MetaState
from coordinator.recorder import Recorder
from coordinator.run_dir import RunDirectory
from metaworker.learners import build_learner
from tests.coordinator.harness import TINY, new_run

INITIAL = MetaState.initial(TINY, build_learner(TINY, (1,)))


def at(version: int) -> Checkpoint:
    return Checkpoint(replace(INITIAL, version=version), (), (), (), 0, "config", 10 * version, 0.1 * version, {}, {})


def entry(version: int) -> Entry:
    return Entry(version, (), (), replace(INITIAL, version=version).digest)


def record(version: int) -> CommitRecord:
    return CommitRecord(version, 0.5, 0.8, 1.5, 32, version * 0.1, 320.0, 0.0, 1)


def validation(version: int, score: float) -> ValidationRecord:
    return ValidationRecord(version, (9.0, score), (0.1, 0.1))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return new_run(tmp_path / "run")


def recorder(
    run: RunDirectory, start: int = 0, *, keep: int = 2, higher: bool = True, val_episodes: int = 200
) -> Recorder:
    config = RunConfig() if higher else TINY
    update = {
        "execution": config.execution.model_copy(update={"keep": keep}),
        "evaluation": config.evaluation.model_copy(update={"val_episodes": val_episodes}),
    }
    return Recorder(run, run.claim_epoch(), config.model_copy(update=update), at(start).state)


def kept(run: RunDirectory) -> list[int]:
    return [checkpoints.version_of(path)[0] for path in checkpoints.list_checkpoints(run.checkpoints)]


def best(run: RunDirectory) -> int | None:
    path = checkpoints.best_of(run.checkpoints)
    return None if path is None else checkpoints.version_of(path)[0]


def test_a_commit_is_with_the_operating_system_before_it_is_published(run: RunDirectory) -> None:
    writing = recorder(run)
    for version in (1, 2):
        writing.commit(entry(version), record(version))
        assert [each.version for each in read_log(run)] == list(range(1, version + 1))
        assert read_history(run.history).version.tolist() == list(range(1, version + 1))


def test_the_log_is_on_the_disk_before_a_checkpoint(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    writing = recorder(run)
    writing.commit(entry(1), record(1))
    synced: list[str] = []
    real = os.fsync

    def spy(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    for write in (lambda: writing.checkpoint(at(1)), lambda: writing.validation(validation(1, 0.5), at(1))):
        synced.clear()
        write()
        assert synced[0] == "0001.msgpack"


def test_checkpoints_are_written_pruned_and_measured(run: RunDirectory) -> None:
    writing = recorder(run)
    for version in range(1, 5):
        writing.commit(entry(version), record(version))
        size = writing.checkpoint(at(version))
        folder = checkpoints.list_checkpoints(run.checkpoints)[-1]
        assert size == sum(file.stat().st_size for file in folder.iterdir())
    assert kept(run) == [3, 4]
    writing.close()
    writing.close()


@pytest.mark.parametrize(
    ("higher", "scores", "bests"),
    [
        (True, [0.5, 0.7, 0.7, 0.6, 0.8], [1, 2, 2, 2, 5]),
        (False, [0.5, 0.7, 0.5, 0.4, 0.3], [1, 1, 1, 4, 5]),
        (True, [math.nan, 0.2, math.nan, math.inf, 0.3], [None, 2, 2, 2, 5]),
        (False, [math.inf, 3.0, math.nan, math.inf, -math.inf], [None, 2, 2, 2, 2]),
    ],
)
def test_the_best_by_validation_is_kept(
    run: RunDirectory, higher: bool, scores: list[float], bests: list[int | None]
) -> None:
    writing = recorder(run, keep=1, higher=higher)
    found: list[int | None] = []
    for version, score in enumerate(scores, 1):
        writing.commit(entry(version), record(version))
        before = best(run)
        assert writing.validation(validation(version, score), at(version)) == (best(run) != before)
        found.append(best(run))
    assert found == bests
    writing.checkpoint(at(6))
    assert kept(run) == sorted({6, *([bests[-1]] if bests[-1] else [])})
    assert [each.version for each in read_history(run.history).validations] == [1, 2, 3, 4, 5]


def test_the_best_survives_a_resume(run: RunDirectory) -> None:
    writing = recorder(run)
    writing.commit(entry(1), record(1))
    writing.validation(validation(1, 0.7), at(1))
    writing.close()
    writing = recorder(run, start=1)
    writing.commit(entry(2), record(2))
    assert not writing.validation(validation(2, 0.6), at(2))
    assert writing.validation(validation(3, 0.75), at(3))
    assert checkpoints.best_score(run.checkpoints) == 0.75 and best(run) == 3


def test_scores_of_other_validation_episodes_are_not_compared(run: RunDirectory) -> None:
    writing = recorder(run)
    writing.commit(entry(1), record(1))
    writing.validation(validation(1, 0.7), at(1))
    writing.close()
    writing = recorder(run, start=1, val_episodes=1000)
    writing.commit(entry(2), record(2))
    assert writing.validation(validation(2, 0.6), at(2)) and best(run) == 2


def test_a_version_is_only_validated_for_the_history_when_its_checkpoint_is_kept(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = recorder(run)
    writing.commit(entry(1), record(1))

    def killed(path: Path, score: float, measured: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "mark_best", killed)
    with pytest.raises(KeyboardInterrupt):
        writing.validation(validation(1, 0.7), at(1))
    assert read_history(run.history).validations == ()


def test_a_resume_marks_the_history_and_sweeps_what_was_left(run: RunDirectory) -> None:
    writing = recorder(run)
    for version in (1, 2, 3):
        writing.commit(entry(version), record(version))
    (run.checkpoints / ".v00000003-e0001.1.partial").mkdir()
    recorder(run, start=1).close()
    assert read_history(run.history).version.tolist() == [1]
    assert read_history(run.history).resumes == (1,)
    assert os.listdir(run.checkpoints) == []
    recorder(run).close()
    assert read_history(run.history).resumes == (1, 0)


def test_a_superseded_driver_writes_no_checkpoint(run: RunDirectory) -> None:
    stale = recorder(run)
    stale.commit(entry(1), record(1))
    stale.checkpoint(at(1))
    later = recorder(run, start=1)
    for write in (lambda: stale.checkpoint(at(2)), lambda: stale.validation(validation(2, 0.9), at(2))):
        with pytest.raises(RunDirectoryError, match=r"another driver \(epoch 2\) has taken over"):
            write()
    assert (kept(run), best(run)) == ([1], None)
    later.commit(entry(2), record(2))
    later.checkpoint(at(2))
    assert kept(run) == [1, 2]


def test_a_superseded_driver_leaves_the_later_ones_metrics_alone(run: RunDirectory) -> None:
    metrics = Metrics(RunInfo("run", "tiny", "maml", "", 0, "digest"), regression=True)
    stale = recorder(run)
    stale.keep_metrics(metrics)
    metrics.version(1, 5)
    recorder(run).keep_metrics(metrics)
    assert "metafleet_version 1.0" in (newer := run.metrics.read_text())
    metrics.version(0, 5)
    with pytest.raises(RunDirectoryError, match=r"another driver \(epoch 2\) has taken over"):
        stale.keep_metrics(metrics)
    assert run.metrics.read_text() == newer
