"""`ray job submit` on a real cluster: a stopped job checkpoints, and submitted again it goes on to the same bits."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coordinator import checkpoint as checkpoints
from coordinator.run_dir import RunDirectory
from tests.system.conftest import ray_head
from tests.system.driving import SCRIPT, Command, entries_of, family, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

STEPS = 400
SINUSOID = (
    *("train", "sinusoid-maml", "--json", "--steps", STEPS, "--aggregator.shards", 4, "--learner.inner_lr", 0.001),
    *("--shard.episodes", 40, "--shard.chunk", 40, "--evaluation.every", 0, "--evaluation.episodes", 20),
    *("--execution.cpus_per_worker", 0.5, "--execution.metrics", "false"),
)


@dataclass
class JobServer:
    """A head with Ray's job server."""

    client: Any
    session: int
    """Of its processes."""

    def submit(self, *argv: object) -> str:
        """A job that runs the command as a user would submit it."""
        entrypoint = " ".join([str(SCRIPT), *map(str, argv)])
        grace = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
        return str(self.client.submit_job(entrypoint=entrypoint, runtime_env={"env_vars": grace}))

    def state(self, job: str) -> str:
        return str(self.client.get_job_status(job).value)

    def end(self, job: str, *states: str) -> str:
        """Waits until a job has ended, in one of these states; returns what it wrote."""
        wait_for(lambda: self.state(job) in ("SUCCEEDED", "FAILED", "STOPPED"), f"the end of {job}", 180)
        logs = str(self.client.get_job_logs(job))
        assert self.state(job) in states, logs
        return logs

    def workers(self) -> list[int]:
        """Worker processes on it."""
        return [pid for pid, name in family(self.session).items() if name.startswith("ray::RayWorker")]

    def drivers(self, run: Path) -> list[int]:
        """Processes of the job that trains a run: they have a session of their own."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    if str(SCRIPT).encode() in words and str(run).encode() in words:
                        found.append(int(folder.name))
        return found


@pytest.fixture(scope="module")
def jobs(environment: dict[str, str]) -> Iterator[JobServer]:
    from ray.job_submission import JobSubmissionClient

    with pytest.MonkeyPatch.context() as patch, ray_head(environment, RAY_AUTH_MODE="disabled") as head:
        patch.setenv("RAY_AUTH_MODE", "disabled")

        def client() -> Any:
            try:
                return JobSubmissionClient(head.dashboard)
            except (ConnectionError, RuntimeError):
                return None

        yield JobServer(head.process.until(client, "a job server"), head.process.pid)


@pytest.fixture(scope="module")
def digest(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the undisturbed run."""
    with Command(tmp_path_factory.mktemp("undisturbed"), environment) as command:
        return str(command.run(*SINUSOID, "--run-dir", "run", "--workers", 1).report["digest"])


def test_a_stopped_job_checkpoints_and_goes_on_when_it_is_submitted_again(
    jobs: JobServer, digest: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = (*SINUSOID, "--run-dir", run, "--resume", "auto", "--address", "auto", "--workers", 2)
    job = jobs.submit(*argv)
    wait_for(lambda: len(entries_of(run)) > 20, "some versions")
    jobs.client.stop_job(job)
    logs = jobs.end(job, "STOPPED")
    assert f"stopped at version {len(entries_of(run))} of {STEPS}, checkpoint written" in logs
    saved = checkpoints.list_checkpoints(run / "checkpoints")[-1]
    assert checkpoints.version_of(saved)[0] == len(entries_of(run)) < STEPS
    wait_for(lambda: not jobs.workers(), "the end of the stopped job's workers")
    logs = jobs.end(jobs.submit(*argv), "SUCCEEDED")
    assert digest in logs and RunDirectory(run).epochs() == [1, 2]
    assert len(entries_of(run)) == STEPS


def test_a_job_whose_driver_dies_leaves_no_workers(jobs: JobServer, digest: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = (*SINUSOID, "--run-dir", run, "--resume", "auto", "--address", "auto", "--workers", 2)
    job = jobs.submit(*argv)
    wait_for(lambda: len(entries_of(run)) > 20 and len(jobs.workers()) == 2, "two workers")
    (driver,) = jobs.drivers(run)
    os.kill(driver, signal.SIGKILL)
    jobs.end(job, "FAILED")
    wait_for(lambda: not jobs.workers(), "the end of the dead job's workers")
    assert digest in jobs.end(jobs.submit(*argv), "SUCCEEDED")


def test_resume_auto_refuses_another_configuration_and_no_directory(command: Command) -> None:
    argv = ("train", "sinusoid-maml", "--steps", 4, "--evaluation.every", 0, "--evaluation.episodes", 20)
    assert "give --run-dir DIR" in command.run(*argv, "--resume", "auto").error
    assert command.run(*argv, "--run-dir", "run", "--resume", "auto", "--workers", 1).code == 0
    error = command.run(*argv, "--run-dir", "run", "--resume", "auto", "--seed", 5).error
    assert "a resumed run cannot change what decides its result: seed 0 -> 5" in error
