"""How Prometheus finds a run whose endpoint has any port: a file_sd file that is there while the run lives."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.durable import write_atomically
from cluster.errors import ConfigError


@contextmanager
def announced(
    folder: Path, host: str, port: int, run: Path, failed: Callable[[], bool] = lambda: False
) -> Iterator[Path]:
    """Announce ``host:port`` in ``folder``, and take it back at the end; gives the file.

    Args:
        folder: is made if it is missing; Prometheus reads ``folder/*.json``.
        host: as bound; where that is every address, this machine's name is announced.
        port: as bound.
        run: the run directory, a whole path. Its name is every sample's label ``run``; the path tells the files of runs
            apart, so that one that is resumed takes over what a killed driver has left, and no other run does.
        failed: whether an error that ends the block is one to be told of. Then the announcement stays, and Prometheus
            finds that nobody answers.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    reachable = _machine() if host in ("0.0.0.0", "::", "") else host
    target = f"[{reachable}]:{port}" if ":" in reachable else f"{reachable}:{port}"
    own = hashlib.sha256(str(run).encode()).hexdigest()[:8]
    path = folder / f"metafleet-{socket.gethostname()}-{run.name}-{own}.json"
    text = json.dumps([{"targets": [target], "labels": {"run": run.name}}], indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise ConfigError(
            f"execution.metrics_discovery {folder}: {error.strerror}; give a folder that this user may write to"
        ) from error
    stays = False
    try:
        yield path
    except Exception:
        stays = failed()
        raise
    finally:
        if not stays:
            path.unlink(missing_ok=True)


def _machine() -> str:
    """This machine's name to others; some machines call themselves localhost in full."""
    name = socket.getfqdn()
    return socket.gethostname() if name.partition(".")[0] == "localhost" else name
