"""Looking at an episode store: a contact sheet of its pictures, and what it holds as plain data."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cluster.durable import write_atomically
from cluster.episodes.store import EpisodeStore
from cluster.errors import StoreError

TILE = 64
"""Least height of a sample on the sheet, pixels: smaller ones are enlarged by a whole factor."""
LARGEST_TILE = 160
"""Most height or width of a sample on the sheet, pixels: larger ones are reduced."""
GAP = 6
MARGIN = 24
FONT_SIZE = 17
PAPER, INK, FAINT, FRAME = (250, 250, 248), (30, 32, 36), (120, 124, 130), (205, 207, 210)
LONGEST_LABEL = 44
"""Characters of a class name that are shown; a longer one loses its middle."""


def contact_sheet(
    store: EpisodeStore, path_png: str | os.PathLike[str], classes: int = 16, samples: int = 12
) -> tuple[str, ...]:
    """Write a PNG with one row a class and several samples in it, names beside; the names of the classes shown.

    ``classes`` classes are spread evenly over the store's order, and so are ``samples`` samples over each class: the
    same store gives the same sheet. Values are shown as they are (255 is white).

    Raises:
        StoreError: the store holds vectors, or channels that are no grey or RGB picture.
        ValueError: ``classes`` or ``samples`` is below 1.
        OSError: ``path_png`` cannot be written.
    """
    if classes < 1 or samples < 1:
        raise ValueError(f"a contact sheet shows at least one class and one sample, got {classes} and {samples}")
    if len(store.sample_shape) != 3 or store.sample_shape[0] not in (1, 3):
        raise StoreError(
            f"{store.path}: samples of shape {store.sample_shape} are no pictures: a sheet cannot show them"
        )
    shown = _spread(len(store.classes), classes)
    rows = [(store.classes[c], store.class_start[c] + _spread(int(store.class_count[c]), samples)) for c in shown]
    sheet = _draw(store, [(name, store.samples[picked]) for name, picked in rows])
    write_atomically(path_png, lambda file: sheet.save(file, format="PNG"))
    return tuple(name for name, _ in rows)


def describe(store: EpisodeStore) -> dict[str, Any]:
    """What ``store`` holds, as plain data that JSON can carry: what `metafleet inspect STORE --json` prints."""
    header = store.header
    return {
        "path": str(store.path),
        "digest": header.digest,
        "bytes": header.size,
        "sample_shape": list(header.sample_shape),
        "dtype": header.dtype,
        "classes": header.classes,
        "samples": header.samples,
        "samples_per_class": {"min": int(store.class_count.min()), "max": int(store.class_count.max())},
        "class_metadata": {name: _counts(store.class_metadata[name]) for name in header.class_columns},
        "sample_metadata": {name: _counts(store.sample_metadata(name)) for name in header.sample_columns},
        "description": dict(header.description),
    }


def _counts(values: tuple[str, ...]) -> dict[str, int]:
    """How often each value occurs, by value."""
    return dict(sorted(Counter(values).items()))


def _spread(total: int, wanted: int) -> np.ndarray:
    """At most ``wanted`` of 0 … total − 1, evenly spread, int64 ``[picked]``: the middles of equal parts."""
    wanted = min(total, wanted)
    return (2 * np.arange(wanted) + 1) * total // (2 * wanted)


# ------------------------------------------------------------------------------------------------------------- drawing


def _draw(store: EpisodeStore, rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """The sheet: a heading, then a label and pictures ``[sample, channel, height, width]`` for each row."""
    font, small = _font(FONT_SIZE), _font(FONT_SIZE - 3)
    labels = [_shortened(name) for name, _ in rows]
    label_width = round(max(font.getlength(label) for label in labels))
    width, height = _tile_size(store)
    step_x, step_y = width + GAP, height + GAP
    title, details = store.path.name, _details(store, len(rows))
    top = MARGIN + 2 * FONT_SIZE + MARGIN
    left = MARGIN + label_width + MARGIN
    grid = max(len(pictures) for _, pictures in rows) * step_x - GAP
    sheet_width = MARGIN + max(
        label_width + MARGIN + grid, round(font.getlength(title)), round(small.getlength(details))
    )
    sheet = Image.new("RGB", (sheet_width + MARGIN, top + len(rows) * step_y - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, font, anchor="lm")
    draw.text((MARGIN, MARGIN + FONT_SIZE + GAP), details, FAINT, small, anchor="lm")
    for row, (label, (_, pictures)) in enumerate(zip(labels, rows, strict=True)):
        y = top + row * step_y
        draw.text((left - MARGIN, y + height // 2), label, INK, font, anchor="rm")
        for column, picture in enumerate(pictures):
            x = left + column * step_x
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)
            sheet.paste(_tile(picture, width, height), (x, y))
    return sheet


def _details(store: EpisodeStore, shown: int) -> str:
    header = store.header
    shape = "×".join(str(length) for length in header.sample_shape)
    return f"{shown} of {header.classes} classes · {header.samples} samples of {shape} · sha256 {header.digest[:12]}"


def _shortened(name: str) -> str:
    half = LONGEST_LABEL // 2
    return name if len(name) <= LONGEST_LABEL else name[: half - 1] + "…" + name[-half:]


def _tile_size(store: EpisodeStore) -> tuple[int, int]:
    """Width and height of a sample on the sheet, pixels."""
    _, height, width = store.sample_shape
    if max(width, height) > LARGEST_TILE:
        shrink = LARGEST_TILE / max(width, height)
        return max(1, round(width * shrink)), max(1, round(height * shrink))
    factor = -(-TILE // height)
    return width * factor, height * factor


def _tile(picture: np.ndarray, width: int, height: int) -> Image.Image:
    """One sample as shown: enlarged pixel by pixel, or reduced smoothly."""
    pixels = picture.transpose(1, 2, 0)
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    larger = width >= image.width
    return image.resize((width, height), Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which Matplotlib brings: the same on every machine. It lacks Chinese, Japanese and Korean."""
    matplotlib = importlib.util.find_spec("matplotlib")
    assert matplotlib is not None and matplotlib.origin is not None  # a dependency of this distribution
    return ImageFont.truetype(str(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"), size)
