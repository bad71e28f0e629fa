"""Where a trainer starts from: the beginning of a new run, or what an earlier driver left in a run directory.

    begin    a new run, with its directory
    find     what an earlier driver left, owned from then on; needs no worker yet
    go_on    the same as it goes on with the workers that are there now

A synchronous run recomputes what was logged after its last checkpoint and must come to the logged digests, if it was
computed on hardware like now's. An asynchronous one replays it there; elsewhere it is refused, or left out if asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.config.run import RunConfig
from cluster.config.sections import AsyncAggregator
from cluster.episodes.types import EpisodeSource
from cluster.errors import FingerprintError
from cluster.messages import WorkerHello
from coordinator import checkpoint as checkpoints
from coordinator.aggregators import build_aggregator
from coordinator.checkpoint import Checkpoint
from coordinator.commit_log import Entry, check_reaches, read_log
from coordinator.crew import Crew
from coordinator.history import read_history
from coordinator.meta_state import MetaState
from coordinator.outcomes import Failure, Joined, Notice
from coordinator.replay import Replayer, check_config, check_source
from coordinator.run_dir import RunDirectory, RunIdentity
from coordinator.tail import recompute_tail
from coordinator.train import Progress, Start, check_data, check_software, check_worker
from metaworker.learners.base import Learner


@dataclass(frozen=True)
class Found:
    """What an earlier driver left."""

    run: RunDirectory
    identity: RunIdentity
    at: Checkpoint
    saved: bool
    """Whether ``at`` lies on the disk; otherwise it is the beginning."""
    entries: Sequence[Entry]
    unvalidated: tuple[Checkpoint, ...]
    """Versions whose validation the earlier driver did not finish."""

    @property
    def tail(self) -> Sequence[Entry]:
        """What was logged after the checkpoint."""
        return self.entries[self.at.state.version :]


def begin(
    config: RunConfig, path: Path, source: EpisodeSource, learner: Learner, first: WorkerHello, stack: ExitStack
) -> tuple[RunDirectory, Start]:
    """A new run with its directory, owned while ``stack`` lives.

    Raises:
        RunDirectoryError: it exists already, or cannot be made.
    """
    initial = MetaState.initial(config, learner)
    identity = RunIdentity(
        config.result_digest(),
        source.digest,
        source.split_digest,
        initial.digest,
        first.fingerprint,
        dict(first.fingerprint_detail),
        source.sample_shape,
    )
    check_data(identity.store_digest, identity.split_digest, first)
    check_software(identity, first)
    run = RunDirectory.create(path, identity, config)
    stack.callback(run.release)
    return run, Start(identity, initial, build_aggregator(config.aggregator))


def find(config: RunConfig, path: Path, source: EpisodeSource, learner: Learner, stack: ExitStack) -> Found:
    """What an earlier driver left in ``path``, owned while ``stack`` lives.

    Raises:
        RunDirectoryError: it is no run, or in use.
        CheckpointError: checkpoint or log are damaged, or the data is not the run's.
    """
    run = RunDirectory.open(path)
    run.acquire()
    stack.callback(run.release)
    identity = run.identity()
    check_config(run, identity, config)
    check_source(identity, source.digest, source.split_digest)
    initial = MetaState.initial(config, learner)
    kept = checkpoints.list_checkpoints(run.checkpoints)
    at = (
        checkpoints.load(kept[-1], initial.layout, identity.config_digest)
        if kept
        else Checkpoint.of_start(initial, identity.config_digest)
    )
    entries = read_log(run)
    check_reaches(run, entries, at.state.version, at.state.digest)
    due = [path for path in kept if _due(config, checkpoints.version_of(path)[0])]
    unvalidated = [checkpoints.load(path, initial.layout, identity.config_digest) for path in due]
    return Found(run, identity, at, bool(kept), entries, _unscored(run, unvalidated))


def go_on(config: RunConfig, learner: Learner, found: Found, crew: Crew, say: Callable[[str], None]) -> Start:
    """The run as it goes on with the workers of ``crew``.

    Raises:
        FingerprintError: it, or what must be recomputed of it, is of other hardware, and that was not allowed.
        NumericsError: what is recomputed differs from the log.
    """
    identity, at, first = found.identity, found.at, crew.first
    check_data(identity.store_digest, identity.split_digest, first)
    check_software(identity, first)
    elsewhere = first.fingerprint != identity.fingerprint
    execution = config.execution
    if elsewhere and execution.pool == "strict" and not execution.other_hardware:
        raise FingerprintError(
            f"{found.run.path} was computed on other hardware or software ({dict(identity.fingerprint_detail)}, here "
            f"{dict(first.fingerprint_detail)}): the digest would not be that of an undisturbed run; resume "
            "it there, or add --execution.other_hardware"
        )
    if execution.pool == "strict":  # what other hardware has computed and no commit holds is computed again
        at = replace(at, pending=tuple(pair for pair in at.pending if pair[0].fingerprint == first.fingerprint))
        found = replace(found, at=at)
    kept = [c.fingerprint for entry in found.entries[: at.state.version] for c in entry.counted]
    mixed = any(other != first.fingerprint for other in [*kept, *(c.fingerprint for c, _ in at.pending)])
    start = Start(
        identity=replace(identity, fingerprint=first.fingerprint, fingerprint_detail=dict(first.fingerprint_detail)),
        state=at.state,
        aggregator=build_aggregator(config.aggregator, at.state.version, pending=at.pending),
        progress=Progress(at.episodes, at.seconds, Counter(at.failures), mixed),
        recent=at.recent,
        dropped=at.dropped,
        unvalidated=found.unvalidated,
        saved=found.saved,
    )
    crew.dispatcher.goodput.restore(at.goodput)
    crew.dispatcher.goodput.lose("driver", shards=sum(len(entry.counted) for entry in found.tail))
    same = _same_bits(config, found, first)
    if isinstance(config.aggregator, AsyncAggregator):
        start = _go_on_async(config, learner, found, crew, start, same, say)
    elif same:
        start = replace(start, expected={entry.version: entry.digest for entry in found.tail})
    elif found.tail:
        say(
            f"versions {found.tail[0].version}–{found.tail[-1].version} were computed on other hardware or software: "
            "they are computed again, and not compared"
        )
    return start


def _same_bits(config: RunConfig, found: Found, first: WorkerHello) -> bool:
    """Whether the workers of now compute the bits of the log's tail."""
    return config.execution.pool == "strict" and all(
        counted.fingerprint == first.fingerprint for entry in found.tail for counted in entry.counted
    )


def _go_on_async(
    config: RunConfig,
    learner: Learner,
    found: Found,
    crew: Crew,
    start: Start,
    same: bool,
    say: Callable[[str], None],
) -> Start:
    """Replay the log's tail, or leave it out where it cannot be; what was in flight is issued again.

    Raises:
        FingerprintError: there is a tail of other hardware, and leaving it out was not allowed.
    """
    at, tail, entries = found.at, found.tail, found.entries
    if tail and same:  # after a clean stop there is none, and nothing to compute
        start = _replayed(config, learner, found, crew, start, say)
    elif tail:
        _leave_out(config, found, say)
        entries = entries[: at.state.version]
    settled = {counted.shard for entry in entries for counted in entry.counted}
    settled |= {drop.shard for drops in (*(entry.dropped for entry in entries), start.dropped) for drop in drops}
    pending = [(c, finite) for c, finite in at.pending if c.shard not in settled]
    settled |= {c.shard for c, _ in pending}
    next_id = max(at.next_id, 1 + max(settled, default=-1))
    reissue = [shard for shard in range(next_id) if shard not in settled]
    aggregator = build_aggregator(config.aggregator, start.state.version, next_id, reissue, pending)
    return replace(start, aggregator=aggregator, saved=start.saved and not tail)


def _replayed(
    config: RunConfig, learner: Learner, found: Found, crew: Crew, start: Start, say: Callable[[str], None]
) -> Start:
    """The start after the log's tail, which the workers recompute."""
    progress = start.progress
    replayer = Replayer(config, learner, start.state, start.recent)
    passed: list[Checkpoint] = []

    def notice(outcome: Failure | Notice | Joined) -> None:
        if isinstance(outcome, Joined):
            check_worker(config, start.identity, outcome.hello)
            return
        if isinstance(outcome, Failure):
            progress.failures[outcome.kind] += 1
        say(outcome.message)

    for _ in recompute_tail(replayer, found.tail, crew, notice, say):
        if _due(config, replayer.state.version):
            passed.append(replace(found.at, state=replayer.state, recent=replayer.recent, pending=(), dropped=()))
    progress.failures["stale"] += sum(len(entry.dropped) for entry in found.tail) - len(start.dropped)
    progress.episodes += replayer.episodes
    crew.dispatcher.goodput.useful += sum(len(entry.counted) for entry in found.tail)
    return replace(
        start,
        state=replayer.state,
        recent=replayer.recent,
        dropped=(),
        unvalidated=_unscored(found.run, [*start.unvalidated, *passed]),
    )


def _leave_out(config: RunConfig, found: Found, say: Callable[[str], None]) -> None:
    """Say that the log's tail is left out.

    Raises:
        FingerprintError: that was not allowed.
    """
    what = f"versions {found.at.state.version + 1}–{found.tail[-1].version} of {found.run.path} are in its log alone"
    if config.execution.pool == "strict" and not config.execution.other_hardware:
        raise FingerprintError(
            f"{what} and were computed on other hardware or software than there is here: add "
            "--execution.other_hardware to leave them out, or to resume it there"
        )
    say(f"{what} and cannot be recomputed with these workers: they are left out")


def _due(config: RunConfig, version: int) -> bool:
    """Whether a version is one that is validated."""
    every = config.evaluation.every
    return bool(every) and version > 0 and (version % every == 0 or version == config.steps)


def _unscored(run: RunDirectory, due: Iterable[Checkpoint]) -> tuple[Checkpoint, ...]:
    """Those of the versions that the history has no validation of, each once."""
    if not run.history.exists():
        return ()
    scored = {validation.version for validation in read_history(run.history).validations}
    return tuple({at.state.version: at for at in due if at.state.version not in scored}.values())
