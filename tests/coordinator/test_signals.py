"""SIGINT and SIGTERM in this process: what they ask for, and when they do not wait."""

from __future__ import annotations

import os
import signal

import pytest

from coordinator.signals import Signals


class SilentView:
    """A view that only knows whether it was stopped."""

    def __init__(self) -> None:
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def signals() -> Signals:
    return Signals(SilentView())  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_loop_is_asked_and_everything_else_ends(signals: Signals, number: signal.Signals) -> None:
    with signals:
        with signals.patience():
            signal.raise_signal(number)
        assert signals.stop.signal == number
    with Signals(SilentView()) as others, pytest.raises(SystemExit) as stopped:  # type: ignore[arg-type]
        signal.raise_signal(number)
    assert stopped.value.code == 128 + number == 128 + (others.stop.signal or 0)


def test_a_second_sigint_does_not_wait(signals: Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    view = signals._view
    with signals, signals.patience():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert codes == [] and not view.stopped  # type: ignore[attr-defined]
        signal.raise_signal(signal.SIGINT)
    assert codes == [128 + signal.SIGINT] and view.stopped  # type: ignore[attr-defined]
    assert signals.stop.signal == signal.SIGTERM


def test_a_second_sigterm_does_not_disturb_the_end(signals: Signals) -> None:
    with signals:
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


def test_handlers_are_what_they_were(signals: Signals) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with signals:
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
