"""The shipped recipes: each is whole, says what it is, and is what its name says."""

from __future__ import annotations

import tomllib
from importlib import resources

import pytest

from cluster.config.learners import MAML
from cluster.config.loading import DEFAULT_RECIPE, load_recipe, resolve, shipped_recipes
from cluster.config.run import RunConfig
from cluster.config.sections import AsyncAggregator, SinusoidData, StoreData
from cluster.episodes.splits import OMNIGLOT_SPLIT

CONTRACT = {
    "glyphs-maml",
    "glyphs-protonet",
    "glyphs-reptile",
    "sinusoid-maml",
    "omniglot-maml",
    "omniglot-fomaml",
    "omniglot-maml-20way",
    "omniglot-protonet",
    "omniglot-protonet-20way",
    "omniglot-reptile",
}
SHIPPED = {recipe.name: recipe for recipe in shipped_recipes()}


def config_of(name: str) -> RunConfig:
    return resolve(load_recipe(name))


def text_of(name: str) -> str:
    return resources.files("cluster").joinpath("recipes", f"{name}.toml").read_text("utf-8")


def test_the_promised_recipes_are_shipped() -> None:
    assert set(SHIPPED) >= CONTRACT
    assert DEFAULT_RECIPE == "glyphs-maml"


@pytest.mark.parametrize("name", SHIPPED)
def test_recipe_validates_and_names_itself(name: str) -> None:
    assert tomllib.loads(text_of(name))["name"] == name
    assert config_of(name).name == name


@pytest.mark.parametrize("name", SHIPPED)
def test_first_line_is_the_description(name: str) -> None:
    first = text_of(name).splitlines()[0]
    assert first == f"# {SHIPPED[name].description}"
    assert 20 < len(first) < 100 and not first.endswith(".")


@pytest.mark.parametrize("name", SHIPPED)
def test_recipe_is_what_its_name_says(name: str) -> None:
    config, (source, algorithm, *shape) = config_of(name), name.split("-")
    assert config.data.type == {"omniglot": "store", "images": "store"}.get(source, source)
    assert config.learner.type == {"fomaml": "maml"}.get(algorithm, algorithm)
    if isinstance(config.learner, MAML):
        assert config.learner.first_order == (algorithm == "fomaml")
    if not isinstance(config.data, SinusoidData):
        assert config.evaluation_shape.way == (20 if shape in (["20way"], ["within"]) else 5)
        assert (config.evaluation_shape.within is not None) == (shape == ["within"])
        assert config.evaluation_shape.shot == 1


@pytest.mark.parametrize("name", SHIPPED)
def test_recipe_leaves_the_machine_to_the_user(name: str) -> None:
    execution = config_of(name).execution
    assert (execution.run_dir, execution.store, execution.workers, execution.address) == (None, None, None, "local")


@pytest.mark.parametrize("name", SHIPPED)
def test_evaluation_is_large_enough_to_report(name: str) -> None:
    assert config_of(name).evaluation.episodes >= (10_000 if name.startswith("sinusoid") else 600)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("omniglot")])
def test_omniglot_holds_out_the_same_alphabets(name: str) -> None:
    data = config_of(name).data
    assert isinstance(data, StoreData) and data.rotations
    assert data.split == OMNIGLOT_SPLIT
    assert SHIPPED[name].needs_store


def test_embedded_recipes_need_no_store() -> None:
    embedded = {name for name in SHIPPED if name.startswith(("glyphs", "sinusoid"))}
    assert {name for name, recipe in SHIPPED.items() if not recipe.needs_store} == embedded


def test_reptile_is_asynchronous_and_everything_else_is_not() -> None:
    asynchronous = {name for name in CONTRACT if isinstance(config_of(name).aggregator, AsyncAggregator)}
    assert asynchronous == {name for name in CONTRACT if config_of(name).learner.type == "reptile"}
