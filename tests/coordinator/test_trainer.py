"""Whole runs in this process: synchronous, asynchronous, stopped, killed, resumed, replayed, diverging, validated."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config.learners import MAML, Reptile
from cluster.config.run import RunConfig
from cluster.config.sections import (
    SGD,
    Adam,
    Aggregator,
    AsyncAggregator,
    CosineSchedule,
    Evaluation,
    Execution,
    Shard,
    SyncAggregator,
)
from cluster.episodes import open_source
from cluster.errors import CheckpointError, FingerprintError, NumericsError
from cluster.messages import EvaluationTask, ShardTask
from coordinator import checkpoint as checkpoints
from coordinator.commit_log import Entry, read_log
from coordinator.history import read_history
from coordinator.meta_state import MetaState
from coordinator.outer_optimizer import OuterOptimizer
from coordinator.replay import replay_run
from coordinator.run_dir import RunDirectory
from metaworker.learners import build_learner
from metaworker.learners.base import Context
from tests.coordinator.harness import TINY, Killed, drive, replayed

ASYNC = AsyncAggregator(staleness_bound=2, buffer=1)
BUFFERED = AsyncAggregator(staleness_bound=2, buffer=3)
THROWN = Adam(lr=2.0)
"""Throws θ about, so that validation errors rise and fall."""
KINDS: dict[str, Aggregator] = {"sync": SyncAggregator(shards=3), "async": ASYNC, "buffered": BUFFERED}


def tiny(aggregator: Aggregator = TINY.aggregator, **changes: object) -> RunConfig:
    """``TINY`` with another aggregator, deep in flight, and whatever else differs."""
    execution = TINY.execution.model_copy(update={"in_flight": 5})
    return TINY.model_copy(update={"aggregator": aggregator, "execution": execution, **changes})


def log(path: Path) -> list[Entry]:
    return read_log(RunDirectory.open(path))


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine dies here; waiting for the disk is half of the time otherwise."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunConfig], str]:
    """The digest of a run that nothing happens to."""

    @cache
    def digest(config: str) -> str:
        return drive(RunConfig.model_validate_json(config), tmp_path_factory.mktemp("undisturbed") / "run").digest

    return lambda config: digest(config.model_dump_json())


def staleness(entries: list[Entry]) -> list[int]:
    return [entry.version - 1 - line.base_version for entry in entries for line in entry.counted]


# ------------------------------------------------------------------------------------------------------ what a run does


def test_a_synchronous_run_is_the_outer_loop_written_plainly(tmp_path: Path) -> None:
    """Meta-gradients summed shard by shard over the tree, divided by the episodes, through torch's Adam."""
    config = tiny(schedule=CosineSchedule(final=0.1), clip_norm=0.5)
    driven = drive(config, tmp_path / "run")
    source = open_source(config)
    learner = build_learner(config, source.sample_shape)
    state = MetaState.initial(config, learner)
    outer = OuterOptimizer(config)
    for version in range(6):
        theta, sums = state.layout.unflatten(state.theta), []
        for shard in range(3 * version, 3 * version + 3):
            episodes = source.sample("train", 2 * shard, 2, 1, 3, 3)
            result = learner.contribute(theta, {}, episodes, Context(version, 2))
            sums.append(state.layout.flatten(result.gradient).numpy())
        gradient = ((sums[0] + sums[1]) + sums[2]) / np.float32(6)
        state, _ = state.apply(gradient, [], learner, outer)
        assert log(tmp_path / "run")[version].digest == state.digest
    assert driven.digest == state.digest and driven.trainer.state.version == 6
    assert torch.equal(driven.trainer.state.theta, state.theta)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_with_its_log_history_and_checkpoint_and_can_be_replayed(tmp_path: Path, kind: str) -> None:
    config, path = tiny(KINDS[kind]), tmp_path / "run"
    driven = drive(config, path)
    entries = log(path)
    assert [entry.version for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert entries[-1].digest == driven.digest == replayed(config, path).state.digest
    history = read_history(path / "history.msgpack")
    assert history.version.tolist() == [1, 2, 3, 4, 5, 6]
    assert history.episodes.tolist() == [2 * len(entry.counted) for entry in entries]
    found = checkpoints.list_checkpoints(path / "checkpoints")
    assert [checkpoints.version_of(at)[0] for at in found] == [4, 6]
    saved = checkpoints.load(found[-1], driven.trainer.state.layout, config.result_digest())
    assert saved.state.digest == driven.digest
    assert saved.episodes == driven.trainer.progress.episodes == sum(2 * len(entry.counted) for entry in entries)
    assert driven.view.snapshots[-1].version == 6


@pytest.mark.parametrize("kind", ["async", "buffered"])
def test_an_asynchronous_run_uses_each_shard_at_most_once_and_none_beyond_its_bound(tmp_path: Path, kind: str) -> None:
    config, path = tiny(KINDS[kind], steps=12), tmp_path / "run"
    driven = drive(config, path)
    entries = log(path)
    used = [line.shard for entry in entries for line in entry.counted]
    dropped = [line.shard for entry in entries for line in entry.dropped]
    assert len({*used, *dropped}) == len(used) + len(dropped)
    assert set(staleness(entries)) <= {0, 1, 2} and max(staleness(entries)) > 0
    weights = {(entry.version - 1 - line.base_version): line.weight for entry in entries for line in entry.counted}
    assert all(weight == pytest.approx((1 + stale) ** -0.5) for stale, weight in weights.items())
    # With one worker and five orders in flight, every fourth and fifth shard of an unbuffered run comes too late.
    assert (len(dropped) > 5) == (kind == "async")
    assert driven.trainer.progress.failures["stale"] >= len(dropped)


@pytest.mark.parametrize("kind", KINDS)
def test_how_much_is_in_flight_decides_an_asynchronous_run_only(tmp_path: Path, kind: str) -> None:
    config = tiny(KINDS[kind])
    few = config.model_copy(update={"execution": config.execution.model_copy(update={"in_flight": 1})})
    digests = {drive(each, tmp_path / str(number)).digest for number, each in enumerate((config, few))}
    assert len(digests) == (1 if kind == "sync" else 2)


def test_reptile_runs_under_either_aggregator(tmp_path: Path) -> None:
    for kind in ("sync", "async"):
        learner = Reptile(inner_lr=0.01, inner_steps=3, eval_steps=2, inner_batch=3)
        config = tiny(KINDS[kind], learner=learner, optimizer=SGD(lr=1.0))
        driven = drive(config, tmp_path / kind)
        assert replayed(config, tmp_path / kind).state.digest == driven.digest


# ------------------------------------------------------------------------------------------------------ stop and resume


Undisturbed = Callable[[RunConfig], str]


@pytest.mark.parametrize(
    ("kind", "stop_at", "version", "taken"),
    [
        ("sync", 1, 0, [0]),
        ("sync", 5, 1, [3, 4]),
        ("sync", 18, 6, []),
        ("buffered", 1, 0, [0]),
        ("buffered", 5, 1, [3, 4]),
        ("async", 1, 1, []),
        ("async", 5, 3, []),
    ],
)
def test_a_stopped_run_goes_on(
    tmp_path: Path, undisturbed: Undisturbed, kind: str, stop_at: int, version: int, taken: list[int]
) -> None:
    config, path = tiny(KINDS[kind]), tmp_path / "run"
    stopped = drive(config, path, stop_at=stop_at)
    assert stopped.trainer.state.version == version
    assert [c.shard for c, _ in stopped.trainer._aggregator.pending()] == taken
    resumed = drive(config, path, resume=True)
    assert (resumed.start, resumed.trainer.state.version) == (version, 6)
    computed = [order.shard for order in resumed.submitted if isinstance(order, ShardTask)]
    assert not set(taken) & set(computed), "a shard that the checkpoint holds was computed again"
    entries = log(path)
    used = [line.shard for entry in entries for line in entry.counted]
    assert len(set(used)) == len(used) and max(staleness(entries)) <= 2
    assert replayed(config, path).state.digest == resumed.digest
    assert resumed.trainer.progress.episodes == 2 * len(used)
    if kind == "sync":
        assert resumed.digest == undisturbed(config) and used == list(range(18))
    else:
        # What was in flight comes first; what was dropped since the last commit is in the next one's log entry.
        lost, dropped = stopped.trainer._aggregator.outstanding(), stopped.trainer._dropped
        assert computed[: len(lost)] == sorted(lost)
        assert entries[version].dropped[: len(dropped)] == tuple(dropped)
        assert not {drop.shard for drop in dropped} & {*computed, *used}


@pytest.mark.parametrize("kind", ["sync", "buffered"])
def test_contributions_taken_since_this_version_s_checkpoint_are_computed_again(
    tmp_path: Path, undisturbed: Undisturbed, kind: str
) -> None:
    config, path = tiny(KINDS[kind]), tmp_path / "run"
    stopped = drive(config, path, stop_at=8)
    assert len(stopped.trainer._aggregator.pending()) == 2 and stopped.trainer.state.version == 2
    resumed = drive(config, path, resume=True)
    used = [line.shard for entry in log(path) for line in entry.counted]
    assert sorted(used) == list(range(18))
    assert replayed(config, path).state.digest == resumed.digest
    if kind == "sync":
        assert resumed.digest == undisturbed(config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kill_at", [1, 11, 16])
def test_a_killed_run_goes_on_and_loses_nothing_of_its_result(
    tmp_path: Path, undisturbed: Undisturbed, kind: str, kill_at: int
) -> None:
    config, path = tiny(KINDS[kind], steps=20 if kind == "async" else 6), tmp_path / "run"
    with pytest.raises(Killed):
        drive(config, path, kill_at=kill_at)
    before = log(path)
    with pytest.raises(Killed):
        drive(config, path, resume=True, kill_at=2)
    resumed = drive(config, path, resume=True)
    entries = log(path)
    assert [entry.version for entry in entries] == list(range(1, config.steps + 1))
    assert entries[: len(before)] == before
    assert replayed(config, path).state.digest == resumed.digest
    used = [line.shard for entry in entries for line in entry.counted]
    assert len(set(used)) == len(used) and max(staleness(entries)) <= 2
    assert read_history(path / "history.msgpack").version.tolist() == list(range(1, config.steps + 1))
    if kind == "sync":
        # From the last checkpoint, of an even version; the tail is recomputed and compared with the log.
        assert resumed.start == len(before) // 2 * 2
        assert resumed.digest == undisturbed(config)
    else:
        assert resumed.start >= len(before)


def test_a_resumed_synchronous_run_must_come_to_the_digests_that_were_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = tiny(), tmp_path / "run"
    with pytest.raises(Killed):
        drive(config, path, kill_at=17)
    assert len(log(path)) == 5
    step = OuterOptimizer.step

    def other_bits(self: OuterOptimizer, theta: torch.Tensor, *rest: object) -> object:
        after, state = step(self, theta, *rest)  # type: ignore[arg-type]
        return after + after * 2**-23, state

    monkeypatch.setattr(OuterOptimizer, "step", other_bits)
    with pytest.raises(NumericsError, match=r"version 5 has digest .*, the log .* says .* other bits"):
        drive(config, path, resume=True)


@pytest.mark.parametrize("kind", KINDS)
def test_other_hardware_must_be_asked_for_and_recomputes_no_foreign_bits(tmp_path: Path, kind: str) -> None:
    steps = 20 if kind == "async" else 12
    config, path = tiny(KINDS[kind], steps=steps), tmp_path / "run"
    asked = config.model_copy(
        update={"execution": config.execution.model_copy(update={"other_hardware": True, "in_flight": 1})}
    )
    with pytest.raises(Killed):
        drive(config, path, kill_at=16)
    with pytest.raises(FingerprintError, match=r"was computed on other hardware .* add --execution.other_hardware"):
        drive(config, path, resume=True, hardware="B")
    with pytest.raises(Killed):
        drive(asked, path, resume=True, hardware="B", kill_at=10)
    # Back where the run began: what follows the last checkpoint is of the other hardware now.
    entries = log(path)
    saved = checkpoints.version_of(checkpoints.list_checkpoints(path / "checkpoints")[-1])[0]
    assert len(entries) > saved > 0
    if kind == "sync":
        driven = drive(config, path, resume=True)
    else:
        with pytest.raises(
            FingerprintError, match=rf"versions {saved + 1}–{len(entries)} .* in its log alone and were"
        ):
            drive(config, path, resume=True)
        driven = drive(asked, path, resume=True)
        assert any("are left out" in message for message in driven.view.messages)
    assert driven.start == saved and driven.trainer.progress.mixed
    entries = log(path)
    used = [line.shard for entry in entries for line in entry.counted]
    assert [entry.version for entry in entries] == list(range(1, steps + 1)) and len(set(used)) == len(used)
    first = next(e.version for e in entries if any(c.fingerprint == "B" for c in e.counted))
    with pytest.raises(FingerprintError, match=rf"is a mixed run: from version {first} on.*--until {first - 1}"):
        replay_run(RunDirectory.open(path))
    replay_run(RunDirectory.open(path), first - 1)


def test_a_log_that_ends_before_the_last_checkpoint_is_no_replay(tmp_path: Path) -> None:
    config, path = tiny(), tmp_path / "run"
    drive(config, path)
    assert replay_run(RunDirectory.open(path))[0].state.version == 6
    RunDirectory(path).log(1).unlink()
    with pytest.raises(CheckpointError, match=r"ends at version 0, before its checkpoint of version 6: restore"):
        replay_run(RunDirectory.open(path))


def test_what_was_dropped_since_a_checkpoint_of_the_same_version_is_in_the_log_after_a_stop(tmp_path: Path) -> None:
    config = tiny(ASYNC, steps=12)
    config = config.model_copy(update={"execution": config.execution.model_copy(update={"checkpoint_every": 1})})
    for stop_at in range(8, 20):
        path = tmp_path / str(stop_at)
        trainer = drive(config, path, stop_at=stop_at).trainer
        if trainer._dropped:
            break
    version, dropped = trainer.state.version, tuple(trainer._dropped)
    assert version > 0 and dropped
    resumed = drive(config, path, resume=True)
    assert log(path)[version].dropped[: len(dropped)] == dropped
    computed = {order.shard for order in resumed.submitted if isinstance(order, ShardTask)}
    assert not computed & {drop.shard for drop in dropped}


def test_a_run_computed_wholly_elsewhere_is_no_mixed_run(tmp_path: Path) -> None:
    config, path = tiny(), tmp_path / "run"
    asked = config.model_copy(update={"execution": config.execution.model_copy(update={"other_hardware": True})})
    with pytest.raises(Killed):
        drive(config, path, kill_at=1, hardware="A")
    driven = drive(asked, path, resume=True)
    assert not driven.trainer.progress.mixed
    assert replay_run(RunDirectory.open(path))[0].state.digest == driven.digest


def test_what_other_hardware_computed_and_no_commit_holds_is_computed_again(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    config, path = tiny(), tmp_path / "run"
    drive(config, path, stop_at=2, hardware="A")
    asked = config.model_copy(update={"execution": config.execution.model_copy(update={"other_hardware": True})})
    driven = drive(asked, path, resume=True)
    assert len(driven.submitted) == 18 and driven.digest == undisturbed(config)


def test_an_asynchronous_run_leaves_out_what_other_hardware_computed_and_no_commit_holds(tmp_path: Path) -> None:
    config, path = tiny(BUFFERED), tmp_path / "run"
    drive(config, path, stop_at=2, hardware="A")
    asked = config.model_copy(update={"execution": config.execution.model_copy(update={"other_hardware": True})})
    assert not drive(asked, path, resume=True).trainer.progress.mixed
    counted = [line for entry in log(path) for line in entry.counted]
    assert "A" not in {line.fingerprint for line in counted} and len({line.shard for line in counted}) == len(counted)


def test_a_mixed_pool_goes_on_whichever_of_its_workers_comes_first(tmp_path: Path) -> None:
    config, path = tiny(), tmp_path / "run"
    config = config.model_copy(update={"execution": config.execution.model_copy(update={"pool": "mixed"})})
    drive(config, path, stop_at=7, hardware="A")
    assert drive(config, path, resume=True, hardware="B").trainer.progress.mixed


def test_what_happened_before_a_stop_is_still_told_after_it(tmp_path: Path) -> None:
    config, path = tiny(ASYNC), tmp_path / "run"
    before = drive(config, path, stop_at=12).trainer.progress.failures["stale"]
    assert before > 0
    after = drive(config, path, resume=True).trainer.progress.failures["stale"]
    assert after >= before and after >= sum(len(entry.dropped) for entry in log(path))


def test_a_run_that_is_over_stays_as_it_is(tmp_path: Path) -> None:
    config, path = tiny(), tmp_path / "run"
    digest = drive(config, path).digest
    before = sorted(path.rglob("v*/*"))
    again = drive(config, path, resume=True)
    assert (again.digest, again.start, list(again.submitted)) == (digest, 6, [])
    assert again.trainer.tasks_per_second is None
    assert sorted(path.rglob("v*/*")) == before
    assert replayed(config, path).state.digest == digest


def test_a_run_goes_on_from_the_checkpoint_before_one_that_was_removed(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    config, path = tiny(), tmp_path / "run"
    with pytest.raises(Killed):
        drive(config, path, kill_at=14)
    _, four = checkpoints.list_checkpoints(path / "checkpoints")
    (four / checkpoints.TENSORS).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"v00000004-e0001 is damaged.* remove it to use the one before"):
        drive(config, path, resume=True)
    shutil.rmtree(four)
    resumed = drive(config, path, resume=True)
    assert (resumed.start, resumed.digest) == (2, undisturbed(config))
    shutil.rmtree(path / "checkpoints")
    (path / "checkpoints").mkdir()
    assert drive(config, path, resume=True).start == 0


def test_a_log_that_has_lost_what_a_checkpoint_stands_on_is_refused(tmp_path: Path) -> None:
    config, path = tiny(), tmp_path / "run"
    drive(config, path, stop_at=13)
    file = RunDirectory(path).log(1)
    data = file.read_bytes()
    file.write_bytes(data[: data.rindex(b"\x92\xce")])
    with pytest.raises(CheckpointError, match="ends at version 3, before version 4 that the run is to go on from"):
        drive(config, path, resume=True)
    file.write_bytes(data)
    assert drive(config, path, resume=True).start == 4


# --------------------------------------------------------------------------------------------------------- non-finite


def test_a_run_that_diverges_stops_and_names_its_shards(tmp_path: Path) -> None:
    config = tiny(learner=MAML(inner_lr=1e30, inner_steps=3, eval_steps=1), nonfinite_share=0.5)
    with pytest.raises(NumericsError) as caught:
        drive(config, tmp_path / "run")
    assert str(caught.value) == (
        "3 of the last 3 shards, at version 0, are not finite (shards [0, 1, 2]), more than nonfinite_share = 0.5: "
        "lower the step sizes or set clip_norm"
    )
    assert log(tmp_path / "run") == [] and checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_an_asynchronous_run_bears_single_non_finite_shards_and_stops_at_too_many(tmp_path: Path) -> None:
    config = tiny(
        learner=MAML(inner_lr=1e30, inner_steps=3, eval_steps=1), nonfinite_share=0.25, aggregator=AsyncAggregator()
    )
    with pytest.raises(NumericsError, match=r"5 of the last 16 shards, at version 4, are not finite"):
        drive(config, tmp_path / "run")
    assert [c.weight for entry in log(tmp_path / "run") for c in entry.counted] == [0.0] * 4


def test_every_non_finite_shard_is_computed_twice_and_a_tolerated_one_has_no_weight(tmp_path: Path) -> None:
    config = tiny(learner=MAML(inner_lr=1e30, inner_steps=3, eval_steps=1), nonfinite_share=1.0, steps=1)
    config = config.model_copy(update={"optimizer": SGD(lr=1.0)})
    driven = drive(config, tmp_path / "run")
    assert sorted((o.shard, o.attempt) for o in driven.submitted if isinstance(o, ShardTask)) == [
        (shard, attempt) for shard in (0, 1, 2) for attempt in (0, 1)
    ]
    assert driven.view.messages == [f"shard {shard} from worker 0 is not finite: asked again" for shard in (0, 1, 2)]
    assert driven.trainer.progress.failures == {"nonfinite": 3}
    (entry,) = log(tmp_path / "run")
    assert [(line.shard, line.weight) for line in entry.counted] == [(0, 0.0), (1, 0.0), (2, 0.0)]
    initial = MetaState.initial(config, build_learner(config, (1,)))
    assert torch.equal(driven.trainer.state.theta, initial.theta) and driven.trainer.progress.episodes == 0
    assert math.isnan(driven.view.snapshots[-1].loss)
    assert replayed(config, tmp_path / "run").state.digest == driven.digest


# --------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("kind", KINDS)
def test_validation_picks_the_best_checkpoint(tmp_path: Path, kind: str) -> None:
    config = tiny(KINDS[kind], optimizer=THROWN, steps=8, evaluation=Evaluation(every=2, val_episodes=12))
    path = tmp_path / "run"
    driven = drive(config, path)
    validations = read_history(path / "history.msgpack").validations
    assert [each.version for each in validations] == [2, 4, 6, 8]
    scores = {each.version: each.steps[-1] for each in validations}
    expected = min(scores, key=scores.__getitem__)
    best = checkpoints.best_of(path / "checkpoints")
    assert best is not None and checkpoints.version_of(best)[0] == expected != max(scores)
    assert checkpoints.best_score(path / "checkpoints") == scores[expected]
    state = checkpoints.load(best, driven.trainer.state.layout).state
    assert state.digest == log(path)[expected - 1].digest
    orders = [order for order in driven.submitted if isinstance(order, EvaluationTask)]
    assert {order.split for order in orders} == {"val"}
    assert sum(order.episodes for order in orders) == 4 * 12
    assert driven.view.snapshots[-1].validation == validations[-1]


def test_validation_changes_nothing_of_a_synchronous_run(tmp_path: Path, undisturbed: Undisturbed) -> None:
    validating = tiny(evaluation=Evaluation(every=1, val_episodes=20))
    assert drive(validating, tmp_path / "run").digest == undisturbed(tiny())


# The validation of version 2 is ordered after 6 replies and takes 2 more, that of version 6 ends the run with the 24th.
@pytest.mark.parametrize("replies", [7, 8, 23])
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_validation_that_was_interrupted_is_made_up_for(tmp_path: Path, how: str, replies: int) -> None:
    config, path = tiny(evaluation=Evaluation(every=2, val_episodes=12)), tmp_path / "run"
    if how == "stop":
        drive(config, path, stop_at=replies)
    else:
        with pytest.raises(Killed):
            drive(config, path, kill_at=replies)
    drive(config, path, resume=True)
    validations = read_history(path / "history.msgpack").validations
    assert [each.version for each in validations] == [2, 4, 6]
    scores = {each.version: each.steps[-1] for each in validations}
    best = checkpoints.best_of(path / "checkpoints")
    assert best is not None and checkpoints.version_of(best)[0] == min(scores, key=scores.__getitem__)


def test_metrics_tell_how_many_validations_are_under_way(tmp_path: Path) -> None:
    config = tiny(evaluation=Evaluation(every=2, val_episodes=12))
    stopped, whole = drive(config, tmp_path / "stopped", stop_at=7), drive(config, tmp_path / "whole")
    counts = [each.metrics.registry.get_sample_value("metafleet_open_validations") for each in (stopped, whole)]
    assert counts == [1, 0]


def test_versions_that_have_a_checkpoint_and_no_validation_are_validated_at_a_resume(tmp_path: Path) -> None:
    config, path = tiny(), tmp_path / "run"
    drive(config, path, stop_at=14)
    validating = tiny(evaluation=Evaluation(every=2, val_episodes=12))
    drive(validating, path, resume=True)
    assert [each.version for each in read_history(path / "history.msgpack").validations] == [2, 4, 6]


def test_execution_may_change_at_a_resume(tmp_path: Path, undisturbed: Undisturbed) -> None:
    config, path = tiny(), tmp_path / "run"
    drive(config, path, stop_at=7)
    other = config.model_copy(update={"execution": Execution(checkpoint_every=1, keep=1, in_flight=1)})
    assert drive(other, path, resume=True).digest == undisturbed(config)
    assert len(checkpoints.list_checkpoints(path / "checkpoints")) == 1


def test_the_shard_size_decides_the_bits_but_not_which_episodes_are_seen(tmp_path: Path) -> None:
    config = tiny(steps=1)
    digests = {
        drive(config.model_copy(update={"shard": shard, "aggregator": aggregator}), tmp_path / str(number)).digest
        for number, (shard, aggregator) in enumerate(
            [
                (Shard(episodes=2, chunk=2), SyncAggregator(shards=3)),
                (Shard(episodes=3, chunk=3), SyncAggregator(shards=2)),
                (Shard(episodes=2, chunk=1), SyncAggregator(shards=3)),
            ]
        )
    }
    thetas = [read_history(tmp_path / str(number) / "history.msgpack").loss[0] for number in range(3)]
    assert thetas == pytest.approx([thetas[0]] * 3, rel=1e-5)
    assert len(digests) > 1


def test_a_stop_request_is_carried_out_at_the_next_reply(tmp_path: Path) -> None:
    stopped = drive(tiny(), tmp_path / "run", stop_at=4)
    assert stopped.trainer.state.version == 1
    (path,) = checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")
    saved = checkpoints.load(path, stopped.trainer.state.layout)
    assert ([c.shard for c, _ in saved.pending], saved.next_id) == ([3], 6)
    assert replace(saved, seconds=0.0).config_digest == tiny().result_digest()
