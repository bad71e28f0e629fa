"""``metafleet train`` from end to end: run directory, cluster, workers, the trainer, the evaluation, the report."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.config.loading import save_resolved
from cluster.config.run import RunConfig
from cluster.config.sections import MLP, AsyncAggregator, GlyphsData
from cluster.device import prepare
from cluster.episodes import open_source
from cluster.episodes.types import EpisodeSource
from cluster.errors import ClusterError, ConfigError, FingerprintError, RunDirectoryError
from cluster.messages import Published, WorkerHello
from cluster.metrics import Metrics, RunInfo
from cluster.ray_runtime import ray_cluster
from coordinator import checkpoint as checkpoints
from coordinator.aggregators import build_aggregator
from coordinator.aggregators.base import Aggregator
from coordinator.capacity import affordable_workers, refuse_unaffordable, say_workers
from coordinator.checkpoint import Checkpoint
from coordinator.commit_log import Entry, read_log
from coordinator.dispatch import Dispatcher, Failure, Joined
from coordinator.evaluation import PATIENCE, EvaluationRequest, evaluate_now
from coordinator.history import read_history
from coordinator.meta_state import MetaState
from coordinator.pool import Pool
from coordinator.recorder import Recorder
from coordinator.replay import Replayer, check_config, check_source
from coordinator.report import RunSummary, results_table
from coordinator.run_dir import RunDirectory, RunIdentity
from coordinator.signals import Signals
from coordinator.train import Progress, Resources, Trainer, check_data
from coordinator.view import View, make_view, summary_line
from metaworker.learners import build_learner
from metaworker.learners.base import Learner
from metaworker.scores import EvaluationScores, MetricName
from metaworker.shard_worker import ShardWorker


@dataclass(frozen=True)
class Start:
    """Where a trainer starts from: the beginning, or what an earlier driver left."""

    state: MetaState
    aggregator: Aggregator
    recent: tuple[Published, ...]
    progress: Progress
    expected: dict[int, str]
    """Run digests that versions must have, from the log of an earlier driver of a synchronous run."""
    unvalidated: bool = False
    """Whether ``state`` is of a version whose validation an earlier driver did not finish."""


def train_command(config: RunConfig, *, resume: Path | None, as_json: bool) -> dict[str, Any]:
    """Train, evaluate on the test split, and report.

    What can be refused is refused before Ray starts; a new run's directory is made when its first worker is there.

    Raises:
        MetafleetError: anything that a user can mend, in one line.
        SystemExit: 128 + the signal's number, after a stop request was carried out.
    """
    prepare("cpu", threads=1)  # the driver's own reductions run on one thread
    view = make_view(config.execution.log_every)
    with ExitStack() as stack:
        path = _run_path(config)
        if resume is None:
            _refuse_path(path)
        if isinstance(config.data, GlyphsData):
            view.message("preparing the embedded glyphs (rendered once, then cached)")
        source = open_source(config)
        _check_shapes(config, source)
        learner = build_learner(config, source.sample_shape)
        left = _left(config, resume, source, learner, stack) if resume else None
        refuse_unaffordable(config)
        metrics = _metrics(config, stack)
        signals = stack.enter_context(Signals(view))
        free = stack.enter_context(ray_cluster(config.execution.address))
        from coordinator.ray_pool import RayPool

        workers = affordable_workers(config, free)
        say_workers(config, workers, view.message)
        if metrics[1] is not None:
            view.message(f"metrics at http://{metrics[1]}/metrics")
        pool = RayPool(config, workers)
        stack.callback(pool.close)
        dispatcher = Dispatcher(pool, config.execution.in_flight, config.execution.attempts)
        first = first_worker(config, dispatcher).hello
        if left:
            run, identity, start = _on_this_hardware(config, *left, first)
        else:
            run, identity, start = _begin(config, path, source, learner, first, stack)
        return _train(config, run, identity, learner, pool, dispatcher, start, view, metrics, signals, as_json)


def _train(
    config: RunConfig,
    run: RunDirectory,
    identity: RunIdentity,
    learner: Learner,
    pool: Pool,
    dispatcher: Dispatcher,
    start: Start,
    view: View,
    metrics: tuple[Metrics, str | None],
    signals: Signals,
    as_json: bool,
) -> dict[str, Any]:
    epoch = run.claim_epoch()
    recorder = Recorder(
        run,
        epoch,
        start.state.version,
        start.state.digest,
        identity.config_digest,
        config.execution.keep,
        not config.regression,
    )
    resources = Resources(config, identity, learner, pool, dispatcher, recorder, view, metrics[0], signals.stop)
    metric: MetricName = "mse" if config.regression else "accuracy"
    with signals.patience():
        view.start(config.steps, summary_line(config), metric=metric, version=start.state.version)
        try:
            trainer = Trainer(resources, start.state, start.aggregator, start.recent, start.progress, start.expected)
            if start.unvalidated:
                trainer.validate()
            trainer.run()
        finally:
            view.stop()
            recorder.close()
    if signals.stop.signal is not None:
        print(
            f"stopped at version {trainer.state.version} of {config.steps}, checkpoint written; go on with: "
            f"metafleet train --resume {run.path}",
            file=sys.stderr,
        )
        _plot(config, run, None)
        raise SystemExit(128 + signals.stop.signal)
    evaluation = _evaluate_test(config, run, trainer, pool, dispatcher, view)
    _plot(config, run, evaluation)
    summary = _summary(config, run, trainer, pool.size, evaluation, metrics[1])
    if not as_json:
        Console().print(results_table(summary))
    return summary.to_json()


# ---------------------------------------------------------------------------------------------------------- start


def _refuse_path(path: Path) -> None:
    """Refuse a new run's path early; making it later decides.

    Raises:
        RunDirectoryError: it exists, or cannot be made.
    """
    if path.exists():
        raise RunDirectoryError(
            f"run directory {path} exists already: choose another --run-dir, or go on with it by --resume {path}"
        )
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise RunDirectoryError(
            f"cannot make run directory {path}: {parent} is no folder that this user may write to; choose another "
            "--run-dir"
        )


def _left(
    config: RunConfig, path: Path, source: EpisodeSource, learner: Learner, stack: ExitStack
) -> tuple[RunDirectory, RunIdentity, Start]:
    """What an earlier driver left: its directory, owned while ``stack`` lives, the run's identity, where to go on."""
    run = RunDirectory.open(path)
    run.acquire()
    stack.callback(run.release)
    identity = run.identity()
    check_config(run, identity, config)
    check_source(identity, source.digest, source.split_digest)
    initial = MetaState.initial(config, learner)
    found = checkpoints.list_checkpoints(run.checkpoints)
    entries = read_log(run)
    if found:
        at = checkpoints.load(found[-1], initial.layout, identity.config_digest)
    else:
        at = Checkpoint(initial, (), (), (), 0, identity.config_digest, 0, 0.0)
    mixed = any(counted.fingerprint != identity.fingerprint for entry in entries for counted in entry.counted)
    progress = Progress(at.episodes, at.seconds, mixed=mixed)
    if isinstance(config.aggregator, AsyncAggregator):
        start = _start_async(config, source, identity, at, entries, progress)
    else:
        # A synchronous run recomputes the tail itself, and must come to the logged digests.
        aggregator = build_aggregator(config.aggregator, at.state.version, pending=at.pending)
        expected = {} if mixed else {e.version: e.digest for e in entries[at.state.version :]}
        start = Start(at.state, aggregator, (), progress, expected)
    return run, identity, replace(start, unvalidated=_unvalidated(config, run, start.state.version))


def _unvalidated(config: RunConfig, run: RunDirectory, version: int) -> bool:
    """Whether a validation of ``version`` was due and the earlier driver ended before it had its scores."""
    every = config.evaluation.every
    due = bool(every) and version > 0 and (version % every == 0 or version == config.steps)
    return due and run.history.exists() and version not in {v.version for v in read_history(run.history).validations}


def _on_this_hardware(
    config: RunConfig, run: RunDirectory, identity: RunIdentity, start: Start, first: WorkerHello
) -> tuple[RunDirectory, RunIdentity, Start]:
    """An earlier run as it goes on with workers like ``first``.

    Raises:
        FingerprintError: it was computed on other hardware, and that was not allowed.
    """
    check_data(identity.store_digest, identity.split_digest, first)
    if first.fingerprint == identity.fingerprint:
        return run, identity, start if config.execution.pool == "strict" else replace(start, expected={})
    if not config.execution.other_hardware:
        raise FingerprintError(
            f"{run.path} was computed on other hardware or software ({dict(identity.fingerprint_detail)}, here "
            f"{dict(first.fingerprint_detail)}): the digest would not be that of an undisturbed run; resume "
            "it there, or add --execution.other_hardware"
        )
    start.progress.mixed = True
    return run, replace(identity, fingerprint=first.fingerprint), replace(start, expected={})


def _begin(
    config: RunConfig, path: Path, source: EpisodeSource, learner: Learner, first: WorkerHello, stack: ExitStack
) -> tuple[RunDirectory, RunIdentity, Start]:
    """A new run, with its directory."""
    initial = MetaState.initial(config, learner)
    identity = RunIdentity(
        config.result_digest(),
        source.digest,
        source.split_digest,
        initial.digest,
        first.fingerprint,
        dict(first.fingerprint_detail),
        source.sample_shape,
    )
    check_data(identity.store_digest, identity.split_digest, first)
    run = RunDirectory.create(path)
    stack.callback(run.release)
    save_resolved(config, run.config)
    run.write_identity(identity)
    return run, identity, Start(initial, build_aggregator(config.aggregator), (), Progress(), {})


def _start_async(
    config: RunConfig,
    source: EpisodeSource,
    identity: RunIdentity,
    at: Checkpoint,
    entries: list[Entry],
    progress: Progress,
) -> Start:
    """Replay what was logged after the checkpoint, then go on; what was in flight is issued again.

    Raises:
        FingerprintError: there is something to replay, and it was computed on other hardware.
    """
    tail = entries[at.state.version :]
    state, recent = at.state, at.recent
    if tail:  # after a clean stop there is none, and nothing for this process to compute
        worker = ShardWorker(config, source)
        if worker.fingerprint != identity.fingerprint:
            raise FingerprintError(
                f"{len(tail)} versions of this run are in its log alone and must be recomputed on hardware and "
                f"software as before ({dict(identity.fingerprint_detail)}, here {worker.fingerprint_detail}): "
                "resume it there"
            )
        replayer = Replayer(config, worker, state, recent)
        for entry in tail:
            replayer.apply(entry)
        prepare("cpu", threads=1)
        state, recent = replayer.state, replayer.recent
        progress.episodes += replayer.episodes
    settled = {c.shard for entry in entries for c in entry.counted} | {d.shard for e in entries for d in e.dropped}
    pending = [(c, finite) for c, finite in at.pending if c.shard not in settled]
    settled |= {c.shard for c, _ in pending}
    next_id = max(at.next_id, 1 + max(settled, default=-1))
    reissue = [shard for shard in range(next_id) if shard not in settled]
    aggregator = build_aggregator(config.aggregator, state.version, next_id, reissue, pending)
    return Start(state, aggregator, recent, progress, {})


def first_worker(config: RunConfig, dispatcher: Dispatcher) -> Joined:
    """Wait for the first worker; later ones join while the run goes on.

    Raises:
        ClusterError: none started within ``execution.start_timeout``.
    """
    deadline = time.monotonic() + config.execution.start_timeout
    while time.monotonic() < deadline:
        match dispatcher.next(PATIENCE):
            case Joined() as joined:
                return joined
            case Failure(_, message):
                print(message, file=sys.stderr)
    raise ClusterError(
        f"no worker started within execution.start_timeout = {config.execution.start_timeout:g} s: look at "
        "`ray status` for what is missing, or raise it"
    )


def _check_shapes(config: RunConfig, source: EpisodeSource) -> None:
    """Refuse episodes that the data cannot give, before anything is started."""
    episode, evaluation = config.episode, config.evaluation_shape
    source.check("train", episode.way, episode.shot, episode.query)
    if config.evaluation.every:
        source.check("val", evaluation.way, evaluation.shot, evaluation.query)
    source.check("test", evaluation.way, evaluation.shot, evaluation.query)
    if config.learner.type != "protonet" and evaluation.way != episode.way:
        raise ConfigError(
            f"evaluation.way must be episode.way = {episode.way} for learner {config.learner.type}, whose head has one "
            f"output a class, got {evaluation.way}"
        )


def _run_path(config: RunConfig) -> Path:
    if config.execution.run_dir is not None:
        return Path(config.execution.run_dir)
    return Path("runs") / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"


def _metrics(config: RunConfig, stack: ExitStack) -> tuple[Metrics, str | None]:
    info = RunInfo(config.name, config.learner.type, config.aggregator.type, config.seed, config.result_digest())
    metrics = Metrics(info, regression=config.regression)
    if not config.execution.metrics:
        return metrics, None
    host, port = metrics.serve(config.execution.metrics_host, config.execution.metrics_port)
    stack.callback(metrics.close)
    return metrics, f"{host}:{port}"


# ------------------------------------------------------------------------------------------------------------ end


def _evaluate_test(
    config: RunConfig, run: RunDirectory, trainer: Trainer, pool: Pool, dispatcher: Dispatcher, view: View
) -> dict[str, Any]:
    """Scores on the test split: of the best checkpoint by validation, or of the last version."""
    state = trainer.state
    best = checkpoints.best_of(run.checkpoints)
    chosen = checkpoints.load(best, state.layout).state if best is not None else state
    request = EvaluationRequest.of(config, "test", config.evaluation.episodes)
    view.message(f"evaluating version {chosen.version} on {request.episodes} episodes of the test split")
    scores = evaluate_now(dispatcher, pool, chosen.published, request, trainer.notice)
    return describe_evaluation(config, scores, request, "best" if best is not None else "last", chosen.version)


def describe_evaluation(
    config: RunConfig, scores: EvaluationScores, request: EvaluationRequest, checkpoint: str, version: int
) -> dict[str, Any]:
    """Scores and what they were measured on, as plain data; ``bn`` is ``None`` for a net without batch-norm."""
    return scores.to_json() | {
        "split": request.split,
        "way": request.way,
        "shot": request.shot,
        "query": request.query,
        "bn": None if isinstance(config.model, MLP) else request.batch_norm,
        "checkpoint": checkpoint,
        "version": version,
    }


def _plot(config: RunConfig, run: RunDirectory, evaluation: dict[str, Any] | None) -> None:
    from coordinator.plots import adaptation_curve, learning_curve

    metric: MetricName = "mse" if config.regression else "accuracy"
    title = summary_line(config)
    learning_curve(read_history(run.history), run.path / "learning_curve.png", title=title, metric=metric)
    if evaluation is not None:
        adaptation_curve(
            evaluation["steps"],
            evaluation["steps_ci95"],
            run.path / "adaptation_curve.png",
            title=evaluation_title(config.name, evaluation),
            metric=metric,
            chance=None if config.regression else 1 / evaluation["way"],
        )


def evaluation_title(name: str, evaluation: dict[str, Any]) -> str:
    """One line on what was evaluated."""
    shape = f"{evaluation['shot']}-shot"
    if "accuracy" in evaluation:
        shape = f"{evaluation['way']}-way {shape}"
    episodes = f"{evaluation['episodes']:,} episodes"
    bn = [f"batch-norm {evaluation['bn']}"] if evaluation["bn"] else []
    return " · ".join((name, f"{evaluation['split']} split", shape, episodes, *bn))


def _summary(
    config: RunConfig,
    run: RunDirectory,
    trainer: Trainer,
    workers: int,
    evaluation: dict[str, Any],
    endpoint: str | None,
) -> RunSummary:
    best = checkpoints.best_of(run.checkpoints)
    kept = [checkpoints.version_of(path)[0] for path in checkpoints.list_checkpoints(run.checkpoints)]
    return RunSummary(
        run_dir=str(run.path),
        recipe=config.name,
        learner=config.learner.type,
        aggregator=config.aggregator.type,
        seed=config.seed,
        version=trainer.state.version,
        total=config.steps,
        digest=trainer.state.digest,
        wall_seconds=trainer.seconds,
        episodes=trainer.progress.episodes,
        tasks_per_second=trainer.tasks_per_second,
        workers=workers,
        failures=dict(trainer.progress.failures),
        checkpoints=kept,
        best=None if best is None else checkpoints.version_of(best)[0],
        mixed=trainer.progress.mixed,
        metrics=endpoint,
        evaluation=evaluation,
    )
