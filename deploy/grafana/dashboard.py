"""The Grafana dashboard, made from the metric catalogue: ``python deploy/grafana/dashboard.py`` writes it.

Panels are data; a query names a metric of ``cluster.metrics_catalogue``, or one of Ray's own. ``$run`` and ``$worker``
choose what is shown. A test compares what is committed with what this makes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
)

from cluster.metrics_catalogue import CATALOGUE, PREFIX

PATH: Final = Path(__file__).parent / "dashboards" / "metafleet.json"
SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
CHOSEN: Final = 'on (job, instance) group_left (run) metafleet_run_info{run=~"$run"}'
"""Restricts samples to the chosen runs, and says whose they are."""
WIDTH, HEIGHT, STAT_HEIGHT = 8, 8, 4


@dataclass(frozen=True)
class Query:
    """An expression, and what its lines are called."""

    expression: str
    legend: str = "{{run}}"


@dataclass(frozen=True)
class Panel:
    """A graph, or the latest value alone where ``latest`` is set."""

    title: str
    meaning: str
    """One sentence."""
    queries: tuple[Query, ...]
    unit: str = "short"
    latest: bool = False
    thresholds: tuple[tuple[float | None, str], ...] = ()
    """Colours from a value on; the first has none."""
    least: float | None = None
    most: float | None = None


def chosen(expression: str) -> str:
    """The expression's samples of the chosen runs."""
    return f"{expression} * {CHOSEN}"


def rate(counter: str) -> str:
    """A counter's growth a second, in the chosen runs."""
    return chosen(f"rate({counter}[$__rate_interval])")


def quantiles(histogram: str) -> tuple[Query, ...]:
    """Median and 99th percentile of a histogram."""
    buckets = f"sum by (run, instance, le) ({rate(f'{histogram}_bucket')})"
    return tuple(
        Query(f"histogram_quantile({q}, {buckets})", f"{{{{run}}}} {name}")
        for q, name in ((0.5, "median"), (0.99, "99 %"))
    )


WORKER: Final = '{worker=~"$worker"}'

ROWS: Final[dict[str, tuple[Panel, ...]]] = {
    "Overview": (
        Panel(
            "Progress",
            "Outer updates made, of those that the run has in all.",
            (Query(f"({chosen('metafleet_version')}) / ({chosen('metafleet_target_versions')})"),),
            unit="percentunit",
            latest=True,
            least=0,
            most=1,
        ),
        Panel(
            "Accuracy of the last validation",
            "Held-out accuracy after the last adaptation step; NaN or nothing before the first validation.",
            (Query(chosen('metafleet_validation_accuracy_ratio{step="last"}')),),
            unit="percentunit",
            latest=True,
        ),
        Panel(
            "Tasks a second",
            "Episodes in applied contributions, a second.",
            (Query(rate("metafleet_episodes_total")),),
            unit="ops",
            latest=True,
        ),
        Panel(
            "Workers",
            "Workers alive, of those that were asked for; red when any is missing.",
            (Query(f"({chosen('metafleet_workers_alive')}) / ({chosen('metafleet_workers_wanted')})"),),
            unit="percentunit",
            latest=True,
            thresholds=((None, "red"), (1, "green")),
        ),
        Panel(
            "Goodput",
            "Shards that counted, of those that were computed, over the whole run.",
            (Query(chosen("metafleet_goodput_ratio")),),
            unit="percentunit",
            latest=True,
            thresholds=((None, "red"), (0.8, "orange"), (0.95, "green")),
        ),
        Panel(
            "Since the last commit",
            "Time since the last outer update; it should stay near the usual time between commits.",
            (Query(chosen("metafleet_commit_age_seconds")),),
            unit="s",
            latest=True,
            thresholds=((None, "green"), (300, "orange"), (900, "red")),
        ),
        Panel(
            "Loss",
            "Mean query loss after adaptation, of each outer update.",
            (Query(chosen("metafleet_loss")),),
        ),
        Panel(
            "Accuracy in training",
            "Mean query accuracy after adaptation, of each outer update.",
            (Query(chosen("metafleet_accuracy_ratio")),),
            unit="percentunit",
            least=0,
            most=1,
        ),
        Panel(
            "Error in training (regression)",
            "Mean squared query error after adaptation, of each outer update of a regression run.",
            (Query(chosen("metafleet_mse")),),
            least=0,
        ),
        Panel(
            "Validation by adaptation step",
            "Held-out accuracy before adaptation and after each step: the gap is what adaptation is worth.",
            (Query(chosen("metafleet_validation_accuracy_ratio"), "{{run}} step {{step}}"),),
            unit="percentunit",
            least=0,
            most=1,
        ),
        Panel(
            "Validation error by adaptation step (regression)",
            "Held-out mean squared error before adaptation and after each step, of regression runs.",
            (Query(chosen("metafleet_validation_mse"), "{{run}} step {{step}}"),),
            least=0,
        ),
        Panel(
            "Gradient norm",
            "Norm of the aggregated meta-gradient before clipping; a jump often precedes a loss that is not finite.",
            (Query(chosen("metafleet_gradient_norm")),),
        ),
        Panel(
            "Tasks a second over time",
            "Episodes in applied contributions, a second.",
            (Query(rate("metafleet_episodes_total")),),
            unit="ops",
            least=0,
        ),
        Panel(
            "Time between commits",
            "Median and 99th percentile of the time from one outer update to the next.",
            quantiles("metafleet_commit_interval_seconds"),
            unit="s",
            least=0,
        ),
        Panel(
            "What the coordinator does",
            "Share of its loop in waiting for workers, moving tensors, aggregating and committing; waiting is healthy.",
            (Query(rate("metafleet_loop_seconds_total"), "{{run}} {{phase}}"),),
            unit="percentunit",
            least=0,
        ),
    ),
    "Workers and stragglers": (
        Panel(
            "Workers over time",
            "Workers alive, workers asked for, and workers below which the run waits for more.",
            (
                Query(chosen("metafleet_workers_alive"), "{{run}} alive"),
                Query(chosen("metafleet_workers_wanted"), "{{run}} wanted"),
                Query(chosen("metafleet_workers_needed"), "{{run}} needed"),
            ),
            least=0,
        ),
        Panel(
            "Workers by node",
            "Workers alive on each node; a node that falls to 0 has lost all of its workers.",
            (Query(chosen("metafleet_node_workers"), "{{run}} {{node}}"),),
            least=0,
        ),
        Panel(
            "Shards a second by worker",
            "Contributions of each worker, a second; a line below the others is a straggler.",
            (Query(rate(f"metafleet_worker_shards_total{WORKER}"), "{{run}} {{worker}}"),),
            unit="ops",
            least=0,
        ),
        Panel(
            "Idle workers",
            "Share of each worker's time in waiting for orders; much of it means a slow coordinator or network.",
            (Query(rate(f"metafleet_worker_idle_seconds_total{WORKER}"), "{{run}} {{worker}}"),),
            unit="percentunit",
            least=0,
            most=1,
            thresholds=((None, "green"), (0.2, "orange"), (0.5, "red")),
        ),
        Panel(
            "Where workers' time goes",
            "How many workers build episodes, adapt, and wait, on average.",
            tuple(
                Query(
                    f"sum by (run, instance) ({rate(f'metafleet_worker_{what}_seconds_total')})", f"{{{{run}}}} {what}"
                )
                for what in ("sample", "adapt", "idle")
            ),
            least=0,
        ),
        Panel(
            "Shard latency",
            "Median and 99th percentile from a shard's dispatch to its contribution; a wide gap means stragglers.",
            quantiles("metafleet_shard_latency_seconds"),
            unit="s",
            least=0,
        ),
        Panel(
            "Shards in flight",
            "Orders that are with workers now.",
            (Query(chosen("metafleet_in_flight_shards")),),
            least=0,
        ),
        Panel(
            "Staleness",
            "Median and 99th percentile of how many versions old the contributions of asynchronous runs are.",
            quantiles("metafleet_staleness_versions"),
            least=0,
        ),
        Panel(
            "Weight of stale contributions",
            "What the average applied contribution counts; below 1 staleness costs.",
            (Query(f"({rate('metafleet_shard_weight_total')}) / ({rate('metafleet_shards_total')})"),),
            unit="percentunit",
            least=0,
            most=1,
            thresholds=((None, "red"), (0.3, "orange"), (0.6, "green")),
        ),
        Panel(
            "GPU utilisation",
            "Share of time in which each worker's GPU was busy; empty on CPUs.",
            (Query(chosen(f"metafleet_worker_gpu_utilisation_ratio{WORKER}"), "{{run}} {{worker}}"),),
            unit="percentunit",
            least=0,
            most=1,
        ),
    ),
    "Data, memory and object store": (
        Panel(
            "Published",
            "Meta-parameters and learner state put into the object store, bytes a second.",
            (Query(rate("metafleet_published_bytes_total")),),
            unit="Bps",
            least=0,
        ),
        Panel(
            "Received",
            "Gradients and proposals that came from workers, bytes a second.",
            (Query(rate("metafleet_received_bytes_total")),),
            unit="Bps",
            least=0,
        ),
        Panel(
            "Object store in use",
            "Share of each node's object store in use (Ray's own metric); near 1 objects are spilled to disk.",
            (
                Query(
                    "ray_object_store_used_memory / (ray_object_store_used_memory + ray_object_store_available_memory)",
                    "{{instance}}",
                ),
            ),
            unit="percentunit",
            least=0,
            most=1,
            thresholds=((None, "green"), (0.8, "orange"), (0.9, "red")),
        ),
        Panel(
            "Memory of workers",
            "Largest resident memory of each worker process so far.",
            (Query(chosen(f"metafleet_worker_resident_memory_max_bytes{WORKER}"), "{{run}} {{worker}}"),),
            unit="bytes",
            least=0,
        ),
        Panel(
            "Memory of the coordinator",
            "Resident memory of the coordinator's process; it should be flat.",
            (Query(chosen("process_resident_memory_bytes")),),
            unit="bytes",
            least=0,
        ),
        Panel(
            "Memory of GPUs",
            "Largest memory of tensors on each worker's GPU so far; empty on CPUs.",
            (Query(chosen(f"metafleet_worker_gpu_memory_max_bytes{WORKER}"), "{{run}} {{worker}}"),),
            unit="bytes",
            least=0,
        ),
        Panel(
            "Memory of nodes",
            "Share of each node's memory in use (Ray's own metric).",
            (Query("ray_node_mem_used / ray_node_mem_total", "{{instance}}"),),
            unit="percentunit",
            least=0,
            most=1,
            thresholds=((None, "green"), (0.85, "orange"), (0.95, "red")),
        ),
        Panel(
            "Checkpoint",
            "Size of the last checkpoint.",
            (Query(chosen("metafleet_checkpoint_bytes")),),
            unit="bytes",
            least=0,
        ),
    ),
    "Failures": (
        Panel(
            "Failures by kind",
            "Failed attempts and refused contributions a minute, by kind; all of them were dealt with.",
            (Query(f"60 * ({rate('metafleet_failures_total')})", "{{run}} {{kind}}"),),
            unit="cpm",
            least=0,
        ),
        Panel(
            "Lost shards",
            "Shards computed for nothing, over the whole run, by what they were lost to.",
            (Query(chosen("metafleet_lost_shards"), "{{run}} {{cause}}"),),
            least=0,
        ),
        Panel(
            "Lost time",
            "Workers' seconds on shards that did not count, over the whole run, by what they were lost to.",
            (Query(chosen("metafleet_lost_worker_seconds"), "{{run}} {{cause}}"),),
            unit="s",
            least=0,
        ),
        Panel(
            "Since the last checkpoint",
            "What a crash now would have to recompute.",
            (Query(chosen("metafleet_checkpoint_age_seconds")),),
            unit="s",
            least=0,
            thresholds=((None, "green"), (1800, "orange"), (3600, "red")),
        ),
        Panel(
            "Software",
            "Versions of the software of each coordinator.",
            (Query(chosen("metafleet_build_info"), "{{run}}: metafleet {{metafleet}}, torch {{torch}}, ray {{ray}}"),),
        ),
    ),
}


def dashboard() -> str:
    """The dashboard as JSON."""
    board = (
        build.Dashboard("Metafleet")
        .uid("metafleet")
        .description("Meta-training runs: are they learning, how fast, are they healthy.")
        .tags(["metafleet", "ray"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .editable()
        .with_variable(build.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_variable("run", "Run", "label_values(metafleet_run_info, run)"))
        .with_variable(_variable("worker", "Worker", "label_values(metafleet_worker_shards_total, worker)"))
    )
    number = count(1)
    for title, panels in ROWS.items():
        board = board.with_row(build.Row(title).id(next(number)))
        for panel in panels:
            board = board.with_panel(_panel(panel).id(next(number)))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def names(expression: str) -> set[str]:
    """The metrics that an expression reads."""
    return set(re.findall(r"\b(?:metafleet|ray|process)_\w+", re.sub(r'"[^"]*"', "", expression)))


def known() -> set[str]:
    """Names of samples that the catalogue promises."""
    histograms = {m.exposed for m in CATALOGUE if m.kind == "histogram"}
    parts = {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    return {m.exposed for m in CATALOGUE} - histograms | parts


def _variable(name: str, label: str, query: str) -> build.QueryVariable:
    return (
        build.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(SOURCE)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(text="All", value="$__all"))
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    )


def _panel(panel: Panel) -> stat.Panel | timeseries.Panel:
    found: stat.Panel | timeseries.Panel
    if panel.latest:
        found = stat.Panel().color_mode(BigValueColorMode.VALUE).span(WIDTH // 2).height(STAT_HEIGHT)
    else:
        found = (
            timeseries.Panel()
            .line_width(1)
            .fill_opacity(5)
            .legend(
                common.VizLegendOptions()
                .display_mode(LegendDisplayMode.LIST)
                .placement(LegendPlacement.BOTTOM)
                .show_legend(True)
            )
            .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
            .span(WIDTH)
            .height(HEIGHT)
        )
    found = found.title(panel.title).description(panel.meaning).datasource(SOURCE).unit(panel.unit)
    found = found.thresholds(_thresholds(panel.thresholds or ((None, "green"),)))
    if panel.thresholds and isinstance(found, timeseries.Panel):
        found = found.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED))
    if panel.least is not None:
        found = found.min(panel.least)
    if panel.most is not None:
        found = found.max(panel.most)
    for at, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(chr(ord("A") + at))
        found = found.with_target(target.instant() if panel.latest else target.range())
    return found


def _thresholds(steps: Sequence[tuple[float | None, str]]) -> build.ThresholdsConfig:
    found = [Threshold(value=value, color=colour) for value, colour in steps]
    return build.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(found)


if __name__ == "__main__":
    assert all(name.startswith(PREFIX) for name in known())
    PATH.write_text(dashboard(), "utf-8")
    print(f"written to {PATH}")
