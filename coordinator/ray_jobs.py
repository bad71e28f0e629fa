"""Ray's job server, by Ray's own client: what it answers as plain data, what it refuses as one line.

The client finds and sends the authentication token by itself; nothing here reads it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from cluster.errors import ClusterError, ConfigError
from cluster.ray_runtime import CONNECT_SECONDS
from coordinator.submit import JobRequest, JobState

_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that Ray's client takes for the address, whatever address it is given."""

SILENCE = 60.0
"""Seconds after which a log in which nothing appears is asked for again: a connection can be lost without a sign."""

_WHERE = ": give the http://HOST:PORT of the cluster's dashboard, which `ray start --head` prints"
_TOKEN = "RAY_AUTH_MODE=token, and the cluster's token in ~/.ray/auth_token or in a file that RAY_AUTH_TOKEN_PATH names"


class RayJobServer:
    """The job server of the Ray cluster at ``address``, http://HOST:PORT."""

    def __init__(self, address: str) -> None:
        """Connect.

        Raises:
            ConfigError: no such address.
            ClusterError: nothing there, no job server, another Ray than here, or a token is missing or wrong.
        """
        self.address = address
        _refuse_absent(address, _WHERE)
        for name in _OVERRIDING:
            os.environ.pop(name, None)
        import ray
        from ray.job_submission import JobSubmissionClient

        for module in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.ERROR)
        with self._refusals(_WHERE):
            self._client = JobSubmissionClient(address)
        version = self._client._server_ray_version
        if version != ray.__version__:
            raise ClusterError(
                f"the cluster at {address} runs Ray {version}, and this machine has Ray {ray.__version__}: install "
                f"ray=={version} here, or submit from a machine of the cluster"
            )

    def submit(self, request: JobRequest, package: Path) -> None:
        """Send the package and start the job.

        Raises:
            ClusterError: refused, for instance because there is such a job already.
        """
        with self._refusals():
            self._client.submit_job(
                entrypoint=request.entrypoint,
                submission_id=request.submission_id,
                runtime_env={"working_dir": str(package), "env_vars": dict(request.environment)},
                metadata=dict(request.metadata),
            )

    def state(self, job: str) -> JobState:
        """What has become of a job.

        Raises:
            ClusterError: no such job, or no answer.
        """
        _refuse_absent(self.address)
        with self._refusals():
            info = self._client.get_job_info(job)
        return JobState(str(info.status.value), info.driver_exit_code, info.message or "")

    def stop(self, job: str) -> None:
        """Ask a job to end; it has its grace period for that.

        Raises:
            ClusterError: no such job, or no answer.
        """
        with self._refusals():
            self._client.stop_job(job)

    def tail(self, job: str, show: Callable[[str], None]) -> bool:
        """Show a job's log from its beginning as it is written.

        Returns:
            Whether the server ended it; not, if nothing came for ``SILENCE`` seconds: then it can be asked for again.

        Raises:
            ClusterError: the connection is lost.
        """
        from aiohttp import ClientError

        async def follow() -> bool:
            texts: Any = self._client.tail_job_logs(job)
            try:
                while True:
                    try:
                        text = await asyncio.wait_for(anext(texts, None), SILENCE)
                    except TimeoutError:
                        return False
                    except (ClientError, OSError, RuntimeError) as error:
                        raise ClusterError(f"the connection to {self.address} is lost") from error
                    if text is None:
                        return True
                    show(text)
            finally:
                await texts.aclose()

        return asyncio.run(follow())

    @contextmanager
    def _refusals(self, advice: str = "") -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(_unauthenticated(self.address, str(error))) from error
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ClusterError(_why(self.address, error, advice)) from error


def _refuse_absent(address: str, advice: str = "") -> None:
    """Refuse an address where nothing listens; Ray's client would wait for minutes.

    Args:
        address: of a job server.
        advice: ends the error where there is none.

    Raises:
        ConfigError: not the form of an address.
        ClusterError: no connection.
    """
    try:
        parts = urlsplit(address)
        if "@" in parts.netloc:  # and not a word of it in the message
            raise ConfigError("--address has a user name in it: Ray's job server takes none, it may want a token")
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (KeyError, ValueError):
        parts = None
    if parts is None or not parts.hostname:
        raise ConfigError(
            f"--address {address} is no job server's address: give http://HOST:PORT of the cluster's dashboard, "
            "port 8265 if it was not changed"
        )
    if parts.scheme in getproxies() and not proxy_bypass(parts.hostname):
        return  # then only the proxy can tell
    try:
        socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(_why(address, error, advice)) from error


def _unauthenticated(address: str, answer: str) -> str:
    if "Missing" in answer or "required" in answer or "couldn't find" in answer:
        return f"the cluster at {address} wants an authentication token: set {_TOKEN}"
    return f"the cluster at {address} refuses this authentication token: set {_TOKEN}"


def _why(address: str, error: Exception, advice: str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "already exists" in text:
        return "the cluster has a job of that --submission-id already: give another one, or none"
    if "code 413" in text:
        return f"the cluster at {address} takes no package of that size: leave something out by --exclude PATTERN"
    if isinstance(error, RuntimeError) and "does not exist" in text:
        return f"the cluster at {address} knows no such job"
    if isinstance(error, OSError) and not isinstance(error, ValueError):
        return f"no Ray job server at {address} ({text[:160]}){advice}"
    return f"what answers at {address} is no Ray job server, or refuses: {text[:300]}"
