"""The outer loop: keeps workers busy, collects contributions, commits versions.

    Trainer.run     the loop, one screen
    Trainer._take   acts on one outcome of the dispatcher
    Trainer._commit θ of the next version, published, logged, checkpointed, validated when due

The trainer knows the dispatcher (who computes), the aggregator (what makes an update), the recorder (what is kept) and
the view and metrics (what is shown). It knows neither Ray nor files.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cluster.config.run import RunConfig
from cluster.config.sections import AsyncAggregator
from cluster.device import versions
from cluster.errors import ClusterError, FingerprintError, MetafleetError, NumericsError
from cluster.faults import fail_at
from cluster.messages import EvaluationPart, EvaluationTask, Published, ShardTask, WorkerHello
from cluster.metrics import Metrics
from coordinator.aggregators.asynchronous import staleness_weight
from coordinator.aggregators.base import Aggregator, Dropped, Update
from coordinator.checkpoint import Checkpoint
from coordinator.commit_log import Entry
from coordinator.dispatch import Dispatcher
from coordinator.evaluation import PATIENCE, EvaluationCollector, EvaluationRequest
from coordinator.goodput import Goodput
from coordinator.history import CommitRecord, ValidationRecord
from coordinator.meta_state import MetaState
from coordinator.outcomes import Accepted, Evaluated, Failure, Joined, Notice, Outcome
from coordinator.outer_optimizer import OuterOptimizer
from coordinator.pool import Handle, Pool
from coordinator.recorder import Recorder
from coordinator.run_dir import RunIdentity
from coordinator.view import Snapshot, View
from metaworker.learners.base import Learner

NONFINITE_WINDOW = 16
"""Contributions of an asynchronous run over which the share of non-finite ones is judged: a commit may hold but one."""


@dataclass
class Progress:
    """What a trainer has done so far, over all attempts."""

    episodes: int = 0
    seconds: float = 0.0
    """Wall time of earlier attempts."""
    failures: Counter[str] = field(default_factory=Counter)
    mixed: bool = False


@dataclass(frozen=True)
class Start:
    """Where a trainer starts from: the beginning, or what an earlier driver left."""

    identity: RunIdentity
    """The run's, with the fingerprint of the workers of now."""
    state: MetaState
    aggregator: Aggregator
    """At that version."""
    progress: Progress = field(default_factory=Progress)
    """Of earlier attempts."""
    recent: tuple[Published, ...] = ()
    """θ and learner state of the versions before, oldest first (asynchronous runs)."""
    dropped: tuple[Dropped, ...] = ()
    """Contributions dropped since the last commit, which no log entry names yet."""
    expected: Mapping[int, str] = field(default_factory=dict)
    """Run digests that versions must have, from the log of an earlier attempt of a synchronous run."""
    saved: bool = False
    """Whether all this is what a checkpoint holds already."""
    unvalidated: tuple[Checkpoint, ...] = ()
    """Versions whose validation an earlier attempt did not finish."""


class StopRequest:
    """Set by a signal handler: the loop checkpoints and ends at the next opportunity."""

    def __init__(self) -> None:
        self.signal: int | None = None


@dataclass(frozen=True)
class Resources:
    """What a trainer works with."""

    config: RunConfig
    learner: Learner
    pool: Pool
    dispatcher: Dispatcher
    recorder: Recorder
    view: View
    metrics: Metrics
    stop: StopRequest
    clock: Callable[[], float] = time.monotonic


class Trainer:
    """Trains one run from ``state`` to its last version.

    Args:
        resources: what it works with.
        start: where it starts from.
    """

    def __init__(self, resources: Resources, start: Start) -> None:
        self._r = resources
        self.state = start.state
        self._aggregator = start.aggregator
        self.progress = start.progress
        self._identity = start.identity
        self._expected = dict(start.expected)
        self._saved = start.saved
        """Whether the last checkpoint holds all that was done since."""
        config = resources.config
        aggregation = config.aggregator
        bound, self._exponent, window = 0, 0.0, config.shards_per_version
        if isinstance(aggregation, AsyncAggregator):
            bound, self._exponent = aggregation.staleness_bound, aggregation.staleness_exponent
            window = max(window, NONFINITE_WINDOW)
        self._judged: deque[tuple[int, bool]] = deque(maxlen=window)
        self._recent = deque(start.recent, maxlen=bound) if bound else deque[Published](maxlen=0)
        self._optimizer = OuterOptimizer(config)
        self._dropped = list(start.dropped)
        self._validations: dict[int, tuple[EvaluationCollector, Checkpoint]] = {}
        self._orders: deque[tuple[EvaluationTask, Handle]] = deque()
        self._last_validation: ValidationRecord | None = None
        self._last: Update | None = None
        self._started = resources.clock()
        self._ended: float | None = None
        self._since_start = 0
        self._handle = self._publish()
        resources.metrics.version(start.state.version, config.steps)
        for checkpoint in start.unvalidated:
            self._validate(checkpoint, resources.pool.publish(checkpoint.state.published))

    def run(self) -> MetaState:
        """The main loop; returns the state at the last version, or where a stop request found it."""
        total = self._r.config.steps
        while (self.state.version < total or self._validations) and self._r.stop.signal is None:
            outcome = self._next()
            if outcome is not None:
                self._take(outcome)
            self._show()
        self._ended = self._r.clock()
        self._r.dispatcher.forget()
        self._count_workers()
        if not self._saved:
            self._save(renew=True)
        for _, checkpoint in self._validations.values():
            self._r.recorder.unvalidated(checkpoint)
        return self.state

    def _next(self) -> Outcome | None:
        """Send orders, then wait for what comes of them."""
        metrics, pool = self._r.metrics, self._r.pool
        with metrics.phase("transfer"):
            self._top_up()
        with metrics.phase("wait"):
            before = pool.transfer_seconds
            outcome = self._r.dispatcher.next(PATIENCE)
            metrics.moved(pool.transfer_seconds - before)
        return outcome

    def _top_up(self) -> None:
        """Validations first, then shards, while the dispatcher has room and the aggregator wants some."""
        dispatcher = self._r.dispatcher
        while dispatcher.room > 0:
            if self._orders:
                dispatcher.submit(*self._orders.popleft())
                continue
            shard = self._aggregator.next_shard() if self.state.version < self._r.config.steps else None
            if shard is None:
                return
            episodes = self._r.config.shard.episodes
            dispatcher.submit(ShardTask(shard, shard * episodes, episodes, self.state.version), self._handle)

    def _take(self, outcome: Outcome) -> None:
        self._saved = self._saved and isinstance(outcome, Joined | Evaluated)
        match outcome:
            case Accepted():
                self._contribution(outcome)
            case Evaluated(part):
                self._validated(part)
            case Failure() | Notice() | Joined():
                self.notice(outcome)

    def notice(self, outcome: Failure | Notice | Joined) -> None:
        """Count and show a failure that was dealt with; check a worker that joins.

        Raises:
            MetafleetError: it reads other data.
            FingerprintError: it is other hardware, in a strict pool.
        """
        if isinstance(outcome, Failure):
            self.progress.failures[outcome.kind] += 1
            self._r.metrics.failure(outcome.kind)
            self._r.view.message(outcome.message)
        elif isinstance(outcome, Notice):
            self._r.view.message(outcome.message)
        elif outcome.late:
            self._welcome_late(outcome.hello)
        else:
            self._welcome(outcome.hello)
        self._count_workers()

    def _contribution(self, accepted: Accepted) -> None:
        contribution, version = accepted.contribution, self.state.version
        if version >= self._r.config.steps:
            return
        with self._r.metrics.phase("reduce"):
            result = self._aggregator.add(contribution, version, finite=accepted.finite)
        staleness = version - contribution.base_version
        counts = accepted.finite and not isinstance(result, Dropped)
        weight = staleness_weight(staleness, self._exponent) if counts else 0.0
        self._r.metrics.contribution(contribution, staleness, accepted.seconds, weight)
        if isinstance(result, Dropped):
            self._dropped.append(result)
            self.goodput.lose("stale", contribution.statistics.adapt_seconds)
            self.progress.failures["stale"] += 1
            self._r.metrics.failure("stale")
        elif result is not None:
            with self._r.metrics.phase("commit"):
                self._commit(result)

    def _commit(self, update: Update) -> None:
        """Make the next version: the log first, then everyone else."""
        self._check_share(update)
        config = self._r.config
        if self._recent.maxlen:
            self._recent.append(self.state.published)
        state, norm = self.state.apply(update.gradient, update.proposals, self._r.learner, self._optimizer)
        expected = self._expected.pop(state.version, None)
        if expected is not None and expected != state.digest:
            raise NumericsError(
                f"version {state.version} has digest {state.digest[:16]}, the log of the earlier attempt says "
                f"{expected[:16]}: this machine computes other bits than the one that wrote it"
            )
        self.state, self._last = state, update
        self.progress.episodes += update.episodes
        self.goodput.useful += len(update.counted)
        self._since_start += update.episodes
        entry = Entry(state.version, tuple(update.counted), tuple(self._dropped), state.digest)
        self._dropped.clear()
        self._r.recorder.commit(entry, self._record(update, norm))
        self._handle = self._publish()
        self._r.metrics.commit(state.version, update.loss, update.metric, norm)
        every = config.evaluation.every
        if every and (state.version % every == 0 or state.version == config.steps):
            self._validate(self._checkpoint(), self._handle)
        if state.version % config.execution.checkpoint_every == 0 and state.version < config.steps:
            self._save()

    def _validate(self, checkpoint: Checkpoint, handle: Handle) -> None:
        """Order a validation of a version; it is computed while the run goes on."""
        version = checkpoint.state.version
        request = EvaluationRequest.of(self._r.config, "val", self._r.config.evaluation.val_episodes)
        self._validations[version] = (EvaluationCollector(request), checkpoint)
        self._orders.extend((order, handle) for order in request.orders(version))
        self._r.metrics.validating(len(self._validations))

    def _validated(self, part: EvaluationPart) -> None:
        version = part.version
        collector, checkpoint = self._validations[version]
        scores = collector.add(part)
        if scores is None:
            return
        del self._validations[version]
        self._r.metrics.validating(len(self._validations))
        self._last_validation = ValidationRecord(version, tuple(scores.steps), tuple(scores.ci95))
        self._r.recorder.validation(self._last_validation, checkpoint)
        self._r.metrics.validation(scores.steps)

    def _welcome(self, hello: WorkerHello) -> None:
        """Check that a worker may take part."""
        if not check_worker(self._r.config, self._identity, hello) and not self.progress.mixed:
            self.progress.mixed = True
            self._r.view.message(
                "workers of different hardware: the run is labelled mixed, equal bits are not promised"
            )

    def _welcome_late(self, hello: WorkerHello) -> None:
        """Check a worker that was not there from the start: the run goes on without one that may not take part."""
        try:
            self._welcome(hello)
        except MetafleetError as error:
            self.progress.failures["refused"] += 1
            self._r.metrics.failure("refused")
            self._r.view.message(f"{error}; it is not used, and the run goes on without it")
            self._r.dispatcher.refuse(hello.worker)

    def _check_share(self, update: Update) -> None:
        """Stop a run whose contributions are not finite too often, judged over a version or, if longer, a window.

        Raises:
            NumericsError: more than ``nonfinite_share`` of them.
        """
        self._judged.extend((c.shard, c.weight > 0) for c in update.counted)
        bad = [shard for shard, finite in self._judged if not finite]
        limit, size = self._r.config.nonfinite_share, self._judged.maxlen or 1
        if len(bad) > limit * size:
            raise NumericsError(
                f"{len(bad)} of the last {size} shards, at version {self.state.version}, are not finite (shards "
                f"{bad[:8]}), more than nonfinite_share = {limit:g}: lower the step sizes or set clip_norm"
            )

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            state=self.state,
            recent=tuple(self._recent),
            pending=tuple(self._aggregator.pending()),
            dropped=tuple(self._dropped),
            next_id=self._aggregator.next_id,
            config_digest=self._identity.config_digest,
            episodes=self.progress.episodes,
            seconds=self.seconds,
            failures=dict(self.progress.failures),
            goodput=self.goodput.pack(),
        )

    def _save(self, *, renew: bool = False) -> None:
        self._r.metrics.checkpoint(self._r.recorder.checkpoint(self._checkpoint(), renew=renew))
        self._r.recorder.goodput(self.state.version, self.goodput)
        self._saved = True

    def _publish(self) -> Handle:
        published = self.state.published
        self._r.metrics.published(published.theta.nbytes + sum(rows.nbytes for rows in published.state.values()))
        fail_at("publish", version=self.state.version)
        with self._r.metrics.phase("transfer"):
            handle = self._r.pool.publish(published)
        fail_at("published", version=self.state.version)
        return handle

    @property
    def goodput(self) -> Goodput:
        """How much of what was computed counted, over all attempts."""
        return self._r.dispatcher.goodput

    @property
    def seconds(self) -> float:
        """Wall time of training over all attempts, validations included, the evaluation at the end not."""
        return self.progress.seconds + self._elapsed

    @property
    def tasks_per_second(self) -> float | None:
        """Episodes committed a second in this attempt; ``None`` if there were none."""
        return self._since_start / max(1e-9, self._elapsed) if self._since_start else None

    @property
    def _elapsed(self) -> float:
        return (self._r.clock() if self._ended is None else self._ended) - self._started

    def _record(self, update: Update, norm: float) -> CommitRecord:
        return CommitRecord(
            version=self.state.version,
            loss=update.loss,
            metric=update.metric,
            gradient_norm=norm,
            episodes=update.episodes,
            seconds=self.seconds,
            tasks_per_second=self.tasks_per_second or 0.0,
            staleness=update.staleness,
            workers=self._r.dispatcher.workers,
        )

    def _count_workers(self) -> None:
        dispatcher, wanted = self._r.dispatcher, self._r.config.execution.workers
        self._r.metrics.in_flight(dispatcher.in_flight)
        self._r.metrics.workers(dispatcher.workers, wanted, dispatcher.nodes, needed=dispatcher.needed)

    def _show(self) -> None:
        dispatcher, last = self._r.dispatcher, self._last
        self._count_workers()
        self._r.metrics.goodput(self.goodput.share, self.goodput.lost, self.goodput.lost_seconds)
        nan = float("nan")
        self._r.view.update(
            Snapshot(
                version=self.state.version,
                loss=last.loss if last else nan,
                metric=last.metric if last else nan,
                episodes=self._since_start,
                workers=dispatcher.workers,
                in_flight=dispatcher.in_flight,
                # What was too stale is the bound at work: in the report and the metrics, but no failure.
                failures=self.progress.failures.total() - self.progress.failures["stale"],
                staleness=last.staleness if last and self._recent.maxlen else None,
                validation=self._last_validation,
            )
        )


def check_worker(config: RunConfig, identity: RunIdentity, hello: WorkerHello) -> bool:
    """Whether a worker that joins computes the run's bits.

    Raises:
        MetafleetError: it reads other data.
        FingerprintError: it is other hardware, in a strict pool.
    """
    check_data(identity.store_digest, identity.split_digest, hello)
    check_software(identity, hello)
    if hello.fingerprint == identity.fingerprint:
        return True
    if config.execution.pool == "strict":
        raise FingerprintError(
            f"worker {hello.worker} on {hello.node} computes on other hardware or software than the run "
            f"({dict(hello.fingerprint_detail)} instead of {dict(identity.fingerprint_detail)}): equal bits cannot "
            "be promised; use equal nodes, or --execution.pool mixed"
        )
    return False


def check_software(identity: RunIdentity, hello: WorkerHello) -> None:
    """Refuse a worker that understands the configuration otherwise, or runs other software than the driver.

    Raises:
        ClusterError: another version of Metafleet or Ray there. (Another torch is another fingerprint.)
    """
    here = versions()
    for name in ("metafleet", "ray"):
        there = hello.versions.get(name, here[name])
        if there != here[name]:
            raise ClusterError(
                f"worker {hello.worker} on {hello.node} runs {name} {there}, the driver {here[name]}: install one "
                "version on every node"
            )
    if hello.config_digest not in ("", identity.config_digest):
        raise ClusterError(
            f"worker {hello.worker} on {hello.node} reads the run's configuration otherwise (digest "
            f"{hello.config_digest[:12]}, not {identity.config_digest[:12]}): install one version on every node"
        )


def check_data(store_digest: str, split_digest: str, hello: WorkerHello) -> None:
    """Refuse a worker that reads other data than the run.

    Raises:
        MetafleetError: another store or split.
    """
    for what, here, there in (
        ("store", store_digest, hello.store_digest),
        ("split", split_digest, hello.split_digest),
    ):
        if here != there:
            raise MetafleetError(
                f"worker {hello.worker} on {hello.node} has another {what} (digest {there[:12]}, the run's is "
                f"{here[:12]}): give every node the same file"
            )
