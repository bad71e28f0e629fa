"""Where a secret can be seen by those who do not know it: command lines, and files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path


def token_of(pids: Iterable[int]) -> str:
    """The token that processes of a local run were given; exactly one."""
    found = set()
    for pid in pids:
        for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = line.partition(b"=")
            found |= {value.decode()} if name == b"RAY_AUTH_TOKEN" else set()
    (token,) = found
    return token


def leaks(secret: str, *folders: Path) -> list[str]:
    """Processes of this machine whose command lines show it, and files below ``folders`` that hold it."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert all(any(path.is_relative_to(folder) for path in files) for folder in folders), (
        "an empty folder proves nothing"
    )
    found = []
    for path in (*Path("/proc").glob("[0-9]*/cmdline"), *files):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended, or was removed meanwhile
            found += [str(path)] if secret.encode() in path.read_bytes() else []
    return found
