"""Configuration: fields, refusals, overrides, the resolved file, and the two halves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.base import Section
from cluster.config.fields import ConfigField, all_fields, as_text, element_type, is_list, members, value_type
from cluster.config.fields import nullable as is_nullable
from cluster.config.help import field_groups
from cluster.config.learners import Learner, Reptile
from cluster.config.loading import load_recipe, load_resolved, refuse_result_changes, resolve, save_resolved
from cluster.config.run import RunConfig
from cluster.config.sections import AsyncAggregator, Conv4Pool, ListedSplit, MetadataSplit, StoreData
from cluster.errors import ConfigError

Overrides = list[tuple[str, str]]

STORE: Overrides = [("data.type", "store")]
LISTS: Overrides = [*STORE, ("data.split.type", "lists"), ("data.split.train", "[a, b]")]
METADATA: Overrides = [*STORE, ("data.split.type", "metadata"), ("data.split.column", "alphabet")]
SINUSOID: Overrides = [("data.type", "sinusoid"), ("episode.way", "1"), ("model.type", "mlp")]
EXECUTION = ("evaluation", "execution")
"""Sections that a resume may change."""
BASES = {
    ("data", "store"): STORE,
    ("data.augment", "glyphs"): [("data.type", "glyphs")],
    ("data.augment", "store"): STORE,
    ("data.split", "store"): STORE,
    ("data.split", "lists"): LISTS,
    ("data.split", "metadata"): METADATA,
    ("data.split", "fractions"): STORE,
    ("data", "sinusoid"): SINUSOID,
}
"""Overrides that make a valid configuration which has the fields of (section, type)."""


def base_of(field: ConfigField) -> Overrides:
    """Overrides under which the field exists."""
    parent = field.path.rpartition(".")[0]
    return BASES.get((parent, field.when), [(f"{parent}.type", field.when)] if field.when else [])


def current(config: RunConfig, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def another_value(field: ConfigField, old: Any) -> str:
    """Another valid value as typed."""
    if field.path.endswith(".type"):
        return next(choice for choice in field.allowed.split(" | ") if choice != old)
    if field.path == "device":
        return "auto"  # cuda asks for a reserved GPU as well
    annotation = value_type(field.info)
    if get_origin(annotation) is not None and not is_list(annotation):
        return str(next(choice for choice in get_args(annotation) if choice != old))
    if is_list(annotation):
        return {float: "0.25, 0.75", int: "7, 8, 9", str: "x, y"}[element_type(annotation)]
    if annotation is bool:
        return as_text(not old)
    if annotation is str:
        return "auto" if field.path.endswith("address") else "other"
    if annotation is int:
        most = next((bound.le for bound in field.info.metadata if hasattr(bound, "le")), None)
        return str(old - 1 if old and old == most else 2 * (old or 0) or 1)
    return "0.125"


LEARNERS = [section.model_fields["type"].default for section in get_args(get_args(Learner)[0])]
CHANGEABLE = [f for f in all_fields() if f.allowed != f.default]


def changed_pair(field: ConfigField) -> tuple[RunConfig, RunConfig]:
    """Two configurations that differ in this field."""
    base = base_of(field)
    before = resolve({}, base)
    text = another_value(field, current(before, field.path))
    if field.path == "data.split.type":
        return before, resolve({}, LISTS)
    return before, resolve({}, [*base, (field.path, text)])


def refusal(recipe: dict[str, Any], overrides: Overrides = []) -> str:  # noqa: B006
    with pytest.raises(ConfigError) as caught:
        resolve(recipe, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --------------------------------------------------------------------------------------------------------- two halves


@pytest.mark.parametrize("field", CHANGEABLE, ids=lambda f: f"{f.path}-{f.when}")
def test_digest_covers_exactly_the_result_half(field: ConfigField) -> None:
    before, after = changed_pair(field)
    assert current(before, field.path) != current(after, field.path)
    changes_result = field.path.partition(".")[0] not in EXECUTION
    assert (before.result_digest() != after.result_digest()) == changes_result


@pytest.mark.parametrize("field", CHANGEABLE, ids=lambda f: f"{f.path}-{f.when}")
def test_resume_refuses_exactly_the_result_half(field: ConfigField) -> None:
    before, after = changed_pair(field)
    if field.path.partition(".")[0] in EXECUTION:
        refuse_result_changes(before, after)
        return
    with pytest.raises(ConfigError) as caught:
        refuse_result_changes(before, after)
    old, new = current(before, field.path), current(after, field.path)
    assert f"{field.path} {as_text(old)} -> {as_text(new)}" in str(caught.value)


def test_only_a_field_with_one_value_escapes_the_two_tests_above() -> None:
    assert {f.path for f in all_fields()} - {f.path for f in CHANGEABLE} == {"dtype"}


def test_digest_does_not_depend_on_how_a_number_is_written() -> None:
    assert resolve({"optimizer": {"lr": 1}}).result_digest() == resolve({"optimizer": {"lr": 1.0}}).result_digest()
    assert resolve({}).result_digest() == RunConfig().result_digest()


def test_resume_names_every_changed_key() -> None:
    with pytest.raises(
        ConfigError, match=r"seed 0 -> 1, .*learner\.type maml -> protonet.*learner\.inner_lr 0\.4 -> unset"
    ):
        refuse_result_changes(resolve({}), resolve({}, [("seed", "1"), ("learner.type", "protonet")]))


# ---------------------------------------------------------------------------------------------------- resolved file


@pytest.mark.parametrize("field", CHANGEABLE, ids=lambda f: f"{f.path}-{f.when}")
def test_resolved_file_round_trips(field: ConfigField, tmp_path: Path) -> None:
    _, config = changed_pair(field)
    save_resolved(config, tmp_path / "config.toml")
    loaded = load_resolved(tmp_path / "config.toml")
    assert loaded == config
    assert loaded.result_digest() == config.result_digest()
    assert [file.name for file in tmp_path.iterdir()] == ["config.toml"]


positive = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
names = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=3)


@given(
    lr=positive,
    seed=st.integers(0, 2**63 - 1),
    groups=names,
    column=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
)
def test_any_number_and_any_name_round_trip(lr: float, seed: int, groups: list[str], column: str) -> None:
    split = {"type": "metadata", "column": column, "val": groups}
    recipe = {"optimizer": {"lr": lr}, "data": {"type": "store", "split": split}}
    config = resolve(recipe, [("seed", str(seed)), ("schedule.type", "linear"), ("schedule.final", repr(lr))])
    assert (config.optimizer.lr, config.seed) == (lr, seed)
    assert config.schedule.type == "linear" and config.schedule.final == lr
    with tempfile.TemporaryDirectory() as folder:
        save_resolved(config, Path(folder, "c.toml"))
        assert load_resolved(Path(folder, "c.toml")) == config


def test_saving_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    save_resolved(resolve({}), path)
    save_resolved(resolve({}, [("seed", "3")]), path)
    assert load_resolved(path).seed == 3
    with pytest.raises(OSError):
        save_resolved(resolve({}), tmp_path / "missing" / "config.toml")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (b"a = [", "not valid TOML"), (b"\xff", "not UTF-8"), (b"foo = 1", "foo: no such key")],
)
def test_unusable_resolved_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_resolved(path)


def test_left_out_means_none() -> None:
    """The resolved file leaves None out, which is right only while None is the default wherever it is allowed."""
    assert all(field.default == "none" for field in all_fields() if is_nullable(field.info))


def test_a_missing_section_means_its_defaults() -> None:
    """Overrides complete a missing section from its type's own defaults: the default instance must be no other."""
    sections = [
        info.default for info in (*RunConfig.model_fields.values(), *StoreData.model_fields.values()) if members(info)
    ]
    assert len(sections) == 12
    assert all(section == type(section)() for section in sections)


# ------------------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            "learner.inner_stepz",
            "learner.inner_stepz: no such key in learner.type maml; did you mean inner_steps? allowed: type, ",
        ),
        ("inner_steps", "did you mean learner.inner_steps?"),
        ("wokers", "did you mean execution.workers?"),
        ("learner.inner_batch", "learner.inner_batch belongs to learner.type reptile"),
        ("data.split.val", "data.split belongs to data.type store"),
        ("data.split.type", "data.split belongs to data.type store"),
        ("seed.x", "seed is a single value"),
        ("episode.type", "episode has no types"),
        ("nonsense.type", "nonsense.type: no such key; allowed: name, "),
        ("learner..inner_steps", "no such key"),
        ("", "no such key"),
        ("type", "no such key"),
    ],
)
def test_unknown_override_is_refused(key: str, expected: str) -> None:
    assert expected in refusal({}, [(key, "5")])


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            {"learner": {"inner_stepz": 1}},
            "learner.inner_stepz: no such key in learner.type maml; did you mean inner_steps?",
        ),
        ({"sed": 1}, "sed: no such key; did you mean seed?"),
        ({"model": {"hidden": [1]}}, "model.hidden belongs to model.type mlp"),
        ({"data": {"split": {"val": 0.1}}}, "data.split belongs to data.type store"),
        (
            {"data": {"type": "store", "split": {"column": "a"}}},
            "data.split.column belongs to data.split.type metadata",
        ),
        ({"execution": {"worker": 1}}, "execution.worker: no such key; did you mean workers?"),
        ({"foo": 1, "seed": -1}, "(also wrong: "),
    ],
)
def test_unknown_recipe_key_is_refused(recipe: dict[str, Any], expected: str) -> None:
    assert expected in refusal(recipe)


# -------------------------------------------------------------------------------------------------- impossible values


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("episode.way", "0", "episode.way: must be >= 1, got 0"),
        ("episode.way", "five", "episode.way: must be a whole number, got 'five'"),
        ("episode.way", "1.5", "episode.way: must be a whole number, got '1.5'"),
        ("episode.way", "none", "episode.way: must be a whole number, got 'none'"),
        ("seed", "-1", "seed: must be >= 0, got -1"),
        ("seed", str(2**63), f"seed: must be < 2^63, got {2**63}"),
        ("clip_norm", "0", "clip_norm: must be > 0, got 0.0"),
        ("optimizer.lr", "inf", "optimizer.lr: must be a finite number, got inf"),
        ("optimizer.lr", "nan", "optimizer.lr: must be a finite number, got nan"),
        ("optimizer.betas", "0.9,1", "optimizer.betas[1]: must be < 1, got 1.0"),
        ("optimizer.betas", "0.9", "optimizer.betas: must have more than 1 item(s)"),
        ("optimizer.betas", "0.9,0.9,0.9", "optimizer.betas: must have at most 2 items, got [0.9, 0.9, 0.9]"),
        ("learner.first_order", "maybe", "learner.first_order: must be true or false, got 'maybe'"),
        ("learner.type", "mamml", f"learner.type: 'mamml' is none of {', '.join(LEARNERS)}; did you mean maml?"),
        ("execution.pool", "loose", "execution.pool: 'loose' is none of strict, mixed"),
        ("device", "tpu", "device: 'tpu' is none of cpu, cuda, auto"),
        ("learner", "protonet", "learner: is a section, got 'protonet'; give learner.KEY, one of type, inner_lr"),
        ("execution.address", "somewhere", "execution.address: must be local, auto or HOST:PORT, got 'somewhere'"),
        ("execution.address", "host:70000", "must be local, auto or HOST:PORT"),
        ("execution.address", "ray://host:10001", "Ray Client (ray://) is not supported"),
    ],
)
def test_impossible_override_is_refused(key: str, text: str, expected: str) -> None:
    assert expected in refusal({}, [(key, text)])


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"episode": {"way": True}}, "episode.way: must be a whole number, got true"),
        ({"episode": {"way": "5"}}, "episode.way: must be a whole number, got '5'"),
        ({"name": 5}, "name: must be text, got 5"),
        ({"learner": 5}, "learner: is a section, to be set by its keys, got 5"),
        ({"episode": [5]}, "episode: is a section, to be set by its keys, got [5]"),
        ({"learner": {"type": []}}, f"learner.type: '[]' is none of {', '.join(LEARNERS)}"),
        ({"model": {"type": "mlp", "hidden": 40}}, "model.hidden: must be a list, got 40"),
        ({"model": {"type": "mlp", "hidden": [40, 0]}}, "model.hidden[1]: must be >= 1, got 0"),
        (
            {"data": {"type": "store", "split": {"type": "metadata"}}},
            "data.split.column: is required (Class metadata column",
        ),
        ({"data": {"type": "store", "split": {"type": "lists", "train": []}}}, "data.split.train: must not be empty"),
        ({"data": {"type": "store", "split": {"val": 0.5, "test": 0.5}}}, "data.split: val + test must be < 1"),
        ({"data": {"type": "sinusoid"}}, "episode.way must be 1 for regression (data.type sinusoid), got 5"),
        (
            {"steps": 10, "schedule": {"type": "cosine", "warmup": 11}},
            "schedule.warmup must be at most the 10 steps, got 11",
        ),
    ],
)
def test_impossible_recipe_value_is_refused(recipe: dict[str, Any], expected: str) -> None:
    assert expected in refusal(recipe)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([("data.x", "3,1")], "data: x must be [low, high] with low < high, got [3.0, 1.0]"),
        ([("learner.type", "protonet")], "learner.type protonet classifies"),
        ([("model.type", "conv4_pool")], "model.type must be mlp for data.type sinusoid, got conv4_pool"),
        ([("evaluation.way", "5")], "evaluation.way must be 1 for regression"),
        (
            [("learner.type", "reptile"), ("learner.inner_batch", "17")],
            "learner.inner_batch must be at most the 16 samples",
        ),
    ],
)
def test_sections_that_do_not_fit_together_are_refused(changes: Overrides, expected: str) -> None:
    assert expected in refusal({}, [*SINUSOID, *changes])


# ---------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("learner.inner_steps", "5", 5),
        ("learner.inner-steps", "5", 5),
        ("learner.inner_lr", "1", 1.0),
        ("learner.inner_lr", ".5", 0.5),
        ("learner.inner_lr", "1e-2", 0.01),
        ("learner.first_order", "true", True),
        ("learner.first_order", "On", True),
        ("learner.first_order", "no", False),
        ("clip_norm", "none", None),
        ("clip_norm", "2.5", 2.5),
        ("optimizer.betas", "[0.5, 0.75]", (0.5, 0.75)),
        ("optimizer.betas", "0.5,0.75", (0.5, 0.75)),
        ("name", "5", "5"),
        ("name", "none", "none"),
        ("device", "'auto'", "auto"),
        ("execution.run_dir", "runs/a=b", "runs/a=b"),
        ("execution.run_dir", "none", None),
        ("execution.workers", "none", None),
        ("execution.address", "head.local:6379", "head.local:6379"),
    ],
)
def test_override_values(key: str, text: str, value: Any) -> None:
    found = current(resolve({}, [(key, text)]), key.replace("-", "_"))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["40,20", "[40,20]", "[40, 20]", " 40 , 20 ", "40,20,"])
def test_list_spellings(text: str) -> None:
    model = resolve({}, [("model.hidden", text), *SINUSOID]).model
    assert model.type == "mlp" and model.hidden == (40, 20)


@pytest.mark.parametrize(
    "text", ["Syriac_(Estrangelo),N_Ko", "[Syriac_(Estrangelo), N_Ko]", '["Syriac_(Estrangelo)", "N_Ko"]']
)
def test_lists_of_names_need_no_quotes(text: str) -> None:
    config = resolve({}, [*METADATA, ("data.split.test", text)])
    assert config.data.type == "store" and config.data.split.test == ("Syriac_(Estrangelo)", "N_Ko")


def test_a_quoted_name_may_have_a_comma() -> None:
    config = resolve({}, [*METADATA, ("data.split.test", '["a, b", "c"]')])
    assert config.data.type == "store" and config.data.split.test == ("a, b", "c")


def test_override_beats_recipe_and_later_beats_earlier() -> None:
    recipe = {"seed": 1, "episode": {"way": 7, "shot": 2}}
    config = resolve(recipe, [("episode.way", "8"), ("episode.way", "9")])
    assert (config.seed, config.episode.way, config.episode.shot) == (1, 9, 2)
    assert recipe == {"seed": 1, "episode": {"way": 7, "shot": 2}}


def test_overrides_reach_sections_the_recipe_has_not() -> None:
    config = resolve({}, [("learner.inner_steps", "4"), ("aggregator.shards", "2")])
    assert config.learner.type == "maml" and config.learner.inner_steps == 4
    assert config.aggregator.type == "sync" and config.aggregator.shards == 2


# -------------------------------------------------------------------------------------------------------- type switch


@pytest.mark.parametrize("order", [1, -1])
def test_type_switch_drops_the_recipes_keys_in_any_order(order: int) -> None:
    recipe = {"learner": {"type": "maml", "inner_lr": 0.1, "first_order": True}}
    config = resolve(recipe, [("learner.type", "reptile"), ("learner.inner_steps", "7")][::order])
    assert config.learner == Reptile(inner_steps=7)


def test_type_switch_without_a_type_in_the_recipe() -> None:
    config = resolve({"model": {"channels": 8}}, [("model.type", "conv4_pool")])
    assert config.model == Conv4Pool()


def test_naming_the_recipes_own_type_keeps_its_keys() -> None:
    config = resolve({"aggregator": {"type": "async", "buffer": 3}}, [("aggregator.type", "async")])
    assert config.aggregator == AsyncAggregator(buffer=3)


def test_nested_type_switch_in_any_order() -> None:
    inner: Overrides = [("data.split.train", "a,b"), ("data.split.type", "lists"), ("data.type", "store")]
    recipe = {"data": {"type": "glyphs", "size": 32}}
    for overrides in (inner, inner[::-1]):
        assert resolve(recipe, overrides).data == StoreData(split=ListedSplit(train=("a", "b")))
    recipe = {"data": {"type": "store", "rotations": True, "split": {"type": "fractions", "val": 0.3}}}
    config = resolve(recipe, [("data.split.type", "metadata"), ("data.split.column", "alphabet")])
    assert config.data == StoreData(rotations=True, split=MetadataSplit(column="alphabet"))


def test_keys_of_a_type_that_was_switched_away_are_refused() -> None:
    text = refusal({"learner": {"type": "maml"}}, [("learner.first_order", "true"), ("learner.type", "reptile")])
    assert "learner.first_order belongs to learner.type maml" in text


# -------------------------------------------------------------------------------------------------------- recipe files


def test_a_recipe_file_is_named_after_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 4\n[learner]\ntype = 'protonet'\n")
    config = resolve(load_recipe(str(path)))
    assert (config.name, config.seed, config.learner.type) == ("mine", 4, "protonet")
    path.write_text("name = 'other'\n")
    assert resolve(load_recipe(str(path))).name == "other"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("glyphs-mamml", "no recipe 'glyphs-mamml'; did you mean glyphs-maml? shipped: "),
        ("nowhere/x", "cannot read the recipe nowhere/x: No such file"),
        ("nowhere.toml", "cannot read the recipe nowhere.toml: No such file"),
        ("../sections", "cannot read the recipe ../sections"),
        ("", "no recipe ''"),
    ],
)
def test_unknown_recipe(name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_recipe(name)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- help


def test_every_field_says_what_it_means() -> None:
    assert [f.path for f in all_fields() if not f.meaning.endswith(".")] == []
    assert [f.path for f in all_fields() if not f.allowed or not f.default] == []


def test_groups_hold_every_field_once() -> None:
    grouped = [(f.path, f.when) for group in field_groups() for f in group.fields]
    assert sorted(grouped) == sorted((f.path, f.when) for f in all_fields())
    assert len(set(grouped)) == len(grouped)


def test_the_walk_reaches_every_model_field() -> None:
    """Counted by another walk, over the classes."""

    def sections(cls: type[Section]) -> set[type[Section]]:
        inner = {one for info in cls.model_fields.values() for one in members(info).values()}
        return {cls}.union(*(sections(one) for one in inner))

    expected = {
        (cls, name) for cls in sections(RunConfig) for name, info in cls.model_fields.items() if not members(info)
    }
    found = {(f.section, f.path.rpartition(".")[2]) for f in all_fields()}
    types = {(cls, "type") for cls in sections(RunConfig)}
    assert found - types == expected - types


@pytest.mark.parametrize(
    ("path", "allowed", "default"),
    [
        ("episode.way", "whole number >= 1", "5"),
        ("clip_norm", "number > 0 or none", "none"),
        ("seed", "whole number >= 0, < 2^63", "0"),
        ("device", "cpu | cuda | auto", "cpu"),
        ("model.hidden", "list of whole numbers >= 1", "[40, 40]"),
        ("optimizer.betas", "2 numbers >= 0, < 1", "[0.9, 0.999]"),
        ("data.split.train", "list of names", "required"),
        ("execution.metrics", "true | false", "true"),
        ("learner.type", " | ".join(LEARNERS), "maml"),
    ],
)
def test_allowed_values_in_words(path: str, allowed: str, default: str) -> None:
    field = next(f for f in all_fields() if f.path == path)
    assert (field.allowed, field.default) == (allowed, default)
