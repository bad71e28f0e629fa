"""The command line: what reaches the commands, what is printed where, and the exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cluster.config.fields import all_fields
from cluster.config.loading import load_recipe, resolve, save_resolved, shipped_recipes
from cluster.config.run import RunConfig
from cluster.errors import ClusterError, ConfigError
from coordinator.cli import app, main, take_overrides
from coordinator.commands import EvaluationOptions

HEAVY = {"torch", "torchvision", "ray", "matplotlib", "pyarrow", "jaxtyping", "PIL", "safetensors", "prometheus_client"}

Trained = list[tuple[RunConfig, Path | None]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """What a stand-in for the training was called with."""
    calls: Trained = []

    def train_command(config: RunConfig, *, resume: Path | None, as_json: bool) -> dict[str, Any]:
        assert isinstance(config, RunConfig) and (resume is None or isinstance(resume, Path))
        calls.append((config, resume))
        return {"digest": "d", "as_json": as_json}

    stand_in(monkeypatch, "coordinator.session", train_command)
    return calls


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, function: Callable[..., dict[str, Any]]) -> None:
    fake = types.ModuleType(module)
    setattr(fake, function.__name__, function)
    monkeypatch.setitem(sys.modules, module, fake)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory as far as the command line looks at it."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_resolved(resolve(load_recipe("glyphs-maml")), folder / "config.toml")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line on stderr of a command that must be refused."""
    assert main([str(arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["evaluate", "-h"],
        ["ingest", "images", "--help"],
        ["recipes"],
        ["train", "--learner.inner_stepz", "3"],
        ["train", "omniglot-maml"],
        ["submit", "--help"],
        ["submit", "omniglot-maml"],
    ],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(argv: list[str]) -> None:
    script = (
        "import sys\nfrom coordinator.cli import main\ncode = main(sys.argv[1:])\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == (2 if argv[-1] in ("3", "omniglot-maml") else 0), done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_train_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in all_fields():
        default = "required" if field.default == "required" else f"default {field.default}"
        entry = f"--{field.path} {field.meaning} [{field.allowed}; {default}]"
        assert " ".join(entry.split()) in text
    assert "learner.type protonet Prototypical Networks" in text


def test_help_lists_the_commands_in_order_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == [
        "train", "submit", "evaluate", "attention", "replay", "ingest", "inspect", "recipes",
    ]  # fmt: skip


def test_every_reporting_command_takes_json() -> None:
    ingests = app.commands["ingest"].commands.values()  # type: ignore[attr-defined]
    for command in [*(one for name, one in app.commands.items() if name != "ingest"), *ingests]:
        assert "--json" in [name for param in command.params for name in param.opts], command.name


def test_module_and_console_script_are_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "coordinator", "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.startswith("metafleet ")


# ----------------------------------------------------------------------------------------------------- train: options


def test_train_alone_is_the_default_recipe(trained: Trained) -> None:
    assert main(["train"]) == 0
    assert trained == [(resolve(load_recipe("glyphs-maml")), None)]


@pytest.mark.parametrize(
    ("argv", "overrides"),
    [
        (["--steps", "7", "--seed", "3"], [("steps", "7"), ("seed", "3")]),
        (["--run-dir", "r", "--workers", "2"], [("execution.run_dir", "r"), ("execution.workers", "2")]),
        (["--run_dir=r", "--address", "auto"], [("execution.run_dir", "r"), ("execution.address", "auto")]),
        (["--learner.inner_steps", "5"], [("learner.inner_steps", "5")]),
        (["--learner.inner-steps=5"], [("learner.inner_steps", "5")]),
        (["--learner.first_order"], [("learner.first_order", "true")]),
        (["--learner.first-order", "--seed", "3"], [("learner.first_order", "true"), ("seed", "3")]),
        (["--learner.first_order", "false"], [("learner.first_order", "false")]),
        (["--clip_norm", "2", "--clip-norm", "none"], [("clip_norm", "none")]),
        (["--execution.run_dir", "a=b"], [("execution.run_dir", "a=b")]),
        (
            ["--learner.type", "reptile", "--optimizer.lr", "1e-2"],
            [("learner.type", "reptile"), ("optimizer.lr", "0.01")],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
@pytest.mark.parametrize("recipe_first", [True, False])
def test_fields_as_options(
    trained: Trained, argv: list[str], overrides: list[tuple[str, str]], recipe_first: bool
) -> None:
    assert main(["train", *(["glyphs-maml", *argv] if recipe_first else [*argv, "glyphs-maml"])]) == 0
    assert trained == [(resolve(load_recipe("glyphs-maml"), overrides), None)]


def test_a_later_resume_elsewhere_finds_the_paths(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("store.arrow").touch()
    argv = ("--store", "store.arrow", "--execution.metrics_discovery", "targets")
    assert main(["train", "omniglot-maml", *argv]) == 0
    [(config, _)] = trained
    assert config.execution.store == str(tmp_path / "store.arrow")
    assert config.execution.metrics_discovery == str(tmp_path / "targets")


def test_overrides_come_before_what_click_parses() -> None:
    options = ["--resume", "--json", "-h"]
    assert take_overrides(["a", "--x.y", "-1", "--json", "--", "--z"], options) == [
        "--set",
        "x.y=-1",
        "a",
        "--json",
        "--",
        "--z",
    ]
    assert take_overrides(["--resume", "--x.y", "1"], options) == ["--set", "x.y=1", "--resume"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["--learner.inner_stepz", "3"],
            "learner.inner_stepz: no such key in learner.type maml; did you mean inner_steps?",
        ),
        (["--inner_steps", "3"], "did you mean learner.inner_steps?"),
        (["--episode.way", "0"], "episode.way: must be >= 1, got 0"),
        (["--workers", "many"], "execution.workers: must be a whole number, got 'many'"),
        (["--jsno"], "'--json'"),
        (["--wokers", "3"], "'--workers'"),
        (["--clip_norm"], "clip_norm: needs a value"),
        (["--clip_norm", "--json"], "clip_norm: needs a value"),
        (["glyphs-mamml"], "did you mean glyphs-maml?"),
        (["a", "b"], "unexpected extra argument"),
        (["-x"], "-x"),
        (["omniglot-maml"], "give --store STORE"),
        (["omniglot-maml", "--store", "nowhere.arrow"], "no episode store at nowhere.arrow"),
        (["--store", "nowhere.arrow"], "give --data.type store as well"),
        (["--resume", "nowhere"], "nowhere is no run: it does not exist"),
        (["--resume"], "'--resume' requires an argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses(
    capsys: pytest.CaptureFixture[str],
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, "train", *argv)
    assert trained == [] and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ train: resume


def test_resume_takes_the_runs_configuration(trained: Trained, run: Path) -> None:
    assert main(["train", "--resume", str(run), "--workers", "3", "--execution.keep", "9"]) == 0
    [(config, resume)] = trained
    assert resume == run
    assert config.result_digest() == resolve(load_recipe("glyphs-maml")).result_digest()
    assert (config.execution.workers, config.execution.keep, config.execution.run_dir) == (3, 9, str(run))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--seed", "1"], "seed 0 -> 1"),
        (["--learner.type", "protonet"], "learner.type maml -> protonet"),
        (["glyphs-maml"], "leave the recipe out"),
        (["--run-dir", "x"], "leave --run-dir out"),
        (["--execution.run-dir", "x"], "leave --run-dir out"),
    ],
)
def test_resume_refuses(
    capsys: pytest.CaptureFixture[str], trained: Trained, run: Path, argv: list[str], expected: str
) -> None:
    assert expected in refused(capsys, "train", "--resume", run, *argv)
    assert trained == []


@pytest.mark.parametrize("command", [["train", "--resume"], ["evaluate"], ["attention"], ["replay"]])
def test_a_folder_that_is_no_run_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]
) -> None:
    assert "has no config.toml" in refused(capsys, *command, tmp_path)


# ------------------------------------------------------------------------------------------- evaluate, replay, inspect


def test_evaluate_hands_over_the_request(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, EvaluationOptions, bool]] = []

    def evaluate_command(run: Path, options: EvaluationOptions, *, as_json: bool) -> dict[str, Any]:
        calls.append((run, options, as_json))
        return {}

    stand_in(monkeypatch, "coordinator.evaluate", evaluate_command)
    assert main(["evaluate", str(run)]) == 0
    assert main(["evaluate", str(run), "--store", "s", "--json"]) == 0
    shape = "--split val --way 20 --shot 5 --query 3 --episodes 900"
    rest = "--bn support --checkpoint last --address auto --workers 2"
    assert main(["evaluate", str(run), *shape.split(), *rest.split()]) == 0
    assert calls == [
        (run, EvaluationOptions(), False),
        (run, EvaluationOptions(store=Path("s")), True),
        (run, EvaluationOptions(None, "val", 20, 5, 3, 900, "support", "last", "auto", 2), False),
    ]


@pytest.mark.parametrize(
    "argv", ["--way 0", "--episodes 1", "--bn mean", "--split dev", "--checkpoint first", "--wya 5", "--workers 0", "x"]
)
def test_evaluate_refuses(capsys: pytest.CaptureFixture[str], run: Path, argv: str) -> None:
    assert "(see metafleet evaluate --help)" in refused(capsys, "evaluate", run, *argv.split())


def test_replay_hands_over_the_request(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def replay_command(run: Path, **options: Any) -> dict[str, Any]:
        calls.append((run, *options.values()))
        return {}

    stand_in(monkeypatch, "coordinator.replay", replay_command)
    assert main(["replay", str(run)]) == 0
    assert main(["replay", str(run), "--until", "7", "--shard", "3", "--store", "s", "--json"]) == 0
    assert calls == [(run, None, None, None, False), (run, 7, 3, Path("s"), True)]


def test_inspect_tells_runs_and_checkpoints_from_stores(
    capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def inspect_command(path: Path, *, as_json: bool) -> dict[str, Any]:
        calls.append(path)
        return {"version": 3}

    stand_in(monkeypatch, "coordinator.inspect", inspect_command)
    weights = run / "theta.safetensors"
    weights.touch()
    assert main(["inspect", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"version": 3}
    assert main(["inspect", str(weights)]) == 0
    assert calls == [run, weights]
    assert "nothing at" in refused(capsys, "inspect", run / "nothing")
    assert "leave it out" in refused(capsys, "inspect", run, "--sheet", "x.png")
    assert "not an episode store" in refused(capsys, "inspect", run / "config.toml")
    assert calls == [run, weights]


def test_ingest_and_inspect_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("circle", "square"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (20, 16), 40 * number).save(tmp_path / "pictures" / name / f"{number}.png")
    (tmp_path / "pictures" / "square" / "bad.png").write_bytes(b"no picture")
    store, sheet = tmp_path / "store.arrow", tmp_path / "sheet.png"

    assert main(["ingest", "images", str(tmp_path / "pictures"), str(store), "--size", "12", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["classes"], report["samples"], report["sample_shape"]) == (2, 6, [1, 12, 12])
    assert [skipped["name"] for skipped in report["skipped"]] == ["square/bad.png"]

    assert main(["inspect", str(store), "--json", "--sheet", str(sheet)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["digest"], shown["classes"]) == ("store", report["digest"], 2)
    with Image.open(sheet) as image:
        assert image.format == "PNG"

    assert main(["inspect", str(store)]) == 0
    assert report["digest"] in capsys.readouterr().out
    again: list[str | Path] = ["ingest", "images", tmp_path / "pictures", store, "--size", "12", "--rgb"]
    assert "exists already" in refused(capsys, *again)

    assert (
        main(["ingest", "images", str(tmp_path / "pictures"), str(tmp_path / "rgb.arrow"), "--size", "12", "--rgb"])
        == 0
    )
    out, err = capsys.readouterr()
    assert "2 classes, 6 samples of 3×12×12 uint8" in out and "1 skipped" in out
    assert "skipped square/bad.png: " in err


def test_ingest_omniglot_downloads_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cluster.episodes import ingest_omniglot

    asked: list[Path] = []

    def download_omniglot(root: Path) -> Path:
        asked.append(root)
        return tmp_path / "nothing here"

    monkeypatch.setattr(ingest_omniglot, "download_omniglot", download_omniglot)
    argv: list[str | Path] = ["ingest", "omniglot", tmp_path / "missing", tmp_path / "store.arrow"]
    assert "missing: no such file or folder" in refused(capsys, *argv)
    assert asked == []
    assert "nothing here: no such file or folder" in refused(capsys, *argv, "--download")
    assert asked == [tmp_path / "missing"]


# ------------------------------------------------------------------------------------------------------ what is printed


def test_recipes_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [recipe.name for recipe in shipped_recipes()]
    assert all(("(needs --store)" in line) == line.startswith(("omniglot", "images")) for line in lines)
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert [recipe["name"] for recipe in listed] == [recipe.name for recipe in shipped_recipes()]


NOISY = """
import os, subprocess, sys, types
from coordinator.cli import main

def train_command(config, *, resume, as_json):
    print("noise of Python")
    os.write(1, b"noise of C\\n")
    subprocess.run([sys.executable, "-c", "print('noise of a child')"], check=True)
    return {"accuracy": float("nan"), "steps": (0.5, float("inf")), "config": {"seed": config.seed}}

sys.modules["coordinator.session"] = types.ModuleType("coordinator.session")
sys.modules["coordinator.session"].train_command = train_command
code = main(sys.argv[1:])
sys.exit(code)
"""


def test_json_is_one_object_whatever_else_prints() -> None:
    argv = [sys.executable, "-c", NOISY, "train", "--seed", "4"]
    # Python's own buffer is one of the ways in which text can reach stdout late.
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run([*argv, "--json"], capture_output=True, text=True, timeout=60, env=buffered)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"accuracy": None, "steps": [0.5, None], "config": {"seed": 4}}
    assert done.stdout.count("\n") == 1
    assert sorted(done.stderr.splitlines()) == ["noise of C", "noise of Python", "noise of a child"]
    plain = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert "noise of Python" in plain.stdout and "{" not in plain.stdout


# ---------------------------------------------------------------------------------------------------------- exit codes


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def train_command(config: RunConfig, *, resume: Path | None, as_json: bool) -> dict[str, Any]:
        raise error

    stand_in(monkeypatch, "coordinator.session", train_command)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_refusal_is_one_line_and_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    failing(monkeypatch, ClusterError("no cluster at x:1: start one"))
    assert refused(capsys, "train", *flags) == "error: no cluster at x:1: start one\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ConfigError("why"))
    monkeypatch.setenv("METAFLEET_DEBUG", "1")
    with pytest.raises(ConfigError, match="why"):
        main(["train"])


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["train"]) == 130
    assert main(["train", "--json"]) == 130


def test_a_defect_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["train"])


@pytest.mark.parametrize("argv", [["trian"], ["--versoin"], ["ingest", "omniglt"], ["evaluate"], ["recipes", "--foo"]])
def test_typos_are_one_line_and_2(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert "--help)" in refused(capsys, *argv)
