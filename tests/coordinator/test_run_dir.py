"""The run directory: who may make it, who may write to it, and what it says the run is."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import msgpack
import pytest

from cluster.config.loading import load_resolved
from cluster.errors import RunDirectoryError
from coordinator.run_dir import FORMAT, LARGEST_HEADER, RunDirectory, RunIdentity
from tests.coordinator.harness import IDENTITY, TINY, new_run

ROOT = Path(__file__).parents[2]
OWNER = """
import sys, time
from pathlib import Path
from coordinator.run_dir import RunDirectory
from tests.coordinator.harness import new_run

run = new_run(Path(sys.argv[1])) if sys.argv[2] == "create" else RunDirectory(Path(sys.argv[1]))
if sys.argv[2] == "acquire":
    run.acquire()
print("mine", flush=True)
time.sleep(60)
"""


@contextmanager
def owner(path: Path, how: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the run until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(path), how], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "mine\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# ------------------------------------------------------------------------------------------------------- making, owning


def test_a_new_run_has_its_folders_and_its_owner(tmp_path: Path) -> None:
    run = new_run(tmp_path / "deep" / "er" / "run")
    assert sorted(os.listdir(run.path)) == ["checkpoints", "config.toml", "epochs", "lock", "log", "run.msgpack"]
    assert (run.log(3), run.checkpoints) == (run.path / "log" / "0003.msgpack", run.path / "checkpoints")
    assert (run.config.name, run.history.name) == ("config.toml", "history.msgpack")
    with pytest.raises(RunDirectoryError, match="is in use by a living run"):
        RunDirectory(run.path).acquire()
    run.release()
    run.release()
    RunDirectory(run.path).acquire()


def test_nobody_else_may_look_into_a_run(tmp_path: Path) -> None:
    assert stat.S_IMODE(new_run(tmp_path / "run").path.stat().st_mode) == 0o700


def test_a_directory_that_exists_is_refused_and_left_alone(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "file"):
        if path != tmp_path:
            path.write_text("mine")
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(RunDirectoryError, match=rf"{path} exists already: choose another .*--resume {path}"):
            new_run(path)
        assert sorted(os.listdir(tmp_path)) == before


def test_a_directory_that_cannot_be_made_is_an_error_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        RunDirectoryError, match=r"cannot make run directory .*: File exists \(.*/file\); choose another"
    ):
        new_run(tmp_path / "file" / "run")
    real = os.mkdir

    def full(path: object, *args: object) -> None:
        if str(path).endswith("log"):
            raise OSError(28, "No space left on device")
        real(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(RunDirectoryError, match=r"cannot make run directory .*No space left on device"):
        new_run(tmp_path / "run")
    assert os.listdir(tmp_path) == ["file"]


def test_a_driver_that_ends_while_it_makes_a_run_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(run: RunDirectory, identity: RunIdentity) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(RunDirectory, "_write_identity", stopped)
    with pytest.raises(SystemExit):
        new_run(tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_a_run_of_a_living_process_is_refused_and_a_killed_one_s_is_free(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with owner(path, "create") as process:
        for _ in range(2):
            with pytest.raises(RunDirectoryError, match=f"{path} is in use by a living run: wait for it, or stop it"):
                RunDirectory(path).acquire()
        process.send_signal(signal.SIGKILL)
        process.wait()
        run = RunDirectory(path)
        run.acquire()
    run.release()
    with owner(path, "acquire"), pytest.raises(RunDirectoryError, match="is in use"):
        run.acquire()


def test_a_refused_owner_keeps_no_file_open(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    before = len(os.listdir("/proc/self/fd"))
    other = RunDirectory(run.path)
    for _ in range(5):
        with pytest.raises(RunDirectoryError):
            other.acquire()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_run_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"cannot write to run directory .*No such file"):
        RunDirectory(tmp_path / "gone").acquire()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(RunDirectoryError, match=r"is no run directory: it has no run.msgpack; give the folder"):
            RunDirectory.open(path)
    run = new_run(tmp_path / "run")
    assert RunDirectory.open(run.path).path == run.path


# --------------------------------------------------------------------------------------------------------------- epochs


def test_epochs_count_up_and_only_the_last_one_may_write(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    assert run.epochs() == []
    assert [run.claim_epoch() for _ in range(3)] == [1, 2, 3]
    (run.path / "epochs" / "notes").touch()
    (run.path / "epochs" / "²").touch()
    assert run.epochs() == [1, 2, 3]
    run.check_epoch(3)
    for stale in (1, 2):
        with pytest.raises(RunDirectoryError, match=rf"driver \(epoch 3\) has taken over .*this one \(epoch {stale}\)"):
            run.check_epoch(stale)
    (run.path / "epochs" / "10000").touch()
    assert run.claim_epoch() == 10_001


def test_of_two_drivers_that_claim_at_once_one_gets_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path / "run")
    run.claim_epoch()
    monkeypatch.setattr(RunDirectory, "epochs", lambda self: [])
    with pytest.raises(RunDirectoryError, match="another driver has just claimed epoch 1"):
        run.claim_epoch()


def test_a_directory_that_is_gone_stops_its_writer(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    epoch = run.claim_epoch()
    run.path.rename(tmp_path / "away")
    for call in (lambda: run.check_epoch(epoch), run.claim_epoch, run.epochs):
        with pytest.raises(RunDirectoryError, match="has lost its epochs: No such file"):
            call()


# ------------------------------------------------------------------------------------------------------------- identity


def test_the_identity_comes_back(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    assert run.identity() == IDENTITY
    assert load_resolved(run.config) == TINY


def test_every_part_of_the_identity_is_kept(tmp_path: Path) -> None:
    for number, field in enumerate(fields(RunIdentity)):
        other = replace(IDENTITY, **{field.name: {"cpu": "other"} if field.name == "fingerprint_detail" else "other"})
        run = RunDirectory.create(tmp_path / str(number), other, TINY)
        assert run.identity() == other != IDENTITY


def test_any_damage_to_the_identity_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    path = run.path / "run.msgpack"
    data = path.read_bytes()
    damaged = [data[:at] for at in range(len(data))]
    damaged += [data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :] for at in range(len(data))]
    damaged += [data + b"\0", msgpack.packb(3), msgpack.packb({"a": 1}), msgpack.packb([*FORMAT, "text", b""])]
    for wrong in damaged:
        path.write_bytes(wrong)
        with pytest.raises(RunDirectoryError, match=r"run.msgpack is damaged \(.*\): restore it from a backup"):
            run.identity()
    path.write_bytes(msgpack.packb([FORMAT[0], 2, b"", b""]))
    with pytest.raises(RunDirectoryError, match="it is 'metafleet-run' 2, expected 'metafleet-run' 1"):
        run.identity()
    os.truncate(path, LARGEST_HEADER + 1)
    with pytest.raises(RunDirectoryError, match="it is too large"):
        run.identity()
