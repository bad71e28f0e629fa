"""Omniglot (Lake et al. 2015) into an episode store: handwritten characters of 50 alphabets, 20 drawings each.

Sources: ``images_background.zip`` or ``images_evaluation.zip`` as published, a folder that holds the zips or the
extracted folders, and what torchvision's ``Omniglot`` leaves on disk. Every drawing is
``images_PART/ALPHABET/characterNN/XXXX_YY.png``: 105×105 pixels, 1 bit, black ink; YY numbers who drew it.

A drawing becomes ``size``×``size`` grey by exact area averaging, ink 255 on 0: grey is the share of ink in a pixel's
square. Only integers below 2²⁴ are summed, so every machine gives the same bytes, and so the same store digest.
"""

from __future__ import annotations

import math
import os
import re
import stat
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from cluster.episodes.pictures import IngestReport, UnusablePicture, open_picture
from cluster.episodes.store import ClassTable, write_store
from cluster.episodes.store_writer import refuse_existing
from cluster.errors import IngestError

SIDE = 105
"""Height and width of a drawing, pixels."""
PARTS = ("images_background", "images_evaluation")
Part = Literal["background", "evaluation", "both"]
MEMBER_LIMIT = 1 << 20
"""Largest file of one drawing, bytes; the published ones have below 1 KiB."""
TOTAL_LIMIT = 1 << 29
"""Most bytes of all members of one archive, uncompressed; the published one has 5 MB."""
COUNT_LIMIT = 200_000
"""Most members of one archive."""
DRAWINGS_AT_ONCE = 512

_MEMBER = re.compile(
    r"(?:.*/)?(?P<part>images_background|images_evaluation)/(?P<alphabet>[^/]+)/(?P<character>character\d+)"
    r"/[^/.][^/]*_(?P<drawer>\d+)\.png"
)


@dataclass(frozen=True, order=True)
class _Drawing:
    """One drawing in reading order: by class, then by drawer."""

    alphabet: str
    character: str
    drawer: str
    part: str
    name: str
    """Where it was found, for the report."""
    raw: bytes

    @property
    def class_name(self) -> str:
        return f"{self.alphabet}/{self.character}"


def ingest_omniglot(
    source: str | os.PathLike[str], store: str | os.PathLike[str], size: int = 28, part: Part | None = None
) -> IngestReport:
    """Write the Omniglot drawings found at ``source`` to the episode store ``store``, ``[1, size, size]`` uint8.

    Without a ``part``, of a source that has both only the background alphabets are taken: they are for training, the
    evaluation alphabets for evaluation, and a split that does not name an alphabet trains on it.

    Classes are "ALPHABET/characterNN" in order of name, with the class metadata columns ``alphabet`` and ``part``
    (background or evaluation) and the sample metadata column ``drawer``. Damaged drawings are skipped and reported.

    Raises:
        IngestError: there is no Omniglot at ``source``, the archive is hostile, or ``size`` is not in 8 … 105.
        StoreError: something lies at ``store`` already, or it cannot be written.
    """
    started = time.monotonic()
    source = Path(source)
    if not 8 <= size <= SIDE:
        raise IngestError(f"size must be 8 … {SIDE} pixels (the drawings have {SIDE}), got {size}")
    refuse_existing(store)
    skipped: list[tuple[str, str]] = []
    found: list[_Drawing] = []
    try:
        for place in _places(source):
            found += _read_zip(place, skipped) if place.is_file() else _read_folder(place, skipped)
    except OSError as error:
        raise IngestError(f"{source}: cannot be read ({error.strerror or error}): check the path") from None
    drawings, bits = _decode(sorted(_of_part(found, part)), skipped)
    if not drawings:
        wanted = "" if part in (None, "both") else f"of the {part} part "
        raise IngestError(
            f"{source}: no usable Omniglot drawing {wanted}in it ({len(skipped)} unusable): give "
            "images_background.zip, or a folder that holds images_background/ALPHABET/characterNN/XXXX_YY.png"
        )
    part_of = {drawing.class_name: (drawing.alphabet, drawing.part.removeprefix("images_")) for drawing in drawings}
    names = tuple(part_of)
    position = {name: index for index, name in enumerate(names)}
    header = write_store(
        store,
        shrink(bits, size)[:, None],
        np.array([position[drawing.class_name] for drawing in drawings]),
        ClassTable(
            names, {"alphabet": tuple(a for a, _ in part_of.values()), "part": tuple(p for _, p in part_of.values())}
        ),
        {"drawer": [drawing.drawer for drawing in drawings]},
        {
            "source": "omniglot",
            "polarity": "ink 255 on 0",
            "resampling": f"exact area average from {SIDE}x{SIDE} 1-bit to {size}x{size} 8-bit",
        },
    )
    return IngestReport(header, len(names), len(drawings), tuple(skipped), time.monotonic() - started)


def _of_part(found: list[_Drawing], part: Part | None) -> list[_Drawing]:
    """The drawings of the part that is wanted."""
    present = {drawing.part for drawing in found}
    if part == "both" or (part is None and len(present) < 2):
        return found
    return [drawing for drawing in found if drawing.part == f"images_{part or 'background'}"]


def download_omniglot(root: str | os.PathLike[str]) -> Path:
    """Download Omniglot through torchvision (both parts, 15 MB); the folder to give to `ingest_omniglot`.

    Raises:
        IngestError: the download fails.
    """
    from torchvision.datasets import Omniglot

    root = Path(root)
    try:
        for background in (True, False):
            Omniglot(str(root), background=background, download=True)
    except (OSError, RuntimeError) as error:  # URLError and timeouts are OSErrors; RuntimeError: wrong checksum
        reason = " ".join(str(error).split())[:200]
        raise IngestError(
            f"Omniglot could not be downloaded to {root} ({reason}): fetch images_background.zip from "
            "https://github.com/brendenlake/omniglot/tree/master/python on a machine with a network and give its path"
        ) from error
    return root


def shrink(bits: np.ndarray, size: int) -> np.ndarray:
    """Exact area average: ``[drawing, side, side]`` of 0 and 1 to uint8 ``[drawing, size, size]``, rounded half up.

    With pixels cut into ``size`` and squares into ``side`` units, both overlap in whole units: sums of weights are
    integers of at most side² < 2²⁴, exact in float32 whatever the order of summation.
    """
    side = bits.shape[1]
    unit = math.gcd(side, size)
    pixel, square = size // unit, side // unit
    edges, starts = np.arange(side) * pixel, np.arange(size)[:, None] * square
    overlap = np.minimum(edges + pixel, starts + square) - np.maximum(edges, starts)
    weights = overlap.clip(0).astype(np.float32)
    out = np.empty((len(bits), size, size), np.uint8)
    for start in range(0, len(bits), DRAWINGS_AT_ONCE):
        share = (weights @ bits[start : start + DRAWINGS_AT_ONCE].astype(np.float32) @ weights.T).astype(np.int64)
        out[start : start + DRAWINGS_AT_ONCE] = (2 * 255 * share + square**2) // (2 * square**2)
    return out


# ------------------------------------------------------------------------------------------------------------- sources


def _places(source: Path) -> list[Path]:
    """The archives and part folders to read: one for each part, the extracted folder before the zip."""
    if not source.exists():
        raise IngestError(f"{source}: no such file or folder: give images_background.zip or a folder that holds it")
    if source.is_file() or source.resolve().name in PARTS:
        return [source.resolve()]
    folders = [source, *sorted(child for child in source.iterdir() if child.is_dir() and not child.is_symlink())]
    places = []
    for part in PARTS:
        here = [folder / part for folder in folders if (folder / part).is_dir()]
        here += [folder / f"{part}.zip" for folder in folders if (folder / f"{part}.zip").is_file()]
        places += here[:1]
    if not places:
        raise IngestError(
            f"{source}: holds neither images_background nor images_evaluation (folder or .zip), nor does a folder "
            "directly in it: give the folder that does"
        )
    return places


def _read_zip(path: Path, skipped: list[tuple[str, str]]) -> Iterator[_Drawing]:
    """The drawings of an archive, read in memory: nothing is ever extracted."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _refuse_hostile(path, members)
            for info in members:
                if (match := _MEMBER.fullmatch(info.filename)) is None:
                    continue
                try:
                    raw = _read_member(archive, info)
                except Exception as error:  # damaged, encrypted, a bomb: named and left out
                    skipped.append((info.filename, " ".join(str(error).split())[:200] or type(error).__name__))
                    continue
                yield _drawing(match, info.filename, raw)
    except zipfile.BadZipFile as error:
        raise IngestError(f"{path}: is not a readable zip archive ({error}): download it again") from None


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """One file of an archive; whatever its header says, no more than `MEMBER_LIMIT` of it is ever unpacked.

    Raises:
        ValueError: it is no ordinary file of Omniglot.
    """
    if stat.S_ISLNK(info.external_attr >> 16):
        raise ValueError("a symbolic link")
    if info.file_size > MEMBER_LIMIT:
        raise ValueError(f"{info.file_size} bytes, more than {MEMBER_LIMIT}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # The other methods are unpacked whole, however much is asked for.
        raise ValueError(f"compression method {info.compress_type}, which Omniglot does not use")
    with archive.open(info) as member:
        return member.read(MEMBER_LIMIT)


def _refuse_hostile(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuse an archive that would write outside its folder if it were extracted, or fill the memory."""
    for info in members:
        parts = info.filename.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", info.filename):
            raise IngestError(
                f"{path}: its member {info.filename!r} points outside the archive: do not trust this file"
            )
    total = sum(info.file_size for info in members)
    if total > TOTAL_LIMIT or len(members) > COUNT_LIMIT:
        raise IngestError(
            f"{path}: {len(members)} members of {total} bytes in all, where Omniglot has 5 MB (limits: {COUNT_LIMIT} "
            f"members, {TOTAL_LIMIT} bytes): download it again"
        )


def _read_folder(folder: Path, skipped: list[tuple[str, str]]) -> Iterator[_Drawing]:
    """The drawings of an extracted part, ``folder/ALPHABET/characterNN/XXXX_YY.png``."""
    top = folder.resolve()
    for path in sorted(folder.glob("*/*/*.png")):
        name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
        if (match := _MEMBER.fullmatch(name)) is None:
            continue
        if not Path(os.path.realpath(path)).is_relative_to(top):
            skipped.append((name, "a symbolic link that leaves the folder"))
        elif not path.is_file():
            skipped.append((name, "not a file"))
        elif (length := path.stat().st_size) > MEMBER_LIMIT:
            skipped.append((name, f"{length} bytes, more than {MEMBER_LIMIT}"))
        else:
            try:
                yield _drawing(match, name, path.read_bytes())
            except OSError as error:
                skipped.append((name, error.strerror or str(error)))


def _drawing(match: re.Match[str], name: str, raw: bytes) -> _Drawing:
    return _Drawing(**match.groupdict(), name=name, raw=raw)


# ------------------------------------------------------------------------------------------------------------- drawings


def _decode(found: list[_Drawing], skipped: list[tuple[str, str]]) -> tuple[list[_Drawing], np.ndarray]:
    """The usable drawings in order, and their ink as uint8 0 or 1, ``[drawing, SIDE, SIDE]``."""
    bits = np.empty((len(found), SIDE, SIDE), np.uint8)
    usable: list[_Drawing] = []
    for drawing in found:
        try:
            bits[len(usable)] = open_picture(drawing.raw, _ink)
        except UnusablePicture as reason:
            skipped.append((drawing.name, str(reason)))
        else:
            usable.append(drawing)
    return usable, bits[: len(usable)]


def _ink(image: Image.Image) -> np.ndarray:
    """Where there is ink, bool ``[SIDE, SIDE]``: the drawings are black on white."""
    if image.size != (SIDE, SIDE):
        raise UnusablePicture(f"{image.width}×{image.height} pixels, an Omniglot drawing has {SIDE}×{SIDE}")
    ink: np.ndarray = np.asarray(image.convert("L")) < 128
    return ink
