"""Scripted faults at named points of worker and coordinator, for tests: off, and free, unless a script is given.

    METAFLEET_FAULTS=/path/faults.json   [{"point": "compute", "action": "sigkill", "shard": 7}, …]

A fault fires where the code asks ``fail_at`` at its point and everything else that it names fits, ``times`` times over
all processes: each firing makes a file beside the script, ``faults.json.fired/INDEX-NUMBER``, by exclusive creation.
Tests assert on these files that a fault has fired. Points are named in ``Point``.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args

VARIABLE = "METAFLEET_FAULTS"

WorkerPoint = Literal["hello", "compute", "computed"]
"""When a worker starts; before it computes a shard; when it has, before the digest."""

DriverPoint = Literal[
    "publish", "published", "append", "appended", "write", "written", "fsync", "fsynced", "rename", "renamed"
]
"""Before and after: a version is published; its log entry is appended; a checkpoint's files are written; the log is
forced to the disk; the checkpoint gets its name."""

Point = WorkerPoint | DriverPoint

Action = Literal["raise", "exit", "sigkill", "hang", "wait", "garbage", "nonfinite", "flip_before", "flip_after"]
"""Raise an exception; end the process; kill it; never go on; take ``factor`` times as long; reply with something else;
reply with NaN; change one value of the reply before its digest is made, or after."""


class FaultError(Exception):
    """What the action ``raise`` raises."""


@dataclass(frozen=True)
class Fault:
    """One line of a script; what is ``None`` fits anything."""

    point: Point
    action: Action
    version: int | None = None
    shard: int | None = None
    attempt: int | None = None
    slot: int | None = None
    times: int = 1
    """How often it fires; 0 for always."""
    factor: float = 5.0
    """Of ``wait``."""

    def __post_init__(self) -> None:
        points = {*get_args(WorkerPoint), *get_args(DriverPoint)}
        if self.point not in points or self.action not in get_args(Action):
            raise ValueError(f"{self}: the point is one of {sorted(points)}, the action one of {get_args(Action)}")


class Script:
    """The faults of a script and what has fired of them."""

    def __init__(self, path: Path) -> None:
        self._faults = [Fault(**line) for line in json.loads(path.read_text(encoding="utf-8"))]
        self._fired = path.with_name(path.name + ".fired")
        self._fired.mkdir(exist_ok=True)

    def find(self, point: Point, about: dict[str, int | None]) -> Fault | None:
        """The first fault that fits and has not fired ``times`` times yet; it has once more when this returns."""
        for index, fault in enumerate(self._faults):
            fits = fault.point == point and all(getattr(fault, name) in (None, value) for name, value in about.items())
            if fits and self._fire(index, fault.times):
                return fault
        return None

    def _fire(self, index: int, times: int) -> bool:
        for number in range(max(1, times)):
            try:
                os.close(os.open(self._fired / f"{index}-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                return True
            except FileExistsError:
                continue
        return times == 0


def _load() -> Script | None:
    path = os.environ.get(VARIABLE)
    return Script(Path(path)) if path else None


_script = _load()


def fail_at(
    point: Point,
    *,
    version: int | None = None,
    shard: int | None = None,
    attempt: int | None = None,
    slot: int | None = None,
) -> Fault | None:
    """Do what the script says for this point. What only the caller can do (``wait`` and the last four) is returned."""
    if _script is None:
        return None
    fault = _script.find(point, {"version": version, "shard": shard, "attempt": attempt, "slot": slot})
    if fault is None or fault.action not in ("raise", "exit", "sigkill", "hang"):
        return fault
    _end(fault)


def _end(fault: Fault) -> NoReturn:
    if fault.action == "raise":
        raise FaultError(f"scripted at {fault.point}")
    if fault.action == "exit":
        os._exit(3)
    while fault.action == "hang":
        time.sleep(3600)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")
