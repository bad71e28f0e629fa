"""One version of a run: its digest holds everything, and the next version comes without touching this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from cluster.config.sections import SGD, Adam
from cluster.flat import FlatSpec
from coordinator.meta_state import MetaState
from coordinator.outer_optimizer import OuterOptimizer
from metaworker.learners import build_learner
from metaworker.learners.base import Learner
from tests.coordinator.harness import TINY

LAYOUT = FlatSpec(("a", "b"), ((2,), (1, 2)), torch.float32)


@dataclass
class CountingLearner:
    """Learner state: the proposals so far, and how many commits there were."""

    seen: list[Mapping[str, np.ndarray]] = field(default_factory=list)

    def commit_state(
        self, state: Mapping[str, np.ndarray], proposals: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        self.seen += proposals
        return {"mean": np.array([sum(p["x"].sum() for p in proposals)]), "count": state["count"] + 1}


def state() -> MetaState:
    arrays = {"mean": np.array([0.5]), "count": np.array(3)}
    optimizer = {"step": torch.tensor(4.0), "exp_avg": torch.arange(4.0), "exp_avg_sq": torch.ones(4)}
    return MetaState(7, LAYOUT, torch.tensor([1.0, -0.0, 3.0, 4.0]), arrays, optimizer)


def test_the_digest_is_a_function_of_the_content() -> None:
    assert state().digest == state().digest
    assert len(state().digest) == 64


OTHERS: dict[str, dict[str, Any]] = {
    "version": {"version": 8},
    "one bit of a parameter": {"theta": torch.tensor([1.0, 0.0, 3.0, 4.0])},
    "the least change of a parameter": {"theta": torch.tensor([1.0 + 2**-23, -0.0, 3.0, 4.0])},
    "a parameter's name": {"layout": replace(LAYOUT, names=("a", "c"))},
    "a parameter's shape": {"layout": replace(LAYOUT, shapes=((2,), (2, 1)))},
    "a parameter's place": {"layout": replace(LAYOUT, names=("b", "a"), shapes=((2,), (1, 2)))},
    "a learner state's value": {"state": {"mean": np.array([0.25]), "count": np.array(3)}},
    "a learner state's dtype": {"state": {"mean": np.array([0.5]), "count": np.array(3, np.int32)}},
    "a learner state's shape": {"state": {"mean": np.array([0.5]), "count": np.array([3])}},
    "a learner state's name": {"state": {"average": np.array([0.5]), "count": np.array(3)}},
    "a learner state that is missing": {"state": {"mean": np.array([0.5])}},
    "an optimizer state's value": {"optimizer": {**state().optimizer, "step": torch.tensor(5.0)}},
    "an optimizer state that is missing": {"optimizer": {"step": torch.tensor(4.0)}},
    "no optimizer state": {"optimizer": {}},
}


@pytest.mark.parametrize("change", OTHERS)
def test_the_digest_changes_with(change: str) -> None:
    assert replace(state(), **OTHERS[change]).digest != state().digest


def test_a_learner_state_is_no_optimizer_state() -> None:
    plain = replace(state(), state={}, optimizer={})
    x = torch.arange(3.0)
    assert replace(plain, state={"x": x.numpy()}).digest != replace(plain, optimizer={"x": x}).digest


def test_what_is_published_is_the_version_s_theta_and_learner_state() -> None:
    published = state().published
    assert published.version == 7
    assert published.theta.tobytes() == state().theta.numpy().tobytes()
    assert published.state.keys() == {"mean", "count"}


@pytest.mark.parametrize("optimizer", [Adam(lr=0.1), SGD(lr=0.1, momentum=0.9)], ids=["adam", "sgd"])
def test_the_next_version_is_made_without_touching_this_one(optimizer: Adam | SGD) -> None:
    learner, outer = CountingLearner(), OuterOptimizer(TINY.model_copy(update={"optimizer": optimizer}))
    before = state() if isinstance(optimizer, Adam) else replace(state(), optimizer={"momentum_buffer": torch.ones(4)})
    digest = before.digest
    gradient = np.array([3.0, 0.0, -4.0, 0.0], dtype=np.float32)
    gradient.flags.writeable = False
    proposals = [{"x": np.array([1.0, 2.0])}, {"x": np.array([4.0])}]
    results = [before.apply(gradient, proposals, cast(Learner, learner), outer) for _ in range(2)]
    (after, norm), (again, _) = results
    assert norm == 5.0 and after.digest == again.digest
    assert replace(before).digest == digest, "apply has changed the version it was called on"
    assert after.version == 8 and after.layout == LAYOUT
    assert learner.seen == [*proposals, *proposals]
    assert (after.state["mean"].tolist(), after.state["count"].tolist()) == ([7.0], 4)
    expected, expected_state = outer.step(before.theta, before.optimizer, gradient, 7)
    assert torch.equal(after.theta, expected) and not torch.equal(after.theta, before.theta)
    assert after.optimizer.keys() == expected_state.keys()


def test_apply_clips_what_it_applies_and_reports_the_norm_before() -> None:
    outer = OuterOptimizer(TINY.model_copy(update={"optimizer": SGD(lr=1.0), "clip_norm": 1.0}))
    start = replace(state(), optimizer={})
    after, norm = start.apply(np.array([0, 30, 0, 40], np.float32), [], cast(Learner, CountingLearner()), outer)
    assert norm == 50.0
    assert (start.theta - after.theta).tolist() == pytest.approx([0, 0.6, 0, 0.8])


def test_version_0_is_the_seed_s() -> None:
    learner = build_learner(TINY, (1,))
    first = MetaState.initial(TINY, learner)
    assert (first.version, first.optimizer, first.layout.size) == (0, {}, 8 + 8 + 8 + 1)
    assert first.digest == MetaState.initial(TINY, learner).digest
    other = TINY.model_copy(update={"seed": 1})
    assert MetaState.initial(other, build_learner(other, (1,))).digest != first.digest
