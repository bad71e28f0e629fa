"""What surrounds Ray: folders of dead drivers, addresses where nobody listens, the CPUs there are. No Ray starts."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import ray_runtime
from cluster.errors import ClusterError
from cluster.ray_runtime import FOLDER, OWNER


def folder_of(parent: Path, name: str, *, owner: bool = True) -> Path:
    """A cluster's folder as Ray fills it."""
    folder = parent / f"{FOLDER}{name}"
    (folder / "session_1" / "logs").mkdir(parents=True)
    (folder / "session_1" / "logs" / "raylet.out").write_text("…")
    (folder / "session_latest").symlink_to("session_1")
    if owner:
        (folder / OWNER).touch()
    return folder


def test_a_sweep_removes_what_dead_drivers_left_and_nothing_else(tmp_path: Path) -> None:
    dead, alive = folder_of(tmp_path, "dead"), folder_of(tmp_path, "alive")
    not_ours, precious = folder_of(tmp_path, "unknown", owner=False), tmp_path / "precious"
    precious.mkdir()
    with open(alive / OWNER) as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        ray_runtime._sweep(tmp_path)
    assert not dead.exists()
    assert sorted(path.name for path in alive.iterdir()) == [OWNER, "session_1", "session_latest"]
    assert not_ours.exists() and precious.exists()


def test_what_resists_keeps_its_owner_so_that_a_later_sweep_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, "dead")
    with monkeypatch.context() as patch:
        patch.setattr(ray_runtime.shutil, "rmtree", lambda *_, **__: None)
        ray_runtime._sweep(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [OWNER, "session_1"]
    ray_runtime._sweep(tmp_path)
    assert not folder.exists()


def test_the_folder_is_private_short_and_locked() -> None:
    with ray_runtime._temporary_folder() as folder:
        assert folder.stat().st_mode & 0o077 == 0
        # A socket's path has 107 characters, of which Ray takes some 75 below this folder.
        assert len(str(folder)) < 32
        with open(folder / OWNER) as second, pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not folder.exists()


@pytest.fixture
def port() -> Iterator[int]:
    """Where someone listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_an_address_where_nobody_listens_is_refused(port: int) -> None:
    assert ray_runtime._refuse_absent(f"127.0.0.1:{port}", "127.0.0.1") == f"127.0.0.1:{port}"
    # A head on this machine may listen at the node's address only.
    assert ray_runtime._refuse_absent(f"localhost:{port}", "127.0.0.1") in (f"127.0.0.1:{port}", f"localhost:{port}")
    with pytest.raises(
        ClusterError, match=r"no Ray cluster at '127.0.0.1:1' \(.*refused.*\): start one with `ray start"
    ):
        ray_runtime._refuse_absent("127.0.0.1:1", "127.0.0.1")
    with pytest.raises(ClusterError, match="no Ray cluster at 'no such host:6379'"):
        ray_runtime._refuse_absent("no such host:6379", "127.0.0.1")


def test_another_runs_cluster_is_told_by_its_folder() -> None:
    ray_runtime._refuse_private([{"RayletSocketName": "/tmp/ray/session_1/sockets/raylet"}])
    with pytest.raises(ClusterError, match="another run's own"):
        ray_runtime._refuse_private([{"RayletSocketName": f"/tmp/{FOLDER}x/session_1/sockets/raylet"}])


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_a_containers_quota_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cpus: int | None
) -> None:
    monkeypatch.setattr(ray_runtime, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert ray_runtime.usable_cpus() == (cpus or 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert ray_runtime.usable_cpus() == 1


def test_sigterm_unwinds_the_block_and_is_what_it_was_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, ray_runtime._sigterm() as after_init:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ray.init replaces it
        after_init()
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_callers_own_handler_of_sigterm_stays() -> None:
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with ray_runtime._sigterm() as after_init:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            after_init()
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
