"""What a run says of itself to Prometheus."""

from __future__ import annotations

import json
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.config.loading import load_recipe, resolve, with_execution
from coordinator.session import _metrics
from coordinator.view import make_view


def test_a_run_that_is_resumed_from_within_its_directory_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first-try").mkdir()
    monkeypatch.chdir(tmp_path / "first-try")
    targets = tmp_path / "targets"
    config = with_execution(resolve(load_recipe("sinusoid-maml")), metrics_discovery=str(targets))
    with ExitStack() as stack:
        _, endpoint = _metrics(config, Path(), stack, make_view(5.0))
        assert endpoint and b'run="first-try"' in urllib.request.urlopen(endpoint, timeout=10).read()
        (announced,) = targets.iterdir()
        assert json.loads(announced.read_text())[0]["labels"] == {"run": "first-try"}


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_metrics_that_others_can_read_are_told_of(host: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = with_execution(resolve(load_recipe("sinusoid-maml")), metrics_host=host)
    with ExitStack() as stack:
        _metrics(config, tmp_path / "run", stack, make_view(5.0))
    assert ("whoever reaches this machine can read them" in "".join(capfd.readouterr())) == (host == "0.0.0.0")
