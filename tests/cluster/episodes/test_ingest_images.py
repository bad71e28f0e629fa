from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.episodes import ingest_images as module
from cluster.episodes import pictures
from cluster.episodes.ingest_images import ingest_images
from cluster.episodes.store import EpisodeStore
from cluster.errors import IngestError, StoreError

RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("METAFLEET_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def put(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def plain(colour: object, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def ingested(folder: Path, size: int = 8, **options: object) -> EpisodeStore:
    """The store of ``folder``; nothing else may be left beside it."""
    store = folder.parent / "store"
    ingest_images(folder, store, size, **options)
    assert sorted(os.listdir(folder.parent)) == [folder.name, "store", "store.header"]
    return EpisodeStore.open(store)


def colour(sample: np.ndarray) -> tuple[int, ...]:
    """The colour of a sample that has only one."""
    assert (sample == sample[:, :1, :1]).all(), sample
    return tuple(sample[:, 0, 0].tolist())


# ------------------------------------------------------------------------------------------------------------- classes


def test_every_folder_that_holds_pictures_is_a_class(folder):
    put(folder / "b/x/1.png", plain(RED))
    put(folder / "b/x/2.jpg", plain(GREEN))
    put(folder / "b/1.PNG", plain(BLUE))
    put(folder / "a/deep/er/1.bmp", plain(GREEN))
    put(folder / "ç/1.webp", plain(RED), lossless=True)
    put(folder / "a/.hidden/1.png", plain(RED))
    put(folder / "b/.1.png", plain(RED))
    (folder / "b/notes.txt").write_text("not a picture")
    (folder / "empty").mkdir()
    store = ingested(folder)
    assert store.classes == ("a/deep/er", "b", "b/x", "ç")
    assert store.class_metadata == {"group": ("a/deep", ".", "b", ".")}
    assert store.class_count.tolist() == [1, 1, 2, 1]
    assert store.sample_shape == (3, 8, 8)
    assert [colour(sample) for sample in store.samples[[0, 1, 2, 4]]] == [GREEN, BLUE, RED, RED]


def test_order_does_not_depend_on_the_file_system(folder, tmp_path, monkeypatch):
    for name in ("b/2", "b/1", "a/2", "a/1"):
        put(folder / f"{name}.png", plain(len(os.listdir(folder)) * 40, mode="L"))
    first = ingest_images(folder, tmp_path / "one", 8)
    walk = os.walk
    for name, step in (("two", 1), ("three", -1)):

        def listed(top, step=step, **rest):
            return [(here, dirs, files[::step]) for here, dirs, files in list(walk(top, **rest))[::step]]

        monkeypatch.setattr(os, "walk", listed)
        assert ingest_images(folder, tmp_path / name, 8).header == first.header


# -------------------------------------------------------------------------------------------------------------- pixels


def test_the_centre_is_kept_and_the_aspect_too(folder):
    wide = plain(RED, (36, 12))
    wide.paste(plain(GREEN, (12, 12)), (12, 0))
    tall = plain(RED, (12, 36))
    tall.paste(plain(BLUE, (12, 12)), (0, 12))
    put(folder / "a/1.png", wide)
    put(folder / "a/2.png", tall)
    assert [colour(sample) for sample in ingested(folder).samples] == [GREEN, BLUE]


def test_pictures_are_turned_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90° clockwise to show
    sideways = plain(0, (12, 12), "L")
    sideways.paste(255, (0, 0, 12, 6))  # upper half white as stored: right half as shown
    put(folder / "a/1.png", sideways, exif=exif)
    deep = Image.fromarray(np.asarray(sideways).astype(np.uint16) * 257)
    put(folder / "a/2.png", deep, exif=exif)
    samples = ingested(folder).samples
    assert samples.shape == (2, 1, 8, 8)
    for sample in samples:
        assert (sample[0, :, -2:] > 250).all() and (sample[0, :, :2] < 5).all()


def test_downsampling_averages_instead_of_picking_pixels(folder):
    stripes = np.zeros((80, 80), np.uint8)
    stripes[:, ::2] = 255
    put(folder / "a/1.png", Image.fromarray(stripes))
    inner = ingested(folder).samples[0, 0, 2:-2, 2:-2]
    assert abs(inner.astype(int) - 128).max() < 12


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (plain(1, mode="1"), "png", (255,)),
        (plain(77, mode="L"), "png", (77,)),
        (plain((77, 255), mode="LA"), "png", (77,)),
        (plain((0, 0), mode="LA"), "png", (255,)),
        (Image.fromarray(np.full((12, 12), 0xABCD, np.uint16)), "png", (0xAB,)),
        (Image.fromarray(np.full((12, 12), 0xABCD, np.uint16)), "tif", (0xAB,)),
        (plain((9, 9, 9)).quantize(), "png", (9,)),
        (plain((9, 9, 9)), "png", (9, 9, 9)),
        (plain((9, 200, 30, 0), mode="RGBA"), "png", (255, 255, 255)),
        (plain(GREEN).quantize(), "gif", GREEN),
        (plain((0, 0, 0, 255), mode="CMYK"), "tif", (0, 0, 0)),
        (plain(RED), "ppm", RED),
    ],
)
def test_every_kind_of_pixel(folder, image, suffix, expected):
    put(folder / f"a/1.{suffix}", image)
    assert colour(ingested(folder).samples[0]) == expected


def test_grey_only_if_all_are_grey_unless_told(folder, tmp_path):
    put(folder / "a/1.png", plain(100, mode="L"))
    put(folder / "a/2.png", plain(RED))
    mixed = ingest_images(folder, tmp_path / "mixed", 8).header
    assert mixed.sample_shape == (3, 8, 8)
    assert colour(EpisodeStore.open(tmp_path / "mixed").samples[0]) == (100, 100, 100)
    assert ingest_images(folder, tmp_path / "grey", 8, grey=True).header.sample_shape == (1, 8, 8)
    assert colour(EpisodeStore.open(tmp_path / "grey").samples[1]) == (round(0.299 * 250 + 0.701 * 10),)
    (folder / "a/2.png").unlink()
    assert ingest_images(folder, tmp_path / "all_grey", 8).header.sample_shape == (1, 8, 8)
    assert ingest_images(folder, tmp_path / "colour", 8, grey=False).header.sample_shape == (3, 8, 8)


def test_an_unreadable_picture_does_not_decide_about_grey(folder, tmp_path):
    put(folder / "a/1.png", plain(100, mode="L"))
    (folder / "a/2.png").write_bytes(b"no picture")
    assert ingest_images(folder, tmp_path / "s", 8).header.sample_shape == (1, 8, 8)


# ---------------------------------------------------------------------------------------------------- unusable pictures


def test_unusable_pictures_are_named_and_skipped(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_LIMIT", 20_000)
    put(folder / "a/good.png", plain(RED))
    put(folder / "loose.png", plain(RED))
    (folder / "a/text.png").write_text("no picture")
    (folder / "a/empty.png").touch()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    whole = put(folder / "a/cut.jpg", noise).read_bytes()
    (folder / "a/cut.jpg").write_bytes(whole[: len(whole) // 2])
    put(folder / "a/large.bmp", plain(RED, (100, 100)))
    put(folder / "a/float.tif", Image.fromarray(np.ones((12, 12), np.float32)))
    (folder / "gone").mkdir()
    (folder / "gone/only.png").write_text("no picture")
    report = ingest_images(folder, tmp_path / "s", 8)
    reasons = dict(report.skipped)
    assert set(reasons) == {
        "loose.png", "a/text.png", "a/empty.png", "a/cut.jpg", "a/large.bmp", "a/float.tif", "gone/only.png"
    }  # fmt: skip
    assert "no class folder" in reasons["loose.png"] and "truncated" in reasons["a/cut.jpg"]
    assert "more than 20000" in reasons["a/large.bmp"] and "no defined white" in reasons["a/float.tif"]
    assert (report.classes, report.samples) == (1, 1)
    assert EpisodeStore.open(tmp_path / "s").classes == ("a",)


def test_a_decompression_bomb_is_skipped_without_decoding(folder, tmp_path, monkeypatch):
    bomb = put(folder / "a/bomb.png", plain(0, (3000, 3000), "1"))
    put(folder / "a/good.png", plain(RED))
    assert bomb.stat().st_size < 5000
    monkeypatch.setattr(pictures, "PIXEL_LIMIT", 1_000_000)
    report = ingest_images(folder, tmp_path / "s", 8)
    assert report.skipped == (("a/bomb.png", "3000×3000 pixels, more than 1000000"),)


def test_pillows_own_limit_is_an_error_too(folder, tmp_path, monkeypatch):
    put(folder / "a/bomb.png", plain(0, (300, 300), "1"))
    put(folder / "a/good.png", plain(RED))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    [(name, reason)] = ingest_images(folder, tmp_path / "s", 8).skipped
    assert name == "a/bomb.png" and "decompression bomb" in reason


def test_formats_whose_readers_start_programs_are_not_read(folder, tmp_path):
    put(folder / "a/good.png", plain(RED))
    raw = io.BytesIO()
    plain(RED).save(raw, "EPS")
    (folder / "a/eps.png").write_bytes(raw.getvalue())
    [(name, reason)] = ingest_images(folder, tmp_path / "s", 8).skipped
    assert name == "a/eps.png" and "not a readable picture" in reason


def test_links_that_leave_the_folder_are_skipped(folder, tmp_path):
    put(folder / "a/1.png", plain(RED))
    put(tmp_path / "outside/secret.png", plain(BLUE))
    (folder / "a/out.png").symlink_to(tmp_path / "outside/secret.png")
    (folder / "a/loop.png").symlink_to("loop.png")
    (folder / "a/inside.png").symlink_to("1.png")
    (folder / "b").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "a/pipe.png")
    report = ingest_images(folder, tmp_path / "s", 8)
    assert {name: reason.split()[0] for name, reason in report.skipped} == {
        "a/out.png": "a", "a/loop.png": "not", "a/pipe.png": "not", "b": "a"
    }  # fmt: skip
    assert report.samples == 2
    assert {colour(sample) for sample in EpisodeStore.open(tmp_path / "s").samples} == {RED}


def test_a_folder_name_that_is_not_utf8_is_reported(folder, tmp_path):
    put(folder / "a/1.png", plain(RED))
    os.mkdir(os.fsencode(folder) + b"/\xff")
    put(folder / os.fsdecode(b"\xff/1.png"), plain(RED))
    [(name, reason)] = ingest_images(folder, tmp_path / "s", 8).skipped
    assert name.encode() and "not UTF-8" in reason


# ------------------------------------------------------------------------------------------------------------ refusals


def fails(folder: Path, words: str, size: int = 8) -> None:
    before = sorted(os.listdir(folder.parent))
    with pytest.raises(IngestError, match=words) as caught:
        ingest_images(folder, folder.parent / "new" / "store", size)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(folder.parent)) == before


def test_folders_without_classes_are_refused_and_leave_nothing(folder):
    fails(folder, "no folder of pictures")
    put(folder / "loose.png", plain(RED))
    fails(folder, r"no folder of pictures in it \(1 files unusable\)")
    fails(folder / "loose.png", "is not a folder")
    fails(folder / "missing", "is not a folder")
    (folder / "a").mkdir()
    (folder / "a/1.png").write_text("no picture")
    fails(folder, "none of 1 pictures is usable: check a/1.png")


def test_impossible_sizes_are_refused(folder, monkeypatch):
    put(folder / "a/1.png", plain(RED))
    fails(folder, "got 7", size=7)
    fails(folder, "got 5000", size=5000)
    monkeypatch.setattr(module, "TOTAL_LIMIT", 100)
    fails(folder, "choose a smaller size")


def test_an_existing_store_is_refused_before_any_work(folder, tmp_path, monkeypatch):
    put(folder / "a/1.png", plain(RED))
    (tmp_path / "store").write_bytes(b"precious")
    monkeypatch.setattr(module, "_members", None)
    with pytest.raises(StoreError, match="never overwritten"):
        ingest_images(folder, tmp_path / "store", 8)
    assert (tmp_path / "store").read_bytes() == b"precious"


def test_a_full_disk_is_one_line_and_leaves_nothing(folder, monkeypatch):
    put(folder / "a/1.png", plain(RED))

    def full(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    fails(folder, "No space left on device")


def test_samples_pass_through_a_file_not_the_memory(folder, tmp_path, monkeypatch):
    put(folder / "a/1.png", plain(RED))
    seen = []
    write = module.write_store

    def spy(store, samples, *rest):
        seen.append(samples)
        return write(store, samples, *rest)

    monkeypatch.setattr(module, "write_store", spy)
    ingest_images(folder, tmp_path / "s", 8)
    assert isinstance(seen[0], np.memmap) and seen[0].flags.c_contiguous
