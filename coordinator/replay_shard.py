"""Computing one shard of a run alone, in this process: what a poison shard's error tells to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.config.run import RunConfig
from cluster.config.sections import AsyncAggregator
from cluster.errors import ConfigError, NumericsError
from cluster.messages import Contribution, ShardTask
from coordinator.checkpoint import list_checkpoints, load, version_of
from coordinator.commit_log import read_log
from coordinator.meta_state import MetaState
from coordinator.replay import Replayer, logged_entries, open_worker
from coordinator.run_dir import RunDirectory
from metaworker.shard_worker import ShardWorker


def replay_shard(
    run: RunDirectory, shard: int, until: int | None, store: Path | None
) -> tuple[Contribution, str | None]:
    """Compute one shard alone, in this process, and what the log says its digest is, if it names it.

    Args:
        run: its directory.
        shard: which one.
        until: the version whose θ it is computed with; in synchronous runs the shard's own when not given.
        store: where the run's episode store is now, if no longer where it was.

    Raises:
        CheckpointError, RunDirectoryError, NumericsError: as ``replay_run``.
        ConfigError: an asynchronous run, and no version.
        Exception: whatever computing it raises, which is what this is for.
    """
    config, _, worker = open_worker(run, store)
    if until is None:
        if isinstance(config.aggregator, AsyncAggregator):
            raise ConfigError(f"--shard {shard} of an asynchronous run needs its base version: give --until VERSION")
        until = shard // config.shards_per_version
    entries = logged_entries(run, until)
    replayer = _from_checkpoint(run, config, worker, until)
    for entry in entries[replayer.state.version :]:
        replayer.apply(entry, worker.compute)
    episodes = config.shard.episodes
    task = ShardTask(shard, shard * episodes, episodes, until)
    logged = [c for entry in read_log(run) for c in entry.counted if (c.shard, c.base_version) == (shard, until)]
    return worker.compute(replayer.state.published, task), logged[0].digest if logged else None


def _from_checkpoint(run: RunDirectory, config: RunConfig, worker: ShardWorker, version: int) -> Replayer:
    """A replayer at the last checkpoint up to ``version``, or at the beginning."""
    initial = MetaState.initial(config, worker.learner)
    earlier = [p for p in list_checkpoints(run.checkpoints) if version_of(p)[0] <= version]
    if not earlier:
        return Replayer(config, worker.learner, initial)
    at = load(earlier[-1], initial.layout, config.result_digest())
    return Replayer(config, worker.learner, at.state, at.recent)


def shard_command(
    run: RunDirectory, shard: int, until: int | None, store: Path | None, *, as_json: bool
) -> dict[str, Any]:
    """``metafleet replay --shard``: one shard alone; what computing it raises is shown with its traceback."""
    contribution, logged = replay_shard(run, shard, until, store)
    report = {
        "run": str(run.path),
        "shard": shard,
        "version": contribution.base_version,
        "episodes": contribution.episodes,
        "finite": contribution.finite,
        "loss": contribution.statistics.loss if contribution.finite else None,
        "digest": contribution.digest,
        "logged_digest": logged,
    }
    if not as_json:
        verdict = "the log does not name it" if logged is None else "as the log says"
        print(
            f"shard {shard} at version {contribution.base_version}: {'' if contribution.finite else 'not '}finite, "
            f"mean query loss {contribution.statistics.loss:.4f}\ndigest {contribution.digest}, {verdict}"
        )
    if logged not in (None, contribution.digest):
        raise NumericsError(
            f"shard {shard} at version {contribution.base_version} gives digest {contribution.digest[:16]}, the log "
            f"says {str(logged)[:16]}: it was computed on other hardware, or wrongly"
        )
    return report
