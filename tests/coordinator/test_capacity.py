"""How many workers the resources allow, and what is said about it."""

from __future__ import annotations

import pytest

from cluster.config.run import RunConfig
from cluster.config.sections import Execution
from cluster.errors import ClusterError
from coordinator.capacity import affordable_workers, say_workers


def asking(**execution: float) -> RunConfig:
    return RunConfig(threads=2, execution=Execution.model_validate(execution))


@pytest.mark.parametrize(
    ("execution", "free", "workers"),
    [
        ({}, {"CPU": 4.0}, 4),
        ({"workers": 3}, {"CPU": 4.0}, 3),
        ({"workers": 9}, {"CPU": 4.0}, 4),
        ({"cpus_per_worker": 0.1}, {"CPU": 0.3}, 3),
        ({"cpus_per_worker": 0.5, "gpus_per_worker": 0.25}, {"CPU": 4.0, "GPU": 1.0}, 4),
        ({"gpus_per_worker": 1}, {"CPU": 8.0, "GPU": 2.0}, 2),
    ],
)
def test_workers_fit_the_free_resources(execution: dict[str, float], free: dict[str, float], workers: int) -> None:
    assert affordable_workers(asking(**execution), free) == workers


def test_resources_for_no_worker_are_refused() -> None:
    with pytest.raises(ClusterError, match="it needs 1 CPUs and 1 GPUs, free are 8 CPUs and 0 GPUs"):
        affordable_workers(asking(gpus_per_worker=1), {"CPU": 8.0})


def test_fewer_workers_and_more_threads_than_cores_are_said() -> None:
    said: list[str] = []
    say_workers(asking(workers=9, cpus_per_worker=2), 4, said.append)
    say_workers(asking(workers=2, cpus_per_worker=1), 2, said.append)
    say_workers(asking(workers=9, cpus_per_worker=2), 0, said.append, grows=True)
    fewer, threads, growing = said
    assert growing == "there is room for 0 of 9 workers now: the autoscaler is to add nodes for the rest"
    assert fewer == "9 workers were asked for, the free resources allow 4: going on with 4"
    assert "2 threads and reserves 1 CPUs" in threads and threads.endswith("give --execution.cpus_per_worker 2")
