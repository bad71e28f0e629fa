"""Nodes that lack the store: it is sent to them, once each."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from cluster.config.loading import with_execution
from cluster.config.run import RunConfig
from cluster.episodes import shipping
from cluster.episodes.store import read_header
from cluster.messages import WorkerHello
from metaworker.actor import WorkerActor
from tests.system.conftest import Pictures, free_port
from tests.system.driving import Command, Finished

pytestmark = pytest.mark.ray

ELSEWHERE = "/no/such/folder/store.arrow"
"""What workers look for that are to think that their node lacks the store."""

RAY = Path(sys.executable).with_name("ray")

CHUNK = 16_384
"""Bytes that are sent at a time, so that the store takes several."""

SHORT = ("--steps", 4, "--evaluation.every", 0, "--evaluation.episodes", 20, "--workers", 3)


class Strangers:
    """Actors for whom the driver's path does not exist."""

    @staticmethod
    def plain() -> type[WorkerActor]:
        class Actor(WorkerActor):
            def __init__(self, config: RunConfig, slot: int) -> None:
                super().__init__(with_execution(config, store=ELSEWHERE), slot)

        return Actor

    @staticmethod
    def killed_by(marker: Path) -> type[WorkerActor]:
        """The first one that is sent more than two chunks dies of them, once."""

        class Actor(WorkerActor):
            def __init__(self, config: RunConfig, slot: int) -> None:
                super().__init__(with_execution(config, store=ELSEWHERE), slot)

            def take(self, chunk: bytes) -> int | None:
                import os

                wanted = super().take(chunk)
                if wanted is not None and wanted > 2 * CHUNK and not marker.exists():
                    marker.touch()
                    os._exit(1)
                return wanted

        return Actor


@dataclass(frozen=True)
class TwoNodes:
    """A cluster of a head without CPUs and of one node for the workers, which has a cache of its own."""

    address: str
    cache: Path
    """Of the workers' node."""


@pytest.fixture
def two_nodes(lasting_two_nodes: TwoNodes) -> Iterator[TwoNodes]:
    """With an empty cache."""
    yield lasting_two_nodes
    if lasting_two_nodes.cache.is_dir():
        shutil.rmtree(lasting_two_nodes.cache)
    else:
        lasting_two_nodes.cache.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def lasting_two_nodes(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's socket paths must be short
    port = free_port()
    common = (
        *("--block", "--disable-usage-stats", "--num-gpus=0", "--object-store-memory=100000000"),
        *("--min-worker-port=0", "--max-worker-port=0"),
    )
    head = (f"--port={port}", "--head", "--num-cpus=0", f"--temp-dir={folder}", "--include-dashboard=false")
    with Command(folder, environment) as command:
        ports = f"--ray-client-server-port={free_port()}"
        first = command.start("start", *head, ports, *common, script=RAY, RAY_AUTH_MODE="disabled")
        first.until(lambda: "Ray runtime started" in first.out + first.err, "a head")
        node = ("start", f"--address=127.0.0.1:{port}", "--num-cpus=3", *common)
        cache = tmp_path_factory.mktemp("node") / "cache"
        second = command.start(*node, script=RAY, RAY_AUTH_MODE="disabled", METAFLEET_CACHE=str(cache))
        second.until(lambda: "Ray runtime started" in second.out + second.err, "a second node")
        yield TwoNodes(f"127.0.0.1:{port}", cache)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def with_actor(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[WorkerActor]], list[int]]:
    """Makes runs in this process use another worker actor; gives the offsets of what the driver reads to send."""

    def use(actor: type[WorkerActor]) -> list[int]:
        from coordinator import ray_pool

        offsets: list[int] = []

        def read(path: Path, offset: int) -> bytes:
            offsets.append(offset)
            return shipping.read_chunk(path, offset)

        monkeypatch.setattr(shipping, "CHUNK_BYTES", CHUNK)
        monkeypatch.setattr(ray_pool, "read_chunk", read)
        monkeypatch.setattr(ray_pool, "RayPool", partial(ray_pool.RayPool, actor=actor))
        return offsets

    return use


def test_a_node_without_the_store_is_sent_it_once(
    with_actor: Callable[[type[WorkerActor]], list[int]],
    here: Callable[..., Finished],
    own_pictures: Pictures,
    two_nodes: TwoNodes,
) -> None:
    plain = here(*("train", *own_pictures.argv, *SHORT), "--run-dir", "plain", "--json").report
    argv = ("train", *own_pictures.argv, *SHORT, "--address", two_nodes.address)
    offsets = with_actor(Strangers.plain())
    sent = here(*argv, "--run-dir", "sent", "--json").report
    assert (sent["digest"], sent["failures"]) == (plain["digest"], plain["failures"])

    size, stores = own_pictures.store.stat().st_size, two_nodes.cache / "stores"
    assert offsets == list(range(0, size, CHUNK)) and len(offsets) > 3
    name = f"{read_header(own_pictures.store).digest}.arrow"
    assert {path.name for path in stores.iterdir()} == {name, f"{name}.header", name.replace("arrow", "lock")}
    assert (stores / name).read_bytes() == own_pictures.store.read_bytes()

    before = (stores / name).stat()
    again = here(*argv, "--run-dir", "again", "--json").report
    assert again["digest"] == plain["digest"]
    assert (stores / name).stat() == before and len(offsets) == -(-size // CHUNK)


def test_a_worker_that_dies_while_it_is_sent_the_store_is_succeeded(
    with_actor: Callable[[type[WorkerActor]], list[int]],
    here: Callable[..., Finished],
    own_pictures: Pictures,
    two_nodes: TwoNodes,
    tmp_path: Path,
) -> None:
    offsets = with_actor(Strangers.killed_by(tmp_path / "killed"))
    argv = ("train", *own_pictures.argv, *SHORT, "--address", two_nodes.address)
    finished = here(*argv, "--run-dir", "run", "--json")
    assert finished.report["version"] == 4 and (tmp_path / "killed").exists()
    assert offsets.count(0) == 2 and offsets[3:5] == [0, CHUNK], offsets
    assert not list(two_nodes.cache.glob("stores/*.partial"))


def test_a_node_that_cannot_keep_the_store_ends_the_run_in_one_line(
    with_actor: Callable[[type[WorkerActor]], list[int]],
    here: Callable[..., Finished],
    own_pictures: Pictures,
    two_nodes: TwoNodes,
) -> None:
    two_nodes.cache.write_text("a file where a folder must be")
    with_actor(Strangers.plain())
    argv = ("train", *own_pictures.argv, *SHORT, "--address", two_nodes.address)
    finished = here(*argv, "--run-dir", "run", "--json")
    assert (finished.code, finished.out) == (2, "") and "Traceback" not in finished.err
    last = finished.err.splitlines()[-1]
    assert last.startswith(f"error: {two_nodes.cache}/stores: the store of ") and "METAFLEET_CACHE" in last, last


def test_a_store_that_the_driver_has_lost_too_ends_the_run_in_one_line(
    with_actor: Callable[[type[WorkerActor]], list[int]],
    here: Callable[..., Finished],
    own_pictures: Pictures,
    two_nodes: TwoNodes,
    tmp_path: Path,
) -> None:
    store = tmp_path / "lost.arrow"
    shutil.copy(own_pictures.store, store)
    shutil.copy(f"{own_pictures.store}.header", f"{store}.header")

    class Actor(WorkerActor):
        def hello(self) -> WorkerHello:
            store.unlink(missing_ok=True)  # the driver has opened it by then
            return super().hello()

    offsets = with_actor(Actor)
    argv = ("train", *own_pictures.argv, "--store", store, *SHORT, "--address", two_nodes.address)
    finished = here(*argv, "--run-dir", "run", "--json")
    last = finished.err.splitlines()[-1]
    assert finished.code == 2 and last.startswith(f"error: {store}: no such episode store") and "(worker " in last, last
    assert offsets == []
