"""What a subject gives back, as plain data for JSON and as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from benchmarks.rounds import Spread

Cell = str | int | float | Spread


@dataclass(frozen=True)
class Sheet:
    """One table: every row has the same columns."""

    title: str
    rows: Sequence[Mapping[str, Cell]]
    note: str = ""
    """What the numbers mean, where the columns do not say it."""

    def table(self) -> Table:
        """As a table for a terminal."""
        table = Table(title=self.title, caption=self.note or None, title_justify="left", caption_justify="left")
        for position, column in enumerate(self.rows[0]):
            table.add_column(column, justify="left" if position == 0 else "right")
        for row in self.rows:
            table.add_row(*(shown(cell) for cell in row.values()))
        return table


@dataclass(frozen=True)
class Floor:
    """A number that has to be at least (or at most) another."""

    what: str
    measured: float
    limit: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether the measurement is on the right side."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass(frozen=True)
class Result:
    """What one subject found."""

    sheets: Sequence[Sheet]
    floors: Sequence[Floor] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "sheets": [asdict(sheet) for sheet in self.sheets],
            "floors": [asdict(floor) | {"met": floor.met} for floor in self.floors],
        }


def floors_table(floors: Sequence[Floor]) -> Table:
    """All floors, and whether they are met."""
    table = Table(title="Floors", title_justify="left")
    table.add_column("what")
    for column in ("measured", "floor", "met"):
        table.add_column(column, justify="right")
    for floor in floors:
        sign = "≥" if floor.at_least else "≤"
        met = "[green]yes[/]" if floor.met else "[bold red]NO[/]"
        table.add_row(floor.what, number(floor.measured), f"{sign} {number(floor.limit)}", met)
    return table


def shown(cell: Cell) -> str:
    """A cell as text."""
    if isinstance(cell, Spread):
        return f"{number(cell.median)} ({number(cell.low)}–{number(cell.high)})"
    return cell if isinstance(cell, str) else number(cell)


def number(value: float) -> str:
    """A number to three digits or so."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
