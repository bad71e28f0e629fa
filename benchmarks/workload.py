"""The training job that scaling and the coordinator's share are measured on: MAML, second order, 1 query, 1 step.

Of the shipped recipes it has the shortest episodes, so that a shard holds the most of them and a version passes the
soonest: what the coordinator does for a shard and for a version weighs the most here. Shards are made as small as the
floor on the coordinator's share allows.
"""

from __future__ import annotations

import math

from benchmarks.machine import THREADS
from benchmarks.rounds import seconds
from cluster.config.learners import MAML
from cluster.config.run import RunConfig
from cluster.config.sections import EpisodeShape, Evaluation, Execution, Shard, SyncAggregator
from cluster.device import prepare
from cluster.episodes import open_source
from cluster.messages import Published, ShardTask
from coordinator.meta_state import MetaState
from metaworker.shard_worker import ShardWorker

SHORTEST = 0.1
"""Seconds that a shard has to last."""
MARGIN = 1.15
"""What it is made longer by, so that none falls short."""
TRIED = 8
"""Episodes of the shard that the speed is found with."""


def config(shard_episodes: int, shards: int) -> RunConfig:
    """The job with shards of so many episodes, all vectorised at once, and so many shards a version."""
    return RunConfig(
        name="benchmark",
        steps=1_000_000,
        threads=THREADS,
        episode=EpisodeShape(way=5, shot=1, query=1),
        shard=Shard(episodes=shard_episodes, chunk=shard_episodes),
        learner=MAML(inner_lr=0.4, inner_steps=1),
        aggregator=SyncAggregator(shards=shards),
        evaluation=Evaluation(every=0),
        execution=Execution(checkpoint_every=1_000_000, metrics=False),
    )


def initial_parameters(worker: ShardWorker) -> Published:
    """Version 0 of the worker's run."""
    return MetaState.initial(worker.config, worker.learner).published


def calibrated_shard() -> int:
    """Episodes of a shard that lasts a little over ``SHORTEST`` seconds on this machine, at its best of five."""
    prepare("cpu", THREADS)
    tried = config(TRIED, shards=1)
    worker = ShardWorker(tried, open_source(tried))
    published, task = initial_parameters(worker), ShardTask(0, 0, TRIED, 0)
    worker.compute(published, task)
    best = min(seconds(lambda: worker.compute(published, task)) for _ in range(5))
    return math.ceil(SHORTEST * MARGIN * TRIED / best)
