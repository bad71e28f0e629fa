"""Which characters the embedded source ``glyphs`` has, and in which real typefaces.

The typefaces are the TrueType files that matplotlib ships. A *face* is one of them that is a face of text; a character
*qualifies* when at least four faces draw it. Three rules keep what is no picture of its character out, and a fourth
what is of several scripts:

1. An entry of a font's character map counts only if the glyph's name, read by the Adobe Glyph List, says that very
   character. This drops all of the placeholder font (Last Resort: glyph ``lastresortgreek`` for each Greek letter) and
   of TeX's Computer Modern fonts what their own encoding puts at a foreign code point (``quotedblright`` at U+0022),
   but keeps their real letters and digits.
2. A font without A … Z is no face: those hold oversized pieces of a few symbols, thinner than a pixel at our sizes.
3. Of characters that look alike in some face (Latin A, Cyrillic А, Greek Α; a dot by any name) the lowest code point
   stays. Samples are centred on their ink, so characters that differ only in their place on the line look alike too.
4. Signs that a few scripts share (the Arabic question mark, the Georgian paragraph separator) are left out: whatever
   scripts a split holds out, nothing of theirs is in training. Signs of no script in particular are ``Common``.

`catalogue` is the whole of it; `render` draws one character, here for the comparison and in `glyphs` for the samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from fontTools import agl
from fontTools import unicodedata as scripts
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from cluster.errors import IngestError

MIN_FACES = 4
"""Faces that must draw a character."""
COMPARED_EM = 160
"""Size at which characters are compared, pixels an em. Fixed, so that every sample size has the same classes."""
SIGNATURE = 16
"""Height and width that a rendering's ink box is resized to for the comparison, pixels."""
LOOKALIKE = 0.01
"""Two renderings look alike below this squared difference of their signatures, relative to the fainter one …"""
SAME_OUTLINE = 0.1
"""… or below this if their outlines are equal: hinting moves the edges of equal outlines by up to half a pixel."""
MARGIN = 2
"""Blank pixels around the ink of a rendering, so that resampling fades it out instead of cutting it."""

_LETTERS = frozenset(range(ord("A"), ord("Z") + 1))
_NO_PICTURE = "CZM"
"""Unicode categories with no picture of their own: control and unassigned, separators, combining marks."""
_NO_SCRIPT = frozenset({"Zyyy", "Zinh", "Zzzz"})
"""Common, inherited, unknown."""
_PAIRS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class Face:
    """A typeface of text."""

    name: str
    """Full name from the font, for instance ``DejaVu Serif Bold``."""
    path: Path
    characters: frozenset[int]
    """Code points that it draws, by its own account."""


@dataclass(frozen=True)
class Character:
    """One class."""

    code_point: int
    faces: tuple[int, ...]
    """Faces with different drawings of it, as indices into `Catalogue.faces`; of equal drawings the first face."""
    face_count: int
    """Faces that draw it, equal drawings included; at least `MIN_FACES`."""

    @property
    def name(self) -> str:
        """Class name, for instance ``U+0416 CYRILLIC CAPITAL LETTER ZHE``."""
        return f"U+{self.code_point:04X} {unicodedata.name(chr(self.code_point))}"

    @property
    def script(self) -> str:
        """Unicode script, for instance ``Cyrillic``; of a symbol that stands for a letter (ℵ) the letter's.

        ``Common`` for what has none.
        """
        own = scripts.script(chr(self.code_point))
        stands_for = {scripts.script(c) for c in unicodedata.normalize("NFKC", chr(self.code_point))} - _NO_SCRIPT
        if own in _NO_SCRIPT and len(stands_for) == 1:
            own = stands_for.pop()
        return str(scripts.script_name(own))

    @property
    def block(self) -> str:
        """Unicode block, for instance ``Cyrillic Supplement``."""
        return str(scripts.block(chr(self.code_point)))

    @property
    def category(self) -> str:
        """Unicode general category, for instance ``Lu``."""
        return unicodedata.category(chr(self.code_point))


@dataclass(frozen=True)
class Catalogue:
    """All classes in the order of their code points, and the faces they refer to."""

    faces: tuple[Face, ...]
    characters: tuple[Character, ...]


@dataclass(frozen=True)
class _Drawn:
    """The renderings of one face at `COMPARED_EM`, ascending by code point, blank ones left out."""

    face: Face
    code_points: np.ndarray
    """int64 ``[glyph]``."""
    digests: tuple[bytes, ...]
    sizes: np.ndarray
    """Width and height of the ink, pixels, int64 ``[glyph, 2]``."""
    signatures: np.ndarray
    """Ink boxes resized to squares, 0 … 255, int32 ``[glyph, SIGNATURE²]``."""


def font_files() -> tuple[Path, ...]:
    """The TrueType files that matplotlib ships, by name.

    Raises:
        IngestError: there are none.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    if files := tuple(sorted(folder.glob("*.ttf"), key=lambda path: path.name)):
        return files
    raise IngestError(f"{folder}: has no .ttf files, and the glyphs are drawn from them: reinstall matplotlib")


@lru_cache(maxsize=1)
def catalogue() -> Catalogue:
    """The characters that qualify. Takes seconds, once a process.

    Raises:
        IngestError: matplotlib's fonts are missing, or not one character qualifies.
    """
    faces = tuple(_text_faces())
    drawn = [_draw_face(face, code_points) for face, code_points in zip(faces, _shared(faces), strict=True)]
    drawings: dict[int, list[tuple[int, bytes]]] = {}
    for index, of_face in enumerate(drawn):
        for code_point, digest in zip(of_face.code_points.tolist(), of_face.digests, strict=True):
            drawings.setdefault(code_point, []).append((index, digest))
    qualified = {code_point: drawings[code_point] for code_point in drawings if len(drawings[code_point]) >= MIN_FACES}
    characters = tuple(
        Character(code_point, _different(qualified[code_point]), len(qualified[code_point]))
        for code_point in _distinguishable(qualified, drawn)
    )
    if not characters:
        raise IngestError(f"no character is drawn by {MIN_FACES} of matplotlib's {len(faces)} faces: reinstall it")
    return Catalogue(faces, characters)


def open_font(face: Face, em: int) -> ImageFont.FreeTypeFont:
    """The font of ``face`` at ``em`` pixels an em, without text layout: one code point, one glyph."""
    return ImageFont.truetype(str(face.path), em, layout_engine=ImageFont.Layout.BASIC)


def render(font: ImageFont.FreeTypeFont, code_point: int) -> Image.Image | None:
    """The character in ink 255 on 0, anti-aliased, cropped to its ink plus `MARGIN`; ``None`` if it has no ink."""
    left, top, right, bottom = font.getbbox(chr(code_point), anchor="ls")
    canvas = Image.new("L", (int(right - left) + 2 * MARGIN, int(bottom - top) + 2 * MARGIN))
    ImageDraw.Draw(canvas).text((MARGIN - left, MARGIN - top), chr(code_point), fill=255, font=font, anchor="ls")
    ink = canvas.getbbox()
    if ink is None:
        return None
    return canvas.crop((ink[0] - MARGIN, ink[1] - MARGIN, ink[2] + MARGIN, ink[3] + MARGIN))


# --------------------------------------------------------------------------------------------------------------- faces


def _text_faces() -> Iterator[Face]:
    for path in font_files():
        with TTFont(path, lazy=True) as font:
            named: dict[int, str] = font.getBestCmap() or {}
            characters = frozenset(
                code_point
                for code_point, glyph in named.items()
                if _means(glyph, code_point) and not _of_several_scripts(code_point)
            )
            if characters >= _LETTERS:
                yield Face(str(font["name"].getDebugName(4) or path.stem), path, characters)


def _means(glyph: str, code_point: int) -> bool:
    """Whether the glyph's name says the character at ``code_point``, and this has a picture.

    Compatibility-equal characters count as one: the Adobe Glyph List reads ``Omega`` as the ohm sign.
    """
    said, character = _said(glyph), chr(code_point)
    return (
        bool(said)
        and (said == character or unicodedata.normalize("NFKC", said) == unicodedata.normalize("NFKC", character))
        and unicodedata.category(character)[0] not in _NO_PICTURE
    )


def _of_several_scripts(code_point: int) -> bool:
    """Whether the character has no script of its own, but some that use it."""
    character = chr(code_point)
    return scripts.script(character) in _NO_SCRIPT and bool(scripts.script_extension(character) - _NO_SCRIPT)


@lru_cache(maxsize=1 << 14)
def _said(glyph: str) -> str:
    return str(agl.toUnicode(glyph))


def _shared(faces: Sequence[Face]) -> list[list[int]]:
    """For each face its characters that `MIN_FACES` faces have, ascending."""
    having = Counter(code_point for face in faces for code_point in face.characters)
    return [sorted(c for c in face.characters if having[c] >= MIN_FACES) for face in faces]


# ---------------------------------------------------------------------------------------------------------- comparison


def _draw_face(face: Face, code_points: Sequence[int]) -> _Drawn:
    font = open_font(face, COMPARED_EM)
    # U+FFFF is no character: what a font draws for it is its box for missing glyphs, and that is no real drawing.
    missing = render(font, 0xFFFF)
    placeholder = None if missing is None else _digest(missing)
    kept, digests, sizes, signatures = [], [], [], []
    for code_point in code_points:
        image = render(font, code_point)
        if image is None or (digest := _digest(image)) == placeholder:
            continue
        ink = image.crop((MARGIN, MARGIN, image.width - MARGIN, image.height - MARGIN))
        kept.append(code_point)
        digests.append(digest)
        sizes.append(ink.size)
        signatures.append(ink.resize((SIGNATURE, SIGNATURE), Image.Resampling.BOX).tobytes())
    pixels = np.frombuffer(b"".join(signatures), dtype=np.uint8).reshape(-1, SIGNATURE**2)
    return _Drawn(
        face,
        np.array(kept, dtype=np.int64),
        tuple(digests),
        np.array(sizes, dtype=np.int64).reshape(-1, 2),
        pixels.astype(np.int32),
    )


def _digest(image: Image.Image) -> bytes:
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()


def _different(drawings: Sequence[tuple[int, bytes]]) -> tuple[int, ...]:
    first: dict[bytes, int] = {}
    for face, digest in drawings:
        first.setdefault(digest, face)
    return tuple(first.values())


def _distinguishable(qualified: dict[int, list[tuple[int, bytes]]], drawn: Sequence[_Drawn]) -> list[int]:
    """The code points, ascending, without those that look like a lower one that stays.

    Equal drawings are found across all faces, nearly equal ones within each face.
    """
    lower: dict[int, list[int]] = {}
    for of_face in drawn:
        for first, second in _lookalikes(of_face):
            lower.setdefault(second, []).append(first)
    stays: set[int] = set()
    taken: set[bytes] = set()
    for code_point in sorted(qualified):
        digests = {digest for _, digest in qualified[code_point]}
        if taken.isdisjoint(digests) and stays.isdisjoint(lower.get(code_point, ())):
            stays.add(code_point)
            taken |= digests
    return sorted(stays)


def _lookalikes(drawn: _Drawn) -> Iterator[tuple[int, int]]:
    """Pairs (lower, higher) of code points whose renderings a and b look alike.

    Their difference is ‖a − b‖² / min(‖a‖², ‖b‖²), of integers, so that every machine finds the same pairs.
    """
    power = (drawn.signatures**2).sum(axis=1)
    outline = _outlines(drawn.face)
    for first, second in _same_size(drawn.sizes):
        apart = ((drawn.signatures[first] - drawn.signatures[second]) ** 2).sum(axis=1)
        difference = apart / np.minimum(power[first], power[second])
        close = difference < SAME_OUTLINE
        pairs = zip(drawn.code_points[first[close]].tolist(), drawn.code_points[second[close]].tolist(), strict=True)
        for (lower, higher), alike in zip(pairs, (difference[close] < LOOKALIKE).tolist(), strict=True):
            if alike or outline(lower) == outline(higher):
                yield lower, higher


def _outlines(face: Face) -> Callable[[int], tuple[bytes, ...]]:
    """From a code point to its outline in ``face``, in font units, wherever on the line it is."""
    font = TTFont(face.path)
    with _silent(logging.getLogger("fontTools.ttLib.tables._h_e_a_d")):
        named, glyphs = font.getBestCmap(), font["glyf"]

    @cache
    def outline(code_point: int) -> tuple[bytes, ...]:
        points, ends, on_curve = glyphs[named[code_point]].getCoordinates(glyphs)
        corners = np.array(points)
        return (corners - corners.min(axis=0)).tobytes(), bytes(repr(ends), "ascii"), bytes(on_curve)

    return outline


@contextlib.contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """No warnings: fontTools finds the dates in Computer Modern's headers odd, which tells a user nothing."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _same_size(sizes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows first < second whose widths and heights differ by at most 2 pixels or a sixteenth."""
    near = np.ones((len(sizes), len(sizes)), dtype=bool)
    for lengths in sizes.T.astype(np.int32):
        near &= np.abs(lengths[:, None] - lengths) <= np.maximum(2, lengths // 16)[:, None]
    first, second = np.nonzero(np.triu(near, 1))
    for start in range(0, len(first), _PAIRS_AT_ONCE):
        yield first[start : start + _PAIRS_AT_ONCE], second[start : start + _PAIRS_AT_ONCE]
