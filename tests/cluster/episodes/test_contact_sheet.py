from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.episodes.contact_sheet import LARGEST_TILE, contact_sheet, describe
from cluster.episodes.store import ClassTable, EpisodeStore, write_store
from cluster.errors import StoreError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("METAFLEET_CACHE", str(tmp_path_factory.mktemp("cache")))


def make(
    folder: Path, classes: int = 6, each: int = 4, shape: tuple[int, ...] = (1, 8, 8), last: int = 1
) -> EpisodeStore:
    """A store whose sample values are 10 × class + sample; its last class has ``last`` samples."""
    index = np.repeat(np.arange(classes), [each] * (classes - 1) + [last])
    values = 10 * index + np.concatenate([*([np.arange(each)] * (classes - 1)), np.arange(last)])
    samples = np.broadcast_to(values.reshape(-1, *[1] * len(shape)), (len(index), *shape)).astype(np.uint8)
    names = tuple(f"group {c % 2}/class number {c}" for c in range(classes))
    table = ClassTable(names, {"group": tuple(f"group {c % 2}" for c in range(classes))})
    drawer = [f"d{row % 3}" for row in range(len(index))]
    write_store(folder / "s", samples, index, table, {"drawer": drawer}, {"source": "test"})
    return EpisodeStore.open(folder / "s")


def shown(path: Path) -> set[int]:
    """The grey values on a sheet that fill a whole sample."""
    pixels = np.asarray(Image.open(path).convert("L"))
    values, counts = np.unique(pixels, return_counts=True)
    return {int(value) for value, count in zip(values, counts, strict=True) if count >= 64 * 64 and value < 100}


def test_every_class_and_sample_is_on_a_sheet_that_has_room(tmp_path):
    store = make(tmp_path)
    assert contact_sheet(store, tmp_path / "sheet.png", classes=6, samples=4) == store.classes
    assert shown(tmp_path / "sheet.png") == {10 * c + k for c in range(5) for k in range(4)} | {50}
    assert contact_sheet(store, tmp_path / "more.png", classes=60, samples=40) == store.classes


def test_a_smaller_sheet_is_spread_evenly(tmp_path):
    store = make(tmp_path)
    names = contact_sheet(store, tmp_path / "sheet.png", classes=3, samples=2)
    assert names == tuple(store.classes[c] for c in (1, 3, 5))
    assert shown(tmp_path / "sheet.png") == {11, 13, 31, 33, 50}


def test_the_same_store_gives_the_same_sheet(tmp_path):
    store = make(tmp_path)
    for name in ("one.png", "two.png"):
        contact_sheet(store, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_the_label_stands_beside_its_row(tmp_path):
    store = make(tmp_path)
    contact_sheet(store, tmp_path / "sheet.png", classes=6, samples=1)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("L")).astype(int)
    rows = [np.flatnonzero((pixels == 10 * c + 2).sum(1) >= 64) for c in range(5)]
    left = np.flatnonzero((pixels == 22).sum(0) >= 64)[0]
    for row in rows:
        label = pixels[row[0] : row[-1] + 1, : left - 2]
        assert len(row) == 64 and (label < 100).sum() > 100, "dark letters left of the pictures"


def test_colour_and_large_pictures(tmp_path):
    (tmp_path / "rgb").mkdir()
    samples = np.zeros((2, 3, 8, 8), np.uint8)
    samples[0, 0], samples[1, 2] = 255, 255
    write_store(tmp_path / "rgb/s", samples, np.array([0, 1]), ClassTable(("red", "blue")), {}, {})
    contact_sheet(EpisodeStore.open(tmp_path / "rgb/s"), tmp_path / "rgb.png")
    pixels = np.asarray(Image.open(tmp_path / "rgb.png"))
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (pixels == colour).all(2).sum() == 64 * 64
    store = make(tmp_path, classes=2, shape=(1, 400, 200))
    contact_sheet(store, tmp_path / "large.png", samples=1)
    assert Image.open(tmp_path / "large.png").height < 3 * LARGEST_TILE


def test_what_cannot_be_shown_is_refused(tmp_path):
    write_store(tmp_path / "v", np.zeros((1, 3), np.float32), np.array([0]), ClassTable(("a",)), {}, {})
    with pytest.raises(StoreError, match="no pictures"):
        contact_sheet(EpisodeStore.open(tmp_path / "v"), tmp_path / "sheet.png")
    store = make(tmp_path)
    for wanted in ({"classes": 0}, {"samples": 0}):
        with pytest.raises(ValueError, match="at least one"):
            contact_sheet(store, tmp_path / "sheet.png", **wanted)
    assert not (tmp_path / "sheet.png").exists()


def test_a_long_class_name_keeps_its_ends(tmp_path):
    long = "beginning" + "x" * 300 + "end"
    write_store(tmp_path / "s", np.zeros((1, 1, 8, 8), np.uint8), np.array([0]), ClassTable((long,)), {}, {})
    assert contact_sheet(EpisodeStore.open(tmp_path / "s"), tmp_path / "sheet.png") == (long,)
    assert Image.open(tmp_path / "sheet.png").width < 800


def test_describe_is_plain_data(tmp_path):
    store = make(tmp_path)
    described = describe(store)
    assert json.loads(json.dumps(described)) == described
    assert described == {
        "path": str(tmp_path / "s"),
        "digest": store.digest,
        "bytes": (tmp_path / "s").stat().st_size,
        "sample_shape": [1, 8, 8],
        "dtype": "uint8",
        "classes": 6,
        "samples": 21,
        "samples_per_class": {"min": 1, "max": 4},
        "class_metadata": {"group": {"group 0": 3, "group 1": 3}},
        "sample_metadata": {"drawer": {"d0": 7, "d1": 7, "d2": 7}},
        "description": {"source": "test"},
    }
