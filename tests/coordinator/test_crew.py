"""The wait for a command's first worker."""

from __future__ import annotations

import pytest

from cluster.config.sections import Execution
from cluster.errors import ClusterError
from coordinator.attempts import Policy
from coordinator.crew import first_worker
from coordinator.dispatch import Dispatcher
from tests.coordinator.harness import TINY, FakePool, hello


def test_the_first_worker_is_waited_for_past_those_that_fail() -> None:
    pool, said = FakePool(2), list[str]()
    pool.fail_start(0)
    pool.ready(1)
    assert first_worker(TINY, Dispatcher(pool, Policy(2, 3)), said.append) == hello(1)
    assert said == ["worker 0 failed to start: no such luck"]


def test_why_the_last_one_failed_is_said_when_none_comes_in_time() -> None:
    config, pool = TINY.model_copy(update={"execution": Execution(start_timeout=0.1)}), FakePool(1)
    pool.fail_start(0)
    with pytest.raises(ClusterError, match=r"no worker started within .* worker 0 failed to start: no such luck$"):
        first_worker(config, Dispatcher(pool, Policy(2, 3)), print)
