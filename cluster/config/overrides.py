"""Dotted overrides as typed on a command line, applied to the tables of a recipe."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_origin

from pydantic.fields import FieldInfo

from cluster.config.base import Section
from cluster.config.fields import as_text, element_type, is_list, members, nullable, value_type
from cluster.config.refusal import unknown_key, unknown_type
from cluster.config.run import RunConfig
from cluster.errors import ConfigError

Override = tuple[str, str]
"""A dotted key (``_`` or ``-``) and its value as typed."""


def apply_overrides(raw: dict[str, Any], overrides: Sequence[Override]) -> None:
    """Set the overrides in ``raw``, the tables of a recipe; every section then has its ``type`` written out.

    ConfigError: no such key or ``type``, or a value for what is a section. Values are judged later, by validation.
    """
    _complete_types(RunConfig, raw)
    types: list[Override] = []
    values: list[Override] = []
    for key, text in overrides:
        normal = key.strip().replace("-", "_")
        (types if f".{normal}".endswith(".type") else values).append((normal, text))
    # Types first, outer before inner: they decide which keys the other overrides can name, in whatever order they come.
    for key, text in sorted(types, key=lambda override: override[0].count(".")):
        _switch_type(raw, key, text)
    for key, text in values:
        _set_value(raw, key, text)


@dataclass(frozen=True)
class _Place:
    """A section on the way to a key."""

    name: str
    """Dotted; empty for the whole configuration."""
    section: type[Section]
    when: str
    """Its ``type`` where it is one of a union."""
    table: dict[str, Any]

    def choices(self, field: str) -> dict[str, type[Section]]:
        info = self.section.model_fields.get(field)
        return members(info) if info else {}


def _complete_types(section: type[Section], table: dict[str, Any]) -> None:
    """Write the default ``type`` into every union section that gives none, so that each key below has one meaning."""
    for name, info in section.model_fields.items():
        choices = members(info)
        inner = table.setdefault(name, {}) if choices else None
        if isinstance(inner, dict):
            when = "" if "" in choices else str(inner.setdefault("type", info.default.type))
            if when in choices:
                _complete_types(choices[when], inner)


def _switch_type(raw: dict[str, Any], key: str, text: str) -> None:
    parent, _, name = key.rpartition(".")[0].rpartition(".")
    place = _descend(raw, parent, key)
    choices = place.choices(name)
    if name not in place.section.model_fields:
        raise ConfigError(unknown_key(key, place.name, place.section, place.when))
    if not choices or "" in choices:
        raise ConfigError(f"{key}: no such key; {parent}{'.' if parent else ''}{name} has no types")
    chosen = text.strip(" '\"")
    if chosen not in choices:
        raise ConfigError(unknown_type(key, chosen, list(choices)))
    table = place.table[name]
    if not isinstance(table, dict) or table["type"] != chosen:
        place.table[name] = {"type": chosen}
    _complete_types(choices[chosen], place.table[name])


def _set_value(raw: dict[str, Any], key: str, text: str) -> None:
    parent, _, name = key.rpartition(".")
    place = _descend(raw, parent, key)
    if name not in place.section.model_fields:
        raise ConfigError(unknown_key(key, place.name, place.section, place.when))
    choices = place.choices(name)
    if choices:
        inside = dict.fromkeys(one for cls in choices.values() for one in cls.model_fields)
        raise ConfigError(f"{key}: is a section, got '{text}'; give {key}.KEY, one of {', '.join(inside)}")
    place.table[name] = parse_value(text, place.section.model_fields[name])


def _descend(raw: dict[str, Any], parent: str, key: str) -> _Place:
    """The section that ``parent`` names, on the way to ``key``."""
    place = _Place("", RunConfig, "", raw)
    for part in parent.split(".") if parent else ():
        name = f"{place.name}.{part}" if place.name else part
        choices = place.choices(part)
        if part not in place.section.model_fields:
            raise ConfigError(unknown_key(key, place.name, place.section, place.when))
        if not choices:
            raise ConfigError(f"{key}: no such key; {name} is a single value")
        table = place.table[part]
        if not isinstance(table, dict):
            raise ConfigError(f"{name}: is a section, to be set by its keys, got {as_text(table)}")
        when = "" if "" in choices else str(table["type"])
        if when not in choices:
            raise ConfigError(unknown_type(f"{name}.type", when, list(choices)))
        place = _Place(name, choices[when], when, table)
    return place


# -------------------------------------------------------------------------------------------------------------- values

_SWITCH = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def is_switch_value(text: str) -> bool:
    """Whether the text is a value for a true/false field."""
    return text.lower() in _SWITCH


def parse_value(text: str, info: FieldInfo) -> Any:
    """What the text means for this field; text that means nothing stays text, for validation to refuse and to show."""
    if nullable(info) and text.strip().lower() in ("none", "null"):
        return None
    annotation = value_type(info)
    if is_list(annotation):
        return [_scalar(item, element_type(annotation)) for item in _items(text)]
    return _scalar(text, annotation)


def _items(text: str) -> list[str]:
    """The items of ``[a, "b"]`` or ``a,b``; quotes are needed only around an item that has a comma in it."""
    try:
        listed = tomllib.loads(f"it = {text}")["it"]
    except tomllib.TOMLDecodeError:
        listed = None
    if isinstance(listed, list):
        return [as_text(item) for item in listed]
    bare = text.strip().removeprefix("[").removesuffix("]")
    return [item.strip() for item in bare.split(",") if item.strip()]


def _scalar(text: str, annotation: Any) -> Any:
    stripped = text.strip()
    if annotation is bool:
        return _SWITCH.get(stripped.lower(), text)
    if annotation in (int, float):
        try:
            return annotation(stripped)
        except ValueError:
            return text
    quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\""
    return stripped[1:-1] if quoted else stripped if get_origin(annotation) else text
