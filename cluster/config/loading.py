"""From a recipe and overrides to a frozen RunConfig, and to and from the resolved configuration of a run directory.

load_recipe -> resolve -> RunConfig -> save_resolved … load_resolved -> refuse_result_changes
"""

from __future__ import annotations

import copy
import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, BinaryIO

import tomli_w
from pydantic import ValidationError

from cluster.config.fields import as_text
from cluster.config.overrides import Override, apply_overrides
from cluster.config.refusal import describe
from cluster.config.run import RunConfig
from cluster.config.sections import StoreData
from cluster.durable import write_atomically
from cluster.errors import ConfigError

DEFAULT_RECIPE = "glyphs-maml"
"""The recipe of `metafleet train` with nothing else."""

RESOLVED_NAME = "config.toml"
"""File name of the resolved configuration in a run directory."""

DEEPEST = 16
"""How deep tables and lists of a recipe may be nested; every field lies higher."""

TOO_DEEP = f"has tables or lists more than {DEEPEST} deep: no field lies there"


@dataclass(frozen=True)
class ShippedRecipe:
    """What `metafleet recipes` says of a recipe."""

    name: str
    description: str
    """The recipe file's first comment line."""
    needs_store: bool
    """Whether it asks for ``--store``."""


def shipped_recipes() -> list[ShippedRecipe]:
    """The recipes in the package, by name."""
    return [_shipped(name) for name in sorted(file.name.removesuffix(".toml") for file in _recipe_files())]


def load_recipe(name_or_path: str) -> dict[str, Any]:
    """The contents of a shipped recipe, or of a TOML file where the name ends in .toml or has a folder in it.

    A file that gives no ``name`` gets its own. ConfigError: no such recipe, unreadable file, or no TOML.
    """
    if name_or_path.endswith(".toml") or os.sep in name_or_path:
        path = Path(name_or_path)
        return {"name": path.stem} | _parse(_read(path, "recipe"), name_or_path)
    shipped = {file.name.removesuffix(".toml"): file for file in _recipe_files()}
    if name_or_path not in shipped:
        near = get_close_matches(name_or_path, shipped, n=1)
        guess = f" did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"no recipe '{name_or_path}';{guess} shipped: {', '.join(sorted(shipped))}; "
            "or give the path of a .toml file"
        )
    return _parse(shipped[name_or_path].read_text("utf-8"), name_or_path)


def resolve(recipe: Mapping[str, Any], overrides: Sequence[Override] = ()) -> RunConfig:
    """The configuration of a recipe with overrides on top; of two for one key the later one holds.

    An override that changes a section's ``type`` drops the recipe's other keys of that section, which would belong to
    the type it had. ConfigError: unknown key or impossible value, with what is allowed.
    """
    raw = copy.deepcopy(dict(recipe))
    apply_overrides(raw, overrides)
    return _validate(raw)


def load_resolved(path: Path) -> RunConfig:
    """The configuration that ``save_resolved`` wrote. ConfigError: missing, no TOML, or refused by this version."""
    return _validate(_parse(_read(path, "resolved configuration"), str(path)), f"{path}: ")


def save_resolved(config: RunConfig, path: Path) -> None:
    """Write the fields to ``path`` as TOML, whole or not at all; fields that are None are left out."""
    header = "# Resolved configuration, written by metafleet. Fields without a value have no line.\n\n"
    text = header + tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
    write_atomically(path, lambda file: _write_text(file, text))


def with_execution(config: RunConfig, **fields: Any) -> RunConfig:
    """The configuration with these fields of its execution section; None stands for a default.

    Raises:
        ConfigError: an impossible value.
    """
    values = config.model_dump(mode="json", exclude_none=True)
    execution = values["execution"] | fields
    values["execution"] = {name: value for name, value in execution.items() if value is not None}
    return _validate(values)


def refuse_result_changes(old: RunConfig, new: RunConfig) -> None:
    """ConfigError, naming each key with its old and new value, if ``new`` would change the result half of ``old``."""
    before, after = flatten(old.result_half()), flatten(new.result_half())
    changed = [key for key in before | after if before.get(key) != after.get(key)]
    if changed:
        changes = ", ".join(f"{key} {_shown(before, key)} -> {_shown(after, key)}" for key in changed)
        raise ConfigError(
            f"a resumed run cannot change what decides its result: {changes}; start a new run, or leave "
            f"{'it' if len(changed) == 1 else 'them'} out"
        )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return as_text(flat[key]) if key in flat else "unset"


def _recipe_files() -> list[Traversable]:
    return [file for file in resources.files("cluster").joinpath("recipes").iterdir() if file.name.endswith(".toml")]


def _shipped(name: str) -> ShippedRecipe:
    text = resources.files("cluster").joinpath("recipes", f"{name}.toml").read_text("utf-8")
    description = text.partition("\n")[0].lstrip("# ")
    return ShippedRecipe(name, description, isinstance(resolve(_parse(text, name)).data, StoreData))


def _write_text(file: BinaryIO, text: str) -> None:
    file.write(text.encode())


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError(f"cannot read the {what} {path}: {reason}") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError is one, and so is what int() says of too many digits
        raise ConfigError(f"{where} is not valid TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} {TOO_DEEP}") from error
    if problem := _excess(tables):
        raise ConfigError(f"{where} {problem}")
    return tables


def _excess(tables: dict[str, Any]) -> str | None:
    """Why tables are refused before anything walks or prints them: too deep, or with too long a number."""
    level: list[Any] = [tables]
    for _ in range(DEEPEST):
        if any(isinstance(value, int) and value.bit_length() > 64 for value in level):
            return "has a whole number of more than 64 bits: give a smaller one"
        level = [inner for value in level for inner in _inside(value)]
    return TOO_DEEP if level else None


def _inside(value: Any) -> Iterable[Any]:
    """The values directly in a table or list."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _validate(raw: Mapping[str, Any], where: str = "") -> RunConfig:
    """The configuration; refusals begin with ``where``."""
    try:
        # By way of JSON, because there pydantic can be strict (true is no number, "5" is no 5) and yet take lists
        # for tuples. Dates, which TOML has and JSON has not, become text and are refused as such.
        return RunConfig.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(where + describe(error)) from error
