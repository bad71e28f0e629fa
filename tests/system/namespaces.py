"""Hosts on one machine: network namespaces with addresses of their own, joined by a bridge that can cut one off.

The bridge lives in a namespace too, so that nothing appears in the machine's own network and the end of the namespaces
is the end of everything. A host is cut off by taking its port out of the bridge: packets vanish, and its own link stays
up, as with a fault somewhere on the way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

NET = "10.79.0"
NSENTER = shutil.which("nsenter")


class NoNamespacesError(Exception):
    """This machine, or this user's rights, do not allow them."""


class Hosts:
    """Hosts with addresses of one network, for the time of a ``with`` block.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._names = [f"metafleet-{os.getpid()}-{host}" for host in range(count)]
        self._switch = f"metafleet-{os.getpid()}-switch"

    def __enter__(self) -> Hosts:
        """Make them.

        Raises:
            NoNamespacesError: they cannot be made here.
        """
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._remove()

    @staticmethod
    def address(host: int) -> str:
        """Of a host, counted from 0."""
        return f"{NET}.{host + 1}"

    def inside(self, host: int) -> tuple[str, ...]:
        """The words before those of a command that is to run on the host.

        Not ``ip netns exec``, which would hide the control groups below /sys.
        """
        assert NSENTER is not None
        return NSENTER, f"--net=/run/netns/{self._names[host]}"

    def cut(self, host: int) -> None:
        """Let no packet through to the host or from it."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "nomaster")

    def heal(self, host: int) -> None:
        """Let its packets through again."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "master", "bridge")

    def processes(self) -> list[int]:
        """Ids of the processes that run on hosts."""
        return [int(pid) for name in self._names for pid in _ip("netns", "pids", name).split()]

    def left(self) -> list[str]:
        """Those of its namespaces that still are."""
        return [name for name in (self._switch, *self._names) if Path("/run/netns", name).exists()]

    def _make(self) -> None:
        if NSENTER is None:
            raise NoNamespacesError("there is no nsenter")
        for name in (self._switch, *self._names):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for host, name in enumerate(self._names):
            peer = ("peer", "name", "eth0", "netns", name)
            _ip("-n", self._switch, "link", "add", f"port{host}", "type", "veth", *peer)
            _ip("-n", self._switch, "link", "set", f"port{host}", "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            # Ray learns its address from the route that a packet to the Internet would take.
            _ip("-n", name, "route", "add", "default", "dev", "eth0")

    def _remove(self) -> None:
        for name in self.left():
            _ip("netns", "delete", name)


def _ip(*words: str) -> str:
    """What the command `ip` answers.

    Raises:
        NoNamespacesError: it cannot do that here.
    """
    try:
        return subprocess.run(("ip", *words), check=True, capture_output=True, text=True, timeout=20).stdout
    except FileNotFoundError:
        raise NoNamespacesError("there is no command ip") from None
    except subprocess.CalledProcessError as error:
        raise NoNamespacesError(f"`ip {' '.join(words)}`: {error.stderr.strip()}") from None
