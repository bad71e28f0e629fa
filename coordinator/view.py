"""What a person sees of a running run, on standard error: a live view in a terminal, plain lines anywhere else.

    Snapshot    what the train loop knows at one moment
    View        the interface that the loop calls; ``make_view`` chooses the implementation
    LiveView    a few lines that redraw themselves (rich), with a thread of their own for the clock
    PlainView   one clean line every few seconds and at every validation; no control codes
    Meter       what both show: smoothed scores, speed and the time left

``update`` may come thousands of times a second: it stores the snapshot, and costs about a microsecond. Nothing here
writes to standard output, which belongs to ``--json``.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.config.run import RunConfig
from cluster.config.sections import SyncAggregator
from coordinator.history import ValidationRecord
from metaworker.scores import MetricName, format_score

Clock = Callable[[], float]
"""Seconds, monotonic."""

SMOOTHING: Final = 0.05
"""Share of the newest version in the scores shown: about the last 20 versions count."""

WINDOW: Final = 20.0
"""Seconds over which speed is measured; at least the last two commits, however slow they are."""

SAMPLE: Final = 0.25
"""Seconds between two samples of the speed."""

WIDTH: Final = 100
"""Largest width of the live view, columns."""

GAP: Final = "   "

ESCAPE: Final = re.compile(r"\x1b\[[0-9;?]*[@-~]")
"""Terminal control sequences: colours, cursor movements."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the train loop knows at one moment."""

    version: int
    loss: float
    """Mean query loss of the last version; NaN before the first."""
    metric: float
    """Accuracy (fraction) or mean squared error of the last version; NaN before the first."""
    episodes: int
    """Episodes that this process has committed so far."""
    workers: int
    """Workers alive."""
    in_flight: int
    """Shards with workers."""
    failures: int
    """Failures of any kind so far."""
    staleness: float | None = None
    """Mean staleness of the last commit, versions; ``None`` in synchronous runs."""
    validation: ValidationRecord | None = None
    """The last validation."""


class View(Protocol):
    """Where a run reports. ``start`` comes before updates, ``stop`` last and also when the run fails.

    Messages may come before ``start`` too.
    """

    def start(self, total: int, summary: str, *, metric: MetricName = "accuracy", version: int = 0) -> None:
        """The run goes from ``version`` to ``total``; ``summary`` is one line on its configuration."""
        ...

    def update(self, snapshot: Snapshot) -> None:
        """Something has changed. Cheap; what is shown follows at the next refresh."""
        ...

    def message(self, text: str) -> None:
        """An event that people should read, for instance a lost worker: one line, shown at once and kept."""
        ...

    def stop(self) -> None:
        """Show the last state and leave the terminal as it was; does nothing the second time."""
        ...


def make_view(log_every: float, stream: TextIO | None = None, clock: Clock = time.monotonic) -> View:
    """The view for ``stream`` (standard error by default): live in a terminal that can, else plain.

    Args:
        log_every: seconds between two plain lines.
        stream: where the view writes.
        clock: seconds, monotonic.
    """
    stream = sys.stderr if stream is None else stream
    console = Console(file=stream, highlight=False)
    # Both are asked: environment variables such as FORCE_COLOR make rich see a terminal in a pipe.
    if stream.isatty() and console.is_interactive:
        return LiveView(console, clock)
    return PlainView(stream, log_every, clock)


def summary_line(config: RunConfig) -> str:
    """One line on what a run does: recipe, learner, episode, version and seed."""
    episode, aggregator = config.episode, config.aggregator
    shape = f"{episode.shot}-shot" if config.regression else f"{episode.way}-way {episode.shot}-shot"
    shards, episodes = config.shards_per_version, config.shard.episodes
    version = f"{shards} × {episodes} episodes a version"
    kind = "synchronous" if isinstance(aggregator, SyncAggregator) else f"staleness ≤ {aggregator.staleness_bound}"
    return " · ".join((config.name, config.learner.type, shape, f"{kind}, {version}", f"seed {config.seed}"))


# --------------------------------------------------------------------------------------------------------------- meter


class Meter:
    """What the snapshots of a run say over time: smoothed loss and metric, episodes a second, seconds left."""

    def __init__(self, total: int, metric: MetricName, version: int, clock: Clock) -> None:
        """A run from ``version`` to ``total`` that starts now."""
        self.total = total
        self.metric_name: MetricName = metric
        self.loss = self.metric = math.nan
        self.last: Snapshot | None = None
        self._clock = clock
        self._first_version = version
        self._start = self._next_sample = clock()
        # (seconds, version, episodes); the first stands for the start, so that speed is known after one commit.
        self._samples = deque([(self._start, version, 0)])

    def add(self, snapshot: Snapshot) -> float:
        """Take a snapshot in; returns the time, so that callers need not ask the clock again."""
        now = self._clock()
        if snapshot.version != self.version:
            share = max(SMOOTHING, 1 / max(1, snapshot.version - self._first_version))
            self.loss = _smooth(self.loss, snapshot.loss, share)
            self.metric = _smooth(self.metric, snapshot.metric, share)
            if now >= self._next_sample:
                self._next_sample = now + SAMPLE
                self._sample(now, snapshot)
        self.last = snapshot
        return now

    @property
    def version(self) -> int:
        """The version reached."""
        return self._first_version if self.last is None else self.last.version

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def tasks_per_second(self) -> float | None:
        """Episodes committed a second over the last ``WINDOW`` seconds; ``None`` before the first commit."""
        return self._per_second(2)

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the last version at the present speed; ``None`` while there is no speed."""
        rate = self._per_second(1)
        return (self.total - self.version) / rate if rate else None

    def _sample(self, now: float, snapshot: Snapshot) -> None:
        samples = self._samples
        samples.append((now, snapshot.version, snapshot.episodes))
        # One sample from before the window stays, so that versions slower than the window have a speed too.
        while samples[1][0] <= now - WINDOW:
            samples.popleft()

    def _per_second(self, column: int) -> float | None:
        first, last = self._samples[0], self._samples[-1]
        if len(self._samples) < 2:
            return None
        # Silence that is long for this run counts, so that a run that hangs does not keep showing its old speed.
        now, gap = self._clock(), (last[0] - first[0]) / (len(self._samples) - 1)
        end = now if now - last[0] > max(WINDOW, 2 * gap) else last[0]
        return (last[column] - first[column]) / (end - first[0]) if end > first[0] else None


def _smooth(old: float, new: float, share: float) -> float:
    if not math.isfinite(new):
        return old
    return old + share * (new - old) if math.isfinite(old) else new


class _Fact(NamedTuple):
    """A value with the words around it."""

    before: str
    value: str
    after: str = ""


def _facts(meter: Meter) -> list[_Fact]:
    """What is known now."""
    name, last, speed = meter.metric_name, meter.last, meter.tasks_per_second
    facts = [_Fact("loss ", format_score("mse", meter.loss)), _Fact(f"{name} ", format_score(name, meter.metric))]
    facts.append(_Fact("", "–" if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}", " tasks/s"))
    if last is not None:
        facts.append(_Fact("", str(last.workers), _plural(" worker", last.workers)))
        facts.append(_Fact("", str(last.in_flight), " in flight"))
        if last.staleness is not None:
            facts.append(_Fact("staleness ", f"{last.staleness:.1f}"))
        if last.failures:
            facts.append(_Fact("", str(last.failures), _plural(" failure", last.failures)))
    return facts


def _validation(metric: MetricName, validation: ValidationRecord) -> _Fact:
    score = format_score(metric, validation.steps[-1], validation.ci95[-1])
    return _Fact("validation ", score, f" at version {validation.version}")


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def format_duration(seconds: float | None) -> str:
    """``0:44``, ``12:07`` or ``3:02:01``."""
    if seconds is None:
        return "–:––"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _one_line(text: str) -> str:
    """``text`` on one line and without control characters, whatever a worker's exception may hold."""
    words = "".join(c if c.isprintable() else " " for c in ESCAPE.sub("", text)).split()
    return " ".join(words)


# --------------------------------------------------------------------------------------------------------------- plain


class PlainView:
    """Plain lines for logs: what the run is, its state every few seconds, every validation and every message."""

    def __init__(self, stream: TextIO, log_every: float, clock: Clock = time.monotonic) -> None:
        """A view that writes to ``stream`` every ``log_every`` seconds."""
        self._stream = stream
        self._log_every = log_every
        self._clock = clock
        self._made = clock()
        self._meter = Meter(0, "accuracy", 0, clock)
        self._due = math.inf
        self._validation: ValidationRecord | None = None
        self._shown: Snapshot | None = None

    def start(self, total: int, summary: str, *, metric: MetricName = "accuracy", version: int = 0) -> None:
        """See ``View``."""
        self._meter = Meter(total, metric, version, self._clock)
        self._due = self._clock() + self._log_every
        self._write(_one_line(summary))

    def update(self, snapshot: Snapshot) -> None:
        """See ``View``."""
        now = self._meter.add(snapshot)
        if snapshot.validation is not self._validation and snapshot.validation is not None:
            self._validation = snapshot.validation
            self._write("".join(_validation(self._meter.metric_name, snapshot.validation)))
        if now >= self._due:
            self._due = now + self._log_every
            self._state(snapshot)

    def message(self, text: str) -> None:
        """See ``View``."""
        self._write(_one_line(text))

    def stop(self) -> None:
        """See ``View``."""
        if self._meter.last is not None and self._meter.last is not self._shown:
            self._state(self._meter.last)
        self._due = math.inf

    def _state(self, snapshot: Snapshot) -> None:
        meter = self._meter
        self._shown = snapshot
        progress = f"version {meter.version}/{meter.total} ({meter.version / meter.total:.0%})"
        seconds = meter.seconds_left
        left = [f"{format_duration(seconds)} left"] if seconds is not None and meter.version < meter.total else []
        self._write("  ".join([progress, *("".join(fact) for fact in _facts(meter)), *left]))

    def _write(self, text: str) -> None:
        self._stream.write(f"[{format_duration(self._clock() - self._made)}] {text}\n")
        self._stream.flush()


# ---------------------------------------------------------------------------------------------------------------- live


class LiveView:
    """A view that redraws itself in a terminal: progress, time left, scores, speed, workers."""

    def __init__(self, console: Console, clock: Clock = time.monotonic, *, auto_refresh: bool = True) -> None:
        """A view on ``console``; without ``auto_refresh`` it is drawn at ``start`` and ``stop`` only."""
        self._console = console
        self._clock = clock
        self._summary = ""
        self._meter = Meter(0, "accuracy", 0, clock)
        self._live = Live(
            console=console,
            get_renderable=lambda: self,
            auto_refresh=auto_refresh,
            refresh_per_second=4,
            # Lines that others print (Ray echoes its workers) go above the view instead of through it; but what is
            # printed to a standard output that leads elsewhere must arrive there.
            redirect_stdout=sys.stdout.isatty(),
        )

    def start(self, total: int, summary: str, *, metric: MetricName = "accuracy", version: int = 0) -> None:
        """See ``View``."""
        self._summary = summary
        self._meter = Meter(total, metric, version, self._clock)
        self._live.start(refresh=True)

    def update(self, snapshot: Snapshot) -> None:
        """See ``View``."""
        self._meter.add(snapshot)

    def message(self, text: str) -> None:
        """See ``View``."""
        line = Text(f"[{format_duration(self._meter.elapsed)}] ", style="dim")
        self._console.print(line.append(_one_line(text), style="not dim yellow"))

    def stop(self) -> None:
        """See ``View``."""
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = min(WIDTH, options.max_width)
        yield Text(self._summary, style="bold", no_wrap=True, overflow="ellipsis")
        yield self._progress(width)
        facts, last = _facts(self._meter), self._meter.last
        if last is not None and last.validation is not None:
            facts.insert(2, _validation(self._meter.metric_name, last.validation))
        yield _packed([_styled(*fact) for fact in facts], width)

    def _progress(self, width: int) -> Table:
        meter = self._meter
        row = Table.grid(padding=(0, 2), expand=True)
        row.width = width
        row.add_column(ratio=1)
        for _ in range(3):
            row.add_column(justify="right", no_wrap=True)
        row.add_row(
            ProgressBar(total=meter.total, completed=meter.version),
            _styled("version ", f"{meter.version}/{meter.total}"),
            _styled("", format_duration(meter.elapsed), " elapsed"),
            _styled("", format_duration(meter.seconds_left if meter.version < meter.total else 0), " left"),
        )
        return row


def _styled(before: str, value: str, after: str = "") -> Text:
    return Text.assemble((before, "dim"), (value, "cyan"), (after, "dim"))


def _packed(items: list[Text], width: int) -> Text:
    """``items`` side by side, broken between items only, on as many lines as ``width`` columns ask for."""
    packed, used = Text(no_wrap=True, overflow="ellipsis"), 0
    for item in items:
        size = cell_len(item.plain)
        if used and used + len(GAP) + size > width:
            packed.append("\n")
            used = 0
        elif used:
            packed.append(GAP)
            used += len(GAP)
        packed.append_text(item)
        used += size
    return packed
