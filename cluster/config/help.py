"""Every configuration field as text for `metafleet train --help`: name, meaning and unit, range, default."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.config.base import Section
from cluster.config.fields import ConfigField, all_fields, members
from cluster.config.run import RunConfig

_INTRODUCTION = """\
Configuration fields, as keys of a recipe or as options: --learner.inner_steps 5, --learner.first_order, \
--model.hidden 40,40, --clip_norm none. An option overrides the recipe; one that changes a section's type drops the \
recipe's other keys of that section. Defaults are those without a recipe (`metafleet recipes` lists recipes). All but \
evaluation and execution decides the result, so a resume cannot change it."""


@dataclass(frozen=True)
class FieldGroup:
    """Fields that stand together: the values of one section or of one member of a union, or a union's ``type``."""

    title: str
    summary: str
    fields: tuple[ConfigField, ...]


def field_groups() -> tuple[FieldGroup, ...]:
    """Every field of the configuration, by section and by ``type``; members without fields have an empty group."""
    return tuple(_groups(RunConfig, "", "", "the run"))


def fields_text(width: int) -> str:
    """The introduction and every group, in ``width`` columns, with ANSI styles unless NO_COLOR forbids them."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard", highlight=False)
    names = max(len(field.path) for field in all_fields()) + len("  --")
    with console.capture() as capture:
        console.print(_INTRODUCTION, markup=False)
        for group in field_groups():
            console.print()
            console.print(Text.assemble((group.title, "bold"), "  ", (group.summary, "dim")))
            table = Table.grid(padding=(0, 2))
            table.add_column(no_wrap=True, width=names)
            table.add_column()
            for field in group.fields:
                name, meaning = Text(f"  --{field.path}", "cyan"), Text(f"{field.meaning}  ")
                table.add_row(name, meaning.append(_limits(field), "dim"))
            if group.fields:
                console.print(table)
    return capture.get()


def _groups(section: type[Section], parent: str, when: str, title: str) -> Iterator[FieldGroup]:
    own = [field for field in all_fields() if field.section is section and field.when == when]
    summary = inspect.cleandoc(section.__doc__ or "").replace("``", "") if parent else ""
    yield FieldGroup(title, summary, tuple(field for field in own if field.path.rpartition(".")[0] == parent))
    for name, info in section.model_fields.items():
        path, choices = f"{parent}.{name}" if parent else name, members(info)
        if choices and "" not in choices:
            yield FieldGroup(path, "", tuple(field for field in own if field.path == f"{path}.type"))
        for choice, cls in choices.items():
            here = f"{path}.type {choice}" if choice else f"{path} of {parent}.type {when}" if when else path
            yield from _groups(cls, path, choice or when, here)


def _limits(field: ConfigField) -> str:
    default = "required" if field.default == "required" else f"default {field.default}"
    return f"[{field.allowed}; {default}]"
