"""How long orders take: running medians by kind of order, over all workers and for each."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

from cluster.messages import EvaluationTask
from coordinator.attempts import Member
from coordinator.pool import Order

ALL, EACH = 64, 8
"""Latest orders that the median over all workers, and that of one worker, is of."""


class Pace:
    """Running medians of seconds an order."""

    def __init__(self) -> None:
        self._all: dict[bool, deque[float]] = defaultdict(lambda: deque(maxlen=ALL))
        self._each: dict[tuple[Member, bool], deque[float]] = defaultdict(lambda: deque(maxlen=EACH))
        self._medians: dict[bool, float] = {}

    def add(self, member: Member, order: Order, seconds: float) -> None:
        """An order took a worker so long."""
        kind = isinstance(order, EvaluationTask)
        self._all[kind].append(seconds)
        self._each[member, kind].append(seconds)
        self._medians.pop(kind, None)

    def leave(self, member: Member) -> None:
        """Forget a worker that is gone."""
        for kind in (True, False):
            self._each.pop((member, kind), None)

    def median(self, order: Order) -> float | None:
        """Seconds that such an order takes; ``None`` before the first."""
        kind = isinstance(order, EvaluationTask)
        if kind not in self._medians and self._all[kind]:
            self._medians[kind] = statistics.median(self._all[kind])
        return self._medians.get(kind)

    def knows(self, member: Member, order: Order) -> bool:
        """Whether this worker has done such an order."""
        return bool(self._each.get((member, isinstance(order, EvaluationTask))))

    def of(self, member: Member, order: Order) -> float | None:
        """Seconds that such an order takes this worker; the median over all before its first."""
        own = self._each.get((member, isinstance(order, EvaluationTask)))
        return statistics.median(own) if own else self.median(order)
