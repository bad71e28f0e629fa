"""What the image ingests share: reading an untrusted picture within limits, and the report of an ingest."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from cluster.episodes.store_header import StoreHeader

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
"""Formats that are decoded. Not all that Pillow knows: some of its readers start other programs."""
PIXEL_LIMIT = 64_000_000
"""Most pixels in one picture: what a decompression bomb can cost is about 200 MB."""


Result = TypeVar("Result")


class UnusablePicture(Exception):
    """One picture cannot be used; the text is the reason given in the report. Never leaves an ingest."""


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did."""

    header: StoreHeader
    classes: int
    samples: int
    skipped: tuple[tuple[str, str], ...]
    """Name and reason of everything that looked like a sample and was left out."""
    seconds: float


def open_picture(raw: bytes, use: Callable[[Image.Image], Result]) -> Result:
    """What ``use`` makes of the picture in ``raw``, with Pillow's complaints about bad files as one error.

    Raises:
        UnusablePicture: not a picture in one of `FORMATS`, damaged, or of more than `PIXEL_LIMIT` pixels.
    """
    try:
        with warnings.catch_warnings():
            # Damaged metadata only makes Pillow warn; the pixels are judged by themselves.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
                if image.width * image.height > PIXEL_LIMIT:
                    raise UnusablePicture(f"{image.width}×{image.height} pixels, more than {PIXEL_LIMIT}")
                return use(image)
    except UnusablePicture:
        raise
    except UnidentifiedImageError:
        raise UnusablePicture(f"not a readable picture ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's readers raise nearly anything on damaged input; the picture is named and left
        raise UnusablePicture(" ".join(str(error).split())[:200] or type(error).__name__) from None
