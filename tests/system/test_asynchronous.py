"""Asynchronous runs: the bound on staleness holds with a slow worker, and the log gives the digest again."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cluster.config.run import RunConfig
from cluster.messages import Contribution, EvaluationPart, EvaluationTask, Published, ShardTask, WorkerHello
from coordinator.commit_log import Entry, read_log
from coordinator.run_dir import RunDirectory
from metaworker.actor import WorkerActor
from tests.system.driving import Command, Finished, entries_of, newest_checkpoint

pytestmark = pytest.mark.ray

BOUND = 4
MANY = 600
"""Versions of a run that is to be stopped in the middle: seconds of work."""

SINUSOID = (
    *("train", "sinusoid-maml", "--learner.inner_lr", 0.001, "--evaluation.episodes", 20, "--evaluation.every", 0),
    *("--aggregator.type", "async", "--aggregator.staleness_bound", BOUND, "--execution.cpus_per_worker", 0.5),
    *("--workers", 2, "--run-dir", "run"),
)


def late(slot: int, run: Path, versions: tuple[int, ...]) -> type[WorkerActor]:
    """A worker actor that is slow in one slot: it holds each reply until so many versions are committed after its base.

    Args:
        slot: which one.
        run: where the commits are seen.
        versions: how late its replies are, in turn.

    A local class, so that it travels by value.
    """
    computes = run.with_name("the slow worker computes")

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)

    class LateActor:
        def __init__(self, config: RunConfig, mine: int) -> None:
            self._actor = WorkerActor(config, mine)
            self._mine = mine
            self._turns = itertools.cycle(versions if mine == slot else (0,))

        def hello(self) -> WorkerHello:
            return self._actor.hello()

        def compute(self, published: Published, order: ShardTask | EvaluationTask) -> Contribution | EvaluationPart:
            result = self._actor.compute(published, order)
            if self._mine == slot:
                computes.touch()
            wait(computes.exists)  # or a fast machine has ended the run before the slow worker has even warmed up
            if isinstance(order, ShardTask):
                reached = order.base_version + next(self._turns)
                wait(lambda: len(read_log(RunDirectory(run))) >= reached)
            return result

    return LateActor  # type: ignore[return-value]


def staleness(entries: list[Entry]) -> list[int]:
    """Of everything that was applied."""
    return [entry.version - 1 - counted.base_version for entry in entries for counted in entry.counted]


def assert_each_counts_at_most_once(entries: list[Entry]) -> None:
    shards = [counted.shard for entry in entries for counted in entry.counted]
    dropped = [drop.shard for entry in entries for drop in entry.dropped]
    assert len(set(shards + dropped)) == len(shards) + len(dropped)


def test_a_slow_worker_stays_within_the_bound(
    here: Callable[..., Finished], cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coordinator import ray_pool

    # Five times slower than the other worker, with two shards in flight: five versions late, and more. Every other
    # reply comes earlier, so that the bound has both to accept and to refuse.
    actor = late(0, tmp_path / "run", versions=(BOUND - 1, BOUND + 2))
    monkeypatch.setattr(ray_pool, "RayPool", partial(ray_pool.RayPool, actor=actor))
    report = here(*SINUSOID, "--steps", 60, "--address", cluster, "--json").report
    entries = entries_of(tmp_path / "run")
    assert report["workers"] == 2
    assert [entry.version for entry in entries] == list(range(1, 61))
    assert 0 < max(staleness(entries)) <= BOUND
    dropped = [(entry.version - 1, drop) for entry in entries for drop in entry.dropped]
    assert dropped and report["failures"]["stale"] >= len(dropped)
    assert all(version - drop.base_version > BOUND for version, drop in dropped)
    assert all(f"above the bound {BOUND}" in drop.reason for _, drop in dropped)
    assert_each_counts_at_most_once(entries)
    assert any(counted.weight < 1 for entry in entries for counted in entry.counted)

    replayed = here("replay", "run", "--json").report
    assert (replayed["digest"], replayed["version"]) == (report["digest"], 60)
    assert replayed["dropped"] == len(dropped)
    inspected = here("inspect", "run", "--json").report
    assert inspected["max_staleness"] == max(staleness(entries))
    evaluated = here("evaluate", "run", "--address", cluster, "--workers", 1, "--json").report
    assert {name: evaluated[name] for name in report["evaluation"]} == report["evaluation"]
    assert evaluated["bn"] is None and "has no batch-norm" in here("evaluate", "run", "--bn", "running").error
    assert "mse" in evaluated and "accuracy" not in evaluated and len(evaluated["steps"]) == 11


def test_a_buffered_run_is_killed_stopped_and_resumed(command: Command, here: Callable[..., Finished]) -> None:
    run = command.folder / "run"
    argv = ("--steps", MANY, "--aggregator.buffer", 3, "--execution.checkpoint_every", 20, "--json")
    driver = command.start(*SINUSOID, *argv)
    driver.until_version(run, 30)
    driver.send(signal.SIGKILL)
    driver.finish()
    before = entries_of(run)

    second = command.start("train", "--resume", "run", "--json")
    reached = second.until_version(run, len(before) + 10)
    second.send(signal.SIGINT)
    finished = second.finish()
    assert (finished.code, finished.out) == (128 + signal.SIGINT, "")
    assert reached <= finished.stopped_at == newest_checkpoint(run) < MANY
    second.must_leave_nothing()

    report = command.run("train", "--resume", run, "--json").report
    entries = entries_of(run)
    assert report["version"] == MANY and RunDirectory(run).epochs() == [1, 2, 3]
    assert [entry.version for entry in entries] == list(range(1, MANY + 1))
    assert entries[: len(before)] == before
    assert all(len(entry.counted) == 3 for entry in entries)
    assert 0 < max(staleness(entries)) <= BOUND
    assert_each_counts_at_most_once(entries)
    replayed = here("replay", run, "--json").report
    assert (replayed["digest"], replayed["version"]) == (report["digest"], MANY)
