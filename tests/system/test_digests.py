"""A synchronous run gives one digest: with any number of workers, after deaths, and when it is recomputed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from cluster.episodes.store import read_header
from cluster.ray_runtime import ray_cluster, usable_cpus
from coordinator.history import read_history
from coordinator.run_dir import RunDirectory
from tests.system.conftest import CLUSTER_CPUS, STEPS, Pictures, Undisturbed
from tests.system.driving import AGENTS, Command, Finished, entries_of, newest_checkpoint, wait_for

pytestmark = pytest.mark.ray


def test_one_worker(command: Command, pictures: Pictures, undisturbed: Undisturbed) -> None:
    report = command.run("train", *pictures.argv, "--workers", 1, "--run-dir", "run", "--json").report
    assert (report["workers"], undisturbed.report["workers"]) == (1, 2)
    assert read_history(RunDirectory(undisturbed.run).history).workers.max() == 2
    assert report["digest"] == undisturbed.report["digest"]
    assert report["evaluation"] == undisturbed.report["evaluation"]


def test_four_workers_on_a_joined_cluster(
    command: Command, pictures: Pictures, undisturbed: Undisturbed, cluster: str
) -> None:
    argv = ("--workers", 4, "--execution.cpus_per_worker", 0.25, "--address", cluster, "--run-dir", "run", "--json")
    driver = command.start("train", *pictures.argv, *argv)
    report = driver.finish().report
    assert report["workers"] == 4 == read_history(RunDirectory(command.folder / "run").history).workers.max()
    assert report["digest"] == undisturbed.report["digest"]
    assert report["evaluation"] == undisturbed.report["evaluation"]
    driver.must_leave_nothing()
    # The cluster goes on, and has all its resources again.
    with ray_cluster(cluster):
        import ray

        wait_for(lambda: ray.available_resources()["CPU"] == CLUSTER_CPUS, "all CPUs to be free", 30)


@pytest.mark.parametrize(
    "learner", [("glyphs-episodic", "--learner.capacity", 12), ("glyphs-memory", "--learner.carry", "true")]
)
def test_state_that_outlives_tasks_is_that_of_one_worker(
    command: Command, cluster: str, learner: tuple[object, ...]
) -> None:
    small = ("--model.channels", 12, "--steps", 10, "--evaluation.every", 0, "--evaluation.episodes", 20)
    placed = ("--address", cluster, "--execution.cpus_per_worker", 0.5, "--json")
    one, two = (
        command.run(
            *("train", *learner, *small, *placed, "--run-dir", f"run-{workers}"),
            *("--workers", workers, "--execution.min_workers", workers),
        ).report
        for workers in (1, 2)
    )
    assert (one["workers"], two["workers"]) == (1, 2)
    assert one["digest"] == two["digest"] and one["evaluation"] == two["evaluation"]


def test_a_killed_worker(command: Command, pictures: Pictures, undisturbed: Undisturbed) -> None:
    half = usable_cpus() / 2
    argv = ("--workers", 3, "--execution.cpus_per_worker", half, "--run-dir", "run", "--json")
    driver = command.start("train", *pictures.argv, *argv)
    version = driver.until_version(command.folder / "run", 10)
    driver.until(lambda: len(driver.workers()) == 2, "both workers")
    with driver.held():
        os.kill(driver.workers()[0], signal.SIGKILL)
    finished = driver.finish()
    report = finished.report
    assert version < STEPS
    assert report["failures"] == {"worker_lost": 1}
    assert report["digest"] == undisturbed.report["digest"]
    assert "3 workers were asked for, the free resources allow 2: going on with 2" in finished.err
    assert finished.err.count("replacing it") == 1
    assert "(raylet)" not in finished.err and "\x1b" not in finished.err
    driver.must_leave_nothing()


def test_a_killed_driver(
    command: Command, pictures: Pictures, undisturbed: Undisturbed, here: Callable[..., Finished]
) -> None:
    run = command.folder / "run"
    driver = command.start("train", *pictures.argv, "--workers", 2, "--run-dir", run)
    driver.until_version(run, 25)
    with driver.held():
        left_behind = driver.ray_folder()
        driver.send(signal.SIGKILL)
    assert driver.finish().code == -signal.SIGKILL
    # Ray's processes notice by themselves that their driver is gone.
    driver.must_leave_nothing(but=AGENTS)
    before = entries_of(run)
    assert newest_checkpoint(run) <= len(before) < STEPS

    resumed = command.run("train", "--resume", run, "--json").report
    entries = entries_of(run)
    assert resumed["digest"] == undisturbed.report["digest"]
    assert resumed["evaluation"] == undisturbed.report["evaluation"]
    assert RunDirectory(run).epochs() == [1, 2]
    assert [entry.version for entry in entries] == list(range(1, STEPS + 1))
    assert entries[: len(before)] == before
    assert entries == entries_of(undisturbed.run)
    # A later driver clears up after a killed one.
    assert not left_behind.exists()

    replayed = here("replay", run, "--json").report
    assert (replayed["digest"], replayed["version"]) == (undisturbed.report["digest"], STEPS)


def test_replay(undisturbed: Undisturbed, here: Callable[..., Finished]) -> None:
    report = here("replay", undisturbed.run, "--json").report
    assert (report["version"], report["digest"]) == (STEPS, undisturbed.report["digest"])
    half = here("replay", undisturbed.run, "--until", STEPS // 2, "--json").report
    assert (half["version"], half["digest"]) == (STEPS // 2, entries_of(undisturbed.run)[STEPS // 2 - 1].digest)


def test_the_digests_are_of_the_real_omniglot(omniglot: Pictures, undisturbed: Undisturbed) -> None:
    assert RunDirectory(undisturbed.run).identity().store_digest == read_header(omniglot.store).digest
