"""Drivers killed by SIGKILL at each point of a commit, on a real run directory: nothing of the result is lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from cluster import faults
from cluster.config.sections import AsyncAggregator, SyncAggregator
from cluster.faults import DriverPoint, Script
from coordinator import checkpoint as checkpoints
from coordinator.commit_log import read_log
from coordinator.run_dir import RunDirectory
from tests.coordinator.harness import TINY, Driven, drive, replayed

KINDS = {"sync": SyncAggregator(shards=3), "buffered": AsyncAggregator(staleness_bound=2, buffer=2)}
UNDISTURBED: dict[str, str] = {}


def in_a_child(do: Callable[[], Driven]) -> int:
    """How a child process ends that does it: minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            do()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", get_args(DriverPoint))
def test_a_driver_killed_at_a_commit_point_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, kind: str
) -> None:
    config, path = TINY.model_copy(update={"aggregator": KINDS[kind]}), tmp_path / "run"
    script = tmp_path / "faults.json"
    # Checkpoints are of even versions; what is forced to the disk has no version, and the first time is at the start.
    about = {} if point.startswith("fsync") else {"version": 4}
    script.write_text(json.dumps([{"point": point, "action": "sigkill", **about}]))
    with monkeypatch.context() as scripted:
        scripted.setattr(faults, "_script", Script(script))
        assert in_a_child(lambda: drive(config, path)) == -signal.SIGKILL
    assert (tmp_path / "faults.json.fired" / "0-0").exists()
    logged = read_log(RunDirectory.open(path))
    for saved in checkpoints.list_checkpoints(path / "checkpoints"):
        assert checkpoints.version_of(saved)[0] <= len(logged)
        checkpoints.read_manifest(saved)
    resumed = drive(config, path, resume=True)
    entries = read_log(RunDirectory.open(path))
    assert entries[: len(logged)] == logged
    assert [entry.version for entry in entries] == list(range(1, 7))
    shards = [counted.shard for entry in entries for counted in entry.counted]
    assert len(set(shards)) == len(shards)
    assert replayed(config, path).state.digest == resumed.digest
    if kind == "sync":
        undisturbed = UNDISTURBED.get(kind) or UNDISTURBED.setdefault(kind, drive(config, tmp_path / "whole").digest)
        assert resumed.digest == undisturbed
