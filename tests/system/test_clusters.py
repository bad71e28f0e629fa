"""Clusters that others have started, and workers that cannot start."""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from cluster.config.run import RunConfig
from cluster.errors import StoreError
from cluster.messages import WorkerHello
from cluster.ray_runtime import ray_cluster
from metaworker.actor import WorkerActor
from tests.system.conftest import metrics_address
from tests.system.driving import Command, Finished, listening
from tests.system.leaks import leaks, token_of

pytestmark = pytest.mark.ray

SHORT = ("train", "sinusoid-maml", "--steps", 3, "--evaluation.every", 0, "--evaluation.episodes", 20)
"""A run of three versions."""

Kind = type[WorkerActor]


def raises_in_hello() -> Kind:
    class Actor(WorkerActor):
        def hello(self) -> WorkerHello:
            raise StoreError("the store is not the one it was")

    return Actor


def raises_when_made() -> Kind:
    class Actor(WorkerActor):
        def __init__(self, config: RunConfig, slot: int) -> None:
            raise ZeroDivisionError("a defect")

    return Actor


def reads_other_data(slot: int) -> Kind:
    class Actor(WorkerActor):
        def hello(self) -> WorkerHello:
            said = super().hello()
            return replace(said, store_digest="0" * 64) if self._slot == slot else said

    return Actor


@pytest.fixture
def with_actor(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kind], None]:
    """Makes runs in this process use another worker actor."""

    def use(actor: Kind) -> None:
        from coordinator import ray_pool

        monkeypatch.setattr(ray_pool, "RayPool", partial(ray_pool.RayPool, actor=actor))

    return use


@pytest.mark.parametrize(
    ("actor", "why"),
    [
        pytest.param(raises_in_hello(), "the store is not the one it was", id="refuses"),
        pytest.param(raises_when_made(), "workers fail to start: ZeroDivisionError: a defect", id="cannot be made"),
        pytest.param(
            reads_other_data(0), "worker 0 on .* has another store .*: give every node the same file", id="other data"
        ),
    ],
)
def test_a_worker_that_cannot_take_part_ends_the_run_in_one_line(
    actor: Kind,
    why: str,
    with_actor: Callable[[Kind], None],
    here: Callable[..., Finished],
    cluster: str,
    tmp_path: Path,
) -> None:
    with_actor(actor)
    finished = here(*SHORT, "--workers", 1, "--address", cluster, "--run-dir", "run", "--json")
    assert (finished.code, finished.out) == (2, "")
    lines = finished.err.splitlines()
    assert re.search(f"^error: {why}$", lines[-1]), finished.err
    assert sum(line.startswith("error: ") for line in lines) == 1 and "Traceback" not in finished.err
    assert not (tmp_path / "run").exists()


def test_a_later_worker_with_other_data_ends_the_run(
    with_actor: Callable[[Kind], None], here: Callable[..., Finished], cluster: str
) -> None:
    with_actor(reads_other_data(1))
    argv = ("--steps", 2000, "--workers", 2, "--execution.cpus_per_worker", 0.5, "--address", cluster)
    finished = here(*SHORT, *argv, "--run-dir", "run", "--json")
    assert finished.code == 2 and "error: worker 1 on " in finished.err.splitlines()[-1]


def test_more_than_the_joined_cluster_has(here: Callable[..., Finished], cluster: str, tmp_path: Path) -> None:
    argv = ("--execution.cpus_per_worker", 5, "--address", cluster, "--run-dir", "run")
    error = here(*SHORT, *argv).error
    assert "not enough for one worker: it needs 5 CPUs and 0 GPUs, free are 4 CPUs and 0 GPUs" in error
    assert not (tmp_path / "run").exists()


def test_one_process_may_train_locally_and_on_a_cluster_whenever_it_imported_ray(cluster: str) -> None:
    import ray

    before = {name for name in os.environ if name.startswith("RAY_")}
    for address in ("local", cluster, "local"):
        with ray_cluster(address, None if address == cluster else 1) as resources:
            assert resources.total()["CPU"] == (4 if address == cluster else 1)
            mode = ray.remote(lambda: os.environ.get("RAY_AUTH_MODE")).options(num_cpus=0.5)
            assert ray.get(mode.remote()) == ("disabled" if address == cluster else "token")
        assert {name for name in os.environ if name.startswith("RAY_")} == before


def test_no_cluster_where_the_environment_says(command: Command) -> None:
    error = command.run(*SHORT, "--address", "auto", "--run-dir", "run", RAY_ADDRESS="127.0.0.1:1").error
    assert "no Ray cluster at '127.0.0.1:1'" in error and "start one with `ray start --head`" in error
    assert not (command.folder / "run").exists()


def test_another_runs_own_cluster_is_closed_to_others_and_keeps_its_token(command: Command) -> None:
    home = command.folder / "home"
    home.mkdir()
    argv = ("train", "sinusoid-maml", "--run-dir", "other", "--workers", 1, "--evaluation.every", 0)
    other = command.start(*argv, HOME=str(home))
    other.until_version(command.folder / "other", 1)
    assert not (home / ".ray").exists()  # where Ray would write a token
    token = token_of(other.family())
    assert leaks(token, command.folder, other.ray_folder()) == []  # its output and the run directory are in the first
    assert token not in urllib.request.urlopen(metrics_address(other), timeout=20).read().decode()
    port = next(filter(None, (re.search(r"--gcs-address=\S+?:(\d+)", name) for name in other.family().values())))[1]
    error = command.run(*SHORT, "--address", f"127.0.0.1:{port}", "--run-dir", "run").error
    assert "another run's own cannot be joined" in error
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    assert listening(other.family()) == loopback  # all that it started, and its metrics
    assert other.alive and not (command.folder / "run").exists()
