"""Every registered learner in whole runs on the embedded glyphs: it learns, and gives the same bits however it is run.

Each runs its own recipes, ``glyphs-TYPE`` and more, shortened: a smaller net, few versions, and scores on scripts that
it has not trained on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import pytest

from cluster.config import learners
from cluster.config.loading import load_recipe, resolve, shipped_recipes
from cluster.config.run import RunConfig
from cluster.config.sections import AsyncAggregator, ConstantSchedule, Execution, SyncAggregator
from cluster.episodes import open_source
from cluster.messages import EvaluationTask, ShardTask
from coordinator.commit_log import read_log
from coordinator.meta_state import MetaState
from coordinator.run_dir import RunDirectory
from metaworker.scores import combine
from metaworker.shard_worker import ShardWorker
from tests.coordinator.harness import Killed, drive, replayed

TYPES = [section.model_fields["type"].default for section in get_args(get_args(learners.Learner)[0])]
RECIPES = [recipe.name for recipe in shipped_recipes() if recipe.name.startswith("glyphs-")]
EPISODES = 480
"""Training episodes of a shortened run."""
MORE = {"snail": 1920, "memory": 1440, "relational": 1920}
"""Those of learners that begin to learn later, by ``type``."""
CHANNELS = 12
VERSIONS = 5
"""Of a run whose bits are compared."""
MARGIN = 0.05
"""By which accuracy must be above that of the untrained learner."""
FLOOR = 0.4
"""Accuracy, 5-way: twice chance."""

every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def shortened(recipe: str) -> RunConfig:
    """The recipe with a smaller net and fewer versions."""
    config = resolve(load_recipe(recipe))
    versions = MORE.get(config.learner.type, EPISODES) // (config.shard.episodes * config.shards_per_version)
    changes: dict[str, Any] = {"steps": versions, "schedule": ConstantSchedule()}
    changes["model"] = config.model.model_copy(update={"channels": CHANNELS})
    changes["evaluation"] = config.evaluation.model_copy(update={"every": 0})
    changes["execution"] = Execution(checkpoint_every=3, metrics=False)
    return config.model_copy(update=changes)


def brief(recipe: str) -> RunConfig:
    """A few synchronous versions of it."""
    config = shortened(recipe)
    changes: dict[str, Any] = {"steps": VERSIONS, "aggregator": SyncAggregator(shards=2)}
    return config.model_copy(update=changes)


def accuracy(config: RunConfig, state: MetaState) -> float:
    """On validation scripts, after adaptation."""
    worker, shape = ShardWorker(config, open_source(config)), config.evaluation_shape
    task = EvaluationTask("val", 0, 60, shape.way, shape.shot, 5, None, state.version)
    return combine([worker.evaluate(state.published, task)]).steps[-1]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine dies here; waiting for the disk is half of the time otherwise."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_every_learner_has_a_recipe() -> None:
    assert {f"glyphs-{kind}" for kind in TYPES} <= set(RECIPES)


@every_recipe
def test_a_short_run_beats_chance_and_the_untrained_learner(recipe: str, tmp_path: Path) -> None:
    config = shortened(recipe)
    driven = drive(config, tmp_path / "run")
    learner = ShardWorker(config, open_source(config)).learner
    before = accuracy(config, MetaState.initial(config, learner))
    after = accuracy(config, driven.trainer.state)
    assert after > max(before + MARGIN, FLOOR), f"{before:.3f} before, {after:.3f} after {config.steps} versions"


@every_recipe
def test_a_killed_run_resumes_to_the_same_bits_and_replays(recipe: str, tmp_path: Path) -> None:
    config = brief(recipe)
    whole = drive(config, tmp_path / "whole")
    assert replayed(config, tmp_path / "whole").state.digest == whole.digest
    replies = VERSIONS * config.shards_per_version
    with pytest.raises(Killed):
        drive(config, tmp_path / "run", kill_at=replies - 1)
    assert drive(config, tmp_path / "run", resume=True).digest == whole.digest


@every_recipe
def test_two_workers_come_to_the_bits_of_one(recipe: str, tmp_path: Path) -> None:
    config = brief(recipe).model_copy(update={"aggregator": SyncAggregator(shards=3)})
    one, two = (drive(config, tmp_path / str(workers), workers=workers) for workers in (1, 2))
    assert two.digest == one.digest
    assert list(two.replied[:2]) == [1, 0], "shards are to arrive in another order than theirs"


@every_recipe
def test_a_killed_asynchronous_run_goes_on_and_replays_to_its_own_bits(recipe: str, tmp_path: Path) -> None:
    """Whatever learner state there is, stale contributions and replay take that of the version they are based on."""
    config = brief(recipe).model_copy(update={"aggregator": AsyncAggregator(staleness_bound=2)})
    with pytest.raises(Killed):
        drive(config, tmp_path / "run", kill_at=VERSIONS - 1)
    resumed = drive(config, tmp_path / "run", resume=True)
    used = [part for entry in read_log(RunDirectory.open(tmp_path / "run")) for part in entry.counted]
    assert len({part.shard for part in used}) == len(used) == VERSIONS
    assert any(part.weight < 1 for part in used), "none was stale"
    assert replayed(config, tmp_path / "run").state.digest == resumed.digest


@every_recipe
def test_what_a_worker_did_before_changes_no_bit(recipe: str, tmp_path: Path) -> None:
    config = brief(recipe)
    source, episodes = open_source(config), config.shard.episodes
    workers = [ShardWorker(config, source, slot) for slot in (0, 1)]
    published = drive(config, tmp_path / "run").trainer.state.published
    tasks = [ShardTask(shard, shard * episodes, episodes, 0) for shard in range(3)]
    forwards = [workers[0].compute(published, task).digest for task in tasks]
    backwards = [workers[1].compute(published, task).digest for task in reversed(tasks)]
    assert forwards == backwards[::-1] and len(set(forwards)) == len(tasks)
