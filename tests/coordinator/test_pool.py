"""The pool of this very process, and what results weigh."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.device import prepare
from cluster.episodes import open_source
from cluster.errors import MetafleetError
from cluster.messages import Contribution, EvaluationPart, EvaluationTask, ShardTask
from coordinator.meta_state import MetaState
from coordinator.pool import InProcessPool, Reply, Skipped, WorkerReady, payload_bytes
from metaworker.shard_worker import ShardWorker
from tests.coordinator.harness import TINY, contribution, hello


def test_the_in_process_pool_answers_in_the_order_of_submission() -> None:
    prepare("cpu", threads=1)
    worker = ShardWorker(TINY, open_source(TINY))
    pool = InProcessPool((worker, hello()))
    assert (pool.size, pool.wait(1.0)) == (1, WorkerReady(0, hello()))
    assert pool.wait(1.0) is None
    published = MetaState.initial(TINY, worker.learner).published
    handle = pool.publish(published)
    shard = ShardTask(3, 6, 2, 0)
    evaluation = EvaluationTask("val", 0, 4, 1, 3, 3, "transductive", 0)
    pool.submit(0, shard, handle)
    pool.submit(0, evaluation, handle)
    first, second = pool.wait(1.0), pool.wait(1.0)
    assert isinstance(first, Reply) and isinstance(first.result, Contribution)
    assert (first.order, first.size, first.result.shard) == (shard, 4 * 25, 3)
    assert first.result.digest == worker.compute(published, shard).digest
    assert isinstance(second, Reply) and isinstance(second.result, EvaluationPart)
    assert second.order == evaluation and second.result.loss.shape == (4, 2)
    assert pool.wait(1.0) is None
    with pytest.raises(MetafleetError, match="no worker to replace"):
        pool.replace(0)
    pool.close()


def test_several_workers_in_process_answer_from_the_highest_slot_down() -> None:
    prepare("cpu", threads=1)
    source = open_source(TINY)
    workers = [ShardWorker(TINY, source, slot) for slot in (0, 1)]
    pool = InProcessPool(*((worker, hello()) for worker in workers))
    assert pool.size == 2
    assert [pool.wait(1.0), pool.wait(1.0)] == [WorkerReady(0, hello()), WorkerReady(1, hello())]
    handle = pool.publish(MetaState.initial(TINY, workers[0].learner).published)
    shards = [ShardTask(shard, 2 * shard, 2, 0) for shard in range(3)]
    for slot, shard in zip((0, 1, 1), shards, strict=True):
        pool.submit(slot, shard, handle)
    pool.recall(1, shards[2])
    assert pool.wait(1.0) == Skipped(1, shards[2])
    answers = [event for event in (pool.wait(1.0), pool.wait(1.0)) if isinstance(event, Reply)]
    assert [(answer.slot, answer.order) for answer in answers] == [(1, shards[1]), (0, shards[0])]
    assert pool.wait(1.0) is None
    pool.recall(0, shards[0])
    assert pool.wait(1.0) is None, "what has been answered cannot be recalled"


def test_a_result_weighs_its_arrays() -> None:
    assert payload_bytes(contribution(0)) == 12
    assert payload_bytes(contribution(0, proposals={"mean": np.zeros((2, 3))})) == 12 + 48
    loss, confusion = np.zeros((10, 2)), np.zeros((10, 2, 5, 5), np.int64)
    assert payload_bytes(EvaluationPart(0, 0, 0, 0, 0, loss, confusion, None)) == 160 + 4000
    assert payload_bytes(EvaluationPart(0, 0, 0, 0, 0, loss, None, loss)) == 320
