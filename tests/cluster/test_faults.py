"""Scripted faults: off without a script, fired at their point and as often as they say, over all processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import faults
from cluster.faults import FaultError, Script, fail_at


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script whose faults are all of this process."""
    path = tmp_path / "faults.json"
    lines = [
        {"point": "compute", "action": "raise", "shard": 3, "attempt": 0},
        {"point": "computed", "action": "wait", "version": 2, "times": 2},
    ]
    path.write_text(json.dumps(lines))
    monkeypatch.setattr(faults, "_script", Script(path))
    return path


def fired(script: Path) -> list[str]:
    return sorted(file.name for file in Path(f"{script}.fired").iterdir())


def test_without_a_script_nothing_happens() -> None:
    assert fail_at("compute", version=0, shard=3, attempt=0, slot=0) is None


def test_a_fault_fires_where_everything_that_it_names_fits(script: Path) -> None:
    for about in ({"shard": 2, "attempt": 0}, {"shard": 3, "attempt": 1}):
        assert fail_at("compute", version=0, slot=1, **about) is None
    with pytest.raises(FaultError, match="scripted at compute"):
        fail_at("compute", version=0, shard=3, attempt=0, slot=1)
    assert fail_at("compute", version=0, shard=3, attempt=0, slot=1) is None
    assert fired(script) == ["0-0"]


def test_what_only_the_caller_can_do_is_returned_as_often_as_the_script_says(script: Path) -> None:
    found = [fail_at("computed", version=2, shard=8, attempt=0, slot=0) for _ in range(3)]
    assert [fault.action if fault else None for fault in found] == ["wait", "wait", None]
    assert fired(script) == ["1-0", "1-1"]


@pytest.mark.parametrize(("action", "code"), [("sigkill", -9), ("exit", 3)])
def test_a_process_ends_where_its_script_says(tmp_path: Path, action: str, code: int) -> None:
    path = tmp_path / "faults.json"
    path.write_text(json.dumps([{"point": "append", "action": action, "version": 4}]))
    program = (
        "from cluster.faults import fail_at\nfor v in range(9): fail_at('append', version=v); print(v, flush=True)"
    )
    environment = {faults.VARIABLE: str(path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "0\n1\n2\n3\n")
    again = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, "a fault fires once over all processes"


def test_a_script_with_an_unknown_point_or_action_is_refused(tmp_path: Path) -> None:
    for line in ({"point": "lunch", "action": "raise"}, {"point": "compute", "action": "sing"}):
        (tmp_path / "faults.json").write_text(json.dumps([line]))
        with pytest.raises(ValueError, match=r"the point is one of .*'append'.* action one of .*'sigkill'"):
            Script(tmp_path / "faults.json")
