"""What the system tests share: data, one undisturbed run to compare with, and one cluster that others have started."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.episodes.ingest_images import ingest_images
from cluster.episodes.ingest_omniglot import ingest_omniglot
from coordinator.cli import main
from tests.system.driving import Command, Driver, Finished

# Started in the background of a script, tests would ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

OMNIGLOT = Path(__file__).parents[3] / "shared" / "data" / "omniglot" / "images_background.zip"

CLUSTER_CPUS = 4
"""Of the cluster that runs join, whatever the machine has."""

STEPS = 120
"""Versions of the runs on pictures: seconds of work, in which tests have to come."""

SMALL = (
    *("--steps", STEPS, "--model.channels", 8, "--learner.inner_steps", 2, "--learner.eval_steps", 3),
    *("--episode.query", 2, "--shard.episodes", 2, "--shard.chunk", 2, "--aggregator.shards", 4),
    *(
        "--evaluation.query",
        3,
        "--evaluation.every",
        STEPS // 2,
        "--evaluation.val_episodes",
        20,
        "--evaluation.episodes",
        40,
    ),
    *("--execution.checkpoint_every", 20, "--execution.cpus_per_worker", 0.5),
)
"""Makes an Omniglot recipe one of seconds."""


@dataclass(frozen=True)
class Pictures:
    """A store and the arguments of `metafleet train` for a small run on it."""

    name: str
    store: Path
    argv: tuple[Any, ...]


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to, with two workers."""

    run: Path
    driver: Driver
    finished: Finished
    scraped: str
    """What its metrics endpoint answered while it ran."""

    @property
    def report(self) -> dict[str, Any]:
        return self.finished.report


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of all processes: nothing of Ray's or Metafleet's from outside, and a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "METAFLEET_"))}
    return {**kept, "METAFLEET_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(autouse=True)
def _this_process(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same for commands that a test runs in this process."""
    monkeypatch.setenv("METAFLEET_CACHE", environment["METAFLEET_CACHE"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(tmp_path: Path, environment: dict[str, str]) -> Iterator[Command]:
    """The command in the test's own folder."""
    with Command(tmp_path, environment) as made:
        yield made


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """The command in this process, which saves the seconds of its imports."""

    def run(*argv: object) -> Finished:
        capfd.readouterr()
        code = main([str(word) for word in argv])
        out, err = capfd.readouterr()
        return Finished(code, out, err)

    return run


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="session")
def own_pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """A folder of made-up pictures, as users have them: 30 classes of 6."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(30):
        pattern = np.kron(rng.integers(0, 2, (7, 7)), np.ones((4, 4))) * 200
        (folder / "in" / f"class{number:02}").mkdir(parents=True)
        for sample in range(6):
            noisy = (pattern + rng.integers(0, 55, pattern.shape)).astype(np.uint8)
            Image.fromarray(noisy).save(folder / "in" / f"class{number:02}" / f"{sample}.png")
    store = folder / "store.arrow"
    ingest_images(folder / "in", store, 28, None)
    split = ("--data.split.type", "fractions", "--data.split.val", 0.2, "--data.split.test", 0.2)
    return Pictures("own pictures", store, ("omniglot-maml", "--store", store, *SMALL, *split))


@pytest.fixture(scope="session")
def omniglot(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """The real Omniglot, where it is."""
    if not OMNIGLOT.exists():
        pytest.skip(f"the real Omniglot is not at {OMNIGLOT}")
    store = tmp_path_factory.mktemp("omniglot") / "omniglot.arrow"
    ingest_omniglot(OMNIGLOT, store, 28)
    return Pictures("omniglot", store, ("omniglot-maml", "--store", store, *SMALL))


@pytest.fixture(scope="session")
def pictures(request: pytest.FixtureRequest) -> Pictures:
    """What runs are compared on: the real Omniglot where it is, made-up pictures elsewhere."""
    return request.getfixturevalue("omniglot" if OMNIGLOT.exists() else "own_pictures")


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="session")
def undisturbed(
    pictures: Pictures, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Undisturbed]:
    """The run that others are compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Command(folder, environment) as command:
        driver = command.start("train", *pictures.argv, "--run-dir", "run", "--workers", 2, "--json")
        driver.until_version(folder / "run", 2)
        scraped = urllib.request.urlopen(metrics_address(driver), timeout=20).read().decode()
        yield Undisturbed(folder / "run", driver, driver.finish(), scraped)


def metrics_address(driver: Driver) -> str:
    """Where a run says that its metrics are."""
    match = re.search(r"metrics at (http://127\.0\.0\.1:\d+/metrics)", driver.err)
    assert match, driver.err
    return match[1]


@pytest.fixture(scope="session")
def cluster_metrics() -> str:
    """Where Ray's own metrics of the cluster are."""
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(scope="session")
def cluster(environment: dict[str, str], cluster_metrics: str) -> Iterator[str]:
    """The address of a Ray cluster that goes on from test to test."""
    flags = {
        "num-gpus": 0,
        "include-dashboard": "false",
        "metrics-export-port": cluster_metrics.rpartition(":")[2],
    }
    # Without the mode, a token file that some other Ray has left in the home folder would decide.
    with ray_start(environment, flags, RAY_AUTH_MODE="disabled") as (_, _, address):
        yield address


@contextmanager
def ray_start(
    environment: dict[str, str], flags: dict[str, object], **allowed: str
) -> Iterator[tuple[Driver, Command, str]]:
    """A head with these flags that ends with the block, commands in its folder, which end with it, and its address."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's socket paths must be short
    port = free_port()
    usual = {
        "port": port,
        "num-cpus": CLUSTER_CPUS,
        "object-store-memory": 200_000_000,
        "temp-dir": folder,
        "ray-client-server-port": free_port(),
        "min-worker-port": 0,
        "max-worker-port": 0,
    }
    argv = (f"--{name}={value}" for name, value in {**usual, **flags}.items())
    # Ray has fixed ones for these, which another cluster on this machine may have.
    allowed |= {f"{what}_METRIC_PORT": str(free_port()) for what in ("AUTOSCALER", "DASHBOARD")}
    with Command(folder, environment) as command:
        ray = Path(sys.executable).with_name("ray")
        head = command.start("start", "--head", "--block", "--disable-usage-stats", *argv, script=ray, **allowed)
        head.until(lambda: "Ray runtime started" in head.out + head.err, "a cluster")
        yield head, command, f"127.0.0.1:{port}"
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Head:
    """The head of a Ray cluster, with a job server."""

    process: Driver
    command: Command
    """Of commands in its folder, which end with it."""
    address: str
    dashboard: str


@contextmanager
def ray_head(environment: dict[str, str], **allowed: str) -> Iterator[Head]:
    """A head that ends with the block; ``allowed`` says who may talk to it."""
    dashboard = free_port()
    flags = {
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "include-dashboard": "true",
    }
    with ray_start(environment, flags, **allowed) as (head, command, address):
        yield Head(head, command, address, f"http://127.0.0.1:{dashboard}")


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
