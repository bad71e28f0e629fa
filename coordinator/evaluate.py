"""``metafleet evaluate``: a run's checkpoint on fixed episodes of its own data or of another store."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from cluster.config.loading import load_resolved, resolve, with_execution
from cluster.config.run import RunConfig
from cluster.config.sections import FractionSplit, StoreData
from cluster.device import prepare
from cluster.episodes import open_source
from cluster.episodes.types import EpisodeSource
from cluster.errors import CheckpointError, ConfigError
from cluster.messages import SplitName
from coordinator import checkpoint as checkpoints
from coordinator.capacity import refuse_unaffordable
from coordinator.commands import EvaluationOptions
from coordinator.crew import ray_crew
from coordinator.evaluation import EvaluationRequest, evaluate_now
from coordinator.meta_state import MetaState
from coordinator.outcomes import Failure, Joined, Notice
from coordinator.replay import check_config, check_source
from coordinator.report import evaluation_table
from coordinator.run_dir import RunDirectory, RunIdentity
from coordinator.session import describe_evaluation
from coordinator.train import check_data
from metaworker.learners import build_learner, check_way, default_batch_norm
from metaworker.learners.base import Learner


def evaluate_command(run: Path, options: EvaluationOptions, *, as_json: bool) -> dict[str, Any]:
    """Evaluate a checkpoint.

    Raises:
        CheckpointError: no such checkpoint, or one that does not fit the data.
        ConfigError: a learner whose head has another number of classes, or options that regression does not have.
        SplitError: the data cannot give such episodes.
    """
    directory = RunDirectory.open(run)
    identity, config = directory.identity(), load_resolved(directory.config)
    check_config(directory, identity, config)
    config = _with_learner(config, options.learner)
    request = _request(config, options)
    config = _execution(with_store(config, options.store, options.split), options)
    prepare("cpu", threads=1)
    source = open_source(config)
    check_held_out(identity, source, options.store)
    source.check(request.split, request.way, request.shot, request.query, request.within)
    learner = build_learner(config, source.sample_shape)
    check_layout(learner, build_learner(load_resolved(directory.config), source.sample_shape), options.learner)
    path, chosen = choose_checkpoint(directory, options.checkpoint)
    state = checkpoints.load(path, MetaState.initial(config, learner).layout).state
    refuse_unaffordable(config)
    if options.checkpoint != chosen:
        _say("no validation has named a best checkpoint: evaluating the last one")
    notice = partial(_notice, source)
    with ray_crew(config, _say) as crew:
        notice(Joined(crew.first))
        scores = evaluate_now(crew.dispatcher, crew.pool, state.published, request, notice)
    report = describe_evaluation(scores, request, chosen, state.version)
    store = None if options.store is None else str(options.store)
    report |= {"run": str(run), "store": store, "digest": state.digest, "learner": list(options.learner)}
    if not as_json:
        Console().print(evaluation_table(report))
    return report


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _notice(source: EpisodeSource, outcome: Failure | Notice | Joined) -> None:
    """Say what failed; refuse a worker that reads other data."""
    if not isinstance(outcome, Joined):
        _say(outcome.message)
    else:
        check_data(source.digest, source.split_digest, outcome.hello)


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def choose_checkpoint(run: RunDirectory, wanted: Literal["best", "last"]) -> tuple[Path, Literal["best", "last"]]:
    """The checkpoint that is wanted, and which it is: the last one where no validation has named a best.

    Raises:
        CheckpointError: the run has none yet.
    """
    found = checkpoints.list_checkpoints(run.checkpoints)
    if not found:
        raise CheckpointError(
            f"{run.path} has no checkpoint yet: let it train on by `metafleet train --resume {run.path}`"
        )
    best = checkpoints.best_of(run.checkpoints)
    return (best, "best") if wanted == "best" and best is not None else (found[-1], "last")


def check_held_out(identity: RunIdentity, source: EpisodeSource, other: Path | None) -> None:
    """Refuse data that is neither the run's own nor another store of equal samples.

    Raises:
        CheckpointError: other data than the run's, or another store with samples of another shape.
    """
    if other is None:
        check_source(identity, source.digest, source.split_digest)
    elif tuple(source.sample_shape) != tuple(identity.sample_shape):
        raise CheckpointError(
            f"{other}: its samples are {_size(source.sample_shape)}, the run was trained on "
            f"{_size(identity.sample_shape)}: ingest it with the same --size and colours"
        )


def with_store(config: RunConfig, store: Path | None, split: SplitName | None) -> RunConfig:
    """The configuration with another store, if there is one, in the place of the run's data.

    Raises:
        ConfigError: regression, or a ``split`` that is not defined on another store.
    """
    if store is None:
        return config
    if config.regression:
        raise ConfigError(f"--store {store}: recipe {config.name!r} is regression on its own source; leave --store out")
    data = config.data
    if split in (None, "all"):
        data = StoreData(split=FractionSplit(val=0.0, test=0.0))
    elif not isinstance(data, StoreData):
        raise ConfigError(f"--split {split} is not defined on another store for data.type {data.type}: use --split all")
    return with_execution(config.model_copy(update={"data": data}), store=str(store.absolute()))


def _with_learner(config: RunConfig, options: Sequence[str]) -> RunConfig:
    """The configuration with options of the learner, each KEY=VALUE, in the place of the run's.

    Raises:
        ConfigError: no such option of this learner, its ``type``, or an impossible value.
    """
    pairs = [option.partition("=")[::2] for option in options]
    if refused := [key for key, _ in pairs if key.strip() == "type"]:
        raise ConfigError(f"--learner {refused[0]}: a run is evaluated with the learner that it trained; leave it out")
    values = config.model_dump(mode="json", exclude_none=True)
    return resolve(values, [(f"learner.{key.strip()}", value) for key, value in pairs]) if pairs else config


def check_layout(learner: Learner, trained: Learner, options: Sequence[str]) -> None:
    """Refuse options that make other parameters, or other learner state, than were trained."""
    shapes = [
        [
            (name, tensor.shape)
            for tensors in (of.meta_parameters(0), of.initial_state())
            for name, tensor in tensors.items()
        ]
        for of in (learner, trained)
    ]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"--learner {' '.join(options)}: that makes other parameters than the run trained; leave out what does"
        )


def _execution(config: RunConfig, options: EvaluationOptions) -> RunConfig:
    """The configuration with what is said now: evaluation may run elsewhere than training did."""
    device = options.device or config.device
    gpus = {"cpu": 0.0, "auto": config.execution.gpus_per_worker, "cuda": config.execution.gpus_per_worker or 1.0}
    place = {"address": options.address or "local", "workers": options.workers}
    return with_execution(
        config.model_copy(update={"device": device}), cpus_per_worker=None, gpus_per_worker=gpus[device], **place
    )


def _request(config: RunConfig, options: EvaluationOptions) -> EvaluationRequest:
    shape, batch_norm = config.evaluation_shape, default_batch_norm(config)
    way = options.way or shape.way
    if options.bn is not None and batch_norm is None:
        raise ConfigError(f"--bn {options.bn}: model {config.model.type} has no batch-norm; leave --bn out")
    check_way(config, way, "--way")
    return EvaluationRequest(
        split=options.split or ("all" if options.store else "test"),
        way=way,
        shot=options.shot or shape.shot,
        query=options.query or shape.query,
        episodes=options.episodes or config.evaluation.episodes,
        batch_norm=options.bn or batch_norm,
        within=shape.within if options.within is None else options.within or None,
    )
