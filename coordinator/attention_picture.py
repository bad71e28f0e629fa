"""The picture of one episode's attention, as PNG: a row a query, with the support samples that it looks at.

Drawn as in ``plots``. Every support sample stands with its share of the query's attention, in figures and as a bar.
With positions to tell apart, the colour on a sample says where the query looks, strongest where a row's attention is
highest; the colour on a query, which of its own positions it is read from.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Int64
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from cluster.durable import write_atomically
from coordinator.attention import EpisodeAttention
from coordinator.plots import GREY

ROWS: Final = 6
"""Most queries shown."""
COLUMNS: Final = 10
"""Most support samples shown of each."""
FEWEST: Final = 3
"""Support samples that there is room for, however few there are: the heading needs it."""
RIGHT: Final = "#1a8f3c"
WRONG: Final = "#c22f2f"
FRAME: Final = "#c8c8c8"
HEAT: Final = "#ff6a00"
STRENGTH: Final = 0.75
"""Share of the colour where attention is highest; the image is the rest."""

TILE, GAP, ABOVE, BELOW, LABEL, MARGIN, HEAD = 1.15, 0.14, 0.48, 0.16, 2.15, 0.2, 0.9
"""Inches: an image, between two of them, its text above and its bar below, a row's label, the edges, the heading."""
DPI: Final = 120


def attention_picture(seen: EpisodeAttention, path: Path, *, title: str) -> None:
    """Draw where queries look, each class's equally often where there is room, and write it to ``path``.

    Args:
        seen: the episode.
        path: the PNG to write, whole or not at all.
        title: one line on what episode of which run this is.

    Raises:
        OSError: ``path`` cannot be written.
    """
    # No version inside: the same attention gives the same file.
    figure = attention_figure(seen, title)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None}))


def attention_figure(seen: EpisodeAttention, title: str) -> Figure:
    """What `attention_picture` writes."""
    queries = shown_queries(len(seen.query_y), len(seen.classes))
    columns = min(COLUMNS, len(seen.support_y))
    width = 2 * MARGIN + LABEL + (max(columns, FEWEST) + 1) * (TILE + GAP) + GAP
    row = ABOVE + TILE + BELOW
    figure = Figure(figsize=(width, HEAD + len(queries) * row + MARGIN))
    FigureCanvasAgg(figure)
    _head(figure, seen, title, columns)
    for place, query in enumerate(queries):
        _row(figure, seen, int(query), figure.get_figheight() - HEAD - (place + 1) * row + BELOW, columns)
    return figure


def shown_queries(queries: int, way: int) -> Int64[np.ndarray, " row"]:
    """At most `ROWS` of so many queries, which are ordered by class, evenly spread; of every class where way ≤ ROWS."""
    rows = min(queries, ROWS // way * way or ROWS)
    return (2 * np.arange(rows) + 1) * queries // (2 * rows)


def shown_samples(attention: Float[np.ndarray, " support"], count: int) -> Int64[np.ndarray, " column"]:
    """The ``count`` samples with most attention, in their own order."""
    return np.sort(np.argsort(-attention, kind="stable")[:count])


def heated(
    image: Float[np.ndarray, "channel height width"], heat: Float[np.ndarray, "rows columns"]
) -> Float[np.ndarray, "height width 3"]:
    """The image as RGB with colour laid over it.

    Args:
        image: grey or RGB, in [0, 1].
        heat: how strong, in [0, 1], of parts of the image that tile it; interpolated between their middles.
    """
    _, height, width = image.shape
    picture = np.broadcast_to(image, (3, height, width)).transpose(1, 2, 0)
    smooth = Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    share = STRENGTH * np.asarray(smooth, dtype=np.float64)[..., None]
    blended: np.ndarray = (1 - share) * picture + share * np.array(to_rgb(HEAT))
    return blended


# -------------------------------------------------------------------------------------------------------------- pieces


def _head(figure: Figure, seen: EpisodeAttention, title: str, columns: int) -> None:
    """The title, what came out, and how to read what is below."""
    lines = [(title, "black", "bold"), (seen.outcome(), "black", "normal")]
    notes = ["green: the right class"]
    if seen.spatial:
        notes.append("orange: where the query looks")
    if columns < len(seen.support_y):
        notes.append(f"of {len(seen.support_y)} support samples, the {columns} with most attention")
    lines.append((" · ".join(notes), GREY, "normal"))
    for place, (text, color, weight) in enumerate(lines):
        _text(figure, MARGIN, figure.get_figheight() - MARGIN - 0.24 * place, text, 10, color, weight)


def _row(figure: Figure, seen: EpisodeAttention, query: int, bottom: float, columns: int) -> None:
    """One query with its label, and support samples with their attention."""
    _label(figure, seen, query, bottom + TILE)
    left = MARGIN + LABEL
    maps, own = seen.support_maps[query], seen.query_maps[query]
    _image(figure, left, bottom, seen.query_x[query], own / own.max() if seen.spatial else None)
    _text(figure, left, bottom + TILE + 0.07, "query", 9, "black", "bold")
    samples = shown_samples(seen.samples[query], columns)
    names = [_lines(seen.classes[label], 20) for label in seen.support_y[samples]]
    above = bottom + TILE + 0.1 + 0.1 * max(map(len, names))
    for column, (sample, name) in enumerate(zip(samples, names, strict=True), start=1):
        x = left + column * (TILE + GAP) + GAP
        share, label = seen.samples[query, sample], int(seen.support_y[sample])
        color, line = (RIGHT, 3.0) if label == seen.query_y[query] else (FRAME, 0.8)
        heat = maps[sample] / maps.max() if seen.spatial else None
        _image(figure, x, bottom, seen.support_x[sample], heat, color, line)
        _bar(figure, x, bottom - 0.09, 1.0, FRAME)
        _bar(figure, x, bottom - 0.09, share, HEAT)
        for place, text in enumerate(reversed(name)):
            _text(figure, x, bottom + TILE + 0.07 + 0.1 * place, text, 6.5, GREY)
        _text(figure, x, above, f"{100 * share:.1f} %", 9, "black", "bold")


def _label(figure: Figure, seen: EpisodeAttention, query: int, top: float) -> None:
    """What the query is, what it was taken for, and its attention to its own class."""
    right, predicted = int(seen.query_y[query]), int(seen.predicted[query])
    color, verdict = (RIGHT, "predicted: right") if predicted == right else (WRONG, "predicted: wrong, it says")
    lines = [(text, "black", "bold") for text in _lines(seen.classes[right], 24)]
    lines += [(verdict, color, "normal")]
    lines += [(text, color, "normal") for text in _lines(seen.classes[predicted], 26) if predicted != right]
    lines.append((f"{100 * seen.on_right_class[query]:.1f} % on the right class", GREY, "normal"))
    for place, (text, color, weight) in enumerate(lines):
        _text(figure, MARGIN, top - 0.12 - 0.19 * place, text, 8, color, weight)


def _image(
    figure: Figure,
    x: float,
    y: float,
    image: Float[np.ndarray, "channel height width"],
    heat: Float[np.ndarray, "rows columns"] | None,
    color: str = FRAME,
    line: float = 0.8,
) -> None:
    """An image in a frame of ``color``, its lower left corner at ``x``, ``y`` (inches)."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((x / width, y / height, TILE / width, TILE / height), xticks=[], yticks=[])
    axes.imshow(heated(image, np.zeros((1, 1)) if heat is None else heat), interpolation="nearest", aspect="auto")
    axes.spines[:].set(color=color, linewidth=line)


def _bar(figure: Figure, x: float, y: float, share: float, color: str) -> None:
    """A bar as wide as ``share`` of an image."""
    figure.add_artist(Rectangle((x, y), share * TILE, 0.05, transform=figure.dpi_scale_trans, color=color, linewidth=0))


def _text(figure: Figure, x: float, y: float, text: str, size: float, color: str, weight: str = "normal") -> None:
    # A class may be named like a formula.
    style: dict[str, Any] = {"fontsize": size, "color": color, "fontweight": weight, "parse_math": False}
    figure.text(x, y, text, transform=figure.dpi_scale_trans, va="baseline", **style)


def _lines(name: str, width: int) -> list[str]:
    """A name in at most two lines."""
    return textwrap.wrap(name, width, max_lines=2, placeholder="…") or [""]
