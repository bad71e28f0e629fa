"""The work of one worker, without Ray: equal work gives equal bits, nothing given is written to, scores add up."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pynvml import NVML_ERROR_NOT_SUPPORTED, NVMLError
from torch.testing import assert_close

from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.episodes.sinusoid import SinusoidSource
from cluster.episodes.types import Episodes, EpisodeSource
from cluster.flat import FlatSpec
from cluster.messages import EvaluationTask, Published, ShardTask, SplitName
from metaworker.learners import build_learner
from metaworker.learners.base import Context
from metaworker.shard_worker import ShardWorker, _gpu_utilisation

# Of a tensor over memory that is not writable torch only warns, and that once a process.
pytestmark = pytest.mark.filterwarnings("error:The given NumPy array is not writable")

WAY, SHOT, QUERY = 5, 2, 3
LEARNERS = (learners.MAML(inner_lr=0.1, eval_steps=2), learners.Reptile(eval_steps=2), learners.ProtoNet())
every_learner = pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: learner.type)


class PictureSource:
    """An ``EpisodeSource`` that checks what it is asked for; episodes in ``broken`` have a NaN among their pixels."""

    digest, split_digest, sample_shape, regression = "pictures", "all", (1, 12, 12), False

    def __init__(self, broken: frozenset[int] = frozenset()) -> None:
        self._broken = broken

    def empty(self, split: SplitName) -> bool:
        return False

    def check(self, split: SplitName, way: int, shot: int, query: int) -> None:
        assert split in ("train", "val", "test", "all") and min(way, shot, query) >= 1

    def sample(
        self,
        split: SplitName,
        first_episode: int,
        episodes: int,
        way: int,
        shot: int,
        query: int,
        within: str | None = None,
    ) -> Episodes:
        self.check(split, way, shot, query)
        assert first_episode >= 0 and episodes >= 1
        ids = np.arange(first_episode, first_episode + episodes)
        drawn = [self._episode(split, int(episode), way, shot + query) for episode in ids]
        x = torch.stack(drawn)

        def part(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            labels = torch.arange(way).repeat_interleave(stop - start).repeat(episodes, 1)
            return x[:, :, start:stop].flatten(1, 2), labels

        return Episodes(ids, way, *part(0, shot), *part(shot, shot + query), {})

    def _episode(self, split: SplitName, episode: int, way: int, samples: int) -> torch.Tensor:
        """Pictures ``[way, sample, 1, 12, 12]``: of each class a pattern, with noise."""
        rng = np.random.default_rng([len(split), episode])
        pictures = rng.normal(size=(way, 1, 1, 12, 12)) + 0.5 * rng.normal(size=(way, samples, 1, 12, 12))
        if episode in self._broken:
            pictures[0, 0, 0, 3, 3] = np.nan
        return torch.from_numpy(pictures.astype(np.float32))


@pytest.fixture(autouse=True)
def determinism_put_back() -> Iterator[None]:
    """A worker switches its process to deterministic algorithms; the other tests' process it is not."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def config_of(learner: learners.Learner = LEARNERS[0], **options: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "model": sections.Conv4Strided(channels=4),
        "episode": sections.EpisodeShape(way=WAY, shot=SHOT, query=QUERY),
        "shard": sections.Shard(episodes=8, chunk=3),
    }
    return RunConfig(learner=learner, **(defaults | options))


def worker_of(learner: learners.Learner = LEARNERS[0], slot: int = 0, **options: Any) -> ShardWorker:
    return ShardWorker(config_of(learner, **options), PictureSource(), slot)


def sinusoid_worker() -> ShardWorker:
    config = RunConfig(
        data=sections.SinusoidData(),
        episode=sections.EpisodeShape(way=1, shot=5, query=7),
        model=sections.MLP(hidden=(8,)),
        learner=learners.MAML(inner_lr=0.01, eval_steps=2),
    )
    return ShardWorker(config, SinusoidSource(config.data, config.seed))


def published_by(worker: ShardWorker, version: int = 4, seed: int = 0) -> Published:
    """A version as it comes out of the object store: its arrays cannot be written to."""
    learner = worker.learner
    theta = worker.layout.flatten(learner.meta_parameters(seed)).numpy()
    state = {name: 0.5 * tensor.numpy() + 0.01 for name, tensor in learner.initial_state().items()}
    for array in (theta, *state.values()):
        array.setflags(write=False)
    return Published(version, theta, state)


def shard(number: int, episodes: int = 8, attempt: int = 0) -> ShardTask:
    return ShardTask(number, number * 8, episodes, base_version=4, attempt=attempt)


def orders(first: int = 0, episodes: int = 6, **options: Any) -> EvaluationTask:
    asked = {"way": WAY, "shot": SHOT, "query": QUERY, "batch_norm": "transductive", "base_version": 4} | options
    return EvaluationTask(split="val", first_episode=first, episodes=episodes, **asked)


# ------------------------------------------------------------------------------------------------------- contributions


@every_learner
def test_the_same_shard_has_the_same_digest_on_every_worker(learner: learners.Learner) -> None:
    one, other = worker_of(learner, slot=0), worker_of(learner, slot=7)
    published = published_by(one)
    other.evaluate(published, orders())
    other.compute(published, shard(11))
    first, second = one.compute(published, shard(3)), other.compute(published, shard(3, attempt=2))
    assert first.digest == second.digest == first.content_digest() != ""
    assert first.gradient.tobytes() == second.gradient.tobytes()
    assert (first.worker, first.attempt, second.worker, second.attempt) == (0, 0, 7, 2)


@every_learner
def test_other_work_has_another_digest(learner: learners.Learner) -> None:
    worker = worker_of(learner)
    published = published_by(worker)
    moved = published.theta.copy()
    moved[-1] = np.nextafter(moved[-1], np.float32(np.inf)) + np.float32(1e-3)
    digests = [
        worker.compute(published, shard(3)).digest,
        worker.compute(published, shard(4)).digest,
        worker.compute(published, replace(shard(3), shard=4)).digest,
        worker.compute(published, shard(3, episodes=7)).digest,
        worker.compute(replace(published, version=5), shard(3)).digest,
        worker.compute(replace(published, version=6, theta=moved), shard(3)).digest,
    ]
    assert len(set(digests)) == len(digests)


def test_the_digest_covers_everything_but_timings_attempt_and_worker() -> None:
    worker = worker_of()
    done = worker.compute(published_by(worker), shard(0))
    statistics = done.statistics
    gradient = done.gradient.copy()
    gradient[5] = np.nextafter(gradient[5], np.float32(1))
    proposals = {name: rows + (name == "mean.2") for name, rows in done.proposals.items()}
    others = [
        replace(done, gradient=gradient),
        replace(done, proposals=proposals),
        replace(done, proposals={}),
        replace(done, statistics=replace(statistics, loss=statistics.loss + 1e-9)),
        replace(done, statistics=replace(statistics, metric=statistics.metric + 1e-9)),
        replace(done, shard=1),
        replace(done, base_version=5),
        replace(done, episodes=7),
        replace(done, fingerprint="another"),
    ]
    assert len({other.content_digest() for other in [done, *others]}) == len(others) + 1
    later = replace(statistics, sample_seconds=1.0, adapt_seconds=2.0, idle_seconds=3.0, peak_bytes=1)
    assert replace(done, attempt=3, worker=9, statistics=later).content_digest() == done.digest


@every_learner
def test_a_contribution_has_what_the_message_says(learner: learners.Learner) -> None:
    worker = worker_of(learner)
    done = worker.compute(published_by(worker), shard(2))
    assert (done.shard, done.base_version, done.episodes) == (2, 4, 8)
    assert done.gradient.dtype == np.float32 and done.gradient.shape == (worker.layout.size,)
    assert done.gradient.any() and done.finite
    assert set(done.proposals) == set(worker.learner.initial_state())
    assert all(rows.shape == (8, 4) and rows.dtype == np.float32 for rows in done.proposals.values())
    assert done.fingerprint == worker.fingerprint
    assert worker.layout == FlatSpec.of(worker.learner.meta_parameters(0))


@every_learner
def test_a_contribution_is_the_learners_on_the_episodes_of_the_shard(learner: learners.Learner) -> None:
    worker = worker_of(learner)
    published = published_by(worker)
    done = worker.compute(published, ShardTask(shard=6, first_episode=48, episodes=3, base_version=4))
    theta = worker.layout.unflatten(torch.from_numpy(published.theta.copy()))
    episodes = PictureSource().sample("train", 48, 3, WAY, SHOT, QUERY)
    expected = worker.learner.contribute(theta, {}, episodes, Context(published.version, chunk=3))
    assert np.array_equal(done.gradient, np.concatenate([g.numpy().ravel() for g in expected.gradient.values()]))
    assert all(np.array_equal(done.proposals[name], rows.numpy()) for name, rows in expected.proposals.items())
    assert done.statistics.loss == pytest.approx(expected.loss.mean().item())
    assert done.statistics.metric == pytest.approx(expected.metric.mean().item())


@every_learner
def test_what_was_published_is_never_written_to(learner: learners.Learner) -> None:
    worker = worker_of(learner)
    published = published_by(worker)
    arrays = (published.theta, *published.state.values())
    before = [array.tobytes() for array in arrays]
    done = worker.compute(published, shard(0))
    worker.evaluate(published, orders(batch_norm="running"))
    assert worker.compute(published, shard(0)).digest == done.digest
    assert [array.tobytes() for array in arrays] == before
    made = (done.gradient, *done.proposals.values())
    assert not any(np.shares_memory(a, b) for a in made for b in arrays)


def test_statistics_are_of_the_shard_and_of_this_worker() -> None:
    worker = worker_of()
    published = published_by(worker)
    began = time.perf_counter()
    worker.compute(published, shard(0))
    time.sleep(0.05)
    started = time.perf_counter()
    statistics = worker.compute(published, shard(1)).statistics
    ended = time.perf_counter()
    assert 0.05 <= statistics.idle_seconds <= ended - began
    assert statistics.sample_seconds > 0 and statistics.adapt_seconds > 0
    assert statistics.sample_seconds + statistics.adapt_seconds <= ended - started
    assert 10**7 < statistics.peak_bytes < 10**12
    assert 0 < statistics.loss < 10 and 0 <= statistics.metric <= 1


@every_learner
def test_statistics_are_means_over_the_episodes(learner: learners.Learner) -> None:
    worker = worker_of(learner)
    published = published_by(worker)
    whole = worker.compute(published, shard(0)).statistics
    single = [worker.compute(published, ShardTask(0, e, 1, 4)).statistics for e in range(8)]
    assert whole.loss == pytest.approx(np.mean([s.loss for s in single]), rel=1e-5)
    assert whole.metric == pytest.approx(np.mean([s.metric for s in single]), rel=1e-5)


@every_learner
def test_shards_of_any_size_add_up(learner: learners.Learner) -> None:
    worker = worker_of(learner)
    published = published_by(worker)
    whole = worker.compute(published, ShardTask(0, 16, 8, 4))
    parts = [
        worker.compute(published, ShardTask(i, 16 + a, b - a, 4)) for i, (a, b) in enumerate([(0, 1), (1, 4), (4, 8)])
    ]
    assert sum(part.episodes for part in parts) == whole.episodes
    scale = np.abs(whole.gradient).max()
    np.testing.assert_allclose(sum(p.gradient for p in parts), whole.gradient, rtol=1e-3, atol=1e-5 * scale)
    for name, rows in whole.proposals.items():
        np.testing.assert_allclose(np.concatenate([p.proposals[name] for p in parts]), rows, rtol=1e-4, atol=1e-5)


def test_each_version_is_computed_with_its_own_parameters_and_state() -> None:
    worker = worker_of(learners.ProtoNet(), model=sections.Conv4Strided(channels=4, batch_norm="running"))
    old, new = published_by(worker, version=4), published_by(worker, version=5, seed=1)
    new = replace(new, state={name: 2 * rows for name, rows in new.state.items()})
    fresh = {p.version: worker_of(learners.ProtoNet(), model=worker.config.model) for p in (old, new)}
    for published in (old, new, new, old):
        expected = fresh[published.version].compute(published, shard(0))
        assert worker.compute(published, shard(0)).digest == expected.digest
        scores = fresh[published.version].evaluate(published, orders(batch_norm="running"))
        assert np.array_equal(worker.evaluate(published, orders(batch_norm="running")).loss, scores.loss)
    assert worker.compute(old, shard(0)).digest != worker.compute(new, shard(0)).digest


def test_parameters_of_another_layout_are_refused() -> None:
    worker = worker_of()
    published = published_by(worker)
    with pytest.raises(ValueError, match="elements, the layout needs"):
        worker.compute(replace(published, theta=published.theta[:-1]), shard(0))


# -------------------------------------------------------------------------------------------------------------- finite


@every_learner
def test_a_contribution_with_nan_says_so(learner: learners.Learner) -> None:
    source = PictureSource(broken=frozenset({13}))
    worker = ShardWorker(config_of(learner), source)
    published = published_by(worker)
    assert worker.compute(published, shard(0)).finite
    broken = worker.compute(published, shard(1))
    assert not broken.finite and np.isnan(broken.gradient).any() and math.isnan(broken.statistics.loss)
    again = ShardWorker(config_of(learner), source).compute(published, shard(1))
    assert again.digest == broken.digest, "the same NaN on another worker is recognised by its bits"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_finite_looks_at_the_gradient_the_proposals_and_the_loss(value: float) -> None:
    worker = worker_of()
    done = worker.compute(published_by(worker), shard(0))
    gradient = done.gradient.copy()
    gradient[-1] = value
    rows = done.proposals["mean.1"].copy()
    rows[2, 1] = value
    assert done.finite
    assert not replace(done, gradient=gradient).finite
    assert not replace(done, proposals=done.proposals | {"mean.1": rows}).finite
    assert not replace(done, statistics=replace(done.statistics, loss=value)).finite


# ---------------------------------------------------------------------------------------------------------- evaluation


@every_learner
def test_evaluation_counts_every_query_once_at_each_step(learner: learners.Learner) -> None:
    worker = worker_of(learner, slot=3)
    part = worker.evaluate(published_by(worker), orders(first=20, episodes=7, part=9, attempt=1))
    steps = 1 if learner.type == "protonet" else 3
    assert (part.part, part.version, part.attempt, part.worker, part.first_episode) == (9, 4, 1, 3, 20)
    assert part.squared_error is None and part.confusion is not None
    assert part.confusion.shape == (7, steps, WAY, WAY) and part.loss.shape == (7, steps)
    assert (part.confusion.sum(3) == QUERY).all() and (part.confusion >= 0).all()
    assert np.isfinite(part.loss).all() and (part.loss > 0).all()


@every_learner
@pytest.mark.parametrize("mode", ["transductive", "support", "running"])
def test_evaluation_scores_what_the_learner_predicts(learner: learners.Learner, mode: Any) -> None:
    worker = worker_of(learner)
    published = published_by(worker)
    part = worker.evaluate(published, orders(episodes=4, shot=1, query=4, batch_norm=mode))
    assert part.confusion is not None
    alone = build_learner(config_of(learner, model=sections.Conv4Strided(channels=4, batch_norm=mode)), (1, 12, 12))
    theta = worker.layout.unflatten(torch.from_numpy(published.theta.copy()))
    state = {name: torch.from_numpy(rows.copy()) for name, rows in published.state.items()}
    episodes = PictureSource().sample("val", 0, 4, WAY, 1, 4)
    for e in range(4):
        expected = np.zeros_like(part.confusion[e])
        for step, task in enumerate(alone.adapt(theta, state, episodes.support_x[e], episodes.support_y[e], {})):
            logits = alone.predict(task, episodes.query_x[e])
            loss = F.cross_entropy(logits, episodes.query_y[e]).item()
            assert part.loss[e, step] == pytest.approx(loss, rel=1e-4)
            for actual, predicted in zip(episodes.query_y[e].tolist(), logits.argmax(1).tolist(), strict=True):
                expected[step, actual, predicted] += 1
        assert np.array_equal(part.confusion[e], expected)


@every_learner
def test_evaluation_in_parts_is_evaluation_as_a_whole(learner: learners.Learner) -> None:
    worker = worker_of(learner)
    published = published_by(worker)
    whole = worker.evaluate(published, orders(episodes=9))
    parts = [worker.evaluate(published, orders(first=first, episodes=3)) for first in (0, 3, 6)]
    assert np.array_equal(np.concatenate([p.confusion for p in parts if p.confusion is not None]), whole.confusion)
    np.testing.assert_allclose(np.concatenate([p.loss for p in parts]), whole.loss, rtol=1e-5)


def test_protonet_is_evaluated_with_other_numbers_of_classes() -> None:
    worker = worker_of(learners.ProtoNet())
    published = published_by(worker)
    for way in (2, 9):
        part = worker.evaluate(published, orders(way=way))
        assert part.confusion is not None and part.confusion.shape == (6, 1, way, way)
        assert (part.confusion.sum(3) == QUERY).all()


@pytest.mark.parametrize("way", [2, 3])
def test_a_head_of_another_width_than_the_episodes_is_refused(way: int) -> None:
    worker = worker_of()
    with pytest.raises(ValueError, match=rf"{WAY} classes apart, the episodes have {way}"):
        worker.evaluate(published_by(worker), orders(way=way))


def test_evaluation_of_regression_is_its_squared_error() -> None:
    worker = sinusoid_worker()
    published = published_by(worker)
    part = worker.evaluate(published, orders(way=1, shot=5, query=7, episodes=6))
    assert part.confusion is None and part.squared_error is not None
    assert part.squared_error.shape == (6, 3)
    assert np.array_equal(part.squared_error, part.loss)
    episodes = worker.source.sample("val", 0, 6, 1, 5, 7)
    theta = worker.layout.unflatten(torch.from_numpy(published.theta.copy()))
    for e in range(6):
        tasks = worker.learner.adapt(theta, {}, episodes.support_x[e], episodes.support_y[e], {})
        errors = [F.mse_loss(worker.learner.predict(t, episodes.query_x[e]), episodes.query_y[e]).item() for t in tasks]
        np.testing.assert_allclose(part.squared_error[e], errors, rtol=1e-4)


def test_a_regression_shard_adapts() -> None:
    worker = sinusoid_worker()
    done = worker.compute(published_by(worker), shard(0))
    assert done.finite and done.proposals == {}
    assert done.statistics.loss == done.statistics.metric > 0


def test_sources_of_the_tests_are_sources() -> None:
    assert isinstance(PictureSource(), EpisodeSource)
    once, cut = PictureSource().sample("val", 0, 5, 3, 1, 2), PictureSource().sample("val", 3, 2, 3, 1, 2)
    assert_close(once.query_x[3:], cut.query_x)


def test_a_gpu_is_as_busy_as_its_driver_says_if_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(device: torch.device) -> int:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)

    for says, busy in ((lambda device: 40, 0.4), (refuses, None)):
        monkeypatch.setattr(torch.cuda, "utilization", says)
        assert _gpu_utilisation(torch.device("cuda")) == busy
    assert _gpu_utilisation(torch.device("cpu")) is None
