"""Ray, started or joined on purpose: local mode never attaches to a running cluster, and nothing is left behind."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.errors import ClusterError

OBJECT_STORE_BYTES = 1 << 30
"""Object store of a local cluster: room for published parameters and replies, not for data (which is memory-mapped)."""

QUIET = {
    # The mode is decided here and not by Ray's default, which would write a token file into the home folder.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


@contextmanager
def ray_cluster(address: str, cpus: int | None = None) -> Iterator[Mapping[str, float]]:
    """A Ray cluster for the time of the block; yields its free resources.

    Args:
        address: ``local`` starts one on this machine, in a private temporary folder, and stops it afterwards; anything
            else (``auto``, ``HOST:PORT``) joins a running one and leaves it running.
        cpus: CPUs that a local cluster has; this process's own number when not given.

    Raises:
        ClusterError: no cluster at the address, or none could be started.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        raise ClusterError("Ray is initialised in this process already: end that session before starting a run")
    local = address == "local"
    # Ray's socket paths must stay under 108 characters: a short folder, not one under a long TMPDIR.
    folder = tempfile.mkdtemp(prefix="metafleet-", dir="/tmp" if os.path.isdir("/tmp") else None) if local else None
    options: dict[str, Any] = {"address": address, "logging_level": logging.ERROR, "log_to_driver": False}
    if local:
        options |= {
            "num_cpus": cpus or len(os.sched_getaffinity(0)),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": folder,
        }
    try:
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise ClusterError(_why_not(address, error)) from error
        yield ray.available_resources()  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _why_not(address: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if address == "local":
        return f"could not start Ray on this machine: {first}"
    return f"no Ray cluster at {address!r} ({first[:160]}): start one with `ray start --head`, or leave out --address"
