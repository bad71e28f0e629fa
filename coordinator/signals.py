"""SIGINT and SIGTERM of a driver: a request to the train loop while it runs, the end of everything else at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from coordinator.train import StopRequest
from coordinator.view import View


class Signals:
    """SIGINT and SIGTERM for the time of a run: they unwind the stack, so that everything is closed.

    Within ``patience`` the first one is a request instead, which the train loop carries out. The second SIGINT ends the
    process at once, whatever it does.
    """

    def __init__(self, view: View) -> None:
        self.stop = StopRequest()
        self._view = view
        self._patient = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """For the time of the block, whoever runs it looks at ``stop`` by itself."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        first = self.stop.signal is None
        if first:
            self.stop.signal = number
        elif number == signal.SIGINT:
            self._view.stop()
            os._exit(128 + number)
        if first and not self._patient:
            raise SystemExit(128 + number)
