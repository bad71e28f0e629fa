"""The embedded image source ``glyphs``: characters of many scripts in real typefaces, 20 samples a class.

Sample k of a character is drawn in face k mod n of its n different faces, and moved by a small affine map

    x ↦ s · R(θ) · [1 h; 0 1] · diag(u, v) · x + t        x from the middle of the ink box, pixels

with θ, h, u, v and t drawn by key (code point, k). The scale s keeps what is large larger than what is small (o < O),
but less so than on the page, where a dot would be one pixel: the longer side ℓ of the ink box, in ems, becomes
`FILL` · min(ℓ / `LONGEST`, 1)^¾ of the image. Nothing is clipped: what would not fit is shrunk until it does.

`glyph_dataset` makes the samples, `ingest_glyphs` writes them as an episode store, and `glyphs_store` keeps one in the
local cache. Which characters and faces there are is `cluster.episodes.glyph_catalogue`'s subject. Only Pillow's
integer rasteriser and correctly rounded float64 operations decide a pixel, so that nodes with the same library versions
make the same store.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import fontTools
import numpy as np
import PIL
from jaxtyping import Float64, Int32, Int64, UInt8
from PIL import Image, features

from cluster import keys
from cluster.config.sections import MetadataSplit
from cluster.durable import cache_folder
from cluster.episodes.glyph_catalogue import MARGIN, Catalogue, Character, catalogue, font_files, open_font, render
from cluster.episodes.store import ClassTable, EpisodeStore, StoreHeader, write_store
from cluster.episodes.store_header import header_path
from cluster.errors import IngestError, StoreError

GENERATOR = "glyphs/2"
"""Changes with every change of the samples or classes: a cached store of another generator is not used."""
SAMPLES = 20
"""Samples a class."""
SIZES = range(8, 257)
"""Sizes that can be made, pixels."""

FILL = 0.86
"""Longer side of the largest ink boxes, as a share of the image's side."""
LONGEST = 1.1
"""Ink boxes at least this long are the largest, ems."""
CLEAR = 0.04
"""Width of the border that stays free of ink, as a share of the image's side."""

HALF_TURN = 0.09
"""Largest tan(θ/2): 10.3°. Drawn instead of θ, as cosine and sine are rational in it: the same bits everywhere."""
SHEAR = 0.15
"""Largest |h|."""
STRETCH = 0.1
"""Largest |u − 1| and |v − 1|."""
SHIFT = 0.06
"""Largest |t| along either axis, as a share of the image's side."""

GLYPHS_SPLIT = MetadataSplit(
    column="script", val=("Arabic", "Old Italic"), test=("Armenian", "Georgian", "Hebrew", "Lao")
)
"""Split by whole scripts: whoever trains never sees a letter of those that validate or test."""

_OVERSAMPLE = 2
"""Samples are warped at this many times their size and averaged down."""


@dataclass(frozen=True, eq=False)
class GlyphDataset:
    """All samples of one size, sorted by class."""

    samples: UInt8[np.ndarray, "sample 1 height width"]
    """Ink 255 on 0, anti-aliased."""
    class_index: Int32[np.ndarray, " sample"]
    """Index into ``names``, non-decreasing; `SAMPLES` of each."""
    names: tuple[str, ...]
    """Class names, for instance ``U+0416 CYRILLIC CAPITAL LETTER ZHE``, by code point."""
    class_metadata: Mapping[str, tuple[str, ...]]
    """Columns ``script``, ``block``, ``category``: one value a class."""
    sample_metadata: Mapping[str, tuple[str, ...]]
    """Column ``face``: one value a sample."""
    description: Mapping[str, str]
    """Source, polarity, resampling, versions."""


def glyph_dataset(size: int = 28) -> GlyphDataset:
    """Draw all characters at ``size`` pixels: some 5,000 classes, 100,000 samples, size² · 0.1 MB.

    Raises:
        IngestError: ``size`` is not in 8 … 256, or matplotlib's fonts are missing.
    """
    if size not in SIZES:
        raise IngestError(f"glyphs cannot be made {size} pixels wide: choose a size from {SIZES[0]} to {SIZES[-1]}")
    chosen = catalogue()
    characters = chosen.characters
    jitter = _jitter(np.array([character.code_point for character in characters], dtype=np.int64))
    samples = np.empty((len(characters), SAMPLES, size, size), dtype=np.uint8)
    pen = _Pen(chosen, size)
    for drawn, character, moves in zip(samples, characters, jitter, strict=True):
        pen.draw(character, moves, drawn)
    faces = [[chosen.faces[c.faces[k % len(c.faces)]].name for k in range(SAMPLES)] for c in characters]
    return GlyphDataset(
        samples=samples.reshape(-1, 1, size, size),
        class_index=np.repeat(np.arange(len(characters), dtype=np.int32), SAMPLES),
        names=tuple(character.name for character in characters),
        class_metadata={
            "script": tuple(character.script for character in characters),
            "block": tuple(character.block for character in characters),
            "category": tuple(character.category for character in characters),
        },
        sample_metadata={"face": tuple(face for of_class in faces for face in of_class)},
        description=_description(size),
    )


def ingest_glyphs(store_path: str | os.PathLike[str], size: int = 28) -> StoreHeader:
    """Write the glyphs at ``size`` pixels as an episode store.

    Raises:
        IngestError: ``size`` is not in 8 … 256, or matplotlib's fonts are missing.
        StoreError: something lies at ``store_path`` already, or the disk refuses.
    """
    made = glyph_dataset(size)
    classes = ClassTable(made.names, made.class_metadata)
    return write_store(store_path, made.samples, made.class_index, classes, made.sample_metadata, made.description)


def glyphs_store(size: int = 28) -> Path:
    """The episode store of the glyphs at ``size`` pixels in the local cache, made there if it is not yet.

    The cache is ``$METAFLEET_CACHE`` or ``~/.cache/metafleet``. Of several processes that come at once one makes the
    store and the others wait. A damaged store is made anew.

    Raises:
        IngestError: as `glyph_dataset`, or the cache cannot be written.
        StoreError: the disk refuses the store.
    """
    try:
        folder = cache_folder() / "glyphs"
    except RuntimeError:
        raise IngestError("there is no home folder to keep the glyphs in: set METAFLEET_CACHE to a folder") from None
    path = folder / f"glyphs-{size}-{_key(size)}.arrow"
    if _is_whole(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + ".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Another process may have made it while this one waited for the lock.
            if not _is_whole(path):
                for damaged in (header_path(path), path):
                    damaged.unlink(missing_ok=True)
                ingest_glyphs(path, size)
    except OSError as error:
        raise IngestError(
            f"{folder}: the glyphs cannot be kept there ({error.strerror or error}): make it writable, or set "
            "METAFLEET_CACHE to a folder that is"
        ) from error
    return path


# ------------------------------------------------------------------------------------------------------------- drawing


class _Pen:
    """Draws characters at one size; keeps the opened fonts."""

    def __init__(self, chosen: Catalogue, size: int) -> None:
        self._size = size
        # Two and a half image sides an em: no face is enlarged, and none shrunk by more than bilinear sampling takes.
        self._em = 5 * size // 2
        self._fonts = [open_font(face, self._em) for face in chosen.faces]

    def draw(self, character: Character, moves: np.ndarray, out: np.ndarray) -> None:
        """Fill ``out``, uint8 ``[SAMPLES, height, width]``, by ``moves``, float64 in [−1, 1) ``[SAMPLES, 6]``."""
        masters = [self._master(character, face) for face in character.faces[:SAMPLES]]
        turn = [masters[k % len(masters)] for k in range(SAMPLES)]
        fine = _OVERSAMPLE * self._size
        maps = _inverse_maps(np.array([master.size for master in turn]), moves, self._em, fine)
        for image, master, inverse in zip(out, turn, maps.tolist(), strict=True):
            warped = master.transform((fine, fine), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
            image[...] = np.asarray(warped.reduce(_OVERSAMPLE))

    def _master(self, character: Character, face: int) -> Image.Image:
        master = render(self._fonts[face], character.code_point)
        if master is None:
            raise IngestError(f"{character.name} has no ink at {self._em} pixels an em: choose a larger size")
        return master


def _jitter(code_points: Int64[np.ndarray, " class"]) -> Float64[np.ndarray, "class sample 6"]:
    """Numbers in [−1, 1) by key (code point, sample): turn, shear, two stretches, two shifts."""
    words = keys.lane_words(0, "glyph jitter", "", code_points, SAMPLES, 12)
    return 2.0 * keys.to_uniforms(words) - 1.0


def _inverse_maps(sizes: np.ndarray, moves: np.ndarray, em: int, side: int) -> Float64[np.ndarray, "sample 6"]:
    """The maps (a, b, c, d, e, f) from image to master: x' = ax + by + c, y' = dx + ey + f, pixels.

    Args:
        sizes: width and height of each master, its margins included, pixels, ``[sample, 2]``.
        moves: turn, shear, two stretches, two shifts in [−1, 1), ``[sample, 6]``.
        em: of the masters, pixels.
        side: of the images, pixels.
    """
    ink = sizes - 2.0 * MARGIN
    forward = _forward(moves) * _scale(ink.max(axis=1) / em, em, side)[:, None, None]
    reach = np.abs(forward[:, :, 0] * ink[:, :1]) / 2 + np.abs(forward[:, :, 1] * ink[:, 1:]) / 2
    room = side * (0.5 - CLEAR)
    shrink = np.minimum(1.0, room / reach.max(axis=1))
    forward *= shrink[:, None, None]
    slack = room - reach * shrink[:, None]
    middle = side / 2 + moves[:, 4:6] * np.minimum(slack, SHIFT * side)
    (a, b), (c, d) = forward[:, 0].T, forward[:, 1].T
    inverse = np.stack([d, -b, -c, a], axis=1) / (a * d - b * c)[:, None]
    x = sizes[:, 0] / 2 - inverse[:, 0] * middle[:, 0] - inverse[:, 1] * middle[:, 1]
    y = sizes[:, 1] / 2 - inverse[:, 2] * middle[:, 0] - inverse[:, 3] * middle[:, 1]
    return np.stack([inverse[:, 0], inverse[:, 1], x, inverse[:, 2], inverse[:, 3], y], axis=1)


def _forward(moves: np.ndarray) -> Float64[np.ndarray, "sample 2 2"]:
    """R(θ) · [1 h; 0 1] · diag(u, v)."""
    half = HALF_TURN * moves[:, 0]
    cosine, sine = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    shear = SHEAR * moves[:, 1]
    u, v = 1 + STRETCH * moves[:, 2], 1 + STRETCH * moves[:, 3]
    rows = [[u * cosine, v * (cosine * shear - sine)], [u * sine, v * (sine * shear + cosine)]]
    return np.moveaxis(np.array(rows), -1, 0)


def _scale(longer: np.ndarray, em: int, side: int) -> Float64[np.ndarray, " sample"]:
    """Image pixels a master pixel, for ink boxes whose longer side is ``longer`` ems."""
    share = np.minimum(longer / LONGEST, 1.0)
    # share^¾ by square roots: these are correctly rounded on every machine, powers are not.
    scale: np.ndarray = FILL * side * np.sqrt(share) * np.sqrt(np.sqrt(share)) / (longer * em)
    return scale


# --------------------------------------------------------------------------------------------------------------- cache


def _versions() -> dict[str, str]:
    return {
        "fonttools": fontTools.version,
        "freetype": str(features.version("freetype2")),
        "pillow": PIL.__version__,
        "unicode": unicodedata.unidata_version,
    }


def _description(size: int) -> dict[str, str]:
    return {
        "source": "glyphs: characters of many scripts in the typefaces that matplotlib ships",
        "generator": GENERATOR,
        "versions": ", ".join(f"{name} {version}" for name, version in _versions().items()),
        "polarity": "ink 255 on 0",
        "resampling": (
            f"rendered at {5 * size // 2} pixels an em, bilinear affine warp at {_OVERSAMPLE}× the size, averaged down"
        ),
    }


def _key(size: int) -> str:
    """What decides the store, as 16 hex digits: generator, size, library versions and font files."""
    key = hashlib.sha256(repr([GENERATOR, size, sorted(_versions().items())]).encode())
    for path in font_files():
        with open(path, "rb") as file:
            key.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return key.hexdigest()[:16]


def _is_whole(path: Path) -> bool:
    """Whether the store is there and undamaged.

    Raises:
        OSError: it cannot be read now, which says nothing of what is in it.
    """
    try:
        EpisodeStore.open(path)
    except StoreError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from error
        return False
    return True
