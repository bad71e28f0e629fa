"""The live and the plain view: what they show, how seldom, and that they keep off standard output."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
from rich.console import Console

from cluster.config.run import RunConfig
from cluster.config.sections import MLP, AsyncAggregator, EpisodeShape, SinusoidData
from coordinator.history import ValidationRecord
from coordinator.view import LiveView, Meter, PlainView, Snapshot, View, make_view, summary_line

SUMMARY = "glyphs-maml · maml · seed 0"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def snapshot(version: int, **changes: object) -> Snapshot:
    base = Snapshot(version=version, loss=0.4, metric=0.85, episodes=version * 32, workers=4, in_flight=8, failures=0)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def drawn(view: LiveView, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width, record=True, force_terminal=True)
    console.print(view)
    return console.export_text().splitlines()


# --------------------------------------------------------------------------------------------------------------- plain


def test_plain_lines_come_every_few_seconds_however_often_there_is_news() -> None:
    clock, stream = Clock(), io.StringIO()
    view = PlainView(stream, log_every=5.0, clock=clock)
    view.start(total=2000, summary=SUMMARY)
    for version in range(1, 1201):
        clock.now = 1000 + version / 100
        view.update(snapshot(version))
    lines = stream.getvalue().splitlines()
    assert lines[0] == f"[0:00] {SUMMARY}"
    assert lines[1] == (
        "[0:05] version 500/2000 (25%)  loss 0.400  accuracy 85.0 %  3,200 tasks/s  4 workers  8 in flight  0:15 left"
    )
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "[0:05] version 500/2000 (25%)",
        "[0:10] version 1000/2000 (50%)",
    ]
    view.stop()
    assert stream.getvalue().splitlines()[3].startswith("[0:12] version 1200/2000 (60%)")
    view.stop()
    assert len(stream.getvalue().splitlines()) == 4


def test_a_validation_gets_a_line_at_once_and_only_once() -> None:
    clock, stream = Clock(), io.StringIO()
    view = PlainView(stream, log_every=1e9, clock=clock)
    view.start(total=2000, summary=SUMMARY)
    validation = ValidationRecord(500, (0.2, 0.831), (0.01, 0.0092))
    for version in (499, 500, 501):
        view.update(snapshot(version, validation=None if version < 500 else validation))
    assert stream.getvalue().splitlines()[1:] == ["[0:00] validation 83.1 ± 0.9 % at version 500"]


def test_plain_lines_hold_no_control_codes_whatever_a_message_holds() -> None:
    stream = io.StringIO()
    view = PlainView(stream, log_every=5.0, clock=Clock())
    view.start(total=10, summary=SUMMARY)
    view.message("worker 2 lost (\x1b[31mSIGKILL\x1b[0m\n  Traceback\r\n\x07), replaced")
    view.update(snapshot(3, staleness=1.25, failures=1, workers=1))
    view.stop()
    text = stream.getvalue()
    assert all(c.isprintable() for c in text.replace("\n", ""))
    lines = text.splitlines()
    assert lines[1] == "[0:00] worker 2 lost (SIGKILL Traceback ), replaced"
    assert "1 worker  8 in flight  staleness 1.2  1 failure" in lines[2]
    assert len(lines) == 3


def test_a_message_may_come_before_the_start() -> None:
    stream, terminal = io.StringIO(), Terminal()
    PlainView(stream, log_every=5.0, clock=Clock()).message("preparing the glyphs")
    LiveView(Console(file=terminal, force_terminal=True), Clock()).message("preparing the glyphs")
    assert stream.getvalue() == "[0:00] preparing the glyphs\n"
    assert "preparing the glyphs" in terminal.getvalue()


def test_regression_shows_mse() -> None:
    stream = io.StringIO()
    view = PlainView(stream, log_every=5.0, clock=Clock())
    view.start(total=10, summary=SUMMARY, metric="mse")
    view.update(snapshot(3, metric=0.3521))
    view.stop()
    assert "mse 0.352" in stream.getvalue()
    assert "accuracy" not in stream.getvalue()


# ---------------------------------------------------------------------------------------------------------------- live


def test_the_live_view_shows_everything_the_issue_asks_for() -> None:
    clock = Clock()
    view = LiveView(Console(file=io.StringIO(), force_terminal=True), clock, auto_refresh=False)
    view.start(total=2000, summary=SUMMARY)
    clock.now += 50
    validation = ValidationRecord(1000, (0.2, 0.831), (0.01, 0.0092))
    view.update(snapshot(1250, staleness=1.3, failures=2, validation=validation))
    summary, progress, *facts = drawn(view)
    view.stop()
    assert summary.rstrip() == SUMMARY
    assert re.search(r"━+.*  version 1250/2000  0:50 elapsed  0:30 left", progress)
    assert "\n".join(line.rstrip() for line in facts) == (
        "loss 0.400   accuracy 85.0 %   validation 83.1 ± 0.9 % at version 1000   800 tasks/s   4 workers\n"
        "8 in flight   staleness 1.3   2 failures"
    )


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_live_view_fits_any_terminal_and_breaks_between_facts_only(width: int) -> None:
    view = LiveView(Console(file=io.StringIO(), force_terminal=True), Clock(), auto_refresh=False)
    view.start(total=2000, summary=SUMMARY * 5)
    view.update(snapshot(1250, staleness=1.3, failures=2))
    lines = drawn(view, width)
    view.stop()
    assert all(len(line) <= width for line in lines)
    facts = [fact for line in lines[2:] for fact in re.split(" {3,}", line.strip())]
    assert facts[:3] == ["loss 0.400", "accuracy 85.0 %", "– tasks/s"]
    assert facts[3:] == ["4 workers", "8 in flight", "staleness 1.3", "2 failures"]


def test_messages_stay_above_the_live_view_and_are_not_taken_for_markup() -> None:
    terminal = Terminal()
    view = LiveView(Console(file=terminal, force_terminal=True, width=100), Clock(), auto_refresh=False)
    view.start(total=10, summary=SUMMARY)
    view.message("worker 2 lost ([red]SIGKILL[/red]),\nreplaced")
    view.update(snapshot(10))
    view.stop()
    view.stop()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "[0:00] worker 2 lost ([red]SIGKILL[/red]), replaced" in shown
    assert shown.index("replaced") < shown.rindex("version 10/10")
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_the_live_view_redraws_by_itself() -> None:
    view = LiveView(Console(file=Terminal(), force_terminal=True), Clock())
    view.start(total=10, summary=SUMMARY)
    assert view._live._refresh_thread is not None
    view.stop()
    assert view._live._refresh_thread is None


# --------------------------------------------------------------------------------------------------------------- choice


def test_a_terminal_gets_the_live_view_and_all_else_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(make_view(5.0, Terminal()), LiveView)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(make_view(5.0, io.StringIO()), PlainView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view(5.0, Terminal()), PlainView)


@pytest.mark.parametrize("terminal", [False, True])
def test_standard_output_stays_empty(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    view: View = make_view(0.0, Terminal()) if terminal else make_view(0.0)
    view.start(total=2, summary=SUMMARY)
    print('{"from": "someone else"}')
    view.message("worker 0 lost")
    view.update(snapshot(1))
    view.stop()
    captured = capsys.readouterr()
    assert captured.out == '{"from": "someone else"}\n'
    assert terminal or "worker 0 lost" in captured.err


# --------------------------------------------------------------------------------------------------------------- meter


def test_the_meter_measures_the_present_speed_and_not_the_past() -> None:
    clock = Clock()
    meter = Meter(total=100_000, metric="accuracy", version=0, clock=clock)
    assert meter.tasks_per_second is None
    assert meter.seconds_left is None
    for version in range(1, 1001):  # 10 versions a second for 100 s, then 100 a second for 30 s
        clock.now += 0.1
        meter.add(snapshot(version))
    assert meter.tasks_per_second == pytest.approx(320)
    for version in range(1001, 4001):
        clock.now += 0.01
        meter.add(snapshot(version))
    assert meter.tasks_per_second == pytest.approx(3200)
    assert meter.seconds_left == pytest.approx(960)
    assert meter.elapsed == pytest.approx(130)
    assert len(meter._samples) < 100


def test_slow_versions_have_a_speed_and_a_run_that_hangs_loses_it() -> None:
    clock = Clock()
    meter = Meter(total=10, metric="accuracy", version=0, clock=clock)
    for version in range(1, 4):
        clock.now += 60
        meter.add(snapshot(version))
    clock.now += 90
    assert meter.tasks_per_second == pytest.approx(32 / 60)
    assert meter.seconds_left == pytest.approx(7 * 60)
    clock.now += 6000
    assert meter.tasks_per_second < 32 / 600


def test_a_resumed_run_measures_from_where_it_resumed() -> None:
    clock = Clock()
    meter = Meter(total=2000, metric="accuracy", version=1000, clock=clock)
    assert meter.version == 1000
    clock.now += 10
    meter.add(snapshot(1100, episodes=3200))
    assert meter.tasks_per_second == pytest.approx(320)
    assert meter.seconds_left == pytest.approx(90)


def test_scores_are_smoothed_over_versions_and_survive_a_nan() -> None:
    meter = Meter(total=2000, metric="accuracy", version=0, clock=Clock())
    for version in range(1, 11):
        meter.add(snapshot(version, loss=float(version)))
        meter.add(snapshot(version, loss=1e9))  # news of the same version is no new score
    assert meter.loss == pytest.approx(5.5)  # the plain mean while there are few versions
    meter.add(snapshot(11, loss=float("nan")))
    assert meter.loss == pytest.approx(5.5)
    for version in range(12, 300):
        meter.add(snapshot(version, loss=2.0))
    assert meter.loss == pytest.approx(2.0, abs=1e-4)


def test_the_summary_says_what_runs() -> None:
    assert summary_line(RunConfig(name="glyphs-maml", seed=3)) == (
        "glyphs-maml · maml · 5-way 1-shot · synchronous, 4 × 8 episodes a version · seed 3"
    )
    regression = RunConfig(
        data=SinusoidData(),
        model=MLP(),
        episode=EpisodeShape(way=1, shot=10, query=10),
        aggregator=AsyncAggregator(staleness_bound=4, buffer=2),
    )
    assert summary_line(regression) == "custom · maml · 10-shot · staleness ≤ 4, 2 × 8 episodes a version · seed 0"
