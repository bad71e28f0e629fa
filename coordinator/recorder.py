"""What a run writes as it goes: commit log, metric history, checkpoints, the best one by validation, last metrics.

Log and checkpoints are the epoch's own files. Before each checkpoint, and before the metrics are kept, the recorder
makes sure that no later driver has taken over; what a superseded driver had appended to its log by then, readers pass
over.
"""

from __future__ import annotations

import math

from cluster.config.run import RunConfig
from cluster.metrics import Metrics
from coordinator import checkpoint as checkpoints
from coordinator.checkpoint import Checkpoint
from coordinator.commit_log import CommitLog, Entry
from coordinator.goodput import Goodput
from coordinator.history import CommitRecord, HistoryWriter, ValidationRecord
from coordinator.meta_state import MetaState
from coordinator.run_dir import RunDirectory


class Recorder:
    """Writes one epoch of a run.

    Args:
        run: the run directory, whose lock is held.
        epoch: the epoch this driver claimed.
        config: the run's configuration.
        start: the version that it goes on from.

    Raises:
        CheckpointError: here and in every method, the disk is full, read-only or gone.
        RunDirectoryError: in ``checkpoint``, ``validation`` and ``keep_metrics``, a later driver has taken over.
    """

    def __init__(self, run: RunDirectory, epoch: int, config: RunConfig, start: MetaState) -> None:
        self._run = run
        self._epoch = epoch
        self._keep = config.execution.keep
        self._sign = -1.0 if config.regression else 1.0
        self._log = CommitLog(run, epoch, start.version, start.digest, config.result_digest())
        self._history = HistoryWriter(run.history)
        if start.version > 0 or epoch > 1:
            self._history.resume(start.version)
        checkpoints.sweep(run.checkpoints)
        # A resume may validate on other episodes: their scores are not compared with those of before.
        shape = config.evaluation_shape
        self._measured = f"{shape.way}/{shape.shot}/{shape.query}/{config.evaluation.val_episodes}"
        self._best = checkpoints.best_score(run.checkpoints, self._measured)

    def commit(self, entry: Entry, record: CommitRecord) -> None:
        """Record a commit, before it is published."""
        self._log.append(entry)
        self._history.commit(record)
        # As far as the log: a resume of an asynchronous run goes on from the log's end, not from the last checkpoint.
        self._history.flush()

    def checkpoint(self, checkpoint: Checkpoint, *, renew: bool = False) -> int:
        """Write a checkpoint, anew where ``renew`` is set; returns its bytes."""
        self._run.check_epoch(self._epoch)
        # The log on the disk must never be behind a checkpoint.
        self._log.sync()
        _, size = checkpoints.save(self._run.checkpoints, checkpoint, self._epoch, renew=renew)
        checkpoints.prune(self._run.checkpoints, self._keep)
        return size

    def goodput(self, version: int, goodput: Goodput) -> None:
        """Record what was computed for nothing up to a version."""
        self._history.goodput(version, goodput.to_json())
        self._history.flush()

    def unvalidated(self, checkpoint: Checkpoint) -> None:
        """Keep a version whose validation is not over, for the next driver."""
        checkpoints.save(self._run.checkpoints, checkpoint, self._epoch)

    def validation(self, record: ValidationRecord, checkpoint: Checkpoint) -> bool:
        """Record a validation; keeps its version if it is the best so far, and says whether it is."""
        best = self._is_best(record.steps[-1])
        if best:
            self._run.check_epoch(self._epoch)
            self._log.sync()
            path, _ = checkpoints.save(self._run.checkpoints, checkpoint, self._epoch)
            checkpoints.mark_best(path, record.steps[-1], self._measured)
            checkpoints.prune(self._run.checkpoints, self._keep)
            self._best = record.steps[-1]
        # Last of all: a version that the history has a validation of is not validated again after a crash.
        self._history.validation(record)
        self._history.flush()
        return best

    def _is_best(self, score: float) -> bool:
        # A diverged model is never the best, not even the first one.
        return math.isfinite(score) and (self._best is None or self._sign * score > self._sign * self._best)

    def keep_metrics(self, metrics: Metrics) -> None:
        """Keep the state of the metrics: a short run may never have been scraped.

        Raises:
            OSError: the disk is full, read-only or gone.
        """
        self._run.check_epoch(self._epoch)
        metrics.save(self._run.metrics)

    def close(self) -> None:
        """Flush and close the files."""
        try:
            self._log.close()
        finally:
            self._history.close()
