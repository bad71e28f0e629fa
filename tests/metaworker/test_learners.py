"""Conformance of every registered learner to ``learners.base.Learner``.

A learner is registered by its section in ``cluster.config.learners.Learner``: it is tested here with its defaults on
every kind of model and episode that its configuration allows. `VARIANTS` adds options to try besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from cluster.config import base, learners, sections
from cluster.config.run import RunConfig
from cluster.episodes.types import Episodes
from cluster.errors import ConfigError
from cluster.flat import FlatSpec, Tensors
from metaworker.learners import build_learner, default_batch_norm
from metaworker.learners.base import Context, GradientKind, Learner, ShardResult, Task
from metaworker.metadata import encode
from metaworker.shard_worker import evaluate_episodes

WAY = 5
REGISTERED: tuple[type[base.Section], ...] = get_args(get_args(learners.Learner)[0])
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "memory": [{"init": "zero", "slots": 3, "heads": 1}, {"carry": True}],
    "mann": [{"slots": 30, "reads": 2, "strength": 4.0}],
    "relational": [{"message_steps": 1}],
    "matching": [{"full_context": True}, {"full_context": True, "reads": 1}],
    "triplet": [{"mining": "all"}, {"margin": 0.3, "normalise": True}],
    "maml": [{"inner_lr": 0.05, "inner_steps": 3, "eval_steps": 2}, {"inner_lr": 0.05, "first_order": True}],
    "anil": [{"inner_steps": 2, "first_order": True}],
    "metasgd": [{"inner_lr": 0.05, "inner_steps": 2, "eval_steps": 3}],
    "mamlpp": [
        {"anneal_versions": 0},
        {"inner_lr": 0.05, "inner_steps": 2, "eval_steps": 4, "first_order_versions": 1},
    ],
    "episodic": [{"use_bank": False}, {"columns": ("strokes",), "capacity": 2}],
    "metadata": [{"inner_steps": 2, "columns": ("script", "strokes", "amplitude")}],
    "imaml": [{"inner_steps": 3, "cg_steps": 2, "eval_steps": 2}],
    "lstm": [
        {"form": "hidden", "inner_steps": 2},
        {"inner_steps": 2, "first_order": False},
        {"form": "hidden", "inner_steps": 2, "first_order": False},
    ],
    "reptile": [{"inner_optimizer": "sgd", "inner_lr": 0.05, "inner_batch": 7, "eval_steps": 3}],
    "attention": [
        {"kind": "additive", "self_attention": False},
        {"kind": "dot"},
        {"hard": True, "heads": 2},
        {"spatial": True},
        {"columns": ("script", "strokes")},
    ],
}
"""Options to test beside the defaults, by ``type``."""
MODELS: list[sections.Model] = [
    sections.Conv4Strided(channels=4),
    sections.Conv4Strided(channels=4, batch_norm="support"),
    sections.Conv4Strided(channels=4, batch_norm="running"),
    sections.Conv4Pool(channels=4),
    sections.MLP(hidden=(8,)),
]
MAPS: list[sections.Model] = [
    sections.Conv4Pool(channels=4, pools=2),
    sections.Conv4Pool(channels=4, pools=2, batch_norm="support"),
    sections.Conv4Pool(channels=4, pools=2, batch_norm="running"),
]
"""For learners that compare maps and refuse every other model."""
TRAINED_FIRST: dict[str, int] = {"attention": 20, "imaml": 20, "lstm": 5, "relation": 60, "relational": 400}
"""Outer steps to take before asking what a learner tells apart, by ``type``: where θ itself learns to compare."""

REFERENCES: dict[str, tuple[str, str]] = {
    "maml": ("test_maml", "test_meta_gradient_is_that_of_higher"),
    "anil": ("test_anil", "test_meta_gradient_is_that_of_nested_autograd"),
    "mamlpp": ("test_mamlpp", "test_weights_and_derivatives_are_annealed"),
    "imaml": ("test_imaml", "test_solved_to_the_end_it_is_the_implicit_gradient"),
    "reptile": ("test_reptile", "test_meta_gradient_is_the_way_of_minibatch_training"),
    "lstm": ("test_lstm_optimizer", "test_meta_gradient_is_that_of_plain_autograd"),
    "attention": ("test_attention", "test_bias_of_the_estimator_falls_with_the_temperature"),
}
"""Where surrogates and estimators are tested against what they claim to be, which finite differences cannot do."""


@dataclass(frozen=True)
class Case:
    """A learner as some run would configure it."""

    config: RunConfig

    def __str__(self) -> str:
        model, learner = self.config.model, self.config.learner
        options = "-".join(str(v) for n, v in learner.model_dump(exclude_defaults=True).items() if n != "type")
        mode = "" if isinstance(model, sections.MLP) else model.batch_norm
        return "-".join(part for part in (learner.type, options, self.config.data.type, model.type, mode) if part)

    @property
    def kind(self) -> GradientKind:
        return self.learner().kind

    def learner(self) -> Learner:
        return build_learner(self.config, (1,) if self.config.regression else (1, 12, 12))


def suited(learner: learners.Learner, models: list[sections.Model], shape: tuple[int, ...]) -> list[sections.Model]:
    """The models that the learner does not refuse."""
    found = []
    for model in models:
        with suppress(ConfigError):
            build_learner(RunConfig(learner=learner, model=model), shape)
            found.append(model)
    return found


def cases() -> list[Case]:
    """Every registered learner on every model that suits it, variants on the first and the last; regression too."""
    found = []
    for section in REGISTERED:
        kind = section.model_fields["type"].default
        for options in [{}, *VARIANTS.get(kind, [])]:
            learner = section(**options)
            models = suited(learner, MODELS, (1, 12, 12)) or suited(learner, MAPS, (1, 12, 12))
            assert models, f"{kind} refuses every model"
            chosen = (models[0], models[-1]) if options else models
            found += [Case(RunConfig(learner=learner, model=model)) for model in chosen]
            try:
                shape = sections.EpisodeShape(way=1, shot=6, query=9)
                data = sections.SinusoidData()
                found.append(Case(RunConfig(learner=learner, model=MODELS[-1], data=data, episode=shape)))
            except ValidationError as refusal:
                assert "regression" in str(refusal)
    return found


CASES = cases()
every_learner = pytest.mark.parametrize("case", CASES, ids=str)
exact_learners = pytest.mark.parametrize("case", [case for case in CASES if case.kind == "exact"], ids=str)

Draw = Callable[..., Episodes]
Point = tuple[Tensors, Tensors]
"""Meta-parameters and learner state."""
Perturbed = Callable[[Learner], Point]


@pytest.fixture
def draw(pictures: Draw, waves: Draw) -> Callable[[Case, int], Episodes]:
    """Episodes in float64 that suit a case, and what is known of them; some of it is missing."""

    def drawn(case: Case, count: int, query: int = 3) -> Episodes:
        number = np.arange(float(count)) + 0.5
        if case.config.regression:
            known = {"amplitude": number, "phase": np.where(number < 1, np.nan, number)}
            return replace(waves(count), metadata=known)
        scripts = np.array(["Greek", "", "Lao"])[np.arange(count) % 3]
        known = {"script": np.repeat(scripts[:, None], WAY, 1), "strokes": number}
        return replace(pictures(count, shot=2, query=query), metadata=known)

    return drawn


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def contribution(learner: Learner, at: Point, episodes: Episodes, chunk: int) -> ShardResult:
    return learner.contribute(*at, episodes, Context(version=0, chunk=chunk))


def outputs_of(learner: Learner, at: Point, episodes: Episodes, queries: Tensor | None = None) -> list[Tensor]:
    """Outputs of every model of the first episode, on its own or on other ``queries``."""
    models = learner.adapt(*at, episodes.support_x[0], episodes.support_y[0], known(episodes))
    return [learner.predict(model, episodes.query_x[0] if queries is None else queries) for model in models]


def known(episodes: Episodes) -> Tensors:
    """What is known of the first episode, as learners are told it."""
    return {name: rows[0] for name, rows in encode(episodes.metadata, episodes.support_x).items()}


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Read-only arrays, as they come out of the object store."""
    copies = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
    for array in copies.values():
        array.setflags(write=False)
    return copies


# --------------------------------------------------------------------------------------------- parameters and identity


@every_learner
def test_is_a_learner_and_says_what_its_gradient_is(case: Case) -> None:
    learner = case.learner()
    assert isinstance(learner, Learner)
    assert learner.kind in get_args(GradientKind)


@every_learner
def test_initial_parameters_are_decided_by_the_seed(case: Case) -> None:
    learner = case.learner()
    first, again, other = learner.meta_parameters(7), case.learner().meta_parameters(7), learner.meta_parameters(8)
    assert list(first) == list(again) == list(other), "the order of names is the layout of the flat buffer"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert FlatSpec.of(first).dtype == torch.float32
    assert all(tensor.isfinite().all() and not tensor.requires_grad for tensor in first.values())


# ------------------------------------------------------------------------------------------------------- contributions


@every_learner
def test_contribution_has_the_shape_of_the_interface(case: Case, draw: Any) -> None:
    learner, episodes = case.learner(), draw(case, 5).to(torch.device("cpu"))
    theta, state = learner.meta_parameters(0), learner.initial_state()
    result = learner.contribute(theta, state, episodes, Context(version=0, chunk=2))
    assert {name: g.shape for name, g in result.gradient.items()} == {name: t.shape for name, t in theta.items()}
    assert result.episodes == 5 and result.loss.shape == result.metric.shape == (5,)
    assert all(rows.shape[0] == 5 for rows in result.proposals.values())
    tensors = [*result.gradient.values(), *result.proposals.values(), result.loss, result.metric]
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors)
    assert not any(tensor.requires_grad for tensor in tensors)
    assert any(gradient.any() for gradient in result.gradient.values())


@every_learner
def test_chunks_do_not_change_the_contribution(case: Case, draw: Any, perturbed: Perturbed) -> None:
    learner, episodes = case.learner(), draw(case, 5)
    at = perturbed(learner)
    whole = contribution(learner, at, episodes, chunk=5)
    for chunk in (1, 3, 50):
        check_equal(contribution(learner, at, episodes, chunk), whole)


@pytest.mark.parametrize("case", [c for c in CASES if not c.config.regression], ids=str)
def test_chunks_do_not_change_the_contribution_of_many_queries(
    case: Case, pictures: Draw, perturbed: Perturbed
) -> None:
    learner, episodes = case.learner(), pictures(3, query=6)
    at = perturbed(learner)
    whole = contribution(learner, at, episodes, chunk=3)
    for chunk in (1, 2):
        check_equal(contribution(learner, at, episodes, chunk), whole)


def check_equal(actual: ShardResult, expected: ShardResult) -> None:
    close(dict(actual.gradient), dict(expected.gradient))
    close(dict(actual.proposals), dict(expected.proposals))
    close((actual.loss, actual.metric), (expected.loss, expected.metric))


@every_learner
def test_contributions_add_up_over_the_episodes(case: Case, draw: Any, perturbed: Perturbed) -> None:
    learner, episodes = case.learner(), draw(case, 5)
    at = perturbed(learner)
    whole = contribution(learner, at, episodes, chunk=4)
    parts = [contribution(learner, at, episodes.chunk(a, b), chunk=4) for a, b in ((0, 1), (1, 3), (3, 5))]
    close({n: sum(p.gradient[n] for p in parts) for n in whole.gradient}, dict(whole.gradient))
    close({n: torch.cat([p.proposals[n] for p in parts]) for n in whole.proposals}, dict(whole.proposals))
    close(torch.cat([p.loss for p in parts]), whole.loss)
    assert sum(p.episodes for p in parts) == whole.episodes == 5


@every_learner
def test_contribution_is_a_pure_function(case: Case, draw: Any, perturbed: Perturbed) -> None:
    learner, episodes = case.learner(), draw(case, 3)
    at = perturbed(learner)
    data = [episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y]
    given = [*at[0].values(), *at[1].values(), *data]
    before = [tensor.clone() for tensor in given]
    generators = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = contribution(learner, at, episodes, chunk=2)
    assert torch.equal(torch.get_rng_state(), generators[0]), "randomness comes by key, not from torch's own generator"
    assert np.array_equal(np.random.get_state()[1], generators[1]), "nor from NumPy's"
    again = contribution(learner, at, episodes, chunk=2)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(given, before, strict=True))
    for a, b in ((first.gradient, again.gradient), (first.proposals, again.proposals)):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(first.loss, again.loss) and torch.equal(first.metric, again.metric)


@exact_learners
@pytest.mark.parametrize("query", [3, 5])
def test_exact_gradient_is_that_of_finite_differences(case: Case, query: int, draw: Any, perturbed: Perturbed) -> None:
    learner, episodes = case.learner(), draw(case, 2, query)
    theta, state = perturbed(learner)
    gradient = contribution(learner, (theta, state), episodes, chunk=2).gradient
    generator = torch.Generator().manual_seed(5)
    step = 1e-6
    for _ in range(4):
        along = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in theta.items()}
        length = torch.stack([d.square().sum() for d in along.values()]).sum().sqrt()

        def loss(distance: float, along: Tensors = along, length: Tensor = length) -> Tensor:
            moved = {n: theta[n] + distance * along[n] / length for n in theta}
            return contribution(learner, (moved, state), episodes, chunk=2).loss.sum()

        slope = torch.stack([(gradient[n] * along[n]).sum() for n in theta]).sum() / length
        assert_close((loss(step) - loss(-step)) / (2 * step), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", [case for case in CASES if case.kind != "exact"], ids=str)
def test_a_gradient_that_is_not_exact_is_tested_against_what_it_is(case: Case) -> None:
    module, test = REFERENCES[case.config.learner.type]
    assert callable(getattr(import_module(f"tests.metaworker.{module}"), test))


WIDE_MODELS: list[sections.Model] = [sections.Conv4Strided(channels=32), sections.Conv4Pool(channels=32)]
WIDE_MAPS: list[sections.Model] = [sections.Conv4Pool(channels=32, pools=2)]
WIDE = [
    RunConfig(learner=section(), model=model)
    for section in REGISTERED
    for model in suited(section(), WIDE_MODELS, (1, 28, 28)) or suited(section(), WIDE_MAPS, (1, 28, 28))
]


@pytest.mark.parametrize("case", [case for case in map(Case, WIDE) if case.kind == "exact"], ids=str)
@pytest.mark.parametrize("query", [2, 5])
def test_float32_keeps_its_digits(case: Case, query: int, pictures: Draw, perturbed: Perturbed) -> None:
    """A wider net on larger pictures: kernels that lose digits, some layouts of convolutions, do so there."""
    learner, episodes = build_learner(case.config, (1, 28, 28)), pictures(2, query=query, side=28)
    theta, state = perturbed(learner)
    exact = contribution(learner, (theta, state), episodes, chunk=2).gradient
    single = {name: tensor.float() for name, tensor in theta.items()}, {n: t.float() for n, t in state.items()}
    rounded = contribution(learner, single, episodes.to(torch.device("cpu")), chunk=2).gradient
    error = torch.cat([(rounded[name].double() - exact[name]).flatten() for name in exact]).norm()
    assert error < 1e-4 * torch.cat([tensor.flatten() for tensor in exact.values()]).norm()


# ---------------------------------------------------------------------------------------------- adaptation, prediction


@every_learner
def test_one_task_model_before_and_after_each_step(case: Case, draw: Any, perturbed: Perturbed) -> None:
    learner, episodes = case.learner(), draw(case, 1)
    steps = getattr(case.config.learner, "eval_steps", 0)
    unlabelled = torch.randn(4, *episodes.query_x.shape[2:], dtype=torch.float64)
    outputs = outputs_of(learner, perturbed(learner), episodes, unlabelled)
    assert len(outputs) == steps + 1
    assert all(o.shape == (4, 1 if case.config.regression else WAY) and o.isfinite().all() for o in outputs)
    assert all(not torch.equal(a, b) for a, b in pairwise(outputs))


@every_learner
def test_adaptation_vectorises_over_episodes(case: Case, draw: Any, perturbed: Perturbed) -> None:
    learner, episodes = case.learner(), draw(case, 2)
    at = perturbed(learner)

    def outputs(support_x: Tensor, support_y: Tensor, query_x: Tensor, metadata: Tensors) -> list[Tensor]:
        return [learner.predict(task, query_x) for task in learner.adapt(*at, support_x, support_y, metadata)]

    metadata = encode(episodes.metadata, episodes.support_x)
    together = torch.func.vmap(outputs)(episodes.support_x, episodes.support_y, episodes.query_x, metadata)
    for e in range(2):
        close([step[e] for step in together], outputs_of(learner, at, episodes.chunk(e, e + 1)))


def adapted_to(episodes: Episodes, learner: Learner, at: Point) -> Task:
    """The last model of the first episode."""
    return learner.adapt(*at, episodes.support_x[0], episodes.support_y[0], known(episodes))[-1]


@every_learner
def test_only_transductive_predictions_depend_on_the_other_queries(case: Case, draw: Any, perturbed: Perturbed) -> None:
    learner, episodes = case.learner(), draw(case, 1)
    queries = episodes.query_x[0]
    adapted = adapted_to(episodes, learner, perturbed(learner))
    together = learner.predict(adapted, queries)
    assert together.std(0).min() > 1e-4, "a dead net would be independent of anything"
    in_other_company = learner.predict(adapted, torch.cat([queries[:4], 3 * queries[4:] + 1]))
    alone = [learner.predict(adapted, queries[q : q + 1]) for q in range(4)]
    if learner.transductive:
        assert (in_other_company[:4] - together[:4]).abs().max() > 1e-3
    else:
        close(in_other_company[:4], together[:4])
        close(torch.cat(alone), together[:4])


@every_learner
def test_order_of_queries_does_not_matter(case: Case, draw: Any, perturbed: Perturbed) -> None:
    learner, episodes = case.learner(), draw(case, 1)
    adapted = adapted_to(episodes, learner, perturbed(learner))
    order = torch.randperm(episodes.query_x.shape[1], generator=torch.Generator().manual_seed(0))
    close(learner.predict(adapted, episodes.query_x[0][order]), learner.predict(adapted, episodes.query_x[0])[order])


@every_learner
def test_order_of_support_samples_matters_where_the_learner_says_so(
    case: Case, draw: Any, perturbed: Perturbed
) -> None:
    learner, episodes = case.learner(), draw(case, 1)
    at, x, y, queries = perturbed(learner), episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    usual, other = (
        learner.predict(learner.adapt(*at, *data, known(episodes))[-1], queries)
        for data in ((x, y), (x[order], y[order]))
    )
    if learner.ordered:
        assert (other - usual).abs().max() > 1e-9
    else:
        close(other, usual)


@pytest.mark.parametrize("case", [c for c in CASES if not c.config.regression], ids=str)
def test_naming_of_classes_matters_where_the_learner_says_so(case: Case, draw: Any, perturbed: Perturbed) -> None:
    learner, episodes = case.learner(), draw(case, 1)
    at, x, y, queries = perturbed(learner), episodes.support_x[0], episodes.support_y[0], episodes.query_x[0]
    names = torch.tensor([3, 1, 4, 0, 2])
    told = known(episodes)
    usual, renamed = (learner.predict(learner.adapt(*at, x, labels, told)[-1], queries) for labels in (y, names[y]))
    if learner.names_matter:
        assert (renamed[:, names] - usual).abs().max() > 1e-9
    else:
        close(renamed[:, names], usual)


@pytest.mark.parametrize("case", [c for c in CASES if not c.config.regression], ids=str)
def test_adaptation_learns_the_names_of_the_classes(case: Case, pictures: Draw) -> None:
    learner, episodes = case.learner(), pictures(30, shot=5, noise=0.3).to(torch.device("cpu"))
    at = trained(learner, TRAINED_FIRST.get(case.config.learner.type, 0), pictures)
    loss, confusion = evaluate_episodes(learner, *at, episodes, regression=False)
    accuracy = confusion.trace(axis1=2, axis2=3).mean(0) / confusion[0, 0].sum()
    assert accuracy[-1] > 1.4 / WAY
    if len(accuracy) > 1:
        assert abs(accuracy[0] - 1 / WAY) < 0.08, "before adaptation no model can know which class is which"
        assert loss[:, -1].mean() < loss[:, 0].mean()


def trained(learner: Learner, steps: int, pictures: Draw) -> Point:
    """Parameters and state after outer steps of Adam on other episodes."""
    theta, state = learner.meta_parameters(0), learner.initial_state()
    pool = pictures(4 * steps, shot=1, query=3, noise=0.3, seed=1).to(torch.device("cpu")) if steps else None
    adam = torch.optim.Adam(list(theta.values()), lr=3e-3)
    for step in range(steps):
        assert pool is not None
        result = contribution(learner, (theta, state), pool.chunk(4 * step, 4 * step + 4), chunk=4)
        for name, tensor in theta.items():
            tensor.grad = result.gradient[name] / 4
        adam.step()
        state = {
            name: torch.from_numpy(rows)
            for name, rows in learner.commit_state(arrays(state), [arrays(result.proposals)]).items()
        }
    return theta, state


# -------------------------------------------------------------------------------------------------------- learner state


@every_learner
def test_commit_state_is_pure_and_keeps_the_layout(case: Case, draw: Any) -> None:
    learner, episodes = case.learner(), draw(case, 3).to(torch.device("cpu"))
    state = arrays(learner.initial_state())
    results = [
        learner.contribute(learner.meta_parameters(seed), learner.initial_state(), episodes, Context(0, 3))
        for seed in (0, 1)
    ]
    proposals = [arrays(result.proposals) for result in results]
    following = learner.commit_state(state, proposals)
    assert list(following) == list(state)
    for name, old in state.items():
        assert following[name].shape == old.shape and following[name].dtype == old.dtype
        assert np.isfinite(following[name]).all()
        assert not np.shares_memory(following[name], old)
    again = learner.commit_state(state, proposals)
    assert all(following[name].tobytes() == again[name].tobytes() for name in state)


@every_learner
def test_nothing_proposed_leaves_the_state(case: Case) -> None:
    learner = case.learner()
    state = arrays(learner.initial_state())
    unchanged = learner.commit_state(state, [])
    assert list(unchanged) == list(state)
    assert all(np.array_equal(unchanged[name], state[name]) for name in state)


@pytest.mark.parametrize("case", [c for c in CASES if not isinstance(c.config.model, sections.MLP)], ids=str)
def test_running_averages_are_read_by_evaluation_in_running_mode_alone(
    case: Case, draw: Any, perturbed: Perturbed
) -> None:
    learner, episodes = case.learner(), draw(case, 1)
    theta, state = perturbed(learner)
    averages = [name for name in state if name.startswith(("mean.", "variance."))]
    points = [(theta, state), (theta, state | {name: 1.5 * state[name] for name in averages})]
    outputs = [outputs_of(learner, at, episodes)[-1] for at in points]
    assert torch.equal(*outputs) == (default_batch_norm(case.config) != "running")
    losses = [contribution(learner, at, episodes, chunk=1).loss for at in points]
    assert torch.equal(*losses), "training takes its statistics from the data"
