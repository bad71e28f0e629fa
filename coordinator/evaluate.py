"""``metafleet evaluate``: a run's checkpoint on fixed episodes of its own data or of another store."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from cluster.config.loading import load_resolved
from cluster.config.run import RunConfig
from cluster.config.sections import MLP, FractionSplit, StoreData
from cluster.device import prepare
from cluster.episodes import open_source
from cluster.episodes.types import EpisodeSource
from cluster.errors import CheckpointError, ConfigError
from cluster.messages import BatchNorm, SplitName
from cluster.ray_runtime import ray_cluster
from coordinator import checkpoint as checkpoints
from coordinator.capacity import affordable_workers, refuse_unaffordable, say_workers
from coordinator.dispatch import Dispatcher, Failure, Joined
from coordinator.evaluation import EvaluationRequest, evaluate_now
from coordinator.meta_state import MetaState
from coordinator.replay import check_config, check_source
from coordinator.report import evaluation_table
from coordinator.run_dir import RunDirectory
from coordinator.session import describe_evaluation, first_worker
from coordinator.train import check_data
from metaworker.learners import build_learner, default_batch_norm


def evaluate_command(
    run: Path,
    *,
    store: Path | None,
    split: SplitName,
    way: int | None,
    shot: int | None,
    query: int | None,
    episodes: int | None,
    batch_norm: BatchNorm | None,
    checkpoint: Literal["best", "last"],
    address: str | None,
    workers: int | None,
    as_json: bool,
) -> dict[str, Any]:
    """Evaluate a checkpoint.

    Raises:
        CheckpointError: no such checkpoint, or one that does not fit the data.
        ConfigError: a learner whose head has another number of classes, or options that regression does not have.
        SplitError: the data cannot give such episodes.
    """
    directory = RunDirectory.open(run)
    identity, config = directory.identity(), load_resolved(directory.config)
    check_config(directory, identity, config)
    config = _execution(_data(config, store, split), address, workers)
    request = _request(config, split, way, shot, query, episodes, batch_norm)
    prepare("cpu", threads=1)
    source = open_source(config)
    if store is None:
        check_source(identity, source.digest, source.split_digest)
    elif tuple(source.sample_shape) != tuple(identity.sample_shape):
        raise CheckpointError(
            f"{store}: its samples are {_size(source.sample_shape)}, the run was trained on "
            f"{_size(identity.sample_shape)}: ingest it with the same --size and colours"
        )
    source.check(split, request.way, request.shot, request.query)
    learner = build_learner(config, source.sample_shape)
    path, chosen = _choose(directory, checkpoint)
    state = checkpoints.load(path, MetaState.initial(config, learner).layout).state
    refuse_unaffordable(config)
    if checkpoint != chosen:
        print("no validation has named a best checkpoint: evaluating the last one", file=sys.stderr)
    with ExitStack() as stack:
        free = stack.enter_context(ray_cluster(config.execution.address))
        from coordinator.ray_pool import RayPool

        affordable = affordable_workers(config, free)
        say_workers(config, affordable, lambda text: print(text, file=sys.stderr))
        pool = RayPool(config, affordable)
        stack.callback(pool.close)
        dispatcher = Dispatcher(pool, config.execution.in_flight, config.execution.attempts)
        _notice(source, first_worker(config, dispatcher))
        scores = evaluate_now(dispatcher, pool, state.published, request, partial(_notice, source))
    report = describe_evaluation(config, scores, request, chosen, state.version)
    report |= {"run": str(run), "store": None if store is None else str(store), "digest": state.digest}
    if not as_json:
        Console().print(evaluation_table(report))
    return report


def _notice(source: EpisodeSource, outcome: Failure | Joined) -> None:
    """Say what failed; refuse a worker that reads other data."""
    if isinstance(outcome, Failure):
        print(outcome.message, file=sys.stderr)
    else:
        check_data(source.digest, source.split_digest, outcome.hello)


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _choose(run: RunDirectory, wanted: Literal["best", "last"]) -> tuple[Path, Literal["best", "last"]]:
    """The checkpoint that is wanted, and which it is: the last one where no validation has named a best."""
    found = checkpoints.list_checkpoints(run.checkpoints)
    if not found:
        raise CheckpointError(
            f"{run.path} has no checkpoint yet: let it train on by `metafleet train --resume {run.path}`"
        )
    best = checkpoints.best_of(run.checkpoints)
    return (best, "best") if wanted == "best" and best is not None else (found[-1], "last")


def _data(config: RunConfig, store: Path | None, split: SplitName) -> RunConfig:
    """The configuration with another store in the place of the run's data."""
    if store is None:
        return config
    if config.regression:
        raise ConfigError(f"--store {store}: recipe {config.name!r} is regression on its own source; leave --store out")
    execution = config.execution.model_copy(update={"store": str(store.absolute())})
    data = config.data
    if split == "all" or not isinstance(data, StoreData):
        if split != "all":
            raise ConfigError(
                f"--split {split} is not defined on another store for data.type {data.type}: use --split all"
            )
        data = StoreData(split=FractionSplit(val=0.0, test=0.0))
    return config.model_copy(update={"data": data, "execution": execution})


def _execution(config: RunConfig, address: str | None, workers: int | None) -> RunConfig:
    """Evaluation may run elsewhere than training did: only what is said now counts."""
    update = {"address": address or "local", "workers": workers}
    return config.model_copy(update={"execution": config.execution.model_copy(update=update)})


def _request(
    config: RunConfig,
    split: SplitName,
    way: int | None,
    shot: int | None,
    query: int | None,
    episodes: int | None,
    batch_norm: BatchNorm | None,
) -> EvaluationRequest:
    shape = config.evaluation_shape
    way = way or shape.way
    if batch_norm is not None and isinstance(config.model, MLP):
        raise ConfigError(f"--bn {batch_norm}: model {config.model.type} has no batch-norm; leave --bn out")
    if config.learner.type != "protonet" and way != config.episode.way:
        raise ConfigError(
            f"--way must be {config.episode.way} for learner {config.learner.type}, whose head has one output a class, "
            f"got {way}"
        )
    return EvaluationRequest(
        split=split,
        way=way,
        shot=shot or shape.shot,
        query=query or shape.query,
        episodes=episodes or config.evaluation.episodes,
        batch_norm=batch_norm or default_batch_norm(config),
    )
