"""Ray, started or joined on purpose: local mode never attaches to a running cluster, and nothing is left behind."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.errors import ClusterError

OBJECT_STORE_BYTES = 1 << 30
"""Object store of a local cluster: room for published parameters and replies, not for data (which is memory-mapped)."""

CONNECT_SECONDS = 5.0
"""How long a cluster's head may take to accept a connection before it counts as absent."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
UNSAID = re.compile(
    "^(A worker died or was killed|The node with node id|Raylet is terminated|There are tasks with infeasible resource)"
)
"""What Ray would print to standard output, whatever ``log_to_driver`` says: lost workers and workers without room. The
dispatcher reports both, in one line each."""
LOCAL = {
    # Processes that Ray starts in advance would never be used: workers get an environment of their own.
    "RAY_prestart_worker_first_driver": "0",
    # There is no dashboard that would show each call.
    "RAY_task_events_report_interval_ms": "0",
}
JOINED = {
    # Attempts (of 40 s) to talk to whatever listens at the address; Ray's own limit is 20 of them.
    "RAY_gcs_server_port_wait_time_s": "1",
}

EXPLAINED = (ConnectionError, RuntimeError, ValueError, TimeoutError)
"""What `ray.init` raises where there is no cluster, or none that wants us."""

NODE_GROUP = "ray.io/node-group"
"""Label of nodes that KubeRay or Ray's launcher has started."""

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where a container sees its own limits."""

FOLDER, OWNER = "metafleet-ray-", "owner"
"""Name of a local cluster's temporary folder, and of the file in it that its driver holds locked while it lives."""


@dataclass(frozen=True)
class ClusterResources:
    """What a cluster has, by Ray's names, for instance CPU and GPU."""

    total: Callable[[], Mapping[str, float]]
    """What all its nodes have together now."""
    free: Callable[[], Mapping[str, float]]
    """What nobody has reserved; a second or so after it was given back."""
    grows: bool = False
    """Whether nodes are added for workers that wait for them: it has an autoscaler."""


@contextmanager
def ray_cluster(address: str, cpus: int | None = None) -> Iterator[ClusterResources]:
    """A Ray cluster for the time of the block; yields its resources. SIGTERM unwinds the block.

    Args:
        address: ``local`` starts one on this machine, in a private temporary folder, and stops it afterwards; anything
            else (``auto``, ``HOST:PORT``) joins a running one and leaves it running.
        cpus: CPUs that a local cluster has; ``usable_cpus`` when not given.

    Raises:
        ClusterError: no cluster at the address, or none could be started.
        SystemExit: 128 + SIGTERM, on that signal, where the caller has not installed a handler of its own.
    """
    import ray

    if ray.is_initialized():
        raise ClusterError("Ray is initialised in this process already: end that session before starting a run")
    local = address == "local"
    settings = _authentication(local) | QUIET | (LOCAL if local else JOINED)
    folders = _temporary_folder() if local else nullcontext()
    with _settings(settings), _unsaid(), folders as folder, _sigterm() as after_init:
        if address == "auto":
            address = os.environ.get("RAY_ADDRESS") or address
        if re.fullmatch(r".+:\d+", address):
            node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            _refuse_foreign(address, _refuse_absent(address, node))
        own: dict[str, Any] = {
            "num_cpus": cpus or usable_cpus(),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(folder),
        }
        try:
            _init(address, **(own if local else {}))
            after_init()
            nodes = [] if local else ray.nodes()  # type: ignore[no-untyped-call]
            _refuse_private(nodes)
            yield ClusterResources(ray.cluster_resources, ray.available_resources, _autoscaled(nodes))
        finally:
            ray.shutdown()


def _init(address: str, **options: Any) -> None:
    """``ray.init``, whose errors become one line.

    Raises:
        ClusterError: no cluster at the address, or none could be started.
        SystemExit: 128 + SIGTERM, on that signal.
    """
    import ray

    try:
        with _held_stderr(EXPLAINED), _on_loopback() if address == "local" else nullcontext():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except EXPLAINED as error:
        raise ClusterError(_why_not(address, error)) from error
    except SystemExit as stop:
        # Ray's own handler of SIGTERM exits with the bare number.
        raise SystemExit(128 + signal.SIGTERM if stop.code == signal.SIGTERM else stop.code) from stop


@contextmanager
def _settings(wanted: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the time of the block, those that the user has set apart; Ray hears of both changes."""
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        _reread()
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        _reread()


@contextmanager
def _unsaid() -> Iterator[None]:
    """Ray keeps what is ``UNSAID`` to itself for the time of the block; its own setting is read at its import alone."""
    from ray._private.ray_logging import stdout_deduplicator

    before, stdout_deduplicator.skip_re = stdout_deduplicator.skip_re, UNSAID
    try:
        yield
    finally:
        stdout_deduplicator.skip_re = before


def _reread() -> None:
    """Make Ray read its settings again: it does so when it is imported, which may have been long ago."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    # Afterwards: a thread that still has to send something would miss its token.
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray that is started meanwhile has the address 127.0.0.1 and binds its ports to that alone.

    So it does by default where clusters are not supported. `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER` says the same, but only
    to a process that has not imported Ray yet; and `ray.init` turns 127.0.0.1 as an address into the outer one.
    """
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _held_stderr(explained: tuple[type[Exception], ...]) -> Iterator[None]:
    """Hold back what native code writes to stderr meanwhile, and drop it where an ``explained`` error says it all."""
    with tempfile.TemporaryFile() as held:
        kept = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except explained:
            held.truncate(0)
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            os.write(2, held.read())


def _authentication(local: bool) -> dict[str, str]:
    """Who may talk to the cluster, unless the user's environment decides.

    Other users of this machine reach a local cluster's ports: only who has the token is listened to, and it lives in
    the environment of this user's processes alone. The mode is always decided here and never by Ray's default, which
    would write a token file into the home folder.
    """
    if "RAY_AUTH_MODE" in os.environ or not local:
        return {"RAY_AUTH_MODE": "disabled"}
    if "RAY_AUTH_TOKEN_PATH" in os.environ:
        return {"RAY_AUTH_MODE": "token"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, and its container's quota where there is one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS
    return min(allowed, _quota() or sys.maxsize)


def _quota() -> int | None:
    """CPUs that the control group grants, of either version, rounded up; ``None`` for no limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):
            words = " ".join((CONTROL_GROUP / name).read_text(encoding="ascii") for name in names).split()
            quota, period = words[0], int(words[1])
            return None if quota in ("max", "-1") else -(-int(quota) // period)
    return None


def _refuse_absent(address: str, node: str) -> str:
    """Refuse an address where nothing listens; Ray itself would go on trying for a quarter of an hour.

    Args:
        address: HOST:PORT.
        node: this machine's address, into which Ray turns localhost.

    Returns:
        HOST:PORT where something does.

    Raises:
        ClusterError: no connection.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    reasons = []
    for candidate in (host, node) if host in ("127.0.0.1", "localhost", "::1") else (host,):
        try:
            socket.create_connection((candidate, int(port)), timeout=CONNECT_SECONDS).close()
            return f"[{candidate}]:{port}" if ":" in candidate else f"{candidate}:{port}"
        except OSError as error:
            reasons.append(error)
    raise ClusterError(_why_not(address, reasons[0]))


def _refuse_foreign(address: str, reachable: str) -> None:
    """Refuse what is no head of a Ray cluster, or one that wants another token: Ray would ask it for 40 seconds.

    Args:
        address: as the user gave it.
        reachable: HOST:PORT.

    Raises:
        ClusterError: it is one.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RpcError

    try:
        with _held_stderr((AuthenticationError, RpcError)):
            GcsClient(address=reachable)
    except (AuthenticationError, RpcError) as error:
        raise ClusterError(_why_not(address, error)) from error


def _refuse_private(nodes: Iterable[Mapping[str, Any]]) -> None:
    """Refuse the local cluster of another run, which ``auto`` may have found: it ends with that run.

    Raises:
        ClusterError: it is one.
    """
    if any(f"/{FOLDER}" in str(node.get("RayletSocketName")) for node in nodes):
        raise ClusterError(
            "the only Ray cluster found is another run's own, which ends with it: start one with `ray start --head`, "
            "give its HOST:PORT, or leave out --address"
        )


def _autoscaled(nodes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether an autoscaler manages a cluster, as far as its nodes tell; on KubeRay it may be switched off."""
    return any(node["Alive"] and NODE_GROUP in node["Labels"] for node in nodes)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for a local cluster, removed afterwards, with those that killed drivers have left."""
    # Ray's socket paths must stay under 108 characters: a short folder, not one under a long TMPDIR.
    parent = Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix=FOLDER, dir=parent))
    with open(folder / f"{OWNER}.new", "x") as owner:
        # Locked before it has its name: nobody takes the folder of a driver that starts for one that is dead.
        fcntl.flock(owner, fcntl.LOCK_EX)
        os.rename(owner.name, folder / OWNER)
        _sweep(parent)
        try:
            yield folder
        finally:
            _remove(folder)


def _sweep(parent: Path) -> None:
    """Remove the folders of this user's drivers that no longer live."""
    for owner in parent.glob(f"{FOLDER}*/{OWNER}"):
        # Another user's, a living driver's, or one that someone else is removing.
        with suppress(OSError), owner.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(owner.parent)


def _remove(folder: Path) -> None:
    """Remove a cluster's folder, its owner's file last: if a dying process still writes, a later sweep finds it."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != OWNER:
            entry.unlink(missing_ok=True)
    if [entry.name for entry in folder.iterdir()] == [OWNER]:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _sigterm() -> Iterator[Any]:
    """Keeps SIGTERM what it was, or makes it unwind the stack; yields what to call after ``ray.init`` replaced it."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.getsignal(signal.SIGTERM)
    during = before if callable(before) else _terminate
    signal.signal(signal.SIGTERM, during)
    try:
        yield lambda: signal.signal(signal.SIGTERM, during)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _why_not(address: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if address == "local":
        return f"could not start Ray on this machine: {first}"
    if first.startswith("Version mismatch"):
        both = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
        versions = " and ".join(f"Ray {ray} with Python {python}" for ray, python in both)
        return f"the cluster and this process differ ({versions}): run with the same versions of both, to the patch"
    # At HOST:PORT something listens: its authentication may be another one than ours.
    absent = address == "auto" and isinstance(error, OSError)
    token = "" if absent else "; one with tokens needs RAY_AUTH_MODE=token, and another run's own cannot be joined"
    start = "start one with `ray start --head`, or leave out --address"
    return f"no Ray cluster at {address!r} ({first[:160]}): {start}{token}"
