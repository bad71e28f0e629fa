"""Bad input: one line that says what to change, exit code 2, nothing half-written, and no Ray started for it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.episodes.ingest_images import ingest_images
from coordinator.cli import main
from coordinator.run_dir import RunDirectory
from tests.system.conftest import Pictures
from tests.system.driving import Finished

pytestmark = pytest.mark.ray

Refused = Callable[..., str]

SINUSOID = ("train", "sinusoid-maml", "--run-dir", "run")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(here: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """The one line of a command that must be refused before Ray is started, and must write nothing."""
    import ray

    def never(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", never)

    def run(*argv: object) -> str:
        before = snapshot(tmp_path)
        error = here(*argv).error
        assert snapshot(tmp_path) == before
        return error

    return run


@pytest.fixture(scope="module")
def trained(
    own_pictures: Pictures, cluster: str, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of 6 versions with checkpoints at 3 and 6; tests work on copies of it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    argv = ("--steps", 6, "--execution.checkpoint_every", 3, "--evaluation.every", 0, "--workers", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAFLEET_CACHE", environment["METAFLEET_CACHE"])
        words = ("train", *own_pictures.argv, *argv, "--address", cluster, "--run-dir", run)
        assert main([str(word) for word in words]) == 0
    return run


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """A store of RGB pictures, where the runs' are grey."""
    for number in range(30):
        folder = tmp_path / "coloured" / f"class{number}"
        folder.mkdir(parents=True)
        for sample in range(6):
            Image.fromarray(np.full((28, 28, 3), 6 * number + sample, dtype=np.uint8)).save(folder / f"{sample}.png")
    store = tmp_path / "coloured.arrow"
    ingest_images(tmp_path / "coloured", store, 28, False)
    return store


def flip(path: Path, at: int) -> None:
    """Damages one bit of a file."""
    body = bytearray(path.read_bytes())
    body[at] ^= 1
    path.write_bytes(body)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("train", "omniglot-mmal", "--run-dir", "run"), ["no recipe 'omniglot-mmal'", "did you mean omniglot-maml?"]),
        ((*SINUSOID, "--learner.inner_stepz", 3), ["learner.inner_stepz", "did you mean", "inner_steps"]),
        ((*SINUSOID, "--learner.inner_steps", 0), ["learner.inner_steps", ">= 1", "got 0"]),
        ((*SINUSOID, "--learner.type", "mmal"), ["learner.type", "'mmal' is none of maml", "did you mean maml?"]),
        ((*SINUSOID, "--episode.way", 5), ["episode.way must be 1 for regression", "got 5"]),
        ((*SINUSOID, "--execution.cpus_per_worker", 1000), ["it needs 1000 CPUs", "lower execution.cpus_per_worker"]),
        ((*SINUSOID, "--execution.gpus_per_worker", 64), ["64 GPUs", "lower execution.cpus_per_worker"]),
        ((*SINUSOID, "--address", "127.0.0.1:1"), ["no Ray cluster at '127.0.0.1:1'", "ray start --head"]),
        ((*SINUSOID, "--address", "ray://head:10001"), ["execution.address", "Ray Client"]),
        ((*SINUSOID, "--execution.metrics_host", "192.0.2.1"), ["192.0.2.1", "--execution.metrics_host"]),
        (("train", "sinusoid-maml", "--run-dir", "file/run"), ["cannot make run directory file/run", "--run-dir"]),
        (("train", "sinusoid-maml", "--run-dir", "taken"), ["taken exists already", "--resume taken"]),
        (("train", "sinusoid-maml", "--run-dir", "file"), ["file exists already"]),
        (("train", "--resume", "taken"), ["taken is no run"]),
        (("evaluate", "taken"), ["taken is no run"]),
        (("replay", "nothing"), ["nothing is no run: it does not exist"]),
        (("inspect", "taken"), ["taken is no run directory"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "refused",
)
def test_refused(refused: Refused, tmp_path: Path, argv: tuple[Any, ...], why: list[str]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_bytes(b"")
    error = refused(*argv)
    assert all(words in error for words in why), error


def test_a_port_that_is_taken(refused: Refused) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        error = refused(*SINUSOID, "--execution.metrics_port", port)
    assert f"metrics port {port} on 127.0.0.1 is taken" in error and "--execution.metrics_port" in error


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("--episode.way", 80), ["80", "72 classes"]),
        (("--evaluation.way", 4), ["evaluation.way must be 5, as in training", "got 4"]),
        (("--episode.way", 7), ["way 7", "6 classes of split val"]),
        (("--episode.query", 6), ["7", "6 samples"]),
        (("--evaluation.query", 9), ["10", "6 samples"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "refused",
)
def test_episodes_that_the_store_cannot_give(
    refused: Refused, own_pictures: Pictures, argv: tuple[Any, ...], why: list[str]
) -> None:
    error = refused("train", *own_pictures.argv, *argv, "--run-dir", "run")
    assert all(words in error for words in why), error


@pytest.mark.parametrize("at", [100, -100])
def test_a_damaged_store(refused: Refused, own_pictures: Pictures, tmp_path: Path, at: int) -> None:
    store = tmp_path / "damaged.arrow"
    shutil.copy(own_pictures.store, store)
    shutil.copy(f"{own_pictures.store}.header", f"{store}.header")
    flip(store, at)
    for argv in (("train", *own_pictures.argv, "--store", store, "--run-dir", "run"), ("inspect", store)):
        assert "damaged.arrow" in refused(*argv)


def test_a_store_of_another_shape(refused: Refused, copy: Path, coloured: Path, tmp_path: Path) -> None:
    larger = tmp_path / "larger.arrow"
    ingest_images(tmp_path / "coloured", larger, 32, True)  # the strided net's parameters would fit it
    for store, shape in ((coloured, "3×28×28"), (larger, "1×32×32")):
        error = refused("evaluate", copy, "--store", store, "--split", "all")
        assert f"its samples are {shape}, the run was trained on 1×28×28" in error


def test_paths_that_cannot_be(refused: Refused, own_pictures: Pictures) -> None:
    long = "x" * 5000
    for argv in (("inspect", long), ("evaluate", long), ("train", *own_pictures.argv, "--store", long)):
        assert "File name too long" in refused(*argv)
    assert "no/such/folder" in refused("inspect", own_pictures.store, "--sheet", "no/such/folder/x.png")


def test_an_altered_configuration(refused: Refused, copy: Path) -> None:
    config = copy / "config.toml"
    text = config.read_text()
    assert "inner_steps = 2" in text
    config.write_text(text.replace("inner_steps = 2", "inner_steps = 3"))
    for argv in (("train", "--resume", copy), ("evaluate", copy), ("replay", copy)):
        assert "config.toml was altered" in refused(*argv)


def test_another_store_for_the_same_run(refused: Refused, copy: Path, coloured: Path) -> None:
    assert "made with another store" in refused("train", "--resume", copy, "--store", coloured)


def test_evaluations_that_cannot_be(refused: Refused, copy: Path) -> None:
    assert "--way must be 5, as in training, for learner maml" in refused("evaluate", copy, "--way", 6)
    assert "6 samples" in refused("evaluate", copy, "--query", 60)


@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.msgpack"])
def test_a_damaged_checkpoint(refused: Refused, here: Callable[..., Finished], copy: Path, name: str) -> None:
    newest = sorted((copy / "checkpoints").glob("v*"))[-1]
    flip(newest / name, -20)
    for argv in (("train", "--resume", copy), ("evaluate", copy, "--checkpoint", "last"), ("inspect", newest)):
        error = refused(*argv)
        assert newest.name in error and "damaged" in error and "remove it to use the one before" in error
    problems = here("inspect", copy, "--json").report["checkpoint_problems"]
    assert len(problems) == 1 and newest.name in problems[0]


def test_a_damaged_log(refused: Refused, copy: Path) -> None:
    log = copy / "log" / "0001.msgpack"
    flip(log, log.stat().st_size // 2)
    for argv in (("replay", copy), ("train", "--resume", copy), ("inspect", copy)):
        assert "0001.msgpack is damaged" in refused(*argv)


@pytest.fixture
def owned(copy: Path) -> Iterator[Path]:
    """A run whose driver lives: this process."""
    run = RunDirectory(copy)
    run.acquire()
    yield copy
    run.release()


def test_a_run_that_lives(refused: Refused, owned: Path) -> None:
    assert "in use by a living run" in refused("train", "--resume", owned)
    assert "exists already" in refused(*SINUSOID[:2], "--run-dir", owned)


def test_a_resume_that_would_change_the_result(refused: Refused, copy: Path) -> None:
    error = refused("train", "--resume", copy, "--seed", 9)
    assert "cannot change what decides its result: seed 0 -> 9" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_ours(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o500)
    assert "theirs is no folder that this user may write to" in refused(*SINUSOID[:3], "theirs/run")
