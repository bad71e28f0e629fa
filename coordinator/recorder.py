"""What a run writes as it goes: commit log, metric history, checkpoints, the best one by validation."""

from __future__ import annotations

from coordinator import checkpoint as checkpoints
from coordinator.checkpoint import Checkpoint
from coordinator.commit_log import CommitLog, Entry
from coordinator.history import CommitRecord, HistoryWriter, ValidationRecord
from coordinator.run_dir import RunDirectory


class Recorder:
    """Writes one epoch of a run; every write first makes sure that no later driver has taken over.

    Args:
        run: the run directory, whose lock is held.
        epoch: the epoch this driver claimed.
        start: the version that it goes on from.
        start_digest: run digest of that version.
        config_digest: digest of the configuration's result half.
        keep: checkpoints kept besides the best.
        higher_is_better: whether validation scores are accuracies.
    """

    def __init__(
        self,
        run: RunDirectory,
        epoch: int,
        start: int,
        start_digest: str,
        config_digest: str,
        keep: int,
        higher_is_better: bool,
    ) -> None:
        self._run = run
        self._epoch = epoch
        self._keep = keep
        self._sign = 1.0 if higher_is_better else -1.0
        self._log = CommitLog(run, epoch, start, start_digest, config_digest)
        self._history = HistoryWriter(run.history)
        if start > 0 or epoch > 1:
            self._history.resume(start)
        self._best = checkpoints.best_score(run.checkpoints)

    def commit(self, entry: Entry, record: CommitRecord) -> None:
        """Record a commit, before it is published."""
        self._log.append(entry)
        self._history.commit(record)

    def checkpoint(self, checkpoint: Checkpoint) -> int:
        """Write a checkpoint; returns its bytes."""
        self._run.check_epoch(self._epoch)
        # The log on the disk must never be behind a checkpoint.
        self._log.sync()
        self._history.flush()
        _, size = checkpoints.save(self._run.checkpoints, checkpoint, self._epoch)
        checkpoints.prune(self._run.checkpoints, self._keep)
        return size

    def validation(self, record: ValidationRecord, checkpoint: Checkpoint) -> bool:
        """Record a validation; keeps its version if it is the best so far, and says whether it is."""
        self._history.validation(record)
        score = record.steps[-1]
        if self._best is not None and self._sign * score <= self._sign * self._best:
            return False
        self._run.check_epoch(self._epoch)
        self._log.sync()
        path, _ = checkpoints.save(self._run.checkpoints, checkpoint, self._epoch)
        checkpoints.mark_best(path, score)
        checkpoints.prune(self._run.checkpoints, self._keep)
        self._best = score
        return True

    def close(self) -> None:
        """Flush and close the files."""
        self._log.close()
        self._history.close()
