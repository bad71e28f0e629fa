"""Disks that fill up, can only be read, or vanish under a run: it ends in one line, and goes on to the same bits.

On a small file system of the test's own, which takes the right to mount one.
"""

from __future__ import annotations

import errno
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.checkpoint import list_checkpoints
from coordinator.run_dir import RunDirectory
from tests.system.driving import Command, Driver, Finished

pytestmark = pytest.mark.ray

MEGABYTES = 16
STEPS = 400
RUN = (
    *("train", "sinusoid-maml", "--steps", STEPS, "--aggregator.shards", 2, "--shard.episodes", 4, "--shard.chunk", 4),
    *("--evaluation.every", 0, "--evaluation.episodes", 20, "--execution.checkpoint_every", 5, "--workers", 1),
)


@pytest.fixture(scope="module")
def digest(cluster: str, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the run on a disk without trouble."""
    with Command(tmp_path_factory.mktemp("whole"), environment) as command:
        return command.run(*RUN, "--address", cluster, "--run-dir", "run", "--json").report["digest"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder))
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount a file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(("umount", "--lazy", str(folder)), check=True)


@pytest.fixture
def started(command: Command, cluster: str) -> Callable[[Path], Driver]:
    """Starts a run that has come to its first checkpoint."""

    def start(run: Path) -> Driver:
        driver, folder = command.start(*RUN, "--address", cluster, "--run-dir", run), RunDirectory(run).checkpoints
        driver.until(lambda: folder.is_dir() and list_checkpoints(folder), "a checkpoint")
        return driver

    return start


def fill(folder: Path) -> Path:
    """A file that leaves no byte free."""
    with open(folder / "fill", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return folder / "fill"


def refusal(finished: Finished) -> str:
    """The one line in which a run that had begun has ended."""
    assert finished.code == 2 and "Traceback" not in finished.err, finished.err
    (line,) = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    return line


def test_a_disk_that_fills_up(
    disk: Path, started: Callable[[Path], Driver], here: Callable[..., Finished], cluster: str, digest: str
) -> None:
    run = disk / "run"
    driver = started(run)
    with driver.held():
        ballast = fill(disk)
    assert "No space left on device" in refusal(driver.finish())
    assert here("inspect", run, "--json").report["checkpoint_problems"] == []
    assert "No space left on device" in refusal(here("train", "--resume", run, "--address", cluster))
    ballast.unlink()
    assert here("train", "--resume", run, "--address", cluster, "--json").report["digest"] == digest


def test_a_run_directory_that_vanishes_and_comes_back(
    started: Callable[[Path], Driver], here: Callable[..., Finished], cluster: str, digest: str, tmp_path: Path
) -> None:
    run = tmp_path / "share" / "run"
    run.parent.mkdir()
    driver = started(run)
    with driver.held():
        run.parent.rename(tmp_path / "away")
    error = refusal(driver.finish())
    assert str(run) in error and "No such file or directory" in error
    assert not run.exists()
    (tmp_path / "away").rename(run.parent)
    assert here("train", "--resume", run, "--address", cluster, "--json").report["digest"] == digest


def test_a_disk_that_can_only_be_read(
    disk: Path, started: Callable[[Path], Driver], here: Callable[..., Finished], cluster: str, digest: str
) -> None:
    run = disk / "run"
    driver = started(run)
    driver.send(signal.SIGTERM)
    driver.finish()
    subprocess.run(("mount", "-o", "remount,ro", disk), check=True)
    assert "Read-only file system" in refusal(here("train", "--resume", run, "--address", cluster))
    report = here("inspect", run, "--json").report
    assert report["checkpoint_problems"] == [] and report["version"] < STEPS
    subprocess.run(("mount", "-o", "remount,rw", disk), check=True)
    assert here("train", "--resume", run, "--address", cluster, "--json").report["digest"] == digest
