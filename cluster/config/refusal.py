"""Refusals: a pydantic ValidationError, or a key that does not exist, as one line a user can act on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cluster.config.base import Section
from cluster.config.fields import all_fields, as_text, members
from cluster.config.run import RunConfig

_BOUNDS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "tuple": "a list"}


def describe(error: ValidationError) -> str:
    """The first error in full (key, what is allowed, value received), the keys of any others after it."""
    first, *others = error.errors(include_url=False)
    line = _describe_one(first)
    if others:
        keys = ", ".join(dict.fromkeys(dotted(other["loc"]) or "the whole" for other in others))
        line += f" (also wrong: {keys})"
    return _one_line(line)


def dotted(location: Sequence[int | str]) -> str:
    """The dotted name of a pydantic location, without the union tags that pydantic puts into it."""
    return _place(location)[0]


def _place(location: Sequence[int | str]) -> tuple[str, type[Section], str]:
    """Dotted name of a location, the section it ends in, and that section's ``type`` where it is one of a union."""
    section: type[Section] = RunConfig
    name, when = "", ""
    choices: dict[str, type[Section]] = {}
    for part in location:
        if part in choices:
            section, when, choices = choices[str(part)], str(part), {}
            continue
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
        info = section.model_fields.get(str(part))
        choices = members(info) if info else {}
        section, when = choices.pop("", section), ""
    return name, section, when


def unknown_key(key: str, parent: str, section: type[Section], when: str) -> str:
    """Why ``key`` is refused, what was probably meant, and what there is.

    ``parent`` is the dotted name of the innermost section on the way to ``key`` that exists, ``section`` its class and
    ``when`` its ``type``.
    """
    below = key.removeprefix(f"{parent}.").partition(".")[0]
    path = f"{parent}.{below}" if parent else below
    refused = f"{key}: no such key" + (f" in {parent}.type {when}" if when else "")
    owners = _owners(path)
    if owners:
        return _one_line(f"{refused}; {path} belongs to {parent}.type {' or '.join(owners)}")
    allowed = ", ".join(section.model_fields)
    return _one_line(f"{refused};{_guess(key, below, list(section.model_fields))} allowed: {allowed}")


def _owners(path: str) -> list[str]:
    """The types of section that have this value or section."""
    direct = dict.fromkeys(field.when for field in all_fields() if field.path in (path, f"{path}.type"))
    inside = dict.fromkeys(field.when for field in all_fields() if field.path.rpartition(".")[0] == path)
    return list(direct or inside)


def _guess(key: str, below: str, siblings: list[str]) -> str:
    """The likeliest existing key: one of this very name elsewhere, a similar sibling, a similar name elsewhere."""
    paths = [field.path for field in all_fields() if not field.path.endswith(".type")]
    by_last = {path.rpartition(".")[2]: path for path in reversed(paths)}
    last = below if key.endswith(".type") else key.rpartition(".")[2]
    near = [by_last[last]] if last in by_last else get_close_matches(below, siblings, n=1)
    near = near or [by_last[name] for name in get_close_matches(last, by_last, n=1, cutoff=0.75)]
    return f" did you mean {near[0]}?" if near else ""


def unknown_type(path: str, received: Any, allowed: Sequence[str]) -> str:
    """Why the ``type`` of a section is refused."""
    near = get_close_matches(str(received), allowed, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return _one_line(f"{path}: {_quoted(received)} is none of {', '.join(allowed)}{guess}")


def _one_line(text: str) -> str:
    """``text`` with its line ends and other control characters escaped: keys and values are a user's."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _describe_one(error: ErrorDetails) -> str:
    kind, path, received, context = error["type"], dotted(error["loc"]), error["input"], error.get("ctx", {})
    if kind in _BOUNDS:
        bound, sign = _BOUNDS[kind]
        limit = "2^63" if context[bound] == 2**63 else f"{context[bound]:g}"
        return f"{path}: must be {sign} {limit}, got {as_text(received)}"
    if kind == "value_error":
        return f"{path}: {context['error']}" if path else str(context["error"])
    if kind == "extra_forbidden":
        return unknown_key(path, *_place(error["loc"][:-1]))
    if kind == "union_tag_invalid":
        return unknown_type(f"{path}.type", context["tag"], _names(context["expected_tags"]))
    if kind == "literal_error":
        return unknown_type(path, received, _names(context["expected"].replace(" or ", ", ")))
    if kind == "missing":
        if isinstance(error["loc"][-1], int):
            return f"{dotted(error['loc'][:-1])}: must have more than {error['loc'][-1]} item(s)"
        meaning = next((f" ({field.meaning.rstrip('.')})" for field in all_fields() if field.path == path), "")
        return f"{path}: is required{meaning}"
    return f"{path}: {_requirement(kind, error)}, got {_quoted(received)}"


def _names(listed: str) -> list[str]:
    """The names in pydantic's ``'a', 'b'``."""
    return [name.strip(" '") for name in listed.split(",")]


def _requirement(kind: str, error: ErrorDetails) -> str:
    if kind == "finite_number":
        return "must be a finite number"
    if kind in ("model_type", "model_attributes_type", "dict_type", "union_tag_not_found"):
        return "is a section, to be set by its keys"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "too_long":
        return f"must have at most {error['ctx']['max_length']} items"
    word = _KINDS.get(kind.partition("_")[0])
    return f"must be {word}" if word else error["msg"]


def _quoted(received: Any) -> str:
    if isinstance(received, Mapping):
        return "a table"
    return f"'{received}'" if isinstance(received, str) else as_text(received)
