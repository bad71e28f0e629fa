"""Which worker computes what: orders in flight, reissue, deadlines, copies, verification, second and third opinions.

    train loop -> submit while there is room
    train loop <- next(timeout): one ``Outcome``; what a retry settles never reaches the loop

The dispatcher knows neither Ray nor aggregation; clock and transport are given to it. An order goes to the worker that
will have done it first. Any error on an attempt means that this attempt failed, never that the run did; a shard whose
attempts are used up is a poison shard and ends the run.

An attempt stays in its worker's queue until the pool has told what became of it, also when it was recalled, or when a
faster copy has settled its order. A reply or failure of an attempt that is in no queue is of a worker that was replaced
since, and is ignored.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import NoReturn

from cluster.errors import NumericsError, PoisonShardError
from cluster.messages import Contribution, EvaluationPart, ShardTask
from coordinator.attempts import (
    Attempt,
    Member,
    OrderKey,
    Policy,
    Work,
    agree,
    chosen_for_verification,
    describe,
    largest_agreement,
    order_key,
)
from coordinator.goodput import Goodput, Loss
from coordinator.help import Helper
from coordinator.outcomes import Accepted, Delay, Evaluated, Failure, Joined, Notice, Outcome, problem_with
from coordinator.pace import Pace
from coordinator.pool import Event, Failed, Handle, NodesChanged, Order, Pool, Reply, Sending, Skipped, WorkerReady
from coordinator.roster import PATIENT_STARTS, Roster

SOON = 0.001
"""Least seconds of waiting for an event."""

MOMENT = 0.05
"""Seconds that a worker must have had an order for, so that this may have been its end."""

UNREACHABLE = 5
"""Calls in a row that do not reach a worker after which it counts as lost."""

SENDING_SECONDS = 10.0
"""Between two notices that a store is being sent, at most."""

SHORT_SECONDS = 5.0
"""How long there may be too few workers before that is said."""


class Dispatcher:
    """Submits orders to a pool and settles their attempts.

    Args:
        pool: where orders are computed.
        policy: how attempts are made.
        clock: seconds, monotonic.
        goodput: counts what was computed for nothing.
    """

    def __init__(
        self,
        pool: Pool,
        policy: Policy,
        clock: Callable[[], float] = time.monotonic,
        goodput: Goodput | None = None,
    ) -> None:
        self.goodput = goodput or Goodput()
        self.reproduce: Callable[[ShardTask], str] | None = None
        """Gives the command that computes a shard alone, for the error about a poison shard."""
        self._pool = pool
        self._policy = policy
        self._clock = clock
        self._pace = Pace()
        self._outcomes: deque[Outcome] = deque()
        self._roster = Roster(pool, policy, clock, self.goodput, lambda text: self._outcomes.append(Notice(text)))
        self._helper = Helper(self._roster, self._pace, policy)
        self._work: dict[OrderKey, Work] = {}
        self._retries: deque[Work] = deque()
        self._short_since: float | None = None
        """Since when there have been too few workers; infinite once that was said."""
        self._sending_said = float("-inf")

    @property
    def workers(self) -> int:
        """Workers ready now."""
        return len(self._roster)

    @property
    def needed(self) -> int:
        """Workers below which nothing is submitted."""
        return self._roster.least

    @property
    def nodes(self) -> Mapping[str, int]:
        """Workers ready now on each node, by host name and the beginning of Ray's node id."""
        return Counter(f"{member.hello.node}/{member.hello.node_id[:8]}" for member in self._roster)

    @property
    def in_flight(self) -> int:
        """Attempts with workers, those among them that nobody waits for any more."""
        return sum(len(member.queue) for member in self._roster)

    @property
    def room(self) -> int:
        """Orders that may be submitted now; retries come first."""
        return sum(max(0, self._policy.in_flight - len(m.queue)) for m in self._roster.open) - len(self._retries)

    def submit(self, order: Order, handle: Handle) -> None:
        """Queue an order on the worker that will have done it first.

        Raises:
            ValueError: there is no room, or the order is under way already.
        """
        key = order_key(order)
        if self.room < 1 or key in self._work:
            why = "it is under way" if key in self._work else "no worker has room"
            raise ValueError(f"{describe(order)} cannot be submitted: {why}")
        verified = isinstance(order, ShardTask) and chosen_for_verification(order.shard, self._policy.verify)
        work = self._work[key] = Work(order, handle, verified, submitted=self._clock())
        self._send(work)
        if verified:
            self._retry(work)

    def forget(self) -> None:
        """Wait for nothing that is in flight any more; workers are told to pass over what they have not begun."""
        for member in self._roster:
            if member.running is not None and not member.running.work.settled:
                self._waste(member.running, "stopped", self._clock() - member.since)
        for work in self._work.values():
            self._release(work)
        self._work.clear()
        self._retries.clear()
        self._outcomes = deque(o for o in self._outcomes if isinstance(o, Failure | Notice | Joined))

    def next(self, timeout: float) -> Outcome | None:
        """The next outcome, or ``None`` if there is none within ``timeout`` seconds.

        Raises:
            PoisonShardError: an order failed in all its attempts.
            NumericsError: workers differ on a verified shard, and no third one can tell who is right.
            ClusterError: workers fail to start again and again.
        """
        if not self._outcomes:
            self._act()
        if not self._outcomes:
            event = self._pool.wait(max(SOON, min(timeout, self._until_due())))
            if event is not None:
                self._handle(event)
            self._send_retries()
        return self._outcomes.popleft() if self._outcomes else None

    # ------------------------------------------------------------------------------------------------------ what is due

    def _act(self) -> None:
        """What time asks for: new workers, the end of hung ones, help for slow ones."""
        self._roster.start_due()
        for member in self._helper.hung(self._clock()):
            self._hang(member)
        self._send_retries()
        for attempt, helper in self._helper.moves(self._clock()):
            running = attempt is attempt.member.running
            if not running:
                self._recall(attempt)
            self._start(attempt.work, helper, copy=running)
        self._say_if_short()
        self._give_up_disputes()

    def _give_up_disputes(self) -> None:
        """End the run over a dispute that waits for a further worker which does not come.

        Raises:
            NumericsError: one has waited as long as workers may take to start.
        """
        long = PATIENT_STARTS * self._policy.start_timeout
        for work in self._retries:
            lonely = len(work.opinions) > 1 and all(member in work.tried for member in self._roster)
            if lonely and self._clock() - work.waits_since > long:
                self._undecided(work, f"no further one has come in {long:g} s to tell who is right")

    def _undecided(self, work: Work, why: str) -> NoReturn:
        workers = [member.slot for member, _ in work.opinions]
        text = f"{describe(work.order)}: workers {workers} give different bits, and {why}{self._command(work.order)}"
        raise NumericsError(text)

    def _until_due(self) -> float:
        now = self._clock()
        due = [when for when in (self._roster.next_due, self._helper.next_due(now)) if when is not None]
        return min(due, default=float("inf")) - now

    def _say_if_short(self) -> None:
        least, there, now = self._roster.least, len(self._roster), self._clock()
        if there >= least:
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
        elif now - self._short_since > SHORT_SECONDS:
            self._short_since = float("inf")
            self._outcomes.append(Notice(f"{there} of at least {least} workers are there: waiting for more"))

    # ----------------------------------------------------------------------------------------------------------- events

    def _handle(self, event: Event) -> None:
        match event:
            case WorkerReady(slot, hello):
                member = self._roster.join(slot, hello)
                self._outcomes.append(Joined(hello, self._roster.is_late(member)))
            case Reply():
                self._reply(event)
            case Skipped(slot, order):
                self._leave_queue(slot, order)
            case NodesChanged(alive, draining):
                leaving, gone = self._roster.nodes(alive, draining)
                self._drain(leaving)
                for member in gone:
                    if self._roster.get(member.slot) is member:
                        self._gone(member, "its node is gone")
                self._roster.start_due()
            case Sending():
                self._sending(event)
            case Failed(order=None):
                self._roster.fail_start(event.slot, event.message, counts=event.kind == "start_error")
                self._outcomes.append(Failure("worker_lost", f"worker {event.slot} failed to start: {event.message}"))
                self._roster.start_due()
            case Failed():
                self._fail(event)

    def _sending(self, sending: Sending) -> None:
        """A node is being sent the store: workers come later for it, which is said now and then."""
        self._roster.wait_on()
        now = self._clock()
        if now - self._sending_said >= min(SENDING_SECONDS, self._policy.start_timeout / 4):
            self._sending_said = now
            sent, size = sending.sent / 1e6, sending.size / 1e6
            text = f"worker {sending.slot}'s node lacks the store: it has been sent {sent:.1f} of {size:.1f} MB"
            self._outcomes.append(Delay(text))

    def _leave_queue(self, slot: int, order: Order) -> tuple[Attempt, float] | None:
        """The attempt that a worker is done with and its seconds; ``None`` for one of a worker that is gone."""
        member = self._roster.get(slot)
        attempt = next((a for a in member.queue if a.order == order), None) if member is not None else None
        if member is None or attempt is None:
            return None
        now = self._clock()
        seconds, member.since = now - member.since, now
        member.queue.remove(attempt)
        if attempt in attempt.work.live:
            attempt.work.live.remove(attempt)
        if member.draining and not member.queue:
            self._retire(member)
        return attempt, seconds

    def _reply(self, reply: Reply) -> None:
        left = self._leave_queue(reply.slot, reply.order)
        if left is None:
            if isinstance(reply.result, Contribution):
                self.goodput.lose("late")
            return
        attempt, seconds = left
        member, work, result = attempt.member, attempt.work, reply.result
        if not member.draining:
            self._pace.add(member, reply.order, seconds)
        member.unreachable = 0
        self._roster.did_something(member)
        problem = problem_with(reply)
        if problem is not None:
            self._waste(attempt, "damaged", seconds)
            if not work.settled:
                self._fault(attempt, Failed(reply.slot, reply.order, "shard_error", problem))
        elif isinstance(result, EvaluationPart):
            if not work.settled:
                self._settle(work)
                self._outcomes.append(Evaluated(result))
        elif work.settled:
            self._superfluous(attempt, result, seconds)
        else:
            self._judge(attempt, result, seconds, reply.size)

    def _superfluous(self, attempt: Attempt, contribution: Contribution, seconds: float) -> None:
        """The reply of a copy that came second: of no use but for comparing."""
        accepted = attempt.work.accepted
        self.goodput.lose("late" if accepted is None else "copy", seconds)
        if accepted is not None and not agree(accepted, contribution):
            what = f"shard {contribution.shard}: worker {accepted.worker} and worker {contribution.worker} differ"
            self._outcomes.append(Failure("duplicate_mismatch", f"{what}; the first one's contribution was taken"))

    # --------------------------------------------------------------------------------------------------------- verdicts

    def _judge(self, attempt: Attempt, contribution: Contribution, seconds: float, size: int) -> None:
        """Accept a contribution, or ask another worker too (design, section 3: wrong answers)."""
        work, member = attempt.work, attempt.member
        finite = contribution.finite
        work.opinions.append((member, contribution))
        work.tried.append(member)
        if not finite and len(work.opinions) == 1:
            work.suspect = member
            message = f"shard {contribution.shard} from worker {member.slot} is not finite: asked again"
            self._outcomes.append(Failure("nonfinite", message))
        if len(work.opinions) == 1 and finite and not work.verified:
            self._accept(work, contribution, size, finite=True)
            return
        group = largest_agreement(work.opinions)
        if len(work.opinions) > 1 and (len(group) > 1 or not work.verified):
            self._agree(work, group, seconds, size)
        elif len(work.opinions) == 1:
            self._reissue(work)
        else:
            self._dispute(work)

    def _agree(self, work: Work, group: list[tuple[Member, Contribution]], seconds: float, size: int) -> None:
        """Settle an order on which there are two equal opinions, or, where none are asked for, a second one."""
        first, last = work.opinions[0][1], work.opinions[-1][1]
        chosen = group[-1][1] if len(group) > 1 else last
        odd = [member for member, contribution in work.opinions if not agree(chosen, contribution)]
        if len(group) == 1:
            verdict = "finite there" if last.finite else "other bits"
            what = f"shard {last.shard}: worker {first.worker} and worker {last.worker} differ ({verdict})"
            self._outcomes.append(Failure("duplicate_mismatch", f"{what}; worker {first.worker} is suspect"))
        else:
            what = f"shard {chosen.shard}: worker {{}} gives other bits than {len(group)} others; it is replaced"
            self._outcomes.extend(Failure("duplicate_mismatch", what.format(member.slot)) for member in odd)
        wasted: Loss = "verification" if work.verified else "nonfinite"
        self.goodput.lose(wasted, seconds * (len(work.opinions) - 1), len(work.opinions) - 1)
        self._accept(work, chosen, size, finite=chosen.finite)
        for member in odd if len(group) > 1 else []:
            if self._roster.get(member.slot) is member:
                self._lost(self._roster.expel(member), "error")
        self._roster.start_due()

    def _dispute(self, work: Work) -> None:
        """All opinions differ: ask one worker more, if there can be one.

        Raises:
            NumericsError: there can be none, or three differ already.
        """
        workers = [member.slot for member, _ in work.opinions]
        if len(work.opinions) > 2 or self._pool.size < 3:
            self._undecided(work, "no further one can tell who is right")
        self._outcomes.append(
            Failure("duplicate_mismatch", f"{describe(work.order)}: workers {workers} differ; a third one is asked")
        )
        self._retry(work)

    def _accept(self, work: Work, contribution: Contribution, size: int, *, finite: bool) -> None:
        work.accepted = contribution
        self._settle(work)
        seconds = self._clock() - work.submitted
        self._outcomes.append(Accepted(contribution, finite, seconds, size))

    def _settle(self, work: Work) -> None:
        del self._work[order_key(work.order)]
        self._release(work)
        if work in self._retries:
            self._retries.remove(work)

    def _release(self, work: Work) -> None:
        """Nobody waits for an order any more: its attempts that are not begun need not be."""
        work.settled = True
        for attempt in list(work.live):
            if attempt is not attempt.member.running:
                self._recall(attempt)

    # --------------------------------------------------------------------------------------------------------- failures

    def _fail(self, failed: Failed) -> None:
        assert failed.order is not None
        member = self._roster.get(failed.slot)
        if member is None or not any(attempt.order == failed.order for attempt in member.queue):
            return
        member.unreachable += failed.kind == "unreachable"
        if failed.kind in ("worker_lost", "node_lost") or member.unreachable >= UNREACHABLE:
            self._gone(member, failed.message, failed if failed.kind == "worker_lost" else None)
            self._roster.start_due()
            return
        left = self._leave_queue(failed.slot, failed.order)
        assert left is not None
        attempt, seconds = left
        self._waste(attempt, "unreachable" if failed.kind == "unreachable" else "error", seconds)
        if attempt.work.settled:
            return
        if failed.kind == "unreachable":  # the network's fault, not the order's
            self._outcomes.append(Failure("unreachable", f"worker {failed.slot} was not reached: {failed.message}"))
            self._reissue(attempt.work)
        else:
            self._fault(attempt, failed)

    def _gone(self, member: Member, why: str, failed: Failed | None = None) -> None:
        """A worker is lost; ``failed`` is given where what it computed may have been its end."""
        queue = self._roster.lose(member)
        count = sum(not attempt.work.settled and not attempt.recalled for attempt in queue)
        message = f"worker {member.slot} lost ({why}); replacing it, {count} order(s) reissued"
        self._outcomes.append(Failure("worker_lost", message))
        self._lost(queue, "worker", failed)

    def refuse(self, slot: int) -> None:
        """A worker that has come late must not take part: it is ended, and its node kept out where there is another."""
        member = self._roster.get(slot)
        if member is not None:
            self._lost(self._roster.expel(member), "error")

    def _fault(self, attempt: Attempt, failed: Failed) -> None:
        """An attempt failed on a worker that lives on."""
        work, member = attempt.work, attempt.member
        self._outcomes.append(Failure("shard_error", f"{describe(work.order)} failed: {failed.message}"))
        work.tried.append(member)
        work.suspect = member if not work.opinions else work.suspect
        self._blame(work, member, failed)

    def _hang(self, member: Member) -> None:
        """A worker has computed one order for too long: it is given up."""
        attempt = member.running
        assert attempt is not None
        seconds = self._clock() - member.since
        what = f"{describe(attempt.order)} has taken worker {member.slot} {seconds:.1f} s, past its deadline"
        normal = "raise execution.deadline_floor if that is no wonder"
        self._outcomes.append(Failure("deadline", f"{what}: the worker is taken for hung and replaced; {normal}"))
        failed = Failed(member.slot, attempt.order, "worker_lost", f"no answer within {seconds:.1f} s")
        self._lost(self._roster.give_up(member), "deadline", failed)
        self._roster.start_due()

    def _drain(self, members: list[Member]) -> None:
        """Workers on nodes that are about to go finish what they compute; the rest of their orders go elsewhere."""
        for member in members:
            node = member.hello.node
            self._outcomes.append(Notice(f"worker {member.slot} leaves {node}, which is being drained"))
            for attempt in member.queue[1:]:
                if not attempt.recalled and not attempt.work.settled:
                    self._recall(attempt)
                    self._reissue(attempt.work)
            if not member.queue:
                self._retire(member)

    def _retire(self, member: Member) -> None:
        """A worker on a draining node is done."""
        self._roster.retire(member)
        self._pace.leave(member)

    def _lost(self, queue: list[Attempt], cause: Loss, failed: Failed | None = None) -> None:
        """What a worker had that is gone: only what it computed may have been its end, the rest is merely reissued."""
        for place, attempt in enumerate(queue):
            work, member = attempt.work, attempt.member
            if attempt in work.live:
                work.live.remove(attempt)
            seconds = self._clock() - member.since
            if place == 0:
                self._waste(attempt, cause, seconds)
                self._pace.leave(member)
            if work.settled or attempt.recalled:
                continue
            # One that had only just got an order may have been dead already.
            work.early += place == 0 and seconds < MOMENT
            if place == 0 and failed is not None and (seconds >= MOMENT or work.early > self._policy.attempts):
                work.tried.append(member)
                self._blame(work, member, failed)
            else:
                self._reissue(work)

    def _blame(self, work: Work, member: Member, failed: Failed) -> None:
        """An attempt failed; too many end the run.

        Raises:
            PoisonShardError: this was one too many.
        """
        work.failures.append((member, failed))
        if len(work.failures) >= self._policy.attempts:
            each = "; ".join(f"worker {m.slot} on {m.hello.node}: {f.message}" for m, f in work.failures)
            details = "".join(f"\n{text}" for text in dict.fromkeys(f.detail for _, f in work.failures) if text)
            raise PoisonShardError(
                f"{describe(work.order)} failed {len(work.failures)} times ({each}){self._command(work.order)}{details}"
            )
        self._reissue(work)

    def _command(self, order: Order) -> str:
        """How to compute an order alone, as the end of a sentence."""
        if self.reproduce is None or not isinstance(order, ShardTask):
            return ""
        return f"; reproduce it alone by `{self.reproduce(order)}`"

    # ---------------------------------------------------------------------------------------------------------- sending

    def _waste(self, attempt: Attempt, cause: Loss, seconds: float) -> None:
        """An attempt at a shard was for nothing; evaluations are not counted."""
        if isinstance(attempt.order, ShardTask):
            self.goodput.lose(cause, seconds)

    def _retry(self, work: Work) -> None:
        work.waits_since = self._clock()
        self._retries.append(work)

    def _reissue(self, work: Work) -> None:
        """Make another attempt at an order that nobody computes any more."""
        if not work.live and work not in self._retries:
            self._retry(work)

    def _send_retries(self) -> None:
        self._retries = deque(work for work in self._retries if not self._send(work))

    def _send(self, work: Work) -> bool:
        """Make an attempt at an order; ``False`` while no worker that may take it has room."""
        member = self._choose(work)
        if member is None:
            return False
        self._start(work, member)
        return True

    def _start(self, work: Work, member: Member, *, copy: bool = False) -> None:
        if not member.queue:
            member.since = self._clock()
        attempt = work.attempt(member, copy=copy)
        self._pool.submit(member.slot, attempt.order, work.handle)

    def _recall(self, attempt: Attempt) -> None:
        """Tell a worker to pass over an order that it has not begun."""
        attempt.recalled = True
        if attempt in attempt.work.live:
            attempt.work.live.remove(attempt)
        self._pool.recall(attempt.member.slot, attempt.order)

    def _choose(self, work: Work) -> Member | None:
        """The worker that may take an order and will have done it first, if one of them has room.

        A retry rather waits for another worker's turn than go back to one that has tried it; the suspect is asked again
        only where there is nobody else.
        """
        members = self._roster.open
        busy_with_it = [attempt.member for attempt in work.live]
        fresh = [m for m in members if m not in work.tried and m not in busy_with_it]
        if len(work.opinions) > 1:  # nobody settles a dispute who has a part in it
            members = fresh
        if work.verified and self._pool.size > 1:  # and nobody verifies what is its own
            members = [m for m in members if all(m is not asked for asked, _ in work.opinions)]
        others = [m for m in members if m is not work.suspect and m not in busy_with_it]
        alone = [m for m in members if m not in busy_with_it]
        free = [m for m in fresh or others or alone if len(m.queue) < self._policy.in_flight]
        return min(free, key=lambda m: (self._helper.backlog(m, work.order), len(m.queue), m.slot), default=None)
