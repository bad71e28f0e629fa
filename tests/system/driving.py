"""Driving the ``metafleet`` command from outside, as users and their clusters do.

Command    the command in one folder and environment; what it starts ends with its ``with`` block
Driver     one process of it, with all the processes that it has started, which share its session
Finished   how one ended
wait_for   waits for a condition, not for a time
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from coordinator.checkpoint import list_checkpoints, version_of
from coordinator.commit_log import Entry, read_log
from coordinator.run_dir import RunDirectory

PATIENT = 240.0
"""Seconds after which something that must happen counts as not happening, on the slowest machine."""

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Two idle processes of Ray's that try for 60 s, a constant of theirs, to tell a dead driver that they go."""

SCRIPT = Path(sys.executable).with_name("metafleet")


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENT) -> Any:
    """The condition's value once that is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)
    return value


def entries_of(run: Path) -> list[Entry]:
    """The commit log of a run, also of one that is being made or written."""
    return read_log(RunDirectory(run)) if (run / "epochs").is_dir() else []


def newest_checkpoint(run: Path) -> int:
    """The version of a run's last checkpoint."""
    return version_of(list_checkpoints(RunDirectory(run).checkpoints)[-1])[0]


def family(session: int) -> dict[int, str]:
    """Living processes of a session, each with its command line."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, _, _, owner = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(owner) == session and state not in "ZX":
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            pass  # it has ended meanwhile
    return found


def listening(pids: Iterable[int]) -> set[str]:
    """Addresses on which processes listen, as the kernel writes them: IPv4 in hexadecimal, bytes reversed."""
    sockets, found = set(), set()
    for link in (link for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            sockets.add(os.readlink(link))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                found.add(local.partition(":")[0])
    return found


@dataclass(frozen=True)
class Finished:
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """The one JSON object on its standard output."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that a refusal is."""
        assert (self.code, self.out) == (2, ""), (self.code, self.out, self.err)
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        return self.err

    @property
    def stopped_at(self) -> int:
        """The version at which a stopped driver says that it wrote a checkpoint."""
        match = re.search(
            r"^stopped at version (\d+) of \d+, checkpoint written; go on with: metafleet train --resume run$",
            self.err,
            re.MULTILINE,
        )
        assert match, self.err
        return int(match[1])


class Driver:
    """One process of the command."""

    def __init__(self, argv: list[str], folder: Path, environment: Mapping[str, str], number: int) -> None:
        self._out, self._err = folder / f"{number}.out", folder / f"{number}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                argv,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def out(self) -> str:
        """What it has written to standard output so far."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What it has written to standard error so far."""
        return self._err.read_text()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def family(self) -> dict[int, str]:
        """It and the processes that it has started, as far as they live."""
        return family(self.pid)

    def workers(self) -> list[int]:
        """Process ids of its local workers."""
        return [pid for pid, name in self.family().items() if name.startswith("ray::RayWorker")]

    def ray_folder(self) -> Path:
        """The temporary folder of its local cluster."""
        for name in self.family().values():
            match = re.search(r"/\S*?/metafleet-ray-[^/\s]+", name)
            if match and "gcs_server" in name:
                return Path(match[0])
        raise AssertionError(f"no local cluster in {self.family()}")

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Stands still for the time of the block; signals that it is sent meanwhile reach it at the end."""
        self.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send(signal.SIGCONT)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Waits for a condition that the process must bring about."""

        def reached() -> Any:
            alive = self.alive
            value = condition()
            assert value or alive, f"ended with {self._process.returncode} before: {what}\n{self.err}"
            return value

        return wait_for(reached, what)

    def until_version(self, run: Path, version: int) -> int:
        """Waits until the run has come to a version; returns which one it is at."""
        self.until(lambda: len(entries_of(run)) >= version, f"version {version}")
        return len(entries_of(run))

    def finish(self, seconds: float = PATIENT) -> Finished:
        """Waits for its end."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended within {seconds:g} s\n{self.err}") from None
        return Finished(code, self.out, self.err)

    def must_leave_nothing(self, but: tuple[str, ...] = (), seconds: float = 30.0) -> None:
        """Waits until nothing that it has started is left, or only processes of these names."""

        def left() -> list[str]:
            return [name for name in self.family().values() if name not in but]

        try:
            wait_for(lambda: not left(), "the end of all processes", seconds)
        except AssertionError:
            raise AssertionError(f"left after {seconds:g} s: {left()}") from None

    def end(self) -> None:
        """Kills it and what it has started."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


class Command:
    """The command in a folder."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self._drivers: list[Driver] = []

    def __enter__(self) -> Command:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for driver in self._drivers:
            driver.end()

    def start(self, *argv: object, script: Path = SCRIPT, **environment: str) -> Driver:
        """A process that goes on by itself."""
        words = [str(script), *map(str, argv)]
        driver = Driver(words, self.folder, {**self.environment, **environment}, len(self._drivers))
        self._drivers.append(driver)
        return driver

    def run(self, *argv: object, **environment: str) -> Finished:
        """A process from start to end."""
        return self.start(*argv, **environment).finish()
