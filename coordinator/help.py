"""Help for slow workers: what an idle one takes off them, and when one of them is taken for hung.

An idle worker takes over what waits behind a slow one, and copies what the slow one computes, if it expects to have
done it first. Pure decisions: the dispatcher acts on them.
"""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.attempts import Attempt, Member, Policy
from coordinator.pace import Pace
from coordinator.pool import Order
from coordinator.roster import Roster

WORTH = 0.5
"""Of the time that an order takes an idle worker, what it must save to be taken over."""

FIRST = 10.0
"""Deadline floors that a worker's first order may take: it loads code and data."""


class Helper:
    """Decides who helps whom.

    Args:
        roster: the workers.
        pace: how long orders take them.
        policy: when help is due.
    """

    def __init__(self, roster: Roster, pace: Pace, policy: Policy) -> None:
        self._roster = roster
        self._pace = pace
        self._policy = policy

    def backlog(self, member: Member, order: Order) -> float:
        """Seconds until a worker would have done one more order, from the beginning of what it computes now."""
        return (len(member.queue) + 1) * (self._pace.of(member, order) or 1.0)

    def moves(self, now: float) -> Iterator[tuple[Attempt, Member]]:
        """Attempts that an idle worker takes over: of what is computed a copy, what only waits as a whole."""
        if not self._policy.speculation:
            return
        copies = sum(a.copy for m in self._roster for a in m.queue)
        most = max(1, int(self._policy.copies * len(self._roster)))
        for idle in self._roster.open:
            if idle.queue:
                continue
            waiting = self._waiting(idle, now)
            if waiting is not None:
                yield waiting, idle
                continue
            slow = self._slowest(idle, now) if copies < most else None
            if slow is not None:
                copies += 1
                yield slow, idle

    def hung(self, now: float) -> list[Member]:
        """Workers that have computed one order for too long."""
        return [member for member in self._roster if (due := self._deadline(member)) is not None and due <= now]

    def next_due(self, now: float) -> float | None:
        """When a deadline passes, or an idle worker is to look again; ``None`` if nothing runs."""
        dues = [due for member in self._roster if (due := self._deadline(member)) is not None]
        if self._policy.speculation and any(not member.queue for member in self._roster.open):
            for member in self._roster:
                median = self._pace.median(member.running.order) if member.running else None
                if median is not None:
                    dues.append(max(now, member.since + self._policy.speculation * median))
        return min((due for due in dues if due > now), default=None)

    def _deadline(self, member: Member) -> float | None:
        if member.running is None or not self._policy.deadline:
            return None
        median = self._pace.median(member.running.order)
        floor = self._policy.deadline_floor
        first = median is None or not self._pace.knows(member, member.running.order)
        return member.since + (FIRST * floor if first else max(floor, self._policy.deadline * (median or 0.0)))

    def _waiting(self, idle: Member, now: float) -> Attempt | None:
        """Of what waits behind others, what would be begun last and is worth taking over."""
        best, longest = None, 0.0
        for member in self._roster:
            for place, attempt in enumerate(member.queue):
                own = self._pace.of(member, attempt.order)
                mine = self._pace.of(idle, attempt.order)
                if place == 0 or own is None or mine is None or not _may(idle, attempt):
                    continue
                gain = self._left(own, now - member.since) + place * own - mine
                # Workers in step would else pass orders on that are about to be begun.
                if gain > max(longest, WORTH * mine):
                    best, longest = attempt, gain
        return best

    def _slowest(self, idle: Member, now: float) -> Attempt | None:
        """Of what others compute and nobody else does, what will be done last and is worth copying."""
        best, longest = None, 0.0
        for member in self._roster:
            attempt = member.running
            if attempt is None or member is idle or not _may(idle, attempt) or len(attempt.work.live) > 1:
                continue
            own, mine = self._pace.of(member, attempt.order), self._pace.of(idle, attempt.order)
            if own is None or mine is None:
                continue
            # A copy keeps its worker from the next version's orders: it has to be worth that.
            gain = self._left(own, now - member.since) - self._policy.speculation * mine
            if gain > longest:
                best, longest = attempt, gain
        return best

    def _left(self, usual: float, elapsed: float) -> float:
        """Seconds that an order may still take: one that has taken far longer than usual may take as long again."""
        if elapsed < usual:
            return usual - elapsed
        return elapsed if elapsed >= self._policy.speculation * usual else 0.0


def _may(idle: Member, attempt: Attempt) -> bool:
    """Whether an idle worker may compute what another one has."""
    work = attempt.work
    return not (
        attempt.recalled or work.settled or idle in work.tried or any(live.member is idle for live in work.live)
    )
