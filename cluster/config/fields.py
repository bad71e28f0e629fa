"""What fields the configuration has: one walk over the models, shared by overrides, refusals and ``--help``."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from cluster.config.base import Section
from cluster.config.run import RunConfig


@dataclass(frozen=True)
class ConfigField:
    """One value a user can set."""

    path: str
    """Dotted name, for instance ``learner.inner_steps``."""
    when: str
    """The ``type`` of the innermost union section around this field; empty where there is none."""
    section: type[Section]
    """The section that has this field; for a union's ``type``, the section that has the union."""
    info: FieldInfo
    meaning: str
    """The field's docstring: meaning and unit."""
    allowed: str
    """Values or range, in words."""
    default: str
    """The default as one would type it; ``required`` where there is none."""

    @property
    def boolean(self) -> bool:
        """Whether it is a switch, which the command line may name without a value."""
        return self.info.annotation is bool


def members(info: FieldInfo) -> dict[str, type[Section]]:
    """The section classes of a field by ``type``; a plain section has the key ``""``, a single value has none."""
    found = [arg for arg in _alternatives(info.annotation) if isinstance(arg, type) and issubclass(arg, Section)]
    return {tag(cls) if info.discriminator else "": cls for cls in found}


def tag(section: type[Section]) -> str:
    """The ``type`` that chooses this member of a union."""
    return str(get_args(section.model_fields["type"].annotation)[0])


def nullable(info: FieldInfo) -> bool:
    """Whether ``none`` is a value of the field."""
    return type(None) in _alternatives(info.annotation)


def value_type(info: FieldInfo) -> Any:
    """The field's annotation without ``None``."""
    return next(arg for arg in _alternatives(info.annotation) if arg is not type(None))


def is_list(annotation: Any) -> bool:
    """Whether the annotation is a tuple, which a user writes as a list."""
    return get_origin(annotation) is tuple


def element_type(annotation: Any) -> Any:
    """The type of a list's elements, without constraints."""
    element = get_args(annotation)[0]
    return get_args(element)[0] if get_origin(element) is Annotated else element


@cache
def all_fields() -> tuple[ConfigField, ...]:
    """Every field of the configuration in the order of the models, but a section's sections come after its values."""
    return tuple(_walk(RunConfig, "", ""))


def _walk(section: type[Section], prefix: str, when: str) -> Iterator[ConfigField]:
    inner = {name: members(info) for name, info in section.model_fields.items()}
    for name, info in section.model_fields.items():
        if not inner[name] and not (name == "type" and when):
            meaning, allowed = info.description or "", _allowed_field(info)
            yield ConfigField(prefix + name, when, section, info, meaning, allowed, _default(info))
    for name, info in section.model_fields.items():
        if inner[name] and "" not in inner[name]:
            meaning, allowed, default = info.description or "", " | ".join(inner[name]), info.default.type
            yield ConfigField(f"{prefix}{name}.type", when, section, info, meaning, allowed, default)
        for choice, cls in inner[name].items():
            yield from _walk(cls, f"{prefix}{name}.", choice or when)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _default(info: FieldInfo) -> str:
    return "required" if info.is_required() else as_text(info.default)


def as_text(value: Any) -> str:
    """A configuration value as one would type it on the command line."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return "[" + ", ".join(as_text(item) for item in value) + "]"
        case Mapping():
            return "{" + ", ".join(f"{key} = {as_text(item)}" for key, item in value.items()) + "}"
        case _:
            return str(value)


def _allowed_field(info: FieldInfo) -> str:
    return _allowed(value_type(info), info.metadata) + (" or none" if nullable(info) else "")


_WORDS = {int: "whole number", float: "number", str: "text", bool: "true | false"}
_PLURAL = {"whole number": "whole numbers", "number": "numbers", "text": "names"}


def _allowed(annotation: Any, metadata: list[Any]) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if is_list(annotation):
        arguments = get_args(annotation)
        count = "list of" if arguments[-1] is Ellipsis else str(len(arguments))
        word, *bounds = _allowed_element(arguments[0]).partition(" >")
        return f"{count} {_PLURAL[word]}{''.join(bounds)}"
    return " ".join(filter(None, (_WORDS[annotation], _bounds(metadata))))


def _allowed_element(element: Any) -> str:
    if get_origin(element) is not Annotated:
        return _allowed(element, [])
    annotation, *constraints = get_args(element)
    return _allowed(annotation, [one for info in constraints for one in info.metadata])


def _bounds(metadata: list[Any]) -> str:
    parts = []
    for constraint in metadata:
        match constraint:
            case annotated_types.Ge(ge=bound):
                parts.append(f">= {bound}")
            case annotated_types.Gt(gt=bound):
                parts.append(f"> {bound}")
            case annotated_types.Le(le=bound):
                parts.append(f"<= {bound}")
            case annotated_types.Lt(lt=bound):
                parts.append("< 2^63" if bound == 2**63 else f"< {bound}")
    return ", ".join(parts)
