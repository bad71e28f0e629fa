"""The embedded image source: which characters it has, that no two look the same, and that every sample is one."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from fontTools import unicodedata
from fontTools.ttLib import TTFont
from hypothesis import given
from hypothesis import strategies as st

from cluster.episodes import glyphs
from cluster.episodes.glyph_catalogue import MARGIN, MIN_FACES, Catalogue, catalogue, font_files
from cluster.episodes.glyphs import CLEAR, GLYPHS_SPLIT, SAMPLES, GlyphDataset, glyph_dataset, glyphs_store
from cluster.episodes.splits import resolve
from cluster.episodes.store import ClassTable, EpisodeStore, write_store
from cluster.errors import IngestError

SIZE = 16
"""Of the samples that most tests look at: the smallest at which a person can still read most of them, pixels."""


def digest(made: GlyphDataset) -> str:
    text = repr([made.names, made.class_metadata, made.sample_metadata, made.description])
    return hashlib.sha256(made.samples.tobytes() + made.class_index.tobytes() + text.encode()).hexdigest()


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[subprocess.Popen[str]]:
    """Another process with another hash seed, that makes the dataset beside this one and prints its digest."""
    program = "\n".join(
        [
            "import hashlib",
            "from cluster.episodes.glyphs import GlyphDataset, glyph_dataset",
            inspect.getsource(digest),
            f"print(digest(glyph_dataset({SIZE})))",
        ]
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment) as other:
        yield other
        other.kill()


@pytest.fixture(scope="session")
def chosen() -> Catalogue:
    return catalogue()


@pytest.fixture(scope="session")
def made(elsewhere: subprocess.Popen[str], chosen: Catalogue) -> GlyphDataset:
    return glyph_dataset(SIZE)


# ------------------------------------------------------------------------------------------------------------- classes


def test_some_five_thousand_characters_of_many_scripts_qualify(chosen: Catalogue) -> None:
    count = Counter(character.script for character in chosen.characters)
    assert 4700 <= len(chosen.characters) <= 5300
    for script in ("Latin", "Greek", "Cyrillic", "Canadian Aboriginal", "Common"):
        assert count[script] >= 200, script


def test_every_character_is_in_the_maps_of_four_font_files_that_speak_unicode(chosen: Catalogue) -> None:
    having: Counter[int] = Counter()
    for path in font_files():
        if not path.name.startswith(("LastResort", "cm", "STIXSiz", "STIXNonUni")) and "Display" not in path.name:
            with TTFont(path, lazy=True) as font:
                having.update(set(font.getBestCmap()))
    assert [c.name for c in chosen.characters if having[c.code_point] < 4] == []
    assert min(character.face_count for character in chosen.characters) == MIN_FACES == 4


def test_neither_the_placeholder_font_nor_its_characters_are_in(chosen: Catalogue) -> None:
    assert [face.name for face in chosen.faces if "Last" in face.name] == []
    present = {character.code_point for character in chosen.characters}
    unassigned, private, hiragana, han = 0x0378, 0xE000, 0x3042, 0x4E00
    assert present.isdisjoint({unassigned, private, hiragana, han, 0xFFFF, 0x10FFFF})


def test_a_font_counts_only_where_its_glyph_means_the_character(chosen: Catalogue) -> None:
    roman = next(face for face in chosen.faces if face.name == "cmr10")
    assert ord("A") in roman.characters
    assert ord('"') not in roman.characters, "cmr10 draws a closing quotation mark there"
    assert ord("<") not in roman.characters, "cmr10 draws an inverted exclamation mark there"


def test_what_has_no_picture_is_out(chosen: Catalogue) -> None:
    assert {character.category[0] for character in chosen.characters} == set("LNPS")


def test_letters_shared_by_scripts_are_there_once(chosen: Catalogue) -> None:
    present = {character.code_point for character in chosen.characters}
    for same in ("AАΑ", "oоοօ", "pр", "jјϳ", ":։", "gց"):
        assert [c for c in same if ord(c) in present] == [same[0]]


def test_no_two_characters_have_the_same_outline_in_a_face(chosen: Catalogue) -> None:
    """An independent reference: points of the outlines in font units, wherever they lie on the line."""
    for name in ("DejaVu Sans", "DejaVu Sans Mono Bold", "DejaVu Serif Italic", "STIXGeneral-Regular"):
        face = next(face for face in chosen.faces if face.name == name)
        font = TTFont(face.path)
        named, table = font.getBestCmap(), font["glyf"]
        same = defaultdict(list)
        for character in chosen.characters:
            if character.code_point in face.characters:
                points, ends, _ = table[named[character.code_point]].getCoordinates(table)
                left, low = min(x for x, _ in points), min(y for _, y in points)
                same[tuple((x - left, y - low) for x, y in points), tuple(ends)].append(character.name)
        assert len(same) > 1000
        assert [names for names in same.values() if len(names) > 1] == []


def test_braille_patterns_that_a_shift_makes_equal_are_one_class(chosen: Catalogue) -> None:
    """Samples are centred, so the 255 patterns of dots on a 2 × 4 grid are as many as there are up to a shift."""
    place = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]

    def shape(code_point: int) -> frozenset[tuple[int, int]]:
        dots = [place[bit] for bit in range(8) if code_point >> bit & 1]
        left, top = min(x for x, _ in dots), min(y for _, y in dots)
        return frozenset((x - left, y - top) for x, y in dots)

    shapes = Counter(shape(c.code_point) for c in chosen.characters if c.script == "Braille")
    everything = {shape(pattern) for pattern in range(0x2801, 0x2900)}
    assert set(shapes) == everything
    assert max(shapes.values()) == 1


def test_fonttools_does_not_warn_users_of_old_dates(caplog: pytest.LogCaptureFixture) -> None:
    from cluster.episodes import glyph_catalogue

    computer_modern = next(face for face in catalogue().faces if face.name == "cmr10")
    with caplog.at_level(logging.WARNING):
        assert glyph_catalogue._outlines(computer_modern)(ord("A"))
    assert caplog.records == []


# --------------------------------------------------------------------------------------------------------------- split


def test_the_split_holds_out_whole_scripts(made: GlyphDataset) -> None:
    parts = resolve(GLYPHS_SPLIT, made.names, made.class_metadata)
    script = np.array(made.class_metadata["script"])
    scripts = {name: set(script[parts[name]]) for name in ("train", "val", "test")}
    assert scripts["test"] == {"Armenian", "Georgian", "Hebrew", "Lao"}
    assert scripts["val"] == {"Arabic", "Old Italic"}
    assert scripts["train"].isdisjoint(scripts["val"] | scripts["test"])
    assert len(parts.test) >= 150 and len(parts.val) >= 60 and len(parts.train) >= 4000
    assert min(Counter(script[parts.test]).values()) >= 20, "20-way episodes from every script alone"


# ------------------------------------------------------------------------------------------------------------- samples


def test_nothing_of_the_scripts_held_out_is_in_training(made: GlyphDataset) -> None:
    held_out = {*GLYPHS_SPLIT.val, *GLYPHS_SPLIT.test}
    scripts = made.class_metadata["script"]
    training = [name for name, script in zip(made.names, scripts, strict=True) if script not in held_out]
    for name in training:
        character = chr(int(name.split()[0].removeprefix("U+"), 16))
        used_by = {unicodedata.script_name(s) for s in unicodedata.script_extension(character)}
        stands_for = {unicodedata.script_name(unicodedata.script(c)) for c in normalize("NFKC", character)}
        assert not held_out & (used_by | stands_for), name
    hebrew = [name for name, script in zip(made.names, scripts, strict=True) if script == "Hebrew"]
    assert "U+2135 ALEF SYMBOL" in hebrew


def test_samples_are_in_the_shape_of_a_store(made: GlyphDataset) -> None:
    count = len(made.names)
    assert made.samples.shape == (SAMPLES * count, 1, SIZE, SIZE) and made.samples.dtype == np.uint8
    assert made.class_index.dtype == np.int32
    assert (made.class_index == np.repeat(np.arange(count), 20)).all()
    assert len(set(made.names)) == count
    assert "U+0416 CYRILLIC CAPITAL LETTER ZHE" in made.names
    zhe = made.names.index("U+0416 CYRILLIC CAPITAL LETTER ZHE")
    metadata = {column: values[zhe] for column, values in made.class_metadata.items()}
    assert metadata == {"script": "Cyrillic", "block": "Cyrillic", "category": "Lu"}
    assert {len(values) for values in made.class_metadata.values()} == {count}
    assert len(set(made.sample_metadata["face"][20 * zhe : 20 * zhe + 20])) >= 10


def test_every_sample_has_ink(made: GlyphDataset) -> None:
    brightest = made.samples.reshape(len(made.samples), -1).max(axis=1)
    faint = np.flatnonzero(brightest < 64)
    assert [made.names[made.class_index[i]] for i in faint] == []
    assert made.samples.max() == 255


def test_ink_is_bright_on_dark(made: GlyphDataset) -> None:
    assert (made.samples == 0).mean() > 0.5


def test_samples_of_a_class_differ(made: GlyphDataset) -> None:
    classes = made.samples.reshape(len(made.names), SAMPLES, -1)
    different = [len({sample.tobytes() for sample in samples}) for samples in classes]
    assert [name for name, count in zip(made.names, different, strict=True) if count < SAMPLES] == []


def test_samples_of_a_class_are_nearer_to_each_other_than_to_other_classes(made: GlyphDataset) -> None:
    """The nearest of five one-shot pictures is of the right class far more often than by chance."""
    test = resolve(GLYPHS_SPLIT, made.names, made.class_metadata).test
    pixels = made.samples.reshape(len(made.names), SAMPLES, -1).astype(np.float64)
    right = []
    for start in range(0, len(test) - 4 * 60, 5):
        ways = test[start + 60 * np.arange(5)]
        apart = ((pixels[ways, None, 3] - pixels[ways, 7, None].swapaxes(0, 1)) ** 2).sum(axis=-1)
        right.append((apart.argmin(axis=1) == np.arange(5)).mean())
    assert np.mean(right) > 0.5


def test_another_process_makes_the_same_bytes(elsewhere: subprocess.Popen[str], made: GlyphDataset) -> None:
    printed, _ = elsewhere.communicate(timeout=120)
    assert elsewhere.returncode == 0
    assert printed.strip() == digest(made)


def test_jitter_is_decided_by_code_point_and_sample_alone() -> None:
    alone, among = glyphs._jitter(np.array([0x416])), glyphs._jitter(np.array([0x41, 0x416, 0x1F0AE]))
    assert (alone[0] == among[1]).all()
    assert alone.shape == (1, 20, 6)
    assert alone.min() < -0.8 and alone.max() > 0.8 and np.abs(alone).max() <= 1
    assert len(np.unique(among)) == among.size


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    em=st.integers(20, 200),
    side=st.integers(16, 512),
    moves=st.lists(st.floats(-1, 1), min_size=6, max_size=6),
)
def test_no_ink_is_moved_out_of_the_image(width: int, height: int, em: int, side: int, moves: list[float]) -> None:
    sizes = np.array([[width + 2 * MARGIN, height + 2 * MARGIN]])
    a, b, x, c, d, y = glyphs._inverse_maps(sizes, np.array([moves]), em, side)[0]
    corners = np.array([(MARGIN + u * width, MARGIN + v * height) for u in (0, 1) for v in (0, 1)])
    placed = np.linalg.solve(np.array([[a, b], [c, d]]), (corners - (x, y)).T)
    assert placed.min() >= side * CLEAR - 1e-6
    assert placed.max() <= side * (1 - CLEAR) + 1e-6
    if not any(moves):
        np.testing.assert_allclose(placed.mean(axis=1), side / 2)


@pytest.mark.parametrize("size", [0, 7, 257])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(IngestError, match=f"{size} pixels.*from 8 to 256"):
        glyph_dataset(size)


# --------------------------------------------------------------------------------------------------------------- cache


class Ingest:
    """Instead of `ingest_glyphs`: writes a tiny store, slowly, and counts; refuses to be called twice at once."""

    def __init__(self) -> None:
        self.calls = 0
        self._busy = threading.Lock()

    def __call__(self, path: Path, size: int) -> None:
        assert self._busy.acquire(blocking=False), "two at once"
        self.calls += 1
        time.sleep(0.05)
        samples = np.full((2, 1, size, size), self.calls, dtype=np.uint8)
        write_store(path, samples, np.arange(2), ClassTable(("a", "b")), {}, {"source": "test"})
        self._busy.release()


@pytest.fixture
def ingest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ingest:
    monkeypatch.setenv("METAFLEET_CACHE", str(tmp_path / "cache"))
    fake = Ingest()
    monkeypatch.setattr(glyphs, "ingest_glyphs", fake)
    return fake


def test_the_store_is_made_once_however_many_come(ingest: Ingest, tmp_path: Path) -> None:
    found: list[Path] = []
    crowd = [threading.Thread(target=lambda: found.append(glyphs_store(8))) for _ in range(4)]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
    assert len(found) == 4 and len(set(found)) == 1 and ingest.calls == 1
    assert found[0].parent == tmp_path / "cache" / "glyphs"
    assert EpisodeStore.open(found[0]).sample_shape == (1, 8, 8)


@pytest.mark.parametrize("part", ["data", "header", "no header", "no data"])
def test_a_damaged_store_is_made_anew(ingest: Ingest, part: str) -> None:
    path = glyphs_store(8)
    header = path.with_name(path.name + ".header")
    harm = {"data": path, "header": header, "no header": header, "no data": path}[part]
    if part.startswith("no"):
        harm.unlink()
    else:
        raw = bytearray(harm.read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        harm.write_bytes(raw)
    assert glyphs_store(8) == path
    assert ingest.calls == 2
    assert EpisodeStore.open(path).samples.max() == 2


def test_sizes_and_generators_have_stores_of_their_own(ingest: Ingest, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {glyphs_store(8), glyphs_store(9)}
    monkeypatch.setattr(glyphs, "GENERATOR", "glyphs/0")
    assert len(first | {glyphs_store(8)}) == 3


def test_a_cache_that_cannot_be_written_is_named(
    ingest: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("METAFLEET_CACHE", str(tmp_path / "file"))
    with pytest.raises(IngestError, match=r"file/glyphs: .*METAFLEET_CACHE"):
        glyphs_store(8)


def test_what_is_made_is_what_the_store_holds(
    made: GlyphDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAFLEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(glyphs, "glyph_dataset", lambda size: made)
    glyphs.ingest_glyphs(tmp_path / "glyphs.arrow", SIZE)
    store = EpisodeStore.open(tmp_path / "glyphs.arrow")
    assert (store.samples == made.samples).all()
    assert store.classes == made.names
    assert store.class_metadata["script"] == made.class_metadata["script"]
    assert store.sample_metadata("face") == made.sample_metadata["face"]
    assert store.header.description["polarity"] == "ink 255 on 0"
    assert "bilinear" in store.header.description["resampling"]
