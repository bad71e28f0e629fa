"""The Ray actor around a ``ShardWorker``: opens the data by itself and answers one order after another.

Where a node has no store at the run's path, ``hello`` says so, ``expect`` and ``take`` bring it into the node's cache,
and ``hello`` is asked again.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import torch

from cluster.config.loading import with_execution
from cluster.config.run import RunConfig
from cluster.device import versions
from cluster.episodes import open_source
from cluster.episodes.shipping import Arrival
from cluster.episodes.store_header import StoreHeader
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
        """Start working and say who this worker is: asked before any order.

        Raises:
            StoreMissingError: this node has nothing at the store's path.
            MetafleetError: this node cannot work on the run, for instance since its store is another one.
        """
        with self._signing():
            source = open_source(self._config)
            self._worker = ShardWorker(self._config, source, self._slot)
        return WorkerHello(
            worker=self._slot,
            pid=os.getpid(),
            node=socket.gethostname(),
            store_digest=source.digest,
            split_digest=source.split_digest,
            fingerprint=self._worker.fingerprint,
            fingerprint_detail=self._worker.fingerprint_detail,
            config_digest=self._config.result_digest(),
            versions=versions(),
        )

    def expect(self, header: StoreHeader) -> int | None:
        """Read the store from the cache from now on; the offset of its bytes wanted first, ``None`` if it is there.

        Waits while another worker of this node is being sent it.

        Raises:
            StoreError: the cache cannot keep it.
        """
        with self._signing():
            self._arrival = Arrival(header)
            self._config = with_execution(self._config, store=str(self._arrival.path))
        return self._arrival.wanted

    def take(self, chunk: bytes) -> int | None:
        """Write the bytes of the store that were wanted; the offset of the next ones, ``None`` when it is there.

        Raises:
            StoreError: the cache cannot keep them, or they are not the store's.
        """
        with self._signing():
            self._arrival.add(chunk)
        return self._arrival.wanted

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

    @contextlib.contextmanager
    def _signing(self) -> Iterator[None]:
        """Errors for the user say which worker they are from."""
        try:
            yield
        except MetafleetError as error:
            raise type(error)(f"{error} (worker {self._slot} on {socket.gethostname()})") from error
