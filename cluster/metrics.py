"""The catalogue of Prometheus metrics of a run, and the endpoint that serves them.

All metrics live in a registry of their own, never in the process-wide one. Labels are bounded: ``kind`` by
``FailureKind``, ``worker`` by ``SLOTS`` slots and one label for all slots above them. Statistics of workers arrive with
their contributions; workers serve nothing themselves. A value that does not exist yet (the loss before the first
commit) is NaN.

| metric (prefix ``metafleet_``)       | type      | meaning |
| ------------------------------------ | --------- | ------- |
| ``run_info``                         | info      | recipe, learner, aggregator, seed, digest of the result half |
| ``episodes_total``                   | counter   | episodes in applied contributions |
| ``shards_total``                     | counter   | contributions applied |
| ``shard_weight_total``               | counter   | sum of their weights; below ``shards_total`` if staleness costs |
| ``commits_total``, ``version``       | counter, gauge | outer updates of this process; of the whole run |
| ``loss``, ``accuracy_ratio`` or ``mse``, ``gradient_norm`` | gauge | of the last commit |
| ``validation_accuracy_ratio`` or ``validation_mse`` | gauge | of the last validation, after adaptation |
| ``staleness_versions``               | histogram | staleness of applied contributions |
| ``shard_latency_seconds``            | histogram | from a shard's dispatch to its contribution |
| ``in_flight_shards``, ``workers_alive`` | gauge  | at this moment |
| ``failures_total{kind}``             | counter   | by ``FailureKind`` |
| ``checkpoint_age_seconds``           | gauge     | since the last checkpoint, or since the start before any |
| ``checkpoint_bytes``                 | gauge     | size of the last checkpoint |
| ``published_bytes_total``            | counter   | meta-parameters and learner state put into the object store |
| ``received_bytes_total``             | counter   | gradients and proposals received, applied or not |
| ``worker_shards_total{worker}``      | counter   | contributions received, applied or not |
| ``worker_adapt_seconds_total{worker}``, ``worker_sample_…``, ``worker_idle_…`` | counter | where workers' time goes |
| ``worker_resident_memory_max_bytes{worker}`` | gauge | largest resident memory of the worker process so far |
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal, get_args
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from cluster.errors import PortError
from cluster.messages import Contribution

FailureKind = Literal[
    "worker_lost", "shard_error", "nonfinite", "stale", "duplicate_mismatch", "deadline", "unreachable", "refused"
]
"""What can go wrong with an attempt without ending the run; the values of the label ``kind``."""

SLOTS: Final = 256
"""Worker slots that have a label of their own; all higher ones share ``256+``, so that the label stays bounded."""

STALENESS_BUCKETS: Final = (0, 1, 2, 4, 8, 16, 32, 64, 128)
"""Upper bounds, versions."""

LATENCY_BUCKETS: Final = tuple(digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5))
"""Upper bounds from 1 ms to 500 s, three a decade."""


@dataclass(frozen=True)
class RunInfo:
    """What run the metrics are of: the labels of ``metafleet_run_info``."""

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

    def __init__(
        self,
        info: RunInfo,
        *,
        regression: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Fresh metrics of a run; ``clock`` gives seconds."""
        self.registry = CollectorRegistry()
        self._clock = clock
        self._checkpoint_at = clock()
        self._server: tuple[WSGIServer, threading.Thread] | None = None
        labels = {name: str(value) for name, value in asdict(info).items()}
        Info("metafleet_run", "What run this is.", registry=self.registry).info(labels)
        self._make_progress("mse" if regression else "accuracy_ratio")
        self._make_execution()
        self._make_workers()

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
        self._received_bytes.inc(sum(array.nbytes for array in arrays))
        self._shard_latency.observe(seconds)
        self._worker(contribution.worker).add(contribution)
        if weight > 0:
            self._episodes.inc(contribution.episodes)
            self._shards.inc()
            self._shard_weight.inc(weight)
            self._staleness.observe(staleness)

    def version(self, version: int) -> None:
        """The run is at ``version``."""
        self._version.set(version)

    def commit(self, version: int, loss: float, metric: float, gradient_norm: float) -> None:
        """The outer update that made ``version``; ``metric`` is the accuracy (fraction) or the mean squared error."""
        self._commits.inc()
        self._version.set(version)
        self._loss.set(loss)
        self._metric.set(metric)
        self._gradient_norm.set(gradient_norm)

    def validation(self, metric: float) -> None:
        """A validation gave this accuracy (fraction) or mean squared error after adaptation."""
        self._validation.set(metric)

    def failure(self, kind: FailureKind) -> None:
        """An attempt failed, or its contribution was refused."""
        self._failures[kind].inc()

    def goodput(self, share: float, lost: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        """How much of what was computed counted, and what was lost to which cause, since the run began."""
        self._goodput.set(share)
        for cause, count in lost.items():
            self._lost_shards.labels(cause).set(count)
            self._lost_seconds.labels(cause).set(seconds.get(cause, 0.0))

    def in_flight(self, shards: int) -> None:
        """So many shards are with workers now."""
        self._in_flight.set(shards)

    def workers(self, alive: int) -> None:
        """So many workers are alive now."""
        self._workers_alive.set(alive)

    def checkpoint(self, size: int) -> None:
        """A checkpoint of ``size`` bytes is whole on disk; its age starts now."""
        self._checkpoint_at = self._clock()
        self._checkpoint_bytes.set(size)

    def published(self, size: int) -> None:
        """A version of ``size`` bytes was put into the object store."""
        self._published_bytes.inc(size)

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

    # ------------------------------------------------------------------------------------------------- the catalogue

    def _make_progress(self, metric: str) -> None:
        self._episodes = self._counter("episodes", "Episodes in applied contributions.")
        self._shards = self._counter("shards", "Contributions applied.")
        self._shard_weight = self._counter("shard_weight", "Sum of the weights of applied contributions.")
        self._commits = self._counter("commits", "Outer updates made by this process.")
        self._version = self._gauge("version", "Outer updates of the whole run.")
        self._loss = self._gauge("loss", "Mean query loss after adaptation, at the last commit.", math.nan)
        self._metric = self._gauge(metric, "Mean query score after adaptation, at the last commit.", math.nan)
        self._gradient_norm = self._gauge("gradient_norm", "Norm of the last aggregated meta-gradient.", math.nan)
        self._validation = self._gauge(f"validation_{metric}", "Score of the last validation.", math.nan)

    def _make_execution(self) -> None:
        self._staleness = Histogram(
            "metafleet_staleness_versions",
            "Staleness of applied contributions.",
            buckets=STALENESS_BUCKETS,
            registry=self.registry,
        )
        self._shard_latency = Histogram(
            "metafleet_shard_latency_seconds",
            "From a shard's dispatch to its contribution.",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._in_flight = self._gauge("in_flight_shards", "Shards with workers now.")
        self._workers_alive = self._gauge("workers_alive", "Workers alive now.")
        failures = self._counter("failures", "Failed attempts and refused contributions.", "kind")
        # Made at once, so that every kind is scraped as 0 before it happens and rates see the first failure.
        self._failures = {kind: failures.labels(kind) for kind in get_args(FailureKind)}
        self._goodput = self._gauge("goodput_ratio", "Shards that counted, of those that were computed.", 1.0)
        about = "for nothing, over the whole run, by what they were lost to."
        names = ("lost_shards", f"Shards computed {about}"), ("lost_worker_seconds", f"Seconds of workers {about}")
        self._lost_shards, self._lost_seconds = (
            Gauge(f"metafleet_{name}", text, ["cause"], registry=self.registry) for name, text in names
        )
        age = self._gauge("checkpoint_age_seconds", "Since the last checkpoint, or since the start before any.")
        age.set_function(lambda: self._clock() - self._checkpoint_at)
        self._checkpoint_bytes = self._gauge("checkpoint_bytes", "Size of the last checkpoint.", math.nan)
        self._published_bytes = self._counter("published_bytes", "Put into the object store for workers.")
        self._received_bytes = self._counter("received_bytes", "Gradients and proposals received from workers.")

    def _make_workers(self) -> None:
        self._worker_shards = self._counter("worker_shards", "Contributions received from the worker.", "worker")
        self._worker_adapt = self._counter("worker_adapt_seconds", "Time in adaptation and meta-gradients.", "worker")
        self._worker_sample = self._counter("worker_sample_seconds", "Time in building episodes.", "worker")
        self._worker_idle = self._counter("worker_idle_seconds", "Time waiting for orders.", "worker")
        self._worker_memory = Gauge(
            "metafleet_worker_resident_memory_max_bytes",
            "Largest resident memory of the worker process so far.",
            ["worker"],
            registry=self.registry,
        )
        self._workers: dict[str, _WorkerMetrics] = {}

    def _worker(self, slot: int) -> _WorkerMetrics:
        label = str(slot) if slot < SLOTS else f"{SLOTS}+"
        if label not in self._workers:
            self._workers[label] = _WorkerMetrics(
                shards=self._worker_shards.labels(label),
                adapt=self._worker_adapt.labels(label),
                sample=self._worker_sample.labels(label),
                idle=self._worker_idle.labels(label),
                memory=self._worker_memory.labels(label),
            )
        return self._workers[label]

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"metafleet_{name}", meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, initial: float = 0.0) -> Gauge:
        gauge = Gauge(f"metafleet_{name}", meaning, registry=self.registry)
        gauge.set(initial)
        return gauge


@dataclass(frozen=True)
class _WorkerMetrics:
    """The metrics under one value of the label ``worker``."""

    shards: Counter
    adapt: Counter
    sample: Counter
    idle: Counter
    memory: Gauge

    def add(self, contribution: Contribution) -> None:
        statistics = contribution.statistics
        self.shards.inc()
        self.adapt.inc(statistics.adapt_seconds)
        self.sample.inc(statistics.sample_seconds)
        self.idle.inc(statistics.idle_seconds)
        self.memory.set(statistics.peak_bytes)


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
