"""Recomputing the tail of an asynchronous run's log on its workers, before it goes on from there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from cluster.messages import Contribution
from coordinator.commit_log import Entry
from coordinator.crew import Crew
from coordinator.evaluation import PATIENCE
from coordinator.outcomes import Accepted, Failure, Joined, Notice
from coordinator.pool import Handle
from coordinator.replay import REPORT_EVERY, Replayer


def recompute_tail(
    replayer: Replayer,
    tail: Sequence[Entry],
    crew: Crew,
    notice: Callable[[Failure | Notice | Joined], None],
    say: Callable[[str], None],
) -> Iterator[Entry]:
    """Apply the entries of ``tail`` to ``replayer``, in parallel as far as their base versions allow; yields each.

    Args:
        replayer: at the version before the tail.
        tail: one or more entries.
        crew: who computes.
        notice: hears of failures and of workers that join meanwhile.
        say: hears of progress.

    Raises:
        CheckpointError: the log does not fit the checkpoint.
        NumericsError: what is recomputed differs from the log.
        PoisonShardError, ClusterError: as the dispatcher.
    """
    say(f"recomputing versions {tail[0].version}–{tail[-1].version}, which were logged after the last checkpoint")
    wanted = deque(replayer.task(counted) for entry in tail for counted in entry.counted)
    handles: dict[int, Handle] = {p.version: crew.pool.publish(p) for p in replayer.recent}
    arrived: dict[int, Contribution] = {}
    said = time.monotonic()
    for entry in tail:
        handles[replayer.state.version] = crew.pool.publish(replayer.state.published)
        for counted in entry.counted:
            replayer.base(counted.base_version)
        while not all(counted.shard in arrived for counted in entry.counted):
            while wanted and wanted[0].base_version in handles and crew.dispatcher.room > 0:
                task = wanted.popleft()
                crew.dispatcher.submit(task, handles[task.base_version])
            match crew.dispatcher.next(PATIENCE):
                case Accepted(contribution):
                    arrived[contribution.shard] = contribution
                case (Failure() | Notice() | Joined()) as outcome:
                    notice(outcome)
        replayer.apply(entry, lambda _, task: arrived.pop(task.shard))
        yield entry
        held = {published.version for published in replayer.recent}
        handles = {version: handle for version, handle in handles.items() if version in held}
        if time.monotonic() - said > REPORT_EVERY:
            said = time.monotonic()
            say(f"recomputed up to version {entry.version} of {tail[-1].version}, digests agree so far")
