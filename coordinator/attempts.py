"""Pieces of work on their way through attempts, and how attempts are told apart and described.

Order    what the train loop wants: a shard to a version, or a part of an evaluation
Attempt  an order with one worker
Work     an order with all its attempts, failures and opinions, until it is settled
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.config.sections import Execution
from cluster.messages import Contribution, EvaluationTask, WorkerHello
from coordinator.pool import Failed, Handle, Order

OrderKey = Order
"""An order as it was first submitted: one piece of work, whatever the attempt."""

TOLERANCE = 1e-3
"""Relative distance up to which arrays of different hardware count as equal: float32 sums in another order."""


@dataclass(frozen=True)
class Policy:
    """How attempts are made; see the fields of ``execution`` with the same meaning."""

    in_flight: int = 2
    """Most orders with one worker."""
    attempts: int = 3
    """Failed attempts after which an order is poison."""
    verify: float = 0.0
    """Share of shards that two workers compute."""
    speculation: float = 0.0
    """Idle workers help with what has taken so many times the median, and with what waits; 0 for never."""
    copies: float = 0.25
    """Most speculative copies at a time, as a share of the workers; at least one."""
    deadline: float = 0.0
    """Times the median after which a worker is taken for hung; 0 for never."""
    deadline_floor: float = 30.0
    """Least seconds of a deadline."""
    min_workers: int = 1
    """Workers below which nothing is submitted."""
    start_timeout: float = 120.0
    """A fifth of the seconds after which a worker that is still not ready is started again."""
    backoff: float = 1.0
    """Seconds before the second start of a slot's worker in a row; doubled each time, a minute at most."""
    node_failures: int = 3
    """Failures within ``quarantine`` seconds after which a node gets no new workers for as long."""
    quarantine: float = 300.0

    @staticmethod
    def of(execution: Execution) -> Policy:
        """The configured one."""
        return Policy(**{name: getattr(execution, name) for name in Policy.__dataclass_fields__})


@dataclass(eq=False)
class Member:
    """A worker that is ready."""

    slot: int
    hello: WorkerHello
    since: float
    """When what it computes now was begun, as far as the coordinator can see; seconds of the dispatcher's clock."""
    queue: list[Attempt] = field(default_factory=list)
    """What it has, first what it computes; also what was recalled and nobody waits for."""
    unreachable: int = 0
    """Calls in a row that did not reach it."""
    draining: bool = False
    """It finishes what it has and gets nothing new."""

    @property
    def running(self) -> Attempt | None:
        """What it computes now."""
        return self.queue[0] if self.queue else None


@dataclass(eq=False)
class Attempt:
    """An order with one worker."""

    work: Work
    order: Order
    member: Member
    copy: bool = False
    """Whether it was made of an order that another worker was computing."""
    recalled: bool = False
    """Whether the worker was told to pass it over."""


@dataclass(eq=False)
class Work:
    """An order until it is settled."""

    order: Order
    """As it was submitted."""
    handle: Handle
    verified: bool = False
    """Whether two workers must agree on it, finite or not."""
    made: int = 0
    """Attempts so far."""
    submitted: float = 0.0
    """When its first attempt was."""
    waits_since: float = 0.0
    """When it last began to wait for a worker to try it again."""
    live: list[Attempt] = field(default_factory=list)
    """Attempts that are with workers and were not recalled."""
    tried: list[Member] = field(default_factory=list)
    """Workers that failed at it or have answered."""
    suspect: Member | None = None
    """The one that gave a non-finite reply, or else failed last: asked again only where there is nobody else."""
    failures: list[tuple[Member, Failed]] = field(default_factory=list)
    opinions: list[tuple[Member, Contribution]] = field(default_factory=list)
    early: int = 0
    """Workers that were lost when they had only just got it."""
    settled: bool = False
    accepted: Contribution | None = None

    def attempt(self, member: Member, *, copy: bool = False) -> Attempt:
        """A new attempt with a worker."""
        made = Attempt(self, replace(self.order, attempt=self.made), member, copy)
        self.made += 1
        self.live.append(made)
        member.queue.append(made)
        return made


def order_key(order: Order) -> OrderKey:
    """What an order is about, whatever the attempt."""
    return replace(order, attempt=0)


def describe(order: Order) -> str:
    """An order in words, with its episode ids."""
    last = order.first_episode + order.episodes - 1
    if isinstance(order, EvaluationTask):
        return f"evaluation of {order.split} episodes {order.first_episode}–{last}"
    return f"shard {order.shard} (episodes {order.first_episode}–{last})"


def chosen_for_verification(shard: int, share: float) -> bool:
    """Whether a shard belongs to the share that is verified: a fixed choice by its id."""
    drawn = int.from_bytes(hashlib.sha256(f"verify {shard}".encode()).digest()[:8], "big")
    return drawn < share * 2**64


def agree(one: Contribution, other: Contribution) -> bool:
    """Whether two contributions to a shard are the same: bit for bit within one class of hardware, else nearly."""
    if one.fingerprint == other.fingerprint:
        return one.digest == other.digest
    if not (one.finite and other.finite):
        return one.finite == other.finite
    loss = np.array([one.statistics.loss]), np.array([other.statistics.loss])
    arrays = [loss, (one.gradient, other.gradient)]
    arrays += [(one.proposals[name], other.proposals.get(name, np.empty(0))) for name in sorted(one.proposals)]
    return one.proposals.keys() == other.proposals.keys() and all(_near(*pair) for pair in arrays)


def _near(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal up to ``TOLERANCE``, as a whole."""
    if one.shape != other.shape:
        return False
    exact = one.astype(np.float64)
    return bool(np.linalg.norm(exact - other) <= TOLERANCE * max(float(np.linalg.norm(exact)), 1e-12))


def largest_agreement(opinions: Sequence[tuple[Member, Contribution]]) -> list[tuple[Member, Contribution]]:
    """The largest group of opinions that agree with one of them; of equal ones the group of the earliest."""
    groups = [[pair for pair in opinions if agree(first, pair[1])] for _, first in opinions]
    return max(groups, key=len)
