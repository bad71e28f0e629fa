"""The commands' bodies between the command line and the work: arguments become a configuration or a request.

Each command returns its report as plain data (what ``--json`` prints) and, unless ``as_json``, has shown it on stdout.
Heavy modules are imported inside the commands: refusals and light commands answer without torch and Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from cluster.config.learners import AttentionLearner
from cluster.config.loading import (
    DEFAULT_RECIPE,
    RESOLVED_NAME,
    load_recipe,
    load_resolved,
    refuse_result_changes,
    resolve,
    shipped_recipes,
)
from cluster.config.overrides import Override
from cluster.config.run import RunConfig
from cluster.config.sections import BatchNorm, StoreData
from cluster.errors import ConfigError, RunDirectoryError, StoreError

if TYPE_CHECKING:
    from cluster.episodes.ingest_omniglot import Part
    from cluster.episodes.store_header import StoreHeader
    from cluster.messages import SplitName
    from coordinator.submit import SubmitOptions

Report = dict[str, Any]
"""Plain data: dicts with text keys, lists, numbers, text, None."""

SHOWN_SKIPPED = 20
"""Skipped samples that an ingest names on a terminal; all are in its JSON."""
SHOWN_VALUES = 40
"""Values of a metadata column that `inspect` names on a terminal; all are in its JSON."""
AUTO = Path("auto")
"""What `--resume` says to go on with the run in `--run-dir` if there is one."""
CHECKPOINT_SUFFIXES = (".safetensors", ".msgpack")


def train(recipe: str | None, overrides: Sequence[Override], resume: Path | None, *, as_json: bool) -> Report:
    """Meta-train a recipe with overrides, or go on with the run in ``resume``; ``auto`` goes on if there is one.

    ConfigError: refused configuration. RunDirectoryError: ``resume`` is no run.
    """
    if resume == AUTO:
        config, resume = _auto(recipe, overrides)
    elif resume is None:
        config = resolve(load_recipe(recipe or DEFAULT_RECIPE), overrides)
    else:
        config = _resumed(resume, recipe, overrides)
    _check_store(config)
    config = _whole_paths(config)

    from coordinator.session import train_command

    return train_command(config, resume=resume, as_json=as_json)


def submit(recipe: str | None, overrides: Sequence[Override], options: SubmitOptions) -> Report:
    """Train a recipe with overrides as a job of a Ray cluster; the store and the run directory are the cluster's.

    Raises:
        ConfigError: refused configuration, or a path that the cluster could not know.
        ClusterError: no such cluster, or one that refuses.
    """
    config = resolve(load_recipe(recipe or DEFAULT_RECIPE), overrides)
    if any(key.replace("-", "_") == "execution.address" for key, _ in overrides):
        raise ConfigError("a job joins the cluster that it runs on: give --address, and leave execution.address out")
    _check_store_wanted(config)
    run_dir, store = config.execution.run_dir, config.execution.store
    if run_dir is None or not Path(run_dir).is_absolute():
        raise ConfigError(
            "a job needs a run directory by its whole path, on storage that outlives the head, got "
            f"{run_dir or 'none'}: give --run-dir /SHARED/DIR"
        )
    if store is not None and not Path(store).is_absolute():
        raise ConfigError(f"a job needs its store by the whole path that the cluster has it at, got --store {store}")
    discovery = config.execution.metrics_discovery
    if discovery is not None and not Path(discovery).is_absolute():
        raise ConfigError(
            "a job announces its metrics in a folder of the cluster's head, which it needs by its whole path, got "
            f"--execution.metrics_discovery {discovery}"
        )

    from coordinator.submit import submit_command

    return submit_command(config, options)


@dataclass(frozen=True)
class EvaluationOptions:
    """What ``metafleet evaluate`` was asked for; ``None`` stands for the run's own."""

    store: Path | None = None
    """Another store."""
    split: SplitName | None = None
    """``None`` stands for test, or for all of another store."""
    way: int | None = None
    shot: int | None = None
    query: int | None = None
    episodes: int | None = None
    bn: BatchNorm | None = None
    checkpoint: Literal["best", "last"] = "best"
    address: str | None = None
    workers: int | None = None
    device: Literal["cpu", "cuda", "auto"] | None = None
    within: str | None = None
    """Class metadata column whose value an episode's classes share; empty for any classes."""
    learner: tuple[str, ...] = ()
    """Options of the learner, each KEY=VALUE."""


def evaluate(run: Path, options: EvaluationOptions, *, as_json: bool) -> Report:
    """Evaluate a run on a split of its own data (test by default) or on another store (all of it by default)."""
    _check_run(run)

    from coordinator.evaluate import evaluate_command

    return evaluate_command(run, options, as_json=as_json)


@dataclass(frozen=True)
class AttentionOptions:
    """What ``metafleet attention`` was asked for."""

    store: Path | None = None
    """Another store."""
    split: SplitName | None = None
    """``None`` stands for test, or for all of another store."""
    episode: int = 0
    """Episode id."""
    picture: Path | None = None
    """The PNG to write; ``None`` stands for one in the run directory."""
    checkpoint: Literal["best", "last"] = "best"


def attention(run: Path, options: AttentionOptions, *, as_json: bool) -> Report:
    """Show where the queries of one held-out episode look.

    RunDirectoryError: ``run`` is none. ConfigError: its learner is no attention learner.
    """
    _check_run(run)
    learner = load_resolved(run / RESOLVED_NAME).learner
    if not isinstance(learner, AttentionLearner):
        raise ConfigError(
            f"{run} was trained with learner.type {learner.type}, and only learner.type attention shows where it "
            "looks: train one, say by `metafleet train glyphs-attention`"
        )

    from coordinator.attention import attention_command

    return attention_command(run, options, as_json=as_json)


def replay(run: Path, until: int | None, shard: int | None, store: Path | None, *, as_json: bool) -> Report:
    """Recompute a run from its commit log, up to version ``until`` or its last one, or one ``shard`` of it alone."""
    _check_run(run)

    from coordinator.replay import replay_command

    return replay_command(run, until=until, shard=shard, store=store, as_json=as_json)


def inspect(path: Path, sheet: Path | None, *, as_json: bool) -> Report:
    """Show a store here; a run directory or a checkpoint where those are known.

    ConfigError: nothing there, or ``sheet`` for what is no store. StoreError: a file that is no whole store.
    """
    if not path.exists():
        raise ConfigError(f"nothing at {path}: give a run directory, a checkpoint or an episode store")
    if path.is_file() and path.suffix not in CHECKPOINT_SUFFIXES:
        return _inspect_store(path, sheet, as_json=as_json)
    if sheet is not None:
        raise ConfigError(f"--sheet shows pictures of an episode store, and {path} is none; leave it out")

    from coordinator.inspect import inspect_command

    return inspect_command(path, as_json=as_json)


def recipes(*, as_json: bool) -> Report:
    """The shipped recipes, one line each."""
    shipped = shipped_recipes()
    if not as_json:
        widest = max(len(recipe.name) for recipe in shipped)
        for recipe in shipped:
            print(f"{recipe.name:{widest}}  {recipe.description}{' (needs --store)' if recipe.needs_store else ''}")
    return {
        "recipes": [
            {"name": recipe.name, "description": recipe.description, "needs_store": recipe.needs_store}
            for recipe in shipped
        ]
    }


# -------------------------------------------------------------------------------------------------------------- ingest


def ingest_omniglot(
    source: Path, store: Path, size: int, part: Part | None, *, download: bool, as_json: bool
) -> Report:
    """Ingest Omniglot from a zip or folder; with ``download``, into which it is downloaded first."""
    from cluster.episodes import ingest_omniglot as omniglot

    report = omniglot.ingest_omniglot(omniglot.download_omniglot(source) if download else source, store, size, part)
    return _ingested(store, report.header, report.skipped, as_json=as_json)


def ingest_images(folder: Path, store: Path, size: int, grey: bool | None, *, as_json: bool) -> Report:
    """Ingest a folder of class folders; ``grey`` None lets the pictures decide."""
    from cluster.episodes import ingest_images as images

    report = images.ingest_images(folder, store, size, grey)
    return _ingested(store, report.header, report.skipped, as_json=as_json)


def ingest_glyphs(store: Path, size: int, *, as_json: bool) -> Report:
    """Write the embedded glyphs as a store."""
    from cluster.episodes import glyphs

    return _ingested(store, glyphs.ingest_glyphs(store, size), (), as_json=as_json)


def _ingested(store: Path, header: StoreHeader, skipped: Sequence[tuple[str, str]], *, as_json: bool) -> Report:
    if not as_json:
        console, errors = (
            Console(highlight=False, soft_wrap=True),
            Console(stderr=True, highlight=False, soft_wrap=True),
        )
        for name, reason in skipped[:SHOWN_SKIPPED]:
            errors.print(f"skipped {name}: {reason}", markup=False)
        if len(skipped) > SHOWN_SKIPPED:
            errors.print(f"… and {len(skipped) - SHOWN_SKIPPED} more, all in the report of --json")
        console.print(
            f"{store}: {header.classes} classes, {header.samples} samples of {_shape(header.sample_shape)} "
            f"{header.dtype}, {header.size / 1e6:.1f} MB, {len(skipped)} skipped, digest {header.digest}",
            markup=False,
        )
    return {
        "store": str(store),
        "digest": header.digest,
        "bytes": header.size,
        "classes": header.classes,
        "samples": header.samples,
        "sample_shape": list(header.sample_shape),
        "dtype": header.dtype,
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
    }


# ------------------------------------------------------------------------------------------------------------- helpers


def _auto(recipe: str | None, overrides: Sequence[Override]) -> tuple[RunConfig, Path | None]:
    """A new run in the given run directory, or the one that is there already: for jobs that are submitted again.

    ConfigError: no run directory is given, or the run there is of another configuration.
    """
    config = resolve(load_recipe(recipe or DEFAULT_RECIPE), overrides)
    if config.execution.run_dir is None:
        raise ConfigError("--resume auto goes on with the run in --run-dir, or starts it: give --run-dir DIR")
    run = Path(config.execution.run_dir)
    if not (run / RESOLVED_NAME).is_file():
        return config, None
    refuse_result_changes(load_resolved(run / RESOLVED_NAME), config)
    return config, run


def _resumed(run: Path, recipe: str | None, overrides: Sequence[Override]) -> RunConfig:
    """The run's own configuration with overrides of its execution half."""
    if recipe is not None:
        raise ConfigError(f"--resume takes its recipe from the run {run}, got '{recipe}' as well; leave the recipe out")
    if any(key.replace("-", "_") == "execution.run_dir" for key, _ in overrides):
        raise ConfigError(f"--resume goes on in the run's own directory {run}; leave --run-dir out")
    _check_run(run)
    old = load_resolved(run / RESOLVED_NAME)
    new = resolve(old.model_dump(mode="json", exclude_none=True), overrides)
    refuse_result_changes(old, new)
    return new.model_copy(update={"execution": new.execution.model_copy(update={"run_dir": str(run)})})


def _check_run(run: Path) -> None:
    if not (run / RESOLVED_NAME).is_file():
        what = f"has no {RESOLVED_NAME}" if run.is_dir() else "is no directory" if run.exists() else "does not exist"
        raise RunDirectoryError(f"{run} is no run: it {what}; give the directory that `metafleet train` made")


def _whole_paths(config: RunConfig) -> RunConfig:
    """The configuration with whole paths: workers and later commands have other working directories."""
    given = {name: getattr(config.execution, name) for name in ("store", "metrics_discovery")}
    whole = {name: str(Path(path).absolute()) for name, path in given.items() if path is not None}
    return config.model_copy(update={"execution": config.execution.model_copy(update=whole)})


def _check_store(config: RunConfig) -> None:
    _check_store_wanted(config)
    store = config.execution.store
    if store is not None and not Path(store).exists():
        raise StoreError(f"no episode store at {store}: make one with `metafleet ingest`")


def _check_store_wanted(config: RunConfig) -> None:
    store, needed = config.execution.store, isinstance(config.data, StoreData)
    if needed and store is None:
        raise ConfigError(
            f"{config.name} reads its episodes from a store: give --store STORE (made by `metafleet ingest`)"
        )
    if store is not None and not needed:
        raise ConfigError(
            f"--store {store} would be unused, since data.type is {config.data.type}; give --data.type store as well, "
            "or a recipe that needs a store"
        )


def _inspect_store(path: Path, sheet: Path | None, *, as_json: bool) -> Report:
    from cluster.episodes.contact_sheet import contact_sheet, describe
    from cluster.episodes.store import EpisodeStore

    store = EpisodeStore.open(path)
    report = {"kind": "store", **describe(store)}
    if sheet is not None:
        contact_sheet(store, sheet)
        report["sheet"] = str(sheet)
    if not as_json:
        _show_store(report)
    return report


def _show_store(report: Report) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    each = report["samples_per_class"]
    table.add_row("episode store", report["path"])
    table.add_row("samples", f"{report['samples']} of {_shape(report['sample_shape'])} {report['dtype']}")
    span = f"{each['min']}" if each["min"] == each["max"] else f"{each['min']} … {each['max']}"
    table.add_row("classes", f"{report['classes']}, each of {span} samples")
    for kind in ("class", "sample"):
        for column, counts in report[f"{kind}_metadata"].items():
            table.add_row(f"{kind} {column}", _counts(counts))
    for name, text in report["description"].items():
        table.add_row(name, text)
    table.add_row("bytes", str(report["bytes"]))
    table.add_row("digest", report["digest"])
    if "sheet" in report:
        table.add_row("contact sheet", report["sheet"])
    Console(highlight=False, markup=False).print(table)


def _counts(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{value} ({count})" for value, count in list(counts.items())[:SHOWN_VALUES])
    return f"{len(counts)}: {shown}" + (", …" if len(counts) > SHOWN_VALUES else "")


def _shape(shape: Sequence[int]) -> str:
    return "×".join(str(length) for length in shape)
