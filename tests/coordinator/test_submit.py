"""Submitting a job, without Ray: what is checked and packed, how a job is followed, what its end says."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.config.loading import load_recipe, load_resolved, resolve
from cluster.config.run import RunConfig
from cluster.errors import ClusterError, ConfigError
from coordinator import ray_jobs
from coordinator.cli import main
from coordinator.submit import JOB_FILE, JobRequest, JobState, SubmitOptions, attend, job_request, submit_command
from coordinator.submit_package import refuse_too_large, survey, write_package

ADDRESS = "http://head:8265"
RUN = ("--run-dir", "/shared/run")


Step = tuple[str | type[BaseException] | None, str | JobState | type[Exception]]
"""What a server shows of a log before it ends it, what happens instead, or ``None`` for silence; and then the state."""


@dataclass
class FakeServer:
    """A job server that plays a script: each step is what a `tail` shows and how it ends, and the state afterwards."""

    address: str = ADDRESS
    script: list[Step] = field(default_factory=list)
    submitted: list[tuple[JobRequest, dict[str, bytes]]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    log: str = ""
    now: str | JobState | type[Exception] = "RUNNING"

    def submit(self, request: JobRequest, package: Path) -> None:
        with zipfile.ZipFile(package) as archive:
            self.submitted.append((request, {name: archive.read(name) for name in archive.namelist()}))

    def state(self, job: str) -> JobState:
        if isinstance(self.now, type):
            raise self.now("no answer")
        return self.now if isinstance(self.now, JobState) else JobState(self.now)

    def stop(self, job: str) -> None:
        self.stopped.append(job)

    def tail(self, job: str, show: Callable[[str], None]) -> bool:
        shown, self.now = self.script.pop(0)
        if isinstance(shown, type):
            raise shown("the line is dead")
        self.log += shown or ""
        show(self.log)
        return shown is not None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    fake = FakeServer(script=[("hello\n", "SUCCEEDED")])

    def connect(address: str) -> FakeServer:
        fake.address = address
        return fake

    monkeypatch.setattr(ray_jobs, "RayJobServer", connect)
    return fake


def config(**execution: Any) -> RunConfig:
    overrides = [(f"execution.{name}", str(value)) for name, value in execution.items()]
    return resolve(load_recipe("sinusoid-maml"), [("execution.run_dir", "/shared/run"), *overrides])


def submit(*argv: object) -> int:
    return main(["submit", *map(str, argv), "--address", ADDRESS])


# --------------------------------------------------------------------------------------------------------- what is sent


def test_the_job_gets_the_configuration_that_was_checked_here(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "my recipe.toml"
    mine.write_text('steps = 7\n[data]\ntype = "glyphs"\n')
    assert submit(mine, *RUN, "--seed", 3, "--learner.inner_steps", 2, "--workers", 5) == 0
    ((request, package),) = server.submitted
    (tmp_path / "got.toml").write_bytes(package[JOB_FILE])
    got = load_resolved(tmp_path / "got.toml")
    wanted = resolve(
        load_recipe(str(mine)),
        [("seed", "3"), ("learner.inner_steps", "2"), ("execution.workers", "5"), ("execution.run_dir", "/shared/run")],
    )
    assert got.result_digest() == wanted.result_digest() and list(package) == [JOB_FILE]
    assert got.execution == wanted.execution.model_copy(update={"address": "auto"})
    assert request.metadata["recipe"] == "my recipe" and request.metadata["run_dir"] == "/shared/run"
    assert request.submission_id.startswith("my-recipe-2")
    assert capsys.readouterr().out == "hello\n"


def test_the_entrypoint_runs_train_and_its_code_comes_back(tmp_path: Path) -> None:
    request = job_request(config(), SubmitOptions(ADDRESS, python=sys.executable, grace=7))
    assert request.environment == {"RAY_JOB_STOP_WAIT_TIME_S": "7"}
    (tmp_path / JOB_FILE).write_text("steps = 0\n")
    done = subprocess.run(request.entrypoint, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "steps" in done.stderr and "got 0" in done.stderr


def test_another_python_is_told_before_anything_is_imported() -> None:
    argv = [sys.executable, "-m", "coordinator.job", "3.9", "train", "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert "was submitted from Python 3.9" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "a job needs a run directory by its whole path"),
        (["--run-dir", "runs/x"], "got runs/x: give --run-dir /SHARED/DIR"),
        ([*RUN, "--learner.inner_stepz", "3"], "learner.inner_stepz"),
        ([*RUN, "--steps", "0"], "steps"),
        ([*RUN, "--execution.address", "auto"], "leave execution.address out"),
        ([*RUN, "--store", "/s.arrow"], "would be unused"),
        ([*RUN, "--data.type", "store"], "give --store STORE"),
        ([*RUN, "--data.type", "store", "--store", "s.arrow"], "by the whole path"),
        (
            [*RUN, "--execution.metrics_discovery", "targets"],
            "by its whole path, got --execution.metrics_discovery targets",
        ),
        ([*RUN, "--submission-id", "a/b"], "--submission-id 'a/b'"),
        ([*RUN, "--exclude", "x"], "give --working-dir DIR as well"),
        ([*RUN, "--working-dir", "nowhere"], "nowhere is no folder"),
        ([*RUN, "--working-dir", ".", "--exclude", "!"], "--exclude: Invalid git pattern: '!'"),
        ([*RUN, "--graze", "3"], "Did you mean '--grace'"),
    ],
)
def test_what_can_be_refused_here_is_not_sent(
    argv: list[str], said: str, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("sinusoid-maml", *argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert server.submitted == []


def test_a_store_need_not_be_here(server: FakeServer) -> None:
    assert submit("omniglot-maml", *RUN, "--store", "/shared/omniglot.arrow") == 0
    assert b'"/shared/omniglot.arrow"' in server.submitted[0][1][JOB_FILE]


# ----------------------------------------------------------------------------------------------------------- packages


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    files = {
        "code/run.py": "print()",
        "code/__pycache__/run.pyc": "x",
        "code/.gitignore": "local.py",
        "code/local.py": "x",
        "code/deep/local.py": "x",
        ".gitignore": "/hidden/\nmine.toml\n",
        ".rayignore": "*.log",
        "hidden/theirs.toml": "x",
        "mine.toml": "x",
        "kept.toml": "x",
        "a.log": "x",
        ".git/config": "x",
        ".env": "TOKEN=1",
        "keys/server.pem": "x",
        "runs/1/lock": "x",
        "data.arrow": "x",
        "big/one.bin": "x" * 3000,
        "big/two.bin": "x" * 2000,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    os.symlink(folder / "big", folder / "link")
    os.symlink(folder / "nowhere", folder / "dangling")
    return folder


def test_ignored_files_and_secrets_stay_here_and_ignored_recipes_are_named(tree: Path) -> None:
    found = survey(tree, ["two.*"])
    shipped = {path.as_posix() for path in found.sizes}
    assert shipped == {".gitignore", ".rayignore", "code/.gitignore", "code/run.py", "kept.toml", "big/one.bin"}
    assert [path.as_posix() for path in found.ignored_recipes] == ["hidden/theirs.toml", "mine.toml"]
    assert [path.as_posix() for path in found.secrets] == [".env", "keys/server.pem"]
    assert [path.as_posix() for path in found.links] == ["dangling", "link"]


def test_too_much_is_refused_with_the_largest_entries(tree: Path) -> None:
    found = survey(tree)
    refuse_too_large(found, found.size)
    with pytest.raises(ConfigError, match=r"tree has 0\.0 MiB to ship, more than .*--exclude PATTERN.*largest: big/ "):
        refuse_too_large(found, found.size - 1)


def test_a_package_has_the_same_bytes_whatever_the_times(tree: Path, tmp_path: Path) -> None:
    (tree / "code" / "run.py").chmod(0o755)
    (tree / JOB_FILE).write_text("old")
    first, second = tmp_path / "1.zip", tmp_path / "2.zip"
    write_package(first, survey(tree), {JOB_FILE: "new"})
    os.utime(tree / "code" / "run.py", (1e9, 1e9))
    write_package(second, survey(tree), {JOB_FILE: "new"})
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist().count(JOB_FILE) == 1 and archive.read(JOB_FILE) == b"new"
        assert archive.getinfo("code/run.py").external_attr >> 16 == 0o755
        assert {entry.date_time[0] for entry in archive.infolist()} == {1980}
        assert archive.read("big/two.bin") == b"x" * 2000


def test_what_is_shipped_is_said_and_sent(
    tree: Path, server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    assert submit("sinusoid-maml", *RUN, "--working-dir", ".") == 0
    assert "code/run.py" in server.submitted[0][1] and "mine.toml" not in server.submitted[0][1]
    err = capsys.readouterr().err
    assert "shipping 7 files of ., 0.0 MiB" in err
    assert "leaves out: hidden/theirs.toml, mine.toml" in err and "which are not followed: " in err and "link" in err
    assert "not shipped: what looks like a secret, by its name: .env, keys/server.pem" in err
    (tree / "large").write_bytes(bytes(1 << 20))
    assert submit("sinusoid-maml", *RUN, "--working-dir", ".", "--max-size", 1) == 2
    assert "raise --max-size; largest: large 1.0 MiB, big/ 0.0 MiB" in capsys.readouterr().err


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder whose ignored parts this process may not read; root, who may, is somebody else meanwhile."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # nobody else may enter the test's own folder
    folder.chmod(0o777)
    for name in ("code/run.py", "theirs/volume/data.toml", "listed/deep/data.toml", "ignoring/.gitignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / ".gitignore").write_text("theirs\nlisted/\nignoring/\n")
    for name, mode in (("theirs/volume", 0), ("listed", 0o444), ("ignoring/.gitignore", 0)):
        (folder / name).chmod(mode)
    os.seteuid(os.geteuid() or 65534)
    yield folder
    os.seteuid(os.getuid())
    for path in (folder / "theirs" / "volume", folder / "listed", folder / "code"):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_what_is_ignored_need_not_be_readable(closed: Path) -> None:
    found = survey(closed)
    assert [path.as_posix() for path in found.sizes] == [".gitignore", "code/run.py"]
    write_package(closed / "package.zip", found, {})
    with zipfile.ZipFile(closed / "package.zip") as archive:
        assert archive.namelist() == [".gitignore", "code/run.py"]


@pytest.mark.parametrize(
    ("name", "mode"), [("code/run.py", 0), ("code", 0), ("code", 0o444), (".gitignore", 0), ("ignoring", None)]
)
def test_what_is_shipped_must_be_readable(closed: Path, name: str, mode: int | None) -> None:
    os.seteuid(os.getuid())
    if mode is None:  # ignored no longer
        (closed / ".gitignore").write_text("theirs\nlisted/\n")
    else:
        (closed / name).chmod(mode)
    os.seteuid(os.geteuid() or 65534)
    why = rf"^cannot ship {closed / name}\S*: Permission denied; leave it out by --exclude PATTERN$"
    with pytest.raises(ConfigError, match=why):
        write_package(closed / "package.zip", survey(closed), {})


# -------------------------------------------------------------------------------------------------------------- follow


def followed(*script: Step, **options: Any) -> tuple[FakeServer, list[float], tuple[JobState | None, int]]:
    server, pauses = FakeServer(script=list(script)), []
    return server, pauses, attend(server, "job", SubmitOptions(ADDRESS, **options), pauses.append)


def test_a_log_that_breaks_off_goes_on_where_it_was_and_both_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    broken = (ClusterError, "RUNNING")
    _, pauses, (state, code) = followed(("one\ntw", "RUNNING"), broken, broken, ("o\nthree\n", "SUCCEEDED"))
    assert (state, code, len(pauses)) == (JobState("SUCCEEDED"), 0, 3)
    out, err = capsys.readouterr()
    assert out == "one\ntwo\nthree\n"
    assert err.splitlines() == [
        "the log cannot be followed for now (the server has closed it): trying again",
        "the log is followed again",
        "job job SUCCEEDED",
    ]


def test_a_silent_log_is_asked_for_again_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert followed((None, "RUNNING"), (None, "SUCCEEDED"), ("one\n", "SUCCEEDED"))[2][1] == 0
    assert capsys.readouterr() == ("one\n", "job job SUCCEEDED\n")


def test_the_rest_of_an_ended_jobs_log_is_tried_for_some_times(capsys: pytest.CaptureFixture[str]) -> None:
    lost = (ClusterError, "SUCCEEDED")
    followed(("one\n", "RUNNING"), lost, ("two\n", "SUCCEEDED"))
    assert capsys.readouterr().out == "one\ntwo\n"
    server, _, (_, code) = followed(*[lost] * 9)
    assert (code, len(server.script)) == (0, 6)
    assert "cannot be followed for now (the line is dead)" in capsys.readouterr().err


def test_a_lost_server_is_told_after_some_tries(capsys: pytest.CaptureFixture[str]) -> None:
    server, pauses = FakeServer(script=[(ClusterError, ClusterError)]), []
    with pytest.raises(ClusterError, match="lost job job, which may go on: no answer; to follow it again: ") as lost:
        attend(server, "job", SubmitOptions(ADDRESS), pauses.append)
    assert str(lost.value).endswith(f"ray job logs --follow --address {ADDRESS} job")
    assert 20 < sum(pauses) < 60 and capsys.readouterr().err.count("\n") == 1


def test_a_server_that_owes_an_answer_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeServer(script=[("one\n", ClusterError)])

    def comes_back(_: float) -> None:
        server.now = "SUCCEEDED"

    assert attend(server, "job", SubmitOptions(ADDRESS), comes_back) == (JobState("SUCCEEDED"), 0)
    assert capsys.readouterr().err.startswith("the log cannot be followed for now (no answer): trying again\n")


@pytest.mark.parametrize(
    ("state", "log", "code", "said"),
    [
        (JobState("STOPPED"), "", 143, "STOPPED; the same line submitted again goes on"),
        (JobState("FAILED", 2), "", 2, "exit code 2; when that is mended, the same line submitted again"),
        (JobState("FAILED", -9), "", 137, "exit code 137"),
        (JobState("FAILED", 127), "", 127, "has no `python`: name its Python by --python"),
        (JobState("FAILED", 1), "No module named 'coordinator'", 1, "has no Metafleet: install it on every node"),
        (JobState("FAILED", None, "runtime_env\nsetup failed"), "", 1, "FAILED: runtime_env setup failed"),
    ],
)
def test_the_end_says_what_to_do(
    state: JobState, log: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert followed((log, state))[2] == (state, code)
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_name_that_was_given_cannot_be_taken_again(capsys: pytest.CaptureFixture[str]) -> None:
    followed(("", "STOPPED"), submission_id="mine")
    assert "submitted again, with another --submission-id, goes on" in capsys.readouterr().err


def test_ctrl_c_leaves_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    server, _, (state, code) = followed((KeyboardInterrupt, "RUNNING"))
    assert (state, code, server.stopped) == (None, 130, [])
    err = capsys.readouterr().err
    assert f"ray job logs --follow --address {ADDRESS} job" in err and f"ray job stop --address {ADDRESS} job" in err


def test_ctrl_c_stops_the_job_if_that_was_asked_for_and_a_second_one_leaves_it() -> None:
    first = (KeyboardInterrupt, "RUNNING")
    server, _, (state, code) = followed(first, ("checkpoint written\n", "STOPPED"), on_interrupt="stop")
    assert (state, code, server.stopped) == (JobState("STOPPED"), 143, ["job"])
    server, _, (state, code) = followed(first, (KeyboardInterrupt, "RUNNING"), on_interrupt="stop")
    assert (state, code, server.stopped) == (None, 130, ["job"])


def test_no_wait_leaves_at_once(server: FakeServer, capfd: pytest.CaptureFixture[str]) -> None:
    assert submit("sinusoid-maml", *RUN, "--submission-id", "mine", "--no-wait", "--json") == 0
    out, err = capfd.readouterr()
    assert '"state": "RUNNING", "exit_code": 0' in out and len(server.script) == 1
    assert f"ray job stop --address {ADDRESS} mine" in err


def test_no_wait_succeeds_although_nobody_says_what_became_of_the_job(server: FakeServer) -> None:
    server.now = ClusterError
    report = submit_command(config(), SubmitOptions(ADDRESS, wait=False))
    assert (report["state"], report["exit_code"], len(server.submitted)) == (None, 0, 1)


def test_json_is_all_on_stdout_and_the_log_is_not(server: FakeServer, capfd: pytest.CaptureFixture[str]) -> None:
    server.script = [("hello\n", JobState("FAILED", 3))]
    assert submit("sinusoid-maml", *RUN, "--json") == 3
    out, err = capfd.readouterr()
    assert out.startswith('{"submission_id": "sinusoid-maml-2') and out.count("\n") == 1 and "hello" in err
    assert '"state": "FAILED", "exit_code": 3, "run_dir": "/shared/run"' in out


def test_the_entrypoint_is_quoted_for_a_shell() -> None:
    entrypoint = job_request(config(), SubmitOptions(ADDRESS, python="/my pythons/python")).entrypoint
    assert shlex.split(entrypoint)[:4] == ["exec", "/my pythons/python", "-m", "coordinator.job"]


def test_links_out_of_the_folder_and_keys_stay_here(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    (folder / "src" / "runs").mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    (folder / ".aws").mkdir()
    keys = (".npmrc", "credentials.json", "credentials.toml", "id_ecdsa", "id_rsa.pub", ".ray_token", ".aws/config")
    for name in ("kept.py", "src/runs/__init__.py", *keys):
        (folder / name).write_text("x")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "nothing").symlink_to(tmp_path / "gone")
    (folder / "inside.py").symlink_to(folder / "kept.py")
    found = survey(folder)
    assert [path.as_posix() for path in found.sizes] == ["inside.py", "kept.py", "src/runs/__init__.py"]
    assert [path.as_posix() for path in found.links] == ["nothing", "out"]
    assert {path.as_posix() for path in found.secrets} == {*keys, ".aws"} - {".aws/config"}


def test_code_is_no_secret_whatever_its_name(tmp_path: Path) -> None:
    for name in ("id_embedding.py", "id_maps.toml", "credentials.py", "next_token.py", "class_token.toml"):
        (tmp_path / name).write_text("x")
    found = survey(tmp_path)
    assert len(found.sizes) == 5 and not found.secrets


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="has a user name in it") as refused:
        ray_jobs.RayJobServer("http://me:hunter2@127.0.0.1:8265")
    assert "hunter2" not in str(refused.value)
