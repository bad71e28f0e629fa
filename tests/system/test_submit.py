"""`metafleet submit` on a real cluster: followed, left, stopped, submitted again; with and without authentication."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import shutil
import signal
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from coordinator.ray_jobs import RayJobServer
from coordinator.run_dir import RunDirectory
from coordinator.submit import SubmitOptions, attend
from tests.system.conftest import ray_head
from tests.system.driving import Command, Driver, Finished, entries_of, newest_checkpoint, wait_for
from tests.system.leaks import leaks
from tests.system.relay import Relay

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning:ray"),
]

SOURCE = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
TOKEN = "5a7e" * 16
STEPS = 250
RECIPE = (SOURCE / "cluster" / "recipes" / "sinusoid-maml.toml").read_text()
SMALL = (
    *("--steps", STEPS, "--aggregator.shards", 4, "--learner.inner_lr", 0.001),
    *("--shard.episodes", 40, "--shard.chunk", 40, "--evaluation.every", 0, "--evaluation.episodes", 20),
    *("--execution.cpus_per_worker", 0.5),
)


@dataclass
class Cluster:
    """A head with Ray's job server, and the command in the environment of those who may use it."""

    address: str
    """Of its job server."""
    joined: str
    """HOST:PORT for drivers."""
    command: Command
    allowed: dict[str, str] = field(default_factory=dict)
    """What an environment needs to be let in."""

    def line(self, *argv: object) -> tuple[object, ...]:
        return ("submit", "--address", self.address, "--python", sys.executable, *argv)

    def start(self, *argv: object) -> Driver:
        return self.command.start(*self.line(*argv), **self.allowed)

    def ray_job(self, *argv: object) -> Finished:
        return self.command.start("job", *argv, script=RAY, **self.allowed).finish()


@contextlib.contextmanager
def head(environment: dict[str, str], **allowed: str) -> Iterator[Cluster]:
    home = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    with ray_head({**environment, "HOME": home}, **allowed) as started:
        cluster = Cluster(started.dashboard, started.address, started.command, allowed)
        started.process.until(lambda: answers(f"{cluster.address}/api/version"), "a job server")
        yield cluster
    shutil.rmtree(home, ignore_errors=True)


def answers(url: str) -> bool:
    """Whether somebody is there, who may want a token."""
    try:
        urllib.request.urlopen(url, timeout=20).close()
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    return True


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """For commands in this process, where Ray reads this once."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture(scope="module")
def open_cluster(environment: dict[str, str]) -> Iterator[Cluster]:
    with head(environment, RAY_AUTH_MODE="disabled") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def token_cluster(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One that has the token in its environment, as in compose; those who may use it have a file."""
    token = tmp_path_factory.mktemp("secrets") / "token"
    token.write_text(TOKEN)
    with head(environment, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as cluster:
        yield replace(cluster, allowed={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})


@pytest.fixture(scope="module")
def digest(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "mine.toml").write_text(RECIPE)
    with Command(folder, environment) as command:
        line = ("train", "mine.toml", *SMALL, "--run-dir", "run", "--workers", 1, "--json")
        return str(command.run(*line).report["digest"])


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's folder: the source tree, and a recipe that git ignores; its code leaves a mark where it runs."""
    folder = tmp_path / "own"
    for name in ("cluster", "metaworker", "coordinator"):
        shutil.copytree(SOURCE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".gitignore").write_text("mine.toml\n/secret\n")
    (folder / "mine.toml").write_text(RECIPE)
    (folder / "secret").write_text("not for the cluster")
    mark = f"\nimport os, pathlib\npathlib.Path({str(tmp_path)!r}, f'{{__name__}}-{{os.getpid()}}').touch()\n"
    for name in ("coordinator", "metaworker"):
        with (folder / name / "__init__.py").open("a") as file:
            file.write(mark)
    return folder


def job_of(driver: Driver) -> str:
    """The name that a driver has given its job."""
    match = driver.until(lambda: re.search(r"^job (\S+) submitted to http", driver.err, re.MULTILINE), "a job")
    return str(match[1])


def stopped_and_submitted_again(
    cluster: Cluster, digest: str, run: Path, *argv: object, meanwhile: Callable[[], None] = lambda: None
) -> Driver:
    line = (*argv, *SMALL, "--run-dir", run, "--workers", 2, "--on-interrupt", "stop")
    driver = cluster.start(*line)
    driver.until_version(run, 20)
    meanwhile()
    driver.send(signal.SIGINT)
    stopped = driver.finish(70)
    at = len(entries_of(run))
    assert stopped.code == 143, stopped.err
    assert f"stopped at version {at} of {STEPS}, checkpoint written" in stopped.out
    assert newest_checkpoint(run) == at < STEPS
    assert f"job {job_of(driver)} STOPPED; the same line submitted again goes on with its run" in stopped.err
    again = cluster.start(*line).finish()
    assert again.code == 0, again.out + again.err
    assert digest in again.out and again.err.endswith(" SUCCEEDED\n")
    assert RunDirectory(run).epochs() == [1, 2] and len(entries_of(run)) == STEPS
    return driver


def test_a_stopped_job_goes_on_with_shipped_code_and_an_ignored_recipe(
    open_cluster: Cluster, digest: str, own: Path, tmp_path: Path
) -> None:
    driver = stopped_and_submitted_again(
        open_cluster, digest, tmp_path / "run", own / "mine.toml", "--working-dir", own
    )
    assert "not shipped: TOML files that .gitignore or .rayignore leaves out: mine.toml" in driver.err
    for package in ("coordinator", "metaworker"):  # the driver and two workers, twice
        assert len(list(tmp_path.glob(f"{package}-*"))) >= 2


def served(url: str) -> str | None:
    """What is at an address, if there is anything yet: Ray tells of some of its own before it serves them."""
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return str(reply.read().decode())
    except urllib.error.URLError:
        return None


def test_a_token_is_asked_for_judged_and_never_shown(
    token_cluster: Cluster, digest: str, tmp_path: Path, command: Command
) -> None:
    recipe, run = tmp_path / "mine.toml", tmp_path / "run"
    recipe.write_text(RECIPE)
    line = ("submit", recipe, "--run-dir", run, "--address", token_cluster.address)
    home = {"HOME": str(tmp_path)}
    for environment in ({}, {"RAY_AUTH_MODE": "token"}):
        error = command.run(*line, **home, **environment).error
        assert "wants an authentication token: set RAY_AUTH_MODE=token, and the cluster's token in" in error
    wrong = command.run(*line, **home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0ff" * 20)
    assert "refuses this authentication token" in wrong.error and "0ff0ff" not in wrong.error
    assert not (tmp_path / ".ray").exists() and not run.exists()

    folder = token_cluster.command.folder  # Ray's session is in it, with the job's log, and what is printed here

    def nowhere() -> None:
        assert leaks(TOKEN, run, folder) == []
        (log,) = folder.glob("session_latest/logs/job-driver-*")
        own = re.findall(r"metrics at (\S+)", log.read_text())
        rays = json.loads((folder / "prom_metrics_service_discovery.json").read_text())[0]["targets"]
        assert own and rays
        for url in (*own, *(f"http://{address}/metrics" for address in rays)):
            assert TOKEN not in wait_for(partial(served, url), url)

    stopped_and_submitted_again(token_cluster, digest, run, recipe, meanwhile=nowhere)
    assert leaks(TOKEN, run, folder) == []


def test_ctrl_c_leaves_the_job_to_the_lines_that_were_printed(open_cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    driver = open_cluster.start("sinusoid-maml", "--run-dir", run, "--workers", 1, "--steps", 100_000)
    driver.until_version(run, 3)
    driver.send(signal.SIGINT)
    left = driver.finish(30)
    assert left.code == 130 and f"detached from job {job_of(driver)}, which goes on" in left.err
    seen = len(entries_of(run))
    wait_for(lambda: len(entries_of(run)) > seen + 5, "more versions")
    stop = re.findall(r"^  stop:   ray job (.*)$", left.err, re.MULTILINE)[-1]
    assert open_cluster.ray_job(*stop.split()).code == 0
    assert newest_checkpoint(run) == len(entries_of(run))
    follow = re.findall(r"^  follow: ray job (.*)$", left.err, re.MULTILINE)[-1]
    assert "checkpoint written" in open_cluster.ray_job(*follow.split()).out


def test_a_connection_that_breaks_is_told_and_made_again(open_cluster: Cluster, tmp_path: Path) -> None:
    line = ("sinusoid-maml", "--run-dir", tmp_path / "run", "--workers", 1, "--steps", 100_000)
    with Relay(int(open_cluster.address.rpartition(":")[2])) as relay:
        driver = replace(open_cluster, address=relay.address).start(*line)
        driver.until(lambda: driver.out.count("\n") > 5, "the job's log")
        relay.close()
        lost = f"\nthe log cannot be followed for now (the connection to {relay.address} is lost): trying again\n"
        driver.until(lambda: lost in driver.err, "the loss")
        relay.open()
        driver.until(lambda: "\nthe log is followed again\n" in driver.err, "the log")
        job = job_of(driver)
        assert open_cluster.ray_job("stop", "--address", open_cluster.address, job).code == 0
        assert driver.finish().code == 143
    (log,) = open_cluster.command.folder.glob(f"session_latest/logs/job-driver-{job}.log")
    assert driver.out == log.read_text()


def test_a_server_that_stays_away_is_an_error(open_cluster: Cluster) -> None:
    with Relay(int(open_cluster.address.rpartition(":")[2])) as relay:
        server = RayJobServer(relay.address)
    with pytest.raises(ClusterError, match=r"^lost job mine, which may go on: no Ray job server at .*refused") as lost:
        attend(server, "mine", SubmitOptions(relay.address), lambda _: None)
    assert str(lost.value).endswith(f"; to follow it again: ray job logs --follow --address {relay.address} mine")


def test_exit_code_and_report_are_the_jobs_own(
    open_cluster: Cluster, here: Callable[..., Finished], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    line = ("sinusoid-maml", "--run-dir", run, "--workers", 1, "--evaluation.every", 0, "--evaluation.episodes", 20)
    report = here(*open_cluster.line(*line, "--steps", 4, "--json", "--submission-id", run.parent.name)).report
    assert (report["state"], report["exit_code"], report["submission_id"]) == ("SUCCEEDED", 0, run.parent.name)
    assert report["metadata"]["learner"] == "maml" and len(entries_of(run)) == 4
    taken = here(*open_cluster.line(*line, "--steps", 4, "--submission-id", run.parent.name))
    assert "has a job of that --submission-id already" in taken.error
    other = here(*open_cluster.line(*line, "--steps", 5))
    assert other.code == 2 and "steps 4 -> 5" in other.out and "FAILED with exit code 2" in other.err
    lacking = here(*open_cluster.line(*line, "--python", "python9"))
    assert lacking.code == 127 and "the cluster's head has no `python9`: name its Python by --python" in lacking.err


def test_plain_ray_job_submit_works_as_well(open_cluster: Cluster, own: Path, tmp_path: Path) -> None:
    train = (sys.executable, "-m", "coordinator", "train", "recipe.toml", "--run-dir", tmp_path / "run")
    shutil.copy(own / "mine.toml", own / "recipe.toml")
    done = open_cluster.ray_job(
        *("submit", "--address", open_cluster.address, "--working-dir", own, "--"),
        *(*train, *SMALL, "--address", "auto", "--workers", 1, "--steps", 4, "--resume", "auto"),
    )
    assert done.code == 0, done.out + done.err
    assert len(entries_of(tmp_path / "run")) == 4 and list(tmp_path.glob("metaworker-*"))


def test_a_driver_with_another_ray_is_told_both_versions(open_cluster: Cluster, tmp_path: Path) -> None:
    other = (
        "import ray, sys; ray.__version__ = '2.40.0'; from coordinator.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    line = ("-c", other, "train", "sinusoid-maml", "--run-dir", tmp_path / "run", "--address", open_cluster.joined)
    driver = open_cluster.command.start(*line, script=Path(sys.executable), **open_cluster.allowed)
    done = driver.finish()
    python = ".".join(map(str, sys.version_info[:3]))
    assert done.code == 2 and f"Ray 2.40.0 with Python {python}): run with the same versions of both" in done.err


# --------------------------------------------------------------------------------------------------- what is no cluster


class Answering(http.server.BaseHTTPRequestHandler):
    """A server that gives one answer."""

    answer = (200, "")

    def do_GET(self) -> None:
        code, text = self.answer
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        (200, json.dumps({"ray_version": "2.40.0"}), "runs Ray 2.40.0, and this machine has Ray "),
        (200, "<html>", "is no Ray job server, or refuses"),
        (404, "", "is no Ray job server, or refuses"),
        (500, "", "no Ray job server at "),
    ],
)
def test_other_servers_are_refused(code: int, text: str, said: str, here: Callable[..., Finished]) -> None:
    handler = type("Handler", (Answering,), {"answer": (code, text)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        error = here("submit", "sinusoid-maml", "--run-dir", "/shared/run", "--address", address).error
        server.shutdown()
    assert said in error and address in error
