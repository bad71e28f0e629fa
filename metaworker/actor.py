"""The Ray actor around a ``ShardWorker``: opens the data by itself and answers one order after another."""

from __future__ import annotations

import os
import socket

from cluster.config.run import RunConfig
from cluster.episodes import open_source
from cluster.messages import Contribution, EvaluationPart, EvaluationTask, Published, ShardTask, WorkerHello
from metaworker.shard_worker import ShardWorker


class WorkerActor:
    """One worker process. Ray starts it with its share of CPUs and GPUs; it restarts nothing by itself."""

    def __init__(self, config: RunConfig, slot: int) -> None:
        source = open_source(config)
        self._worker = ShardWorker(config, source, slot)
        self._hello = WorkerHello(
            worker=slot,
            pid=os.getpid(),
            node=socket.gethostname(),
            store_digest=source.digest,
            split_digest=source.split_digest,
            fingerprint=self._worker.fingerprint,
            fingerprint_detail=self._worker.fingerprint_detail,
        )

    def hello(self) -> WorkerHello:
        """Who this worker is; the first thing asked of it."""
        return self._hello

    def compute(self, published: Published, order: ShardTask | EvaluationTask) -> Contribution | EvaluationPart:
        """The answer to an order."""
        if isinstance(order, ShardTask):
            return self._worker.compute(published, order)
        return self._worker.evaluate(published, order)
