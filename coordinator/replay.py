"""Recomputing a run from its commit log, in one process: the same contributions in the same order, the same bits.

``Replayer`` applies one log entry after another; a resume uses it for the tail that an asynchronous run had logged
after its last checkpoint, ``metafleet replay`` for the whole run.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cluster.config.loading import load_resolved, with_execution
from cluster.config.run import RunConfig
from cluster.config.sections import AsyncAggregator
from cluster.episodes import open_source
from cluster.errors import CheckpointError, FingerprintError, NumericsError, RunDirectoryError
from cluster.messages import Contribution, Published, ShardTask
from coordinator.aggregators import build_aggregator
from coordinator.aggregators.base import Counted, Update
from coordinator.commit_log import Entry, log_problem, read_log
from coordinator.meta_state import MetaState
from coordinator.outer_optimizer import OuterOptimizer
from coordinator.run_dir import RunDirectory, RunIdentity
from metaworker.learners.base import Learner
from metaworker.shard_worker import ShardWorker

Compute = Callable[[Published, ShardTask], Contribution]
"""What gives the contribution of a shard to a version."""

REPORT_EVERY = 5.0
"""Seconds between two progress lines."""


class Replayer:
    """Recomputes commits from their log entries.

    Args:
        config: the run's configuration.
        learner: the run's.
        state: the version to start from.
        recent: θ and learner state of the versions before, oldest first.
    """

    def __init__(self, config: RunConfig, learner: Learner, state: MetaState, recent: Iterable[Published] = ()) -> None:
        self._config = config
        self._learner = learner
        self._optimizer = OuterOptimizer(config)
        aggregation = config.aggregator
        bound = aggregation.staleness_bound if isinstance(aggregation, AsyncAggregator) else 0
        self._recent: deque[Published] = deque(recent, maxlen=bound)
        self.state = state
        self.episodes = 0

    @property
    def recent(self) -> tuple[Published, ...]:
        """θ and learner state of the versions before the current one, oldest first."""
        return tuple(self._recent)

    def task(self, counted: Counted) -> ShardTask:
        """The order that a log line's contribution was the answer to."""
        episodes = self._config.shard.episodes
        return ShardTask(counted.shard, counted.shard * episodes, episodes, counted.base_version)

    def apply(self, entry: Entry, compute: Compute) -> None:
        """Recompute one commit, its contributions by ``compute``.

        Raises:
            NumericsError: a contribution or the run digest differs from the log.
            CheckpointError: the entry does not follow from the current version.
        """
        if entry.version != self.state.version + 1:
            raise CheckpointError(f"the log goes on with version {entry.version}, the state is at {self.state.version}")
        aggregator = build_aggregator(
            self._config.aggregator, self.state.version, reissue=[c.shard for c in entry.counted]
        )
        for _ in entry.counted:
            aggregator.next_shard()
        update: Any = None
        for counted in entry.counted:
            contribution = compute(self.base(counted.base_version), self.task(counted))
            _check(contribution, counted)
            update = aggregator.add(contribution, self.state.version, finite=counted.weight > 0)
        if not isinstance(update, Update):
            raise CheckpointError(f"version {entry.version} of the log does not hold a whole commit")
        self._recent.append(self.state.published)
        self.state, _ = self.state.apply(update.gradient, update.proposals, self._learner, self._optimizer)
        self.episodes += update.episodes
        if self.state.digest != entry.digest:
            raise NumericsError(
                f"version {entry.version} gives digest {self.state.digest[:16]}, the log says {entry.digest[:16]}"
            )

    def base(self, version: int) -> Published:
        """θ and learner state of a version that contributions may be based on.

        Raises:
            CheckpointError: it is older than the staleness bound allows.
        """
        if version == self.state.version:
            return self.state.published
        for published in self._recent:
            if published.version == version:
                return published
        raise CheckpointError(f"the log uses version {version}, which is older than the staleness bound allows")


def _check(contribution: Contribution, counted: Counted) -> None:
    if contribution.digest != counted.digest:
        raise NumericsError(
            f"shard {counted.shard} at version {counted.base_version} gives digest {contribution.digest[:16]}, the "
            f"log says {counted.digest[:16]}"
            + ("" if contribution.fingerprint == counted.fingerprint else ": it was computed on other hardware")
        )


def replay_run(run: RunDirectory, until: int | None = None, store: Path | None = None) -> tuple[Replayer, list[Entry]]:
    """Recompute a run from version 0.

    Args:
        run: its directory.
        until: the last version to recompute; the log's last one when not given.
        store: where the run's episode store is now, if no longer where it was.

    Raises:
        CheckpointError: the log is damaged or too short, or the data is not the run's.
        RunDirectoryError: the configuration was altered.
        FingerprintError: the run was computed on other hardware.
        NumericsError: what is recomputed differs from the log.
    """
    entries = logged_entries(run, until)
    config, identity, worker = open_worker(run, store)
    _check_fingerprint(run, identity, entries, worker)
    replayer = Replayer(config, worker.learner, MetaState.initial(config, worker.learner))
    if replayer.state.digest != identity.initial_digest:
        raise NumericsError(
            f"version 0 gives digest {replayer.state.digest[:16]}, the run says {identity.initial_digest[:16]}"
        )
    said = time.monotonic()
    for entry in entries:
        replayer.apply(entry, worker.compute)
        if time.monotonic() - said > REPORT_EVERY:
            said = time.monotonic()
            print(f"replayed {entry.version} of {len(entries)} versions, digests agree so far", file=sys.stderr)
    return replayer, entries


def open_worker(run: RunDirectory, store: Path | None) -> tuple[RunConfig, RunIdentity, ShardWorker]:
    """A run's configuration and identity, and a worker of this process on its data."""
    config = load_resolved(run.config)
    if store is not None:
        config = with_execution(config, store=str(store.absolute()))
    identity = run.identity()
    check_config(run, identity, config)
    source = open_source(config)
    check_source(identity, source.digest, source.split_digest)
    return config, identity, ShardWorker(config, source)


def logged_entries(run: RunDirectory, until: int | None) -> list[Entry]:
    """The log's entries up to ``until``, or all of a log that holds all."""
    entries = read_log(run)
    if until is not None and not 0 <= until <= len(entries):
        raise CheckpointError(f"--until {until} is not in the log of {run.path}: it holds versions 0 … {len(entries)}")
    problem = log_problem(run, entries)
    if until is None and problem is not None:
        raise CheckpointError(f"{problem}: restore the log from a backup, or give --until {len(entries)}")
    return entries[:until]


def _check_fingerprint(run: RunDirectory, identity: RunIdentity, entries: Sequence[Entry], worker: ShardWorker) -> None:
    """Refuse a run whose contributions are not all of this machine's class."""
    classes = {counted.fingerprint for entry in entries for counted in entry.counted}
    if classes <= {worker.fingerprint}:
        return
    if len(classes) == 1:
        detail = dict(identity.fingerprint_detail) if identity.fingerprint in classes else "later than its start"
        raise FingerprintError(
            f"{run.path} was computed on other hardware or software ({detail}, here {worker.fingerprint_detail}): "
            "replay it on the same kind of machine"
        )
    first = entries[0].counted[0].fingerprint
    other = next(e.version for e in entries if any(c.fingerprint != first for c in e.counted))
    raise FingerprintError(
        f"{run.path} is a mixed run: from version {other} on, workers of other hardware or software took part, and no "
        f"one machine gives all its bits; versions before are replayed by --until {other - 1}"
    )


def check_config(run: RunDirectory, identity: RunIdentity, config: RunConfig) -> None:
    """Refuse a configuration that is not the one the run was made with.

    Raises:
        RunDirectoryError: its result half was altered.
    """
    if config.result_digest() != identity.config_digest:
        raise RunDirectoryError(
            f"{run.config} was altered, or the run is of a Metafleet with other settings: what decides results is not "
            "as the run was made; restore the file, use the Metafleet that made the run, or train anew"
        )


def check_source(identity: RunIdentity, store_digest: str, split_digest: str) -> None:
    """Refuse data that is not the run's.

    Raises:
        CheckpointError: another store or split.
    """
    if (store_digest, split_digest) != (identity.store_digest, identity.split_digest):
        what = "store" if store_digest != identity.store_digest else "split"
        raise CheckpointError(f"the run was made with another {what} than the one found now: give its own --store")


def replay_command(
    run: Path, *, until: int | None, shard: int | None, store: Path | None, as_json: bool
) -> dict[str, Any]:
    """``metafleet replay``: recompute and compare; what does not agree is an error."""
    if shard is not None:
        from coordinator.replay_shard import shard_command

        return shard_command(RunDirectory.open(run), shard, until, store, as_json=as_json)
    started = time.monotonic()
    replayer, entries = replay_run(RunDirectory.open(run), until, store)
    report = {
        "run": str(run),
        "version": replayer.state.version,
        "digest": replayer.state.digest,
        "shards": sum(len(entry.counted) for entry in entries),
        "dropped": sum(len(entry.dropped) for entry in entries),
        "matches": True,
        "seconds": time.monotonic() - started,
    }
    if not as_json:
        print(
            f"replayed {report['version']:,} versions from {report['shards']:,} shards in {report['seconds']:.1f} s: "
            f"every digest agrees with the log\ndigest {report['digest']}"
        )
    return report
