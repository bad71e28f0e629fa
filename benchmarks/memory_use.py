"""Peak memory that one worker's ``contribute`` takes above rest, for every registered learner, by inner steps.

Each number is of a fresh process that has imported everything, drawn the episodes and made a contribution of one of
them. What that left free goes back to the kernel, which then says how much was resident at most during a shard, less
what was before it: all that the shard needs besides θ, the learner state and its episodes.

Tensors are mapped and returned singly, so that the numbers are of what is alive at once and repeat to 1 or 2 %. A
worker (`cluster.device.prepare`) keeps what is free for the next tensors instead, which is faster, and holds more.

Learners with inner steps adapt the strided Conv-4 with transductive batch-norm; the others have the net of their
Omniglot recipe.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

from benchmarks.machine import THREADS
from benchmarks.report import Floor, Result, Sheet
from cluster.config import learners
from cluster.config.run import RunConfig
from cluster.config.sections import Conv4Pool, Conv4Strided, EpisodeShape, Shard
from cluster.device import prepare
from cluster.episodes import open_source
from metaworker.learners import build_learner
from metaworker.learners.base import Context

REGISTERED: tuple[type[learners.Learner], ...] = get_args(get_args(learners.Learner)[0])
STEPS = (1, 5, 20)
EPISODES = 8
"""Episodes of the shard, all vectorised at once."""
SHAPE = EpisodeShape(way=5, shot=1, query=5)
CONSTANT = {"imaml": 1.1}
"""What memory at the most steps may be, over that at one, of learners whose memory does not depend on the steps."""

STRIDED = Conv4Strided(channels=64)
RUNNING = Conv4Strided(channels=64, batch_norm="running")
POOL = Conv4Pool(channels=64, batch_norm="running")
MAPS = Conv4Pool(channels=64, batch_norm="running", pools=2)
NETS: dict[str, Conv4Strided | Conv4Pool] = {
    "mann": RUNNING,
    "memory": RUNNING,
    "relational": STRIDED,
    "relation": MAPS,
    "attention, spatial": MAPS,
}
"""Nets of learners without inner steps, by row; of those that are not here, `POOL`."""
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "maml": {"maml": {}, "maml, first order": {"first_order": True}},
    "lstm": {"lstm, cell": {"form": "cell"}, "lstm, hidden": {"form": "hidden"}},
    "matching": {"matching": {}, "matching, full context": {"full_context": True}},
    "attention": {"attention": {}, "attention, hard": {"hard": True}, "attention, spatial": {"spatial": True}},
    "triplet": {"triplet": {}, "triplet, all": {"mining": "all"}},
    "snail": {"snail, 128 filters": {"filters": 128}},
}
"""Options of each row, by ``type``; a learner that is not here has one row, with its defaults."""
QUICK = ("maml", "imaml", "protonet")
"""Rows of a quick run."""

MALLOC_OPTIONS = {-4: 1 << 16, -3: 1 << 16, -2: 0, -1: 1 << 16, -8: 1}
"""glibc's M_MMAP_MAX, M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD, M_ARENA_MAX: 64 KiB and more are mapped singly."""
MEBI = 2**20


@dataclass(frozen=True)
class Case:
    """A row: a learner and its net."""

    name: str
    section: learners.Learner

    @property
    def stepwise(self) -> bool:
        """Whether the learner has inner steps."""
        return "inner_steps" in type(self.section).model_fields

    @property
    def net(self) -> Conv4Strided | Conv4Pool:
        """What the learner adapts or embeds with."""
        return STRIDED if self.stepwise else NETS.get(self.name, POOL)

    def config(self, **options: int) -> RunConfig:
        """A run with the learner's options changed."""
        section = self.section.model_copy(update=options)
        shard = Shard(episodes=EPISODES, chunk=EPISODES)
        return RunConfig(episode=SHAPE, shard=shard, learner=section, model=self.net)


def cases() -> list[Case]:
    """Every registered learner, some with several options."""
    found = []
    for section in REGISTERED:
        kind = section.model_fields["type"].default
        found += [Case(name, section(**options)) for name, options in VARIANTS.get(kind, {kind: {}}).items()]
    return found


def measure(quick: bool) -> Result:
    """Learners with inner steps, then the others."""
    chosen = [case for case in cases() if not quick or case.name in QUICK]
    counts = (STEPS[0], STEPS[-1]) if quick else STEPS
    by_steps = [_with_steps(case, counts) for case in chosen if case.stepwise]
    others = [_row(case) | {"MiB": _in_fresh_process(case.config())} for case in chosen if not case.stepwise]
    growth = f"{counts[-1]} : {counts[0]}"
    floors = [
        Floor(f"{row['learner']}: memory at inner steps {growth}", float(row[growth]), CONSTANT[row["learner"]], False)
        for row in by_steps
        if row["learner"] in CONSTANT
    ]
    work = f"{EPISODES} episodes at once, {SHAPE.way}-way {SHAPE.shot}-shot, {SHAPE.query} queries a class, 28×28"
    return Result(
        [
            Sheet(
                f"Peak memory of a contribution above rest, MiB, by inner steps: {work}",
                by_steps,
                "parameters with the learner's default number of steps (those of mamlpp grow with it)",
            ),
            Sheet("The same of learners without inner steps", others),
        ],
        floors,
    )


def _row(case: Case) -> dict[str, Any]:
    theta = build_learner(case.config(), (1, 28, 28)).meta_parameters(0)
    return {
        "learner": case.name,
        "net": f"{case.net.type}, {case.net.batch_norm}",
        "parameters": sum(tensor.numel() for tensor in theta.values()),
    }


def _with_steps(case: Case, counts: Sequence[int]) -> dict[str, Any]:
    found = {steps: _in_fresh_process(case.config(inner_steps=steps)) for steps in counts}
    columns = {f"{steps} step{'s' if steps > 1 else ''}": memory for steps, memory in found.items()}
    return _row(case) | columns | {f"{counts[-1]} : {counts[0]}": found[counts[-1]] / found[counts[0]]}


# ------------------------------------------------------------------------------------------------------- in a process


def _in_fresh_process(config: RunConfig) -> float:
    """MiB that a contribution to this run takes, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(contribution_memory, config).result() / MEBI


def contribution_memory(config: RunConfig) -> int:
    """Bytes that one contribution takes above rest at most; leaves this process's allocator changed.

    Raises:
        OSError: this is no Linux, or the process may not reset its peak.
    """
    prepare("cpu", THREADS)
    libc = ctypes.CDLL(None)
    for option, value in MALLOC_OPTIONS.items():
        libc.mallopt(option, value)
    source, shape = open_source(config), config.episode
    learner = build_learner(config, source.sample_shape)
    episodes = source.sample("train", 0, config.shard.episodes, shape.way, shape.shot, shape.query)
    at = learner.meta_parameters(0), learner.initial_state()
    learner.contribute(*at, episodes.chunk(0, 1), Context(0, 1))
    libc.malloc_trim(0)
    return peak_above_rest(partial(learner.contribute, *at, episodes, Context(0, config.shard.chunk)))


def peak_above_rest(work: Callable[[], object]) -> int:
    """Bytes resident at most while ``work`` runs, less those before."""
    Path("/proc/self/clear_refs").write_text("5")  # makes the peak what is resident now
    rest = _resident("VmRSS")
    work()
    return _resident("VmHWM") - rest


def _resident(name: str) -> int:
    """A size in ``/proc/self/status``, bytes."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise OSError(f"/proc/self/status has no {name}")
