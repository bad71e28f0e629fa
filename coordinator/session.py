"""``metafleet train`` from end to end: run directory, cluster, workers, the trainer, the evaluation, the report."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.config.loading import with_execution
from cluster.config.run import RunConfig
from cluster.config.sections import GlyphsData
from cluster.device import prepare
from cluster.discovery import announced
from cluster.episodes import open_source
from cluster.episodes.types import EpisodeSource
from cluster.errors import RunDirectoryError, SplitError
from cluster.metrics import Metrics, RunInfo
from coordinator import checkpoint as checkpoints
from coordinator.capacity import refuse_unaffordable
from coordinator.crew import Crew, ray_crew
from coordinator.evaluation import EvaluationRequest, evaluate_now
from coordinator.history import read_history
from coordinator.recorder import Recorder
from coordinator.report import RunSummary, results_table
from coordinator.run_dir import RunDirectory, exists_already
from coordinator.signals import Signals
from coordinator.start import begin, find, go_on
from coordinator.train import Resources, Start, Trainer
from coordinator.view import View, make_view, summary_line
from metaworker.learners import build_learner, check_way
from metaworker.learners.base import Learner
from metaworker.scores import EvaluationScores, MetricName


@dataclass(frozen=True)
class Watch:
    """What people see of a run, and how they stop it."""

    view: View
    metrics: Metrics
    signals: Signals


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
        found = find(config, resume, source, learner, stack) if resume else None
        refuse_unaffordable(config)
        where = found.run.path if found else path
        metrics, endpoint = _metrics(config, where, stack, view)
        watch = Watch(view, metrics, stack.enter_context(Signals(view)))
        crew = stack.enter_context(ray_crew(config, view.message))
        if endpoint is not None:
            view.message(f"metrics at {endpoint}")
        crew.dispatcher.reproduce = lambda task: (
            f"metafleet replay {where} --shard {task.shard} --until {task.base_version}"
        )
        if found:
            run, start = found.run, go_on(config, learner, found, crew, view.message)
            run.save_config(with_execution(config, other_hardware=False))
        else:
            run, start = begin(config, path, source, learner, crew.first, stack)
        trainer = _train(config, run, learner, crew, start, watch)
        summary = _finish(config, source, run, crew, trainer, view)
    if not as_json:
        Console().print(results_table(summary))
    return summary.to_json()


def _train(config: RunConfig, run: RunDirectory, learner: Learner, crew: Crew, start: Start, watch: Watch) -> Trainer:
    """Train to the last version.

    Raises:
        SystemExit: 128 + the signal's number, after a stop request was carried out.
    """
    stop, view = watch.signals.stop, watch.view
    recorder = Recorder(run, run.claim_epoch(), config, start.state)
    resources = Resources(config, learner, crew.pool, crew.dispatcher, recorder, view, watch.metrics, stop)
    metric: MetricName = "mse" if config.regression else "accuracy"
    with watch.signals.patience():
        view.start(config.steps, summary_line(config), metric=metric, version=start.state.version)
        try:
            trainer = Trainer(resources, start)
            trainer.run()
        finally:
            view.stop()
            recorder.close()
            _keep_metrics(watch, recorder)
    if stop.signal is not None:
        print(
            f"stopped at version {trainer.state.version} of {config.steps}, checkpoint written; go on with: "
            f"metafleet train --resume {run.path}",
            file=sys.stderr,
        )
        _plot(config, run, None)
        raise SystemExit(128 + stop.signal)
    return trainer


def _keep_metrics(watch: Watch, recorder: Recorder) -> None:
    """Keep the last state of the metrics in the run directory, or say why not."""
    try:
        recorder.keep_metrics(watch.metrics)
    except (OSError, RunDirectoryError) as error:
        watch.view.message(f"the last metrics were not written: {error}")


# ---------------------------------------------------------------------------------------------------------- start


def _refuse_path(path: Path) -> None:
    """Refuse a new run's path early; making it later decides.

    Raises:
        RunDirectoryError: it exists, or cannot be made.
    """
    if path.exists():
        raise RunDirectoryError(exists_already(path))
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise RunDirectoryError(
            f"cannot make run directory {path}: {parent} is no folder that this user may write to; choose another "
            "--run-dir"
        )


def _check_shapes(config: RunConfig, source: EpisodeSource) -> None:
    """Refuse episodes that the data cannot give, before anything is started."""
    episode, evaluation = config.episode, config.evaluation_shape
    check_way(config, evaluation.way, "evaluation.way")
    source.check("train", episode.way, episode.shot, episode.query, episode.within)
    if config.evaluation.every:
        if source.empty("val"):
            raise SplitError(
                "split val has no classes: give it some by data.split, or validate nothing by --evaluation.every 0"
            )
        source.check("val", evaluation.way, evaluation.shot, evaluation.query, evaluation.within)
    if not source.empty("test"):
        source.check("test", evaluation.way, evaluation.shot, evaluation.query, evaluation.within)


def _run_path(config: RunConfig) -> Path:
    if config.execution.run_dir is not None:
        return Path(config.execution.run_dir)
    return Path("runs") / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"


def _metrics(config: RunConfig, path: Path, stack: ExitStack, view: View) -> tuple[Metrics, str | None]:
    """The metrics of the run in ``path``, and where they are served and announced while ``stack`` lives."""
    path = path.resolve()  # `--resume .` has no name
    info = RunInfo(
        path.name, config.name, config.learner.type, config.aggregator.type, config.seed, config.result_digest()
    )
    metrics = Metrics(info, regression=config.regression)
    if not config.execution.metrics:
        return metrics, None
    host, port = metrics.serve(config.execution.metrics_host, config.execution.metrics_port)
    stack.callback(metrics.close)
    if not (host.startswith("127.") or host == "::1"):
        view.message(f"metrics are served on {host}: whoever reaches this machine can read them")
    if config.execution.metrics_discovery is not None:
        folder = Path(config.execution.metrics_discovery)
        stack.enter_context(announced(folder, host, port, path, lambda: metrics.unfinished))
    return metrics, f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"


# ------------------------------------------------------------------------------------------------------------ end


def _finish(
    config: RunConfig, source: EpisodeSource, run: RunDirectory, crew: Crew, trainer: Trainer, view: View
) -> RunSummary:
    """Evaluation, plots and summary of a run that has reached its last version."""
    if source.empty("test"):
        view.message("split test has no classes: nothing is evaluated on it")
        evaluation = None
    else:
        evaluation = _evaluate_test(config, run, trainer, crew, view)
    _plot(config, run, evaluation)
    return _summary(config, run, trainer, crew.dispatcher.workers, evaluation)


def _evaluate_test(config: RunConfig, run: RunDirectory, trainer: Trainer, crew: Crew, view: View) -> dict[str, Any]:
    """Scores on the test split: of the best checkpoint by validation, or of the last version."""
    state = trainer.state
    best = checkpoints.best_of(run.checkpoints)
    chosen = checkpoints.load(best, state.layout).state if best is not None else state
    request = EvaluationRequest.of(config, "test", config.evaluation.episodes)
    view.message(f"evaluating version {chosen.version} on {request.episodes} episodes of the test split")
    scores = evaluate_now(crew.dispatcher, crew.pool, chosen.published, request, trainer.notice)
    return describe_evaluation(scores, request, "best" if best is not None else "last", chosen.version)


def describe_evaluation(
    scores: EvaluationScores, request: EvaluationRequest, checkpoint: str, version: int
) -> dict[str, Any]:
    """Scores and what they were measured on, as plain data; ``bn`` is ``None`` for a net without batch-norm."""
    return scores.to_json() | {
        "split": request.split,
        "way": request.way,
        "within": request.within,
        "shot": request.shot,
        "query": request.query,
        "bn": request.batch_norm,
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
    evaluation: dict[str, Any] | None,
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
        goodput=trainer.goodput.to_json(),
        evaluation=evaluation,
    )
