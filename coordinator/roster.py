"""Who works: the ready workers, when lost ones are started again, and which nodes are kept out for a while.

A lost worker is replaced at once; if its successor is lost too before it has done anything, the next one waits, each
time twice as long. A node with too many failures gets no new workers for a while, as long as there is another one.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cluster.errors import ClusterError
from cluster.messages import WorkerHello
from coordinator.attempts import Attempt, Member, Policy
from coordinator.goodput import Goodput
from coordinator.pool import Pool

START_FAILURES = 3
"""Failed starts of one slot in a row after which a run stops that has no worker. A node's death may take many."""

LONGEST_BACKOFF = 60.0
"""Seconds."""

PATIENT_STARTS = 5
"""Start timeouts that a worker may take to come, once there have been others; it may be waiting for room."""


@dataclass
class _Slot:
    """A place for a worker that has none now, or whose worker has done nothing yet."""

    losses: int = 0
    """In a row."""
    lost_at: float | None = None
    due: float | None = None
    """When the next worker is to be started."""
    started: float | None = None
    """When the one was started that is not ready yet."""
    avoid: frozenset[str] = frozenset()
    """Nodes on which that one must not be."""
    starts: int = 0
    """Workers that have been ready here."""
    failed_starts: int = 0
    """In a row, while there was no worker."""


@dataclass
class _Node:
    failures: deque[float] = field(default_factory=deque)
    until: float = 0.0
    """Kept out until then."""


class Roster:
    """The workers of a pool.

    Args:
        pool: where they are started.
        policy: when, and how many there must be.
        clock: seconds, monotonic.
        goodput: hears of recoveries.
        say: hears of nodes that are kept out, in one line.
    """

    def __init__(
        self, pool: Pool, policy: Policy, clock: Callable[[], float], goodput: Goodput, say: Callable[[str], None]
    ) -> None:
        self._pool = pool
        self._policy = policy
        self._clock = clock
        self._goodput = goodput
        self._say = say
        self._members: dict[int, Member] = {}
        self._slots: dict[int, _Slot] = defaultdict(_Slot)
        self._nodes: dict[str, _Node] = defaultdict(_Node)
        self._alive: frozenset[str] = frozenset()
        self._draining: frozenset[str] = frozenset()
        self._hosts: set[str] = set()
        """Nodes that have had workers: a head may have no room for any."""
        self._first = pool.size
        """Slots that there were from the start."""
        for slot in range(pool.size):
            self._slots[slot].started = clock()

    def __iter__(self) -> Iterator[Member]:
        """The ready workers, by slot."""
        return iter([self._members[slot] for slot in sorted(self._members)])

    def __len__(self) -> int:
        return len(self._members)

    def get(self, slot: int) -> Member | None:
        """The ready worker of a slot."""
        return self._members.get(slot)

    @property
    def open(self) -> list[Member]:
        """Workers that may get orders: none while there are fewer than there must be."""
        if len(self._members) < self.least:
            return []
        return [member for member in self if not member.draining]

    @property
    def least(self) -> int:
        """Workers that there must be: two, where one is to verify what another computes, if there ever are two."""
        return max(self._policy.min_workers, min(2, self._pool.size) if self._policy.verify else 1)

    def join(self, slot: int, hello: WorkerHello) -> Member:
        """A slot's worker is ready."""
        now, place = self._clock(), self._slots[slot]
        if place.lost_at is not None:
            self._goodput.recovered(now - place.lost_at)
            place.lost_at = None
        place.started, place.starts = None, place.starts + 1
        for each in self._slots.values():
            each.failed_starts = 0
        self._hosts.add(hello.node_id)
        self._members[slot] = Member(slot, hello, now)
        return self._members[slot]

    def is_late(self, member: Member) -> bool:
        """Whether a worker was not there from the start: it replaces another one, or its node joined later."""
        return member.slot >= self._first or self._slots[member.slot].starts > 1

    def did_something(self, member: Member) -> None:
        """A worker has answered: its slot's losses are forgiven."""
        if self._slots[member.slot].losses:
            self._slots[member.slot].losses = 0

    def lose(self, member: Member) -> list[Attempt]:
        """A worker is lost, or given up; another one will come. Returns what it had, first what it computed."""
        del self._members[member.slot]
        self._blame(member.hello.node_id)
        self._schedule(member.slot)
        return member.queue

    def fail_start(self, slot: int, message: str, *, counts: bool = True) -> None:
        """A slot's worker could not be started; it ``counts`` unless that may be the network's fault alone.

        Raises:
            ClusterError: too often, and there is no other worker.
        """
        place = self._slots[slot]
        place.failed_starts += counts and not self._members
        if place.failed_starts >= START_FAILURES:
            raise ClusterError(f"workers fail to start: {message}")
        self._schedule(slot)

    def give_up(self, member: Member) -> list[Attempt]:
        """As ``lose``, of a worker that hangs and has to be ended."""
        self._pool.end(member.slot)
        return self.lose(member)

    def expel(self, member: Member) -> list[Attempt]:
        """As ``give_up``, of a worker that computes wrongly or must not take part: its node is kept out at once, where
        there is another.
        """
        for _ in range(self._policy.node_failures - 1):
            self._blame(member.hello.node_id)
        return self.give_up(member)

    def nodes(self, alive: frozenset[str], draining: frozenset[str]) -> tuple[list[Member], list[Member]]:
        """The cluster has changed; returns the workers that are to finish what they compute and get nothing new, and
        those that are gone with their nodes.
        """
        leaving = [m for m in self if m.hello.node_id in draining and not m.draining]
        gone = [m for m in self if m.hello.node_id and m.hello.node_id not in alive]
        for member in self:
            member.draining = member.hello.node_id in draining
        self._alive, self._draining = alive, draining
        return leaving, gone

    def retire(self, member: Member) -> None:
        """A worker on a draining node is done; its slot gets another one elsewhere."""
        del self._members[member.slot]
        self._schedule(member.slot)

    def wait_on(self) -> None:
        """Workers that have been started and are not ready yet have a good reason."""
        for place in self._slots.values():
            if place.started is not None:
                place.started = self._clock()

    def start_due(self) -> None:
        """Start the workers whose time has come, and those again that do not come or may be elsewhere by now."""
        now, avoided = self._clock(), self.avoided
        for slot, place in self._slots.items():
            due = place.due is not None and place.due <= now
            waits = place.started is not None and (
                now - place.started > PATIENT_STARTS * self._policy.start_timeout or not place.avoid <= avoided
            )
            if due or waits:
                place.due, place.started, place.avoid = None, now, avoided
                self._pool.replace(slot, avoided)

    @property
    def avoided(self) -> frozenset[str]:
        """Nodes that get no new workers now."""
        now = self._clock()
        if len(self._members) < self.least:  # better a bad node than none
            return self._draining
        return self._draining | frozenset(name for name, node in self._nodes.items() if node.until > now)

    @property
    def next_due(self) -> float | None:
        """When the next worker is to be started, if one is."""
        return min((place.due for place in self._slots.values() if place.due is not None), default=None)

    def _schedule(self, slot: int) -> None:
        now, place = self._clock(), self._slots[slot]
        place.started = None
        if place.lost_at is None:
            place.lost_at = now
        wait = 0.0 if place.losses == 0 else min(LONGEST_BACKOFF, self._policy.backoff * 2.0 ** (place.losses - 1))
        place.losses += 1
        place.due = now + wait

    def _blame(self, name: str) -> None:
        """A failure on a node; too many keep it out for a while."""
        if not name:
            return
        now, node = self._clock(), self._nodes[name]
        node.failures.append(now)
        while node.failures and node.failures[0] < now - self._policy.quarantine:
            node.failures.popleft()
        others = (self._hosts & self._alive) - self.avoided - {name}
        if len(node.failures) >= self._policy.node_failures and others and node.until <= now:
            node.until = now + self._policy.quarantine
            node.failures.clear()
            self._say(f"node {name[:12]} keeps failing: no new workers there for {self._policy.quarantine:g} s")
