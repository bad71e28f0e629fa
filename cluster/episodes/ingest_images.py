"""A folder of pictures into an episode store: every folder that directly holds pictures is a class.

A picture is turned upright (EXIF), laid on white where it is transparent, made grey (ITU-R 601 luma) or RGB, cut to
the centred square of its shorter side, and resized to ``size`` by Pillow's antialiased bicubic filter. 16-bit grey
keeps its upper 8 bits; of an animation the first frame counts. JPEG decoders differ in the last bit: ingest once and
copy the store, rather than ingest on every machine.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from cluster.episodes.pictures import IngestReport, UnusablePicture, open_picture
from cluster.episodes.store import ClassTable, StoreHeader, write_store
from cluster.episodes.store_writer import refuse_existing, scratch_array
from cluster.errors import IngestError

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
"""File names that are taken for pictures, in any case; other files are ignored."""
FILE_LIMIT = 1 << 28
"""Largest file of one picture, bytes."""
TOTAL_LIMIT = 1 << 40
"""Largest store, bytes of samples: more is taken for a mistake in the folder or the size."""
LARGEST_SIZE = 1024

Skipped = list[tuple[str, str]]
Member = tuple[str, str]
"""Class name and file name: the picture's path below the folder."""


def ingest_images(
    folder: str | os.PathLike[str], store: str | os.PathLike[str], size: int, grey: bool | None = None
) -> IngestReport:
    """Write the pictures below ``folder`` to the episode store ``store``, uint8 ``[1 or 3, size, size]``.

    A class's name is its folder's path below ``folder``, with the class metadata column ``group``: the path of the
    folder above it ("." at the top). Classes and pictures are in order of name. ``grey`` chooses one channel or three;
    by default one only if all pictures are grey. Unreadable pictures, links that leave the folder, and pictures in no
    class folder are skipped and reported. Samples pass through a scratch file on the store's disk, not the memory.

    Raises:
        IngestError: no usable picture below ``folder``, or an impossible ``size``.
        StoreError: something lies at ``store`` already, or it cannot be written.
    """
    started = time.monotonic()
    folder, store = Path(folder), Path(store)
    if not 8 <= size <= LARGEST_SIZE:
        raise IngestError(f"size must be 8 … {LARGEST_SIZE} pixels, got {size}")
    if not folder.is_dir():
        raise IngestError(
            f"{folder}: is not a folder: give one with a folder of pictures for each class (unpack archives)"
        )
    refuse_existing(store)
    skipped: Skipped = []
    members = sorted(_members(folder, skipped))
    if not members:
        raise IngestError(
            f"{folder}: no folder of pictures in it ({len(skipped)} files unusable): put each class's pictures "
            f"({', '.join(SUFFIXES)}) in a folder of its own"
        )
    if grey is None:
        grey = _all_grey(folder, members)
    shape = (len(members), 1 if grey else 3, size, size)
    if (total := int(np.prod(shape, dtype=object))) > TOTAL_LIMIT:
        raise IngestError(f"{folder}: {len(members)} pictures at size {size} take {total} bytes: choose a smaller size")
    try:
        with scratch_array(store, shape, np.dtype(np.uint8)) as rows:
            names = _fill(rows, folder, members, skipped)
            if not names:
                raise IngestError(
                    f"{folder}: none of {len(members)} pictures is usable: check {skipped[-1][0]} ({skipped[-1][1]})"
                )
            header = _write(store, rows[: len(names)], names)
    except OSError as error:
        raise IngestError(
            f"{store}: {total} bytes of scratch cannot be had beside it ({error.strerror}): choose another disk"
        ) from error
    return IngestReport(header, header.classes, header.samples, tuple(skipped), time.monotonic() - started)


def _write(store: Path, rows: np.ndarray, names: list[str]) -> StoreHeader:
    """The store of ``rows``, whose classes are ``names``, one a row, in order."""
    counts = Counter(names)
    groups = tuple(PurePosixPath(name).parent.as_posix() for name in counts)
    description = {
        "source": "images",
        "polarity": "as in the files, 0 is black",
        "resampling": f"centred square, antialiased bicubic to {rows.shape[2]}x{rows.shape[3]}",
    }
    index = np.repeat(np.arange(len(counts)), list(counts.values()))
    return write_store(store, rows, index, ClassTable(tuple(counts), {"group": groups}), {}, description)


# --------------------------------------------------------------------------------------------------------------- files


def _members(folder: Path, skipped: Skipped) -> Iterator[Member]:
    """Every picture below ``folder`` that may be read; hidden files and folders are ignored."""
    top = folder.resolve()

    def unreadable(error: OSError) -> None:
        skipped.append((_printable(error.filename), error.strerror or "cannot be listed"))

    for here, folders, files in os.walk(folder, onerror=unreadable):
        below = Path(here).relative_to(folder).as_posix()
        # os.walk does not follow links to folders: they could leave the folder or run in a circle.
        for name in folders:
            if Path(here, name).is_symlink():
                skipped.append((_printable((PurePosixPath(below) / name).as_posix()), "a link to a folder"))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            try:
                reason = _refusal(Path(here, name), below, top)
            except OSError as error:
                reason = error.strerror or str(error)
            if reason:
                skipped.append((_printable((PurePosixPath(below) / name).as_posix()), reason))
            else:
                yield below, name


def _refusal(path: Path, below: str, top: Path) -> str | None:
    """Why the picture ``path`` may not be read, or ``None``."""
    if below == ".":
        return "in no class folder"
    if not Path(os.path.realpath(path)).is_relative_to(top):
        return "a link that leaves the folder"
    if not path.is_file():
        return "not a file"
    if (length := path.stat().st_size) > FILE_LIMIT:
        return f"{length} bytes, more than {FILE_LIMIT}"
    if below != _printable(below):
        return "its folder's name is not UTF-8"
    return None


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def _read(folder: Path, member: Member) -> bytes:
    try:
        return folder.joinpath(*member).read_bytes()
    except OSError as error:
        raise UnusablePicture(error.strerror or str(error)) from None


# ------------------------------------------------------------------------------------------------------------ pictures


def _all_grey(folder: Path, members: list[Member]) -> bool:
    """Whether every readable picture is grey; decided by the files' headers, nothing is decoded."""
    for member in members:
        try:
            if not open_picture(_read(folder, member), _is_grey):
                return False
        except UnusablePicture:
            continue
    return True


def _is_grey(image: Image.Image) -> bool:
    if image.mode == "P":
        palette = np.array(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I;16")


def _fill(rows: np.ndarray, folder: Path, members: list[Member], skipped: Skipped) -> list[str]:
    """Put the usable pictures into the first rows; their class names."""
    names: list[str] = []
    channels, size = rows.shape[1], rows.shape[2]
    for member in members:
        try:
            rows[len(names)] = open_picture(_read(folder, member), lambda image: _pixels(image, channels, size))
        except UnusablePicture as reason:
            skipped.append((_printable("/".join(member)), str(reason)))
        else:
            names.append(member[0])
    return names


def _pixels(image: Image.Image, channels: int, size: int) -> np.ndarray:
    """The picture as uint8 ``[channels, size, size]``."""
    if image.mode in ("I", "F"):
        raise UnusablePicture(f"its pixels ({image.mode}) have no defined white: convert it to 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = _upper_bits(image)
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cut before resizing: ImageOps.fit would let what lies outside the square into its edge.
    square = image.crop((left, top, left + side, top + side))
    fitted = square.resize((size, size), Image.Resampling.BICUBIC)
    pixels: np.ndarray = np.asarray(fitted).reshape(size, size, channels).transpose(2, 0, 1)
    return pixels


def _upper_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit, with its EXIF orientation: Pillow's own conversion clips instead."""
    upper = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    upper.info["exif"] = image.getexif().tobytes()
    return upper
