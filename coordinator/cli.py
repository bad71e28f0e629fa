"""The command line: options, help and exit codes; what the commands do is in ``commands``, imported when one runs.

Nothing here may import torch, Ray, Arrow or matplotlib, also not by way of another module: ``--help`` answers within a
second. Exit codes: 0 done, 2 refused (one line on stderr), 130 and 143 stopped by
SIGINT and SIGTERM, 1 a defect of Metafleet (with traceback).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from cluster.errors import ConfigError, MetafleetError

DEBUG_VARIABLE = "METAFLEET_DEBUG"
"""Set to anything, it makes refusals show their traceback."""

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there.")
_path = click.Path(path_type=Path)
_count = click.IntRange(min=1)
_address = click.option("--address", metavar="A", help="Ray cluster: local (default), auto, or HOST:PORT.")
_other_store = click.option("--store", type=_path, metavar="STORE", help="Another episode store, taken as a whole.")
_split = click.option(
    "--split",
    type=click.Choice(["train", "val", "test", "all"]),
    help="Classes to draw from; test when not given, all for another store.",
)
_checkpoint = click.option(
    "--checkpoint",
    type=click.Choice(["best", "last"]),
    default="best",
    show_default=True,
    help="Best by validation, or last.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (the process's own by default) and return the exit code."""
    try:
        # A click command that ends by itself (--help, --version) gives its exit code, ours give None.
        return app.main(args=argv, prog_name="metafleet", standalone_mode=False) or 0
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f" (see {context.command_path} --help)" if context else ""
        click.echo(f"error: {' '.join(error.format_message().split())}{hint}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except MetafleetError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        click.echo(f"error: {error}", err=True)
        return 2
    except OSError as error:
        if os.environ.get(DEBUG_VARIABLE) or error.filename is None:
            raise
        click.echo(f"error: {error.filename}: {error.strerror}: check the path, its permissions and the disk", err=True)
        return 2


# ------------------------------------------------------------------------------------------- configuration as options


class GroupInOrder(click.Group):
    """A group whose help lists the commands as they are defined, the main one first."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands' names in order of definition."""
        return list(self.commands)


class OverridesCommand(click.Command):
    """A command that takes every configuration field as an option, and shows them all in its help.

    The fields are no click options: which of them exist depends on the recipe and on other options. They go on as
    hidden ``--set KEY=VALUE`` and are judged by the configuration.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Click's parsing, after the fields have been taken out."""
        visible = [param for param in self.get_params(ctx) if not getattr(param, "hidden", False)]
        options = [name for param in visible for name in (*param.opts, *param.secondary_opts)]
        return super().parse_args(ctx, take_overrides(args, options, ctx))

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Click's help, then the fields."""
        from cluster.config.help import fields_text

        super().format_help(ctx, formatter)
        formatter.write("\n" + fields_text(formatter.width))


def take_overrides(args: Iterable[str], options: Sequence[str], context: click.Context | None = None) -> list[str]:
    """``args`` with each option that is none of ``options`` rewritten as ``--set KEY=VALUE``, and those put first.

    A field takes the next argument for its value unless that is an option; a true/false field takes it only if it is
    such a value, so that it can stand before the recipe's name. ``_`` and ``-`` are the same in every name.

    Raises:
        ConfigError: a field without a value.
        click.UsageError: neither an option nor a field, but close to an option.
    """
    overrides: list[str] = []
    others: list[str] = []
    rest = deque(args)
    while rest:
        token = rest.popleft()
        name, equals, value = token.partition("=")
        dashed = name.replace("_", "-")
        if token == "--":
            others += [token, *rest]
            break
        if not token.startswith("--"):
            others.append(token)
        elif dashed in options:
            others.append(dashed + equals + value)
        else:
            key = name.removeprefix("--").replace("-", "_")
            _refuse_misspelt_option(dashed, key, options, context)
            overrides += ["--set", f"{key}={value if equals else _next_value(key, rest)}"]
    return overrides + others


def _refuse_misspelt_option(name: str, key: str, options: Sequence[str], context: click.Context | None) -> None:
    from cluster.config.run import RunConfig

    near = get_close_matches(name, [option for option in options if option.startswith("--")], n=1, cutoff=0.75)
    if near and "." not in key and key not in RunConfig.model_fields:
        raise click.UsageError(f"No such option '{name}'. Did you mean '{near[0]}'?", context)


def _next_value(key: str, rest: deque[str]) -> str:
    from cluster.config.fields import all_fields
    from cluster.config.overrides import is_switch_value

    if any(field.path == key and field.boolean for field in all_fields()):
        return rest.popleft() if rest and is_switch_value(rest[0]) else "true"
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"{key}: needs a value")
    return rest.popleft()


# -------------------------------------------------------------------------------------------------------------- report


def _report(as_json: bool, command: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a command that shows its report itself, or, for JSON, print what it returns and nothing else; return that."""
    if not as_json:
        return command()
    with _stdout_to_stderr():
        report = command()
    click.echo(json.dumps(_finite(report), allow_nan=False))
    return report


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what anyone prints: Python code, C code, and the processes that are started meanwhile."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinities, which JSON does not have: a diverged run still gets its report."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case Path():
            return str(value)
        case _:
            return value


# ------------------------------------------------------------------------------------------------------------ commands


def _shorthands(command: Callable[..., None]) -> Callable[..., None]:
    """The options of `train` and `submit` that stand for a configuration field, and the hidden one for all others."""
    options = (
        click.option(
            "--workers", metavar="N", help="Worker actors; as many as the free CPUs (or GPUs) allow when not given."
        ),
        click.option("--steps", metavar="VERSIONS", help="Outer updates of the whole run."),
        click.option("--seed", metavar="S", help="Seed of the initial parameters and of every episode."),
        click.option("--store", metavar="STORE", help="Episode store, for recipes that need one."),
        click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, hidden=True),
    )
    for option in reversed(options):
        command = option(command)
    return command


_FIELD_OF = {name: f"execution.{name}" for name in ("run_dir", "address", "workers", "store")}
"""The configuration field that an option of `train` sets, where the names differ."""


def _overrides(settings: Iterable[str], named: dict[str, str | None]) -> list[tuple[str, str]]:
    """What `_shorthands` and other named options ask of the configuration; the named ones go last and so hold."""
    overrides = [(key, value) for key, _, value in (setting.partition("=") for setting in settings)]
    return overrides + [(_FIELD_OF.get(name, name), value) for name, value in named.items() if value is not None]


@click.group(cls=GroupInOrder, context_settings=_SETTINGS, invoke_without_command=True)
@click.version_option(package_name="metafleet", message="%(prog)s %(version)s")
@click.pass_context
def app(context: click.Context) -> None:
    """Distributed meta-learning on Ray and PyTorch: the same bits whatever the number of workers.

    `metafleet train` without anything else meta-trains MAML on the embedded glyphs, on all cores of this machine.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@app.command(cls=OverridesCommand, short_help="Meta-train a recipe, or resume a run.")
@click.argument("recipe", required=False)
@click.option("--run-dir", metavar="DIR", help="Run directory to make; runs/RECIPE-DATE-TIME when not given.")
@click.option(
    "--resume",
    type=_path,
    metavar="RUN",
    help="Go on with the run in this directory, to the same result; auto: with the one in --run-dir, if there is one.",
)
@_address
@_shorthands
@_json
def train(
    recipe: str | None, resume: Path | None, settings: tuple[str, ...], as_json: bool, **named: str | None
) -> None:
    """Meta-train RECIPE: the name of a shipped one (see `metafleet recipes`; glyphs-maml by default) or a .toml file.

    Every configuration field is an option, see below.
    """
    from coordinator import commands

    _report(as_json, lambda: commands.train(recipe, _overrides(settings, named), resume, as_json=as_json))


@app.command(cls=OverridesCommand, short_help="Train a recipe as a job of a Ray cluster.")
@click.argument("recipe", required=False)
@click.option(
    "--address",
    metavar="URL",
    envvar="RAY_API_SERVER_ADDRESS",
    default="http://localhost:8265",
    show_default=True,
    help="The cluster's job server, http://HEAD:8265; $RAY_API_SERVER_ADDRESS when not given.",
)
@click.option(
    "--run-dir",
    metavar="DIR",
    help="Run directory as the cluster sees it: a whole path, on storage that outlives its head. "
    "The same line submitted again goes on with the run there. Required.",
)
@_shorthands
@click.option(
    "--working-dir",
    type=_path,
    metavar="DIR",
    help="Folder to ship as the job's working directory, say the source tree, whose code then runs; without it the "
    "job runs the Metafleet that is installed there. What its .gitignore names, data, caches and keys stay here.",
)
@click.option(
    "--exclude", metavar="PATTERN", multiple=True, help="Leave this out too, as .gitignore has it. Repeatable."
)
@click.option(
    "--max-size", type=_count, metavar="MIB", default=100, show_default=True, help="Most to ship; more is refused."
)
@click.option("--submission-id", metavar="ID", help="Name of the job; from recipe and time when not given.")
@click.option(
    "--grace",
    type=_count,
    metavar="SECONDS",
    default=60,
    show_default=True,
    help="Time that a stopped job has for its checkpoint.",
)
@click.option(
    "--python", metavar="PATH", default="python", show_default=True, help="Python on the cluster's head to run it with."
)
@click.option(
    "--on-interrupt",
    type=click.Choice(["detach", "stop"]),
    default="detach",
    show_default=True,
    help="What Ctrl-C does: leave the job running, or stop it and wait for its checkpoint.",
)
@click.option("--wait/--no-wait", default=True, help="Follow the log and end as the job ends; or leave at once.")
@_json
def submit(
    recipe: str | None,
    settings: tuple[str, ...],
    as_json: bool,
    run_dir: str | None,
    workers: str | None,
    steps: str | None,
    seed: str | None,
    store: str | None,
    **options: Any,
) -> None:
    """Train RECIPE, as `metafleet train` takes it, as a job of a running Ray cluster, and follow its log.

    The configuration is checked here and sent whole; a .toml recipe need not be on the cluster. Exit code: the job's
    own, 0 when it succeeded, 143 when it was stopped, 130 after Ctrl-C, which leaves it running. For a cluster with
    token authentication set RAY_AUTH_MODE=token, and the token in ~/.ray/auth_token or a file at RAY_AUTH_TOKEN_PATH.

    Every configuration field is an option, see below.
    """
    from coordinator import commands
    from coordinator.submit import SubmitOptions

    named = {"run_dir": run_dir, "workers": workers, "steps": steps, "seed": seed, "store": store}
    overrides = _overrides(settings, named)
    report = _report(as_json, lambda: commands.submit(recipe, overrides, SubmitOptions(**options)))
    click.get_current_context().exit(report["exit_code"])


@app.command(short_help="Evaluate a run on held-out episodes.")
@click.argument("run", type=_path)
@_other_store
@_split
@click.option("--way", type=_count, metavar="N", help="Classes an episode; the run's when not given.")
@click.option(
    "--within",
    metavar="COLUMN",
    help="Class metadata column whose value an episode's classes share, say alphabet; '' for any; else the run's.",
)
@click.option("--shot", type=_count, metavar="K", help="Support samples a class; the run's when not given.")
@click.option("--query", type=_count, metavar="Q", help="Query samples a class; the run's when not given.")
@click.option("--episodes", type=click.IntRange(min=2), metavar="E", help="Episodes; the run's when not given.")
@click.option(
    "--bn",
    type=click.Choice(["transductive", "support", "running"]),
    help="Batch statistics: of the set at hand, of the support set, or running averages; the run's when not given.",
)
@click.option(
    "--learner",
    metavar="KEY=VALUE",
    multiple=True,
    help="Learner option to evaluate with, say eval_steps=20; any that leaves the parameters as they are. Repeatable.",
)
@_checkpoint
@_address
@click.option(
    "--workers",
    type=_count,
    metavar="N",
    help="Worker actors; as many as the free CPUs (or GPUs) allow when not given.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda", "auto"]), help="Device of the workers; the run's when not given."
)
@_json
def evaluate(run: Path, as_json: bool, **request: Any) -> None:
    """Evaluate the run in directory RUN: mean and 95 % confidence interval before and after each adaptation step.

    The same episodes each time: they are decided by the run's seed, the split and the episode's number.
    """
    from coordinator import commands

    _report(as_json, lambda: commands.evaluate(run, commands.EvaluationOptions(**request), as_json=as_json))


@app.command(short_help="Show where an attention learner looks.")
@click.argument("run", type=_path)
@_split
@click.option(
    "--episode",
    type=click.IntRange(min=0, max=10**9),
    metavar="E",
    default=0,
    show_default=True,
    help="Which episode of the split.",
)
@click.option(
    "--picture", type=_path, metavar="PNG", help="Where to draw it; attention.png in the run directory when not given."
)
@_checkpoint
@_other_store
@_json
def attention(run: Path, as_json: bool, **request: Any) -> None:
    """Show where the attention learner trained in directory RUN looks, on one episode of those that evaluate draws.

    Says how much of each query's attention falls on support samples of the right class, and draws which samples, and
    with learner.spatial which places on them, some queries look at.
    """
    from coordinator import commands

    _report(as_json, lambda: commands.attention(run, commands.AttentionOptions(**request), as_json=as_json))


@app.command(short_help="Recompute a run from its log.")
@click.argument("run", type=_path)
@click.option(
    "--until", type=click.IntRange(min=0), metavar="VERSION", help="Stop at this version; the last by default."
)
@click.option(
    "--shard",
    type=click.IntRange(min=0),
    metavar="SHARD",
    help="Compute this shard alone, at version --until.",
)
@click.option("--store", type=_path, metavar="STORE", help="Where the run's own store is now, if it was moved.")
@_json
def replay(run: Path, until: int | None, shard: int | None, store: Path | None, as_json: bool) -> None:
    """Recompute the run in directory RUN from its commit log, in one process, and compare the digests."""
    from coordinator import commands

    _report(as_json, lambda: commands.replay(run, until, shard, store, as_json=as_json))


@app.group(cls=GroupInOrder, invoke_without_command=True, short_help="Turn a data source into an episode store.")
@click.pass_context
def ingest(context: click.Context) -> None:
    """Turn a data source into an episode store: an immutable file, with its .header beside it."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


_size = click.option(
    "--size", type=_count, metavar="N", default=28, show_default=True, help="Height and width, pixels."
)


@ingest.command("omniglot", short_help="Omniglot, from its zip files or folders.")
@click.argument("source", type=_path, metavar="ZIP_OR_FOLDER")
@click.argument("store", type=_path)
@_size
@click.option(
    "--part",
    type=click.Choice(["background", "evaluation", "both"]),
    help="Which alphabets, where the source has both parts; the background ones when not given.",
)
@click.option("--download", is_flag=True, help="First download Omniglot into the folder, through torchvision.")
@_json
def ingest_omniglot(source: Path, store: Path, size: int, part: Any, download: bool, as_json: bool) -> None:
    """Omniglot as published (zip files or unpacked), or as torchvision leaves it on disk; ink is white on black."""
    from coordinator import commands

    _report(as_json, lambda: commands.ingest_omniglot(source, store, size, part, download=download, as_json=as_json))


@ingest.command("images", short_help="Your own pictures in class folders.")
@click.argument("folder", type=_path)
@click.argument("store", type=_path)
@click.option("--size", type=_count, metavar="N", required=True, help="Height and width, pixels.")
@click.option("--grey/--rgb", default=None, help="Channels; grey only if all pictures are, when not given.")
@_json
def ingest_images(folder: Path, store: Path, size: int, grey: bool | None, as_json: bool) -> None:
    """Your own pictures: every folder below FOLDER that holds pictures is a class, its parent folder its group."""
    from coordinator import commands

    _report(as_json, lambda: commands.ingest_images(folder, store, size, grey, as_json=as_json))


@ingest.command("glyphs", short_help="The embedded characters of many scripts.")
@click.argument("store", type=_path)
@_size
@_json
def ingest_glyphs(store: Path, size: int, as_json: bool) -> None:
    """The embedded source as a file: characters of many scripts in the typefaces that matplotlib ships."""
    from coordinator import commands

    _report(as_json, lambda: commands.ingest_glyphs(store, size, as_json=as_json))


@app.command(short_help="Show what a run, checkpoint or episode store holds.")
@click.argument("path", type=_path, metavar="RUN|CHECKPOINT|STORE")
@click.option("--sheet", type=_path, metavar="PNG", help="Write a contact sheet of the store's pictures.")
@_json
def inspect(path: Path, sheet: Path | None, as_json: bool) -> None:
    """Show what a run directory, a checkpoint or an episode store holds, after checking that it is whole."""
    from coordinator import commands

    _report(as_json, lambda: commands.inspect(path, sheet, as_json=as_json))


@app.command(short_help="List the shipped recipes.")
@_json
def recipes(as_json: bool) -> None:
    """List the shipped recipes, one line each."""
    from coordinator import commands

    _report(as_json, lambda: commands.recipes(as_json=as_json))
