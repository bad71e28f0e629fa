"""Signals: a checkpoint, an exit code, a way to go on, and nothing left behind."""

from __future__ import annotations

import signal

import pytest

from coordinator.run_dir import RunDirectory
from tests.system.conftest import STEPS, Pictures, Undisturbed
from tests.system.driving import AGENTS, Command, newest_checkpoint

pytestmark = pytest.mark.ray


def test_stops_and_resumes_end_with_the_undisturbed_digest(
    command: Command, pictures: Pictures, undisturbed: Undisturbed
) -> None:
    run = command.folder / "run"

    first = command.start("train", *pictures.argv, "--workers", 2, "--run-dir", "run", "--json")
    first.until_version(run, 5)
    with first.held():  # or it would be at its end before another process has even started
        ray_folder = first.ray_folder()
        assert "in use by a living run" in command.run("train", "--resume", "run").error
        first.send(signal.SIGTERM)
    finished = first.finish()
    assert (finished.code, finished.out) == (128 + signal.SIGTERM, "")
    reached = finished.stopped_at
    assert 5 <= reached == newest_checkpoint(run) < STEPS
    first.must_leave_nothing()
    assert not ray_folder.exists()

    second = command.start("train", "--resume", "run", "--json")
    second.until_version(run, reached + 5)
    with second.held():
        ray_folder = second.ray_folder()
        second.send(signal.SIGINT)
    second.until(lambda: "stopped at version" in second.err, "the checkpoint")
    second.send(signal.SIGINT)
    finished = second.finish()
    assert (finished.code, finished.out) == (128 + signal.SIGINT, "")
    assert reached + 5 <= finished.stopped_at == newest_checkpoint(run) < STEPS
    # What a driver does after its checkpoint includes removing this folder: it was not waited for.
    assert ray_folder.exists()
    second.must_leave_nothing(but=AGENTS)

    report = command.run("train", "--resume", "run", "--json").report
    assert report["digest"] == undisturbed.report["digest"]
    assert report["evaluation"] == undisturbed.report["evaluation"]
    assert RunDirectory(run).epochs() == [1, 2, 3]


def test_a_stop_before_there_is_a_run_leaves_nothing(command: Command) -> None:
    driver = command.start("train", "sinusoid-maml", "--run-dir", "run")
    driver.until(lambda: any("raylet" in name for name in driver.family().values()), "Ray")
    driver.send(signal.SIGTERM)
    finished = driver.finish()
    assert (finished.code, finished.out) == (128 + signal.SIGTERM, "")
    assert "Traceback" not in finished.err
    assert not (command.folder / "run").exists()
    driver.must_leave_nothing(but=AGENTS)
