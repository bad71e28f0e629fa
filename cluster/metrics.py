"""The metrics of a run (``metrics_catalogue``) as they are counted and served.

All live in a registry of their own, never in the process-wide one. Statistics of workers arrive with their
contributions; workers serve nothing themselves. A value that does not exist yet (the loss before the first commit) is
NaN.
"""

from __future__ import annotations

import errno
import math
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.openmetrics.exposition import generate_latest

from cluster.device import versions
from cluster.durable import write_atomically
from cluster.errors import PortError
from cluster.messages import Contribution
from cluster.metrics_catalogue import BUILD_LABELS, CATALOGUE, NODES, SLOTS, FailureKind, Metric, Phase

TASKS: dict[bool, Literal["classification", "regression"]] = {False: "classification", True: "regression"}


@dataclass(frozen=True)
class RunInfo:
    """What run the metrics are of: the labels of ``metafleet_run_info``."""

    run: str
    """Name of the run directory."""
    recipe: str
    learner: str
    aggregator: str
    seed: int
    config_digest: str
    """SHA-256 (hex) of the configuration's result half."""


class Metrics:
    """The metrics of one coordinator process, updated by the train loop and served over HTTP on demand.

    Methods cost a few microseconds each and may be called from one thread while others scrape.
    """

    def __init__(self, info: RunInfo, *, regression: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """Fresh metrics of a run; ``clock`` gives seconds."""
        # For the whole process: series of creation times would double what a scrape costs, and Prometheus ignores them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._clock = clock
        self._server: tuple[WSGIServer, threading.Thread] | None = None
        self._score = "mse" if regression else "accuracy_ratio"
        wanted = [metric for metric in CATALOGUE if metric.task in (None, TASKS[regression])]
        self._of: dict[str, Any] = {metric.name: _made(metric, self.registry) for metric in wanted}
        self._of["run"].info({name: str(value) for name, value in asdict(info).items()})
        software = versions() | {"python": platform.python_version()}
        self._of["build"].info({name: software.get(name, "") for name in BUILD_LABELS})
        for name in ("loss", self._score, "gradient_norm", "checkpoint_bytes"):
            self._of[name].set(math.nan)
        self._of["goodput_ratio"].set(1.0)
        # Made at once, so that every value is scraped as 0 before it happens and rates see the first one.
        for label, metric in (
            *((k, "failures") for k in get_args(FailureKind)),
            *((p, "loop_seconds") for p in get_args(Phase)),
        ):
            self._of[metric].labels(label)
        self._commit_at = self._checkpoint_at = clock()
        self._of["commit_age_seconds"].set_function(lambda: self._clock() - self._commit_at)
        self._of["checkpoint_age_seconds"].set_function(lambda: self._clock() - self._checkpoint_at)
        self._most_workers = 0
        self._nodes: dict[str, int] = {}
        self._named: set[str] = set()
        self._phases: list[Phase] = []
        self._phase_at = 0.0

    # ------------------------------------------------------------------------------------------- what the loop calls

    def contribution(self, contribution: Contribution, staleness: int, seconds: float, weight: float) -> None:
        """A contribution has arrived.

        Args:
            contribution: as the worker sent it.
            staleness: versions.
            seconds: from its dispatch to its arrival.
            weight: what it counts in the update; 0 if it is not applied (stale, non-finite, a duplicate), which leaves
                it out of episodes, shards and the staleness histogram.
        """
        arrays = (contribution.gradient, *contribution.proposals.values())
        self._of["received_bytes"].inc(sum(array.nbytes for array in arrays))
        self._of["shard_latency_seconds"].observe(seconds)
        self._worker(contribution)
        if weight > 0:
            self._of["episodes"].inc(contribution.episodes)
            self._of["shards"].inc()
            self._of["shard_weight"].inc(weight)
            self._of["staleness_versions"].observe(staleness)

    def version(self, version: int, target: int) -> None:
        """The run begins, or goes on, at ``version`` and ends at ``target``."""
        self._commit_at = self._clock()
        self._of["version"].set(version)
        self._of["target_versions"].set(target)

    @property
    def unfinished(self) -> bool:
        """Whether a run has begun that is not at its last version."""
        version, target = (self.registry.get_sample_value(f"metafleet_{n}") for n in ("version", "target_versions"))
        return (version or 0) < (target or 0)

    def commit(self, version: int, loss: float, metric: float, gradient_norm: float) -> None:
        """The outer update that made ``version``; ``metric`` is the accuracy (fraction) or the mean squared error."""
        before, self._commit_at = self._commit_at, self._clock()
        self._of["commit_interval_seconds"].observe(self._commit_at - before)
        self._of["commits"].inc()
        for name, value in (
            ("version", version),
            ("loss", loss),
            (self._score, metric),
            ("gradient_norm", gradient_norm),
        ):
            self._of[name].set(value)

    def validating(self, validations: int) -> None:
        """So many validations are under way now."""
        self._of["open_validations"].set(validations)

    def validation(self, steps: Sequence[float]) -> None:
        """A validation gave these accuracies (fractions) or mean squared errors, before and after each inner step."""
        for step in shown_steps(len(steps)):
            self._of[f"validation_{self._score}"].labels(str(step)).set(steps[step])
        self._of[f"validation_{self._score}"].labels("last").set(steps[-1])

    def failure(self, kind: FailureKind) -> None:
        """An attempt failed, or its contribution was refused.

        Raises:
            KeyError: no such kind.
        """
        if kind not in get_args(FailureKind):
            raise KeyError(kind)
        self._of["failures"].labels(kind).inc()

    def goodput(self, share: float, lost: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        """How much of what was computed counted, and what was lost to which cause, since the run began."""
        self._of["goodput_ratio"].set(share)
        for cause, count in lost.items():
            self._of["lost_shards"].labels(cause).set(count)
            self._of["lost_worker_seconds"].labels(cause).set(seconds.get(cause, 0.0))

    def in_flight(self, shards: int) -> None:
        """So many shards are with workers now."""
        self._of["in_flight_shards"].set(shards)

    def workers(
        self, alive: int, wanted: int | None = None, nodes: Mapping[str, int] | None = None, *, needed: int = 1
    ) -> None:
        """So many workers are alive now, of so many that were asked for; on these nodes; so many there must be."""
        if nodes is not None and nodes != self._nodes:
            self._nodes = dict(nodes)
            counts = dict.fromkeys(self._named, 0)
            for node, count in sorted(nodes.items()):
                label = node if node in counts or len(counts) < NODES else "other"
                counts[label] = counts.get(label, 0) + count
            for label, count in counts.items():
                self._of["node_workers"].labels(label).set(count)
            self._named = set(counts)
        self._most_workers = max(self._most_workers, alive)
        self._of["workers_alive"].set(alive)
        self._of["workers_wanted"].set(self._most_workers if wanted is None else wanted)
        self._of["workers_needed"].set(needed)

    def checkpoint(self, size: int) -> None:
        """A checkpoint of ``size`` bytes is whole on disk; its age starts now."""
        self._checkpoint_at = self._clock()
        self._of["checkpoint_bytes"].set(size)

    def published(self, size: int) -> None:
        """A version of ``size`` bytes was put into the object store."""
        self._of["published_bytes"].inc(size)

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """What is done inside counts as ``phase``, and no longer as the phase around it."""
        self._charge()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._phases.pop()

    def moved(self, seconds: float) -> None:
        """So much of the phase at hand was fetching tensors."""
        self._of["loop_seconds"].labels("transfer").inc(seconds)
        self._phase_at += seconds

    # -------------------------------------------------------------------------------------------------- the endpoint

    def serve(self, host: str, port: int) -> tuple[str, int]:
        """Serve the metrics at ``http://host:port/metrics`` from a thread of this process, until ``close``.

        Args:
            host: the address to bind to, and no other; localhost unless others shall scrape.
            port: 0 takes a free one.

        Returns:
            The host and port that are bound.

        Raises:
            PortError: the port is taken or not allowed, or the host is no address of this machine.
        """
        try:
            server, thread = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise PortError(_why_not(host, port, error)) from error
        server.set_app(_as_text(server.get_app()))
        self._server = server, thread
        bound = server.server_address
        return str(bound[0]), int(bound[1])

    def close(self) -> None:
        """Stop serving and free the port; does nothing when nothing is served."""
        if self._server is not None:
            server, thread = self._server
            self._server = None
            server.shutdown()
            thread.join()
            server.server_close()

    def save(self, path: Path) -> None:
        """Write what a scrape would give now as an OpenMetrics file, whole or not at all."""
        text: bytes = generate_latest(self.registry)  # type: ignore[no-untyped-call]
        write_atomically(path, lambda file: file.write(text))

    # ------------------------------------------------------------------------------------------------------- inside

    def _worker(self, contribution: Contribution) -> None:
        """Count what a worker says with its contribution."""
        slot, statistics = contribution.worker, contribution.statistics
        label = str(slot) if slot < SLOTS else f"{SLOTS}+"
        self._of["worker_shards"].labels(label).inc()
        for name in ("sample", "adapt", "idle"):
            self._of[f"worker_{name}_seconds"].labels(label).inc(getattr(statistics, f"{name}_seconds"))
        self._of["worker_resident_memory_max_bytes"].labels(label).set(statistics.peak_bytes)
        if statistics.gpu_peak_bytes is not None:
            self._of["worker_gpu_memory_max_bytes"].labels(label).set(statistics.gpu_peak_bytes)
        if statistics.gpu_utilisation is not None:
            self._of["worker_gpu_utilisation_ratio"].labels(label).set(statistics.gpu_utilisation)

    def _charge(self) -> None:
        """Count the time since the last charge as that of the innermost phase."""
        now = self._clock()
        if self._phases:
            self._of["loop_seconds"].labels(self._phases[-1]).inc(max(0.0, now - self._phase_at))
        self._phase_at = now


def shown_steps(count: int) -> list[int]:
    """Which of ``count`` adaptation steps are shown: 0 and the series 1, 2, 5, 10 …."""
    series = [digit * 10**power for power in range(9) for digit in (1, 2, 5)]
    return [0, *(step for step in series if step < count)]


def _made(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram | Info:
    name, text = f"metafleet_{metric.name}", metric.meaning
    match metric.kind:
        case "info":
            return Info(name, text, registry=registry)
        case "counter":
            return Counter(name, text, metric.labels, registry=registry)
        case "gauge":
            return Gauge(name, text, metric.labels, registry=registry)
        case "histogram":
            return Histogram(name, text, metric.labels, buckets=metric.buckets, registry=registry)


def _as_text(app: Any) -> Any:
    """A WSGI application that answers in Prometheus' text format whoever asks.

    OpenMetrics, which Prometheus prefers, has nothing more to say here and takes two thirds longer to write.
    """

    def plain(environ: dict[str, Any], start_response: Any) -> Any:
        return app({name: value for name, value in environ.items() if name != "HTTP_ACCEPT"}, start_response)

    return plain


def _why_not(host: str, port: int, error: OSError) -> str:
    """One line on why ``host:port`` cannot be bound and what to change."""
    if error.errno == errno.EADDRINUSE:
        return (
            f"metrics port {port} on {host} is taken: choose another with --execution.metrics_port, 0 takes a free one,"
            " or turn the endpoint off with --execution.metrics false"
        )
    if error.errno == errno.EACCES:
        return f"metrics port {port} on {host} is not allowed for this user: choose one above 1023, or 0 for a free one"
    return (
        f"metrics cannot be served on {host}:{port} ({error.strerror or error}): "
        "set --execution.metrics_host to an address of this machine, for instance 127.0.0.1"
    )
