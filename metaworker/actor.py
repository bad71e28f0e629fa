"""The Ray actor around a ``ShardWorker``: opens the data by itself and answers one order after another."""

from __future__ import annotations

import os
import socket

import torch

from cluster.config.run import RunConfig
from cluster.episodes import open_source
from cluster.errors import ClusterError, MetafleetError
from cluster.messages import Contribution, EvaluationPart, EvaluationTask, Published, ShardTask, WorkerHello
from metaworker.shard_worker import ShardWorker


class WorkerActor:
    """One worker process. Ray starts it with its share of CPUs and GPUs; it restarts nothing by itself."""

    def __init__(self, config: RunConfig, slot: int) -> None:
        # Nothing here may fail: of an error in the making of an actor, Ray hands on the text and not the exception.
        self._config = config
        self._slot = slot

    def hello(self) -> WorkerHello:
        """Start working and say who this worker is: asked once, before anything else.

        Raises:
            MetafleetError: this node cannot work on the run, for instance since its store is another one.
        """
        node = socket.gethostname()
        try:
            source = open_source(self._config)
            self._worker = ShardWorker(self._config, source, self._slot)
        except MetafleetError as error:
            raise type(error)(f"{error} (worker {self._slot} on {node})") from error
        return WorkerHello(
            worker=self._slot,
            pid=os.getpid(),
            node=node,
            store_digest=source.digest,
            split_digest=source.split_digest,
            fingerprint=self._worker.fingerprint,
            fingerprint_detail=self._worker.fingerprint_detail,
        )

    def compute(self, published: Published, order: ShardTask | EvaluationTask) -> Contribution | EvaluationPart:
        """The answer to an order.

        Raises:
            ClusterError: out of memory.
        """
        try:
            return self._worker.answer(published, order)
        except (MemoryError, RuntimeError) as error:
            # torch's own error for GPUs is a RuntimeError; of the CPU's allocator, only the text tells.
            known = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not known and "can't allocate memory" not in str(error):
                raise
            raise ClusterError(
                f"out of memory on {self._worker.device}: train anew with a smaller --shard.chunk, or with fewer "
                f"workers a node or GPU ({str(error).splitlines()[0]})"
            ) from error
