"""Every Prometheus metric of a run, as data: what is served, documented (docs/metrics.md) and drawn (deploy/grafana).

Names follow Prometheus' conventions: base units, ``_total`` on counters, ``_ratio`` for fractions. Labels are bounded.
``python -m cluster.metrics_catalogue`` prints docs/metrics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

FailureKind = Literal[
    "worker_lost", "shard_error", "nonfinite", "stale", "duplicate_mismatch", "deadline", "unreachable", "refused"
]
"""What can go wrong with an attempt without ending the run; the values of the label ``kind``."""

Phase = Literal["wait", "transfer", "reduce", "commit"]
"""What the coordinator's loop does; the values of the label ``phase``."""

PREFIX: Final = "metafleet_"

SLOTS: Final = 96
"""Worker slots that have a label of their own; all higher ones share ``96+``, so that a scrape stays short."""

NODES: Final = 96
"""Nodes that have a label of their own."""

STALENESS_BUCKETS: Final = (0, 1, 2, 4, 8, 16, 32, 64, 128)
"""Upper bounds, versions."""

SECONDS_BUCKETS: Final = tuple(digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5))
"""Upper bounds from 1 ms to 500 s, three a decade."""


@dataclass(frozen=True)
class Metric:
    """One metric family."""

    name: str
    """Without prefix and without ``_total``."""
    kind: Literal["counter", "gauge", "histogram", "info"]
    meaning: str
    """One sentence."""
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    task: Literal["classification", "regression"] | None = None
    """Runs that have it; all if none is named."""

    @property
    def exposed(self) -> str:
        """The name of its samples (of a histogram, what ``_bucket``, ``_sum`` and ``_count`` are appended to)."""
        suffix = {"counter": "_total", "info": "_info"}.get(self.kind, "")
        return f"{PREFIX}{self.name}{suffix}"


RUN_LABELS: Final = ("run", "recipe", "learner", "aggregator", "seed", "config_digest")
BUILD_LABELS: Final = ("metafleet", "torch", "ray", "python")

SECTIONS: Final[dict[str, tuple[Metric, ...]]] = {
    "What runs": (
        Metric("run", "info", "The run: the name of its directory and what it trains.", RUN_LABELS),
        Metric("build", "info", "Versions of the software of the coordinator.", BUILD_LABELS),
    ),
    "Is it learning": (
        Metric("version", "gauge", "Outer updates of the whole run."),
        Metric("target_versions", "gauge", "Outer updates after which the run ends."),
        Metric("loss", "gauge", "Mean query loss after adaptation, at the last commit."),
        Metric(
            "accuracy_ratio",
            "gauge",
            "Mean query accuracy after adaptation, at the last commit.",
            task="classification",
        ),
        Metric("mse", "gauge", "Mean squared query error after adaptation, at the last commit.", task="regression"),
        Metric(
            "validation_accuracy_ratio",
            "gauge",
            "Accuracy of the last validation, by adaptation step: 0, the series 1, 2, 5 …, and last.",
            ("step",),
            task="classification",
        ),
        Metric(
            "validation_mse",
            "gauge",
            "Mean squared error of the last validation, by adaptation step: 0, the series 1, 2, 5 …, and last.",
            ("step",),
            task="regression",
        ),
        Metric("gradient_norm", "gauge", "Norm of the last aggregated meta-gradient, before clipping."),
    ),
    "How fast": (
        Metric("episodes", "counter", "Episodes in applied contributions."),
        Metric("shards", "counter", "Contributions applied."),
        Metric(
            "shard_weight", "counter", "Sum of the weights of applied contributions; below shards if staleness costs."
        ),
        Metric("commits", "counter", "Outer updates made by this process."),
        Metric("commit_interval_seconds", "histogram", "Time between commits.", buckets=SECONDS_BUCKETS),
        Metric("commit_age_seconds", "gauge", "Time since the last commit, or since the start before any."),
        Metric(
            "shard_latency_seconds",
            "histogram",
            "From a shard's dispatch to its contribution.",
            buckets=SECONDS_BUCKETS,
        ),
        Metric(
            "loop_seconds",
            "counter",
            "The coordinator's time: waiting for workers, fetching and publishing tensors (transfer), aggregating "
            "(reduce), and making versions (commit).",
            ("phase",),
        ),
        Metric("in_flight_shards", "gauge", "Shards with workers now."),
        Metric("open_validations", "gauge", "Validations under way; they go before shards."),
        Metric("staleness_versions", "histogram", "Staleness of applied contributions.", buckets=STALENESS_BUCKETS),
    ),
    "Is it healthy": (
        Metric("workers_alive", "gauge", "Workers alive now."),
        Metric("workers_wanted", "gauge", "Workers asked for, or else the most that there have been at once."),
        Metric("workers_needed", "gauge", "Workers below which the run waits for more and computes nothing."),
        Metric("node_workers", "gauge", "Workers alive now on each node that has had any.", ("node",)),
        Metric("failures", "counter", "Failed attempts and refused contributions.", ("kind",)),
        Metric("goodput_ratio", "gauge", "Shards that counted, of those that were computed, over the whole run."),
        Metric(
            "lost_shards",
            "gauge",
            "Shards computed for nothing, over the whole run, by what they were lost to.",
            ("cause",),
        ),
        Metric(
            "lost_worker_seconds",
            "gauge",
            "Workers' time on shards that did not count, over the whole run, by what they were lost to.",
            ("cause",),
        ),
        Metric("checkpoint_age_seconds", "gauge", "Time since the last checkpoint, or since the start before any."),
        Metric("checkpoint_bytes", "gauge", "Size of the last checkpoint."),
    ),
    "Data and memory": (
        Metric(
            "published_bytes", "counter", "Meta-parameters and learner state put into the object store for workers."
        ),
        Metric("received_bytes", "counter", "Gradients and proposals received from workers, applied or not."),
    ),
    "Workers": (
        Metric("worker_shards", "counter", "Contributions received from the worker, applied or not.", ("worker",)),
        Metric("worker_sample_seconds", "counter", "The worker's time in building episodes.", ("worker",)),
        Metric("worker_adapt_seconds", "counter", "The worker's time in adaptation and meta-gradients.", ("worker",)),
        Metric("worker_idle_seconds", "counter", "The worker's time waiting for orders.", ("worker",)),
        Metric(
            "worker_resident_memory_max_bytes",
            "gauge",
            "Largest resident memory of the worker process so far.",
            ("worker",),
        ),
        Metric(
            "worker_gpu_memory_max_bytes",
            "gauge",
            "Largest memory of tensors on the worker's GPU so far, if it has one.",
            ("worker",),
        ),
        Metric(
            "worker_gpu_utilisation_ratio",
            "gauge",
            "Share of time in which the worker's GPU was busy, lately, where the driver tells.",
            ("worker",),
        ),
    ),
}

CATALOGUE: Final = tuple(metric for section in SECTIONS.values() for metric in section)

LABELS: Final = {
    "run": "name of the run directory; on Kubernetes that of the RayJob, and the directory's is `exported_run`",
    "step": "0, 1, 2, 5, 10 … and `last`",
    "phase": ", ".join(f"`{phase}`" for phase in get_args(Phase)),
    "kind": ", ".join(f"`{kind}`" for kind in get_args(FailureKind)),
    "cause": "what shards were lost to: a dozen values, see docs/failure-model.md",
    "node": f"host name and the beginning of Ray's node id; `other` beyond {NODES} nodes",
    "worker": f"the worker's slot, 0 to {SLOTS - 1}, and `{SLOTS}+` for all above",
}
"""What the values of labels may be."""


def document() -> str:
    """The text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Written by `python -m cluster.metrics_catalogue`; not to be edited. The coordinator serves these, workers",
        "nothing. A gauge of what does not exist yet (the loss before the first commit) is NaN. Beside these are the",
        "standard `process_…` metrics of the coordinator (memory, CPU, open files); the object store, nodes and GPUs",
        "as such are in Ray's own metrics (`ray_…`).",
    ]
    for title, metrics in SECTIONS.items():
        lines += ["", f"## {title}", "", "| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
        for m in metrics:
            labels = ", ".join(f"`{label}`" for label in m.labels)
            only = f" Runs of {m.task} alone." if m.task else ""
            lines.append(f"| `{m.exposed}` | {m.kind} | {labels} | {m.meaning}{only} |")
    lines += ["", "## Labels", "", "| label | values |", "| --- | --- |"]
    lines += [f"| `{name}` | {values} |" for name, values in LABELS.items()]
    lines += [
        "",
        f"Histograms of seconds have buckets 1, 2, 5 a decade, {SECONDS_BUCKETS[0]:g} to {SECONDS_BUCKETS[-1]:g} s.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")
