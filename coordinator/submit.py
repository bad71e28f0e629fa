"""``metafleet submit``: a recipe as a job of a Ray cluster, followed to its end.

What is sent is one zip file: the resolved configuration, so that what was checked here is what runs there, and with
``--working-dir`` a folder. The job is ``metafleet train`` with ``--resume auto``: submitted again, it goes on.

JobRequest, JobState   what goes to the job server, and what comes back
JobServer              the server itself; ``ray_jobs`` has Ray's
"""

from __future__ import annotations

import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

from cluster.config.loading import save_resolved, with_execution
from cluster.config.run import RunConfig
from cluster.errors import ClusterError, ConfigError
from coordinator.submit_package import MIB, Survey, mib, refuse_too_large, survey, write_package

JOB_FILE = "metafleet-job.toml"
"""The resolved configuration in the package, which is the job's working directory."""

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Ray's variable for the seconds between a job's SIGTERM and its SIGKILL."""

STOPPED_CODE = 143
"""Exit code for a stopped job, as of `train` after SIGTERM."""
DETACHED_CODE = 130
"""Exit code after Ctrl-C, which leaves the job running."""

ANSWERS = 10
"""Answers in a row that the job server may owe before it counts as lost."""
PAUSE = 3.0
"""Seconds before it is asked again."""
TAILS = 2
"""Attempts in a row at the rest of an ended job's log that may fail before the job's end is told without it."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class SubmitOptions:
    """What ``metafleet submit`` was asked for besides the configuration."""

    address: str
    """http://HOST:PORT of the cluster's job server."""
    working_dir: Path | None = None
    exclude: tuple[str, ...] = ()
    """Patterns as .gitignore has them."""
    max_size: int = 100
    """Most that is shipped, MiB."""
    submission_id: str | None = None
    grace: int = 60
    """Seconds that a stopped job has for its checkpoint."""
    python: str = "python"
    """Python on the cluster's head."""
    on_interrupt: Literal["detach", "stop"] = "detach"
    wait: bool = True


@dataclass(frozen=True)
class JobRequest:
    """A job as it is sent."""

    submission_id: str
    entrypoint: str
    """A shell's line."""
    environment: Mapping[str, str]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class JobState:
    """What has become of a job."""

    name: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    driver_code: int | None = None
    """Exit code of the job's own process, negative for a signal; ``None`` if Ray does not say."""
    message: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will become of it."""
        return self.name in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def exit_code(self) -> int:
        """0 while all is well, and else what the job itself ended with, as a shell has it."""
        if self.name == "STOPPED":
            return STOPPED_CODE
        if self.name != "FAILED":
            return 0
        code = self.driver_code or 1
        return 128 - code if code < 0 else code


class JobServer(Protocol):
    """Where jobs are submitted; every method raises ClusterError for no answer or a refusal."""

    def submit(self, request: JobRequest, package: Path) -> None:
        """Send the package and start the job."""

    def state(self, job: str) -> JobState:
        """What has become of a job."""

    def stop(self, job: str) -> None:
        """Ask a job to end."""

    def tail(self, job: str, show: Callable[[str], None]) -> bool:
        """Show a job's log from its beginning as it is written, until the server ends it or nothing comes for long.

        Returns:
            Whether the server ended it, as it does some time after the job's end.

        Raises:
            ClusterError: the connection is lost.
        """


def submit_command(config: RunConfig, options: SubmitOptions) -> dict[str, Any]:
    """Submit a checked configuration to the server at ``options.address``, and follow the job unless told otherwise.

    Raises:
        ConfigError: impossible options, or too much to ship.
        ClusterError: no job server there, or one that refuses.
    """
    request = job_request(config, options)
    found = _surveyed(options)

    from coordinator.ray_jobs import RayJobServer

    server = RayJobServer(options.address)
    with tempfile.TemporaryDirectory(prefix="metafleet-submit-") as folder:
        package = Path(folder) / "package.zip"
        write_package(package, found, {JOB_FILE: _job_file(config, Path(folder))})
        try:
            server.submit(request, package)
        except KeyboardInterrupt:
            status = _ray_job("status", options.address, request.submission_id)
            _say(f"interrupted while the job was submitted; whether it was: {status}")
            raise
    _say(f"job {request.submission_id} submitted to {options.address}")
    _say_how(options.address, request.submission_id)
    state, code = attend(server, request.submission_id, options) if options.wait else (None, 0)
    if state is None:
        with suppress(ClusterError):  # the job is there, whatever becomes of this connection
            state = server.state(request.submission_id)
    return {
        "submission_id": request.submission_id,
        "address": options.address,
        "state": state.name if state else None,
        "exit_code": code,
        "run_dir": config.execution.run_dir,
        "entrypoint": request.entrypoint,
        "metadata": dict(request.metadata),
        "shipped": {"files": len(found.sizes) if found else 0, "bytes": found.size if found else 0},
    }


def job_request(config: RunConfig, options: SubmitOptions) -> JobRequest:
    """The job of a configuration, whose run directory is given.

    Raises:
        ConfigError: an impossible ``submission_id``.
    """
    job = options.submission_id
    if job is None:
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", config.name).strip("-._") or "run"
        job = f"{slug[:60]}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    elif not _ID.fullmatch(job):
        raise ConfigError(f"--submission-id '{job}': give letters, digits, '.', '_' and '-', 100 at most")
    python = "{}.{}".format(*sys.version_info[:2])
    train = ["train", JOB_FILE, "--resume", "auto"]
    return JobRequest(
        job,
        # `exec`: the signals of a stop reach Python itself, and its exit code comes back.
        "exec " + shlex.join([options.python, "-m", "coordinator.job", python, *train]),
        {STOP_WAIT: str(options.grace)},
        {
            "recipe": config.name,
            "learner": config.learner.type,
            "run_dir": str(config.execution.run_dir),
            "metafleet_version": version("metafleet"),
        },
    )


# -------------------------------------------------------------------------------------------------------------- follow


@dataclass
class _Log:
    """Shows a log that may come again from its beginning, each character once, and says when it breaks off."""

    shown: int = 0
    position: int = 0
    tail: str = ""
    """The last of it."""
    broken: bool = False

    def rewind(self) -> None:
        self.position = 0

    def breaks(self, why: str) -> None:
        if not self.broken:
            _say(f"the log cannot be followed for now ({why}): trying again")
        self.broken = True

    def add(self, text: str) -> None:
        if self.broken:
            _say("the log is followed again")
        self.broken = False
        new = text[max(0, self.shown - self.position) :]
        self.position += len(text)
        self.shown = max(self.shown, self.position)
        self.tail = (self.tail + new)[-2000:]
        sys.stdout.write(new)
        sys.stdout.flush()


def attend(
    server: JobServer, job: str, options: SubmitOptions, pause: Callable[[float], None] = time.sleep
) -> tuple[JobState | None, int]:
    """Follow a job to its end and say how it ended; returns its last state, if known, and the exit code.

    Ctrl-C leaves the job running, or stops it with ``on_interrupt`` stop and goes on following; a second one leaves it.

    Raises:
        ClusterError: the job server is lost.
    """
    log = _Log()
    try:
        try:
            state = _follow(server, job, log, pause)
        except KeyboardInterrupt:
            if options.on_interrupt != "stop":
                raise
            _say(f"stopping job {job}: it has {options.grace} s for its checkpoint; Ctrl-C leaves it to that")
            server.stop(job)
            state = _follow(server, job, log, pause)
    except KeyboardInterrupt:
        _say(f"detached from job {job}, which goes on")
        _say_how(options.address, job)
        return None, DETACHED_CODE
    except ClusterError as error:
        follow = _ray_job("logs --follow", options.address, job)
        raise ClusterError(f"lost job {job}, which may go on: {error}; to follow it again: {follow}") from error
    _say(_ending(job, state, log.tail, options))
    return state, state.exit_code


def _follow(server: JobServer, job: str, log: _Log, pause: Callable[[float], None]) -> JobState:
    """The state in which the job ended, after all of its log unless that cannot be had."""
    lost = 0
    while True:
        log.rewind()
        try:
            whole = server.tail(job, log.add)
            lost = 0
        except ClusterError as error:
            log.breaks(str(error))
            whole, lost = False, lost + 1
        state = _patiently(server, job, log, pause)
        if state.ended and (whole or lost > TAILS):
            return state
        if whole:
            log.breaks("the server has closed it")
        pause(PAUSE)


def _patiently(server: JobServer, job: str, log: _Log, pause: Callable[[float], None]) -> JobState:
    for _ in range(ANSWERS - 1):
        try:
            return server.state(job)
        except ClusterError as error:
            log.breaks(str(error))
            pause(PAUSE)
    return server.state(job)


def _ending(job: str, state: JobState, log: str, options: SubmitOptions) -> str:
    """One line on how the job ended, and what to do."""
    if state.name == "SUCCEEDED":
        return f"job {job} SUCCEEDED"
    another = ", with another --submission-id," if options.submission_id else ""
    again = f"the same line submitted again{another} goes on with its run"
    if state.name == "STOPPED":
        return f"job {job} STOPPED; {again}"
    if state.driver_code is None:
        return f"job {job} FAILED: {' '.join(state.message.split())[:500]}; when that is mended, {again}"
    reason = f"job {job} FAILED with exit code {state.exit_code}"
    if state.driver_code == 127:
        return f"{reason}: the cluster's head has no `{options.python}`: name its Python by --python"
    if "No module named 'coordinator'" in log:
        return (
            f"{reason}: its `{options.python}` has no Metafleet: install it on every node, name another Python by "
            "--python, or ship the source tree by --working-dir"
        )
    return f"{reason}; when that is mended, {again}"


# ------------------------------------------------------------------------------------------------------------- helpers


def _surveyed(options: SubmitOptions) -> Survey | None:
    """What would be shipped, after saying so. ConfigError: too much."""
    if options.working_dir is None:
        if options.exclude:
            raise ConfigError("--exclude leaves out of what --working-dir ships: give --working-dir DIR as well")
        return None
    found = survey(options.working_dir, options.exclude)
    refuse_too_large(found, options.max_size * MIB)
    _say(f"shipping {len(found.sizes)} files of {options.working_dir}, {mib(found.size)}")
    for what, paths in (
        ("TOML files that .gitignore or .rayignore leaves out", found.ignored_recipes),
        ("what looks like a secret, by its name", found.secrets),
        ("links to folders, to nothing, or out of the folder, which are not followed", found.links),
    ):
        if paths:
            named = ", ".join(map(str, paths[:5])) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
            _say(f"not shipped: {what}: {named}")
    return found


def _job_file(config: RunConfig, folder: Path) -> str:
    """The configuration as the job reads it: it joins the cluster that it runs on."""
    path = folder / JOB_FILE
    save_resolved(with_execution(config, address="auto"), path)
    return path.read_text("utf-8")


def _say_how(address: str, job: str) -> None:
    """How to follow and to stop a job."""
    _say(f"  follow: {_ray_job('logs --follow', address, job)}")
    _say(f"  stop:   {_ray_job('stop', address, job)}")


def _ray_job(what: str, address: str, job: str) -> str:
    return shlex.join(["ray", "job", *what.split(), "--address", address, job])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
