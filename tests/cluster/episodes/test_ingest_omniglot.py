from __future__ import annotations

import io
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.episodes import ingest_omniglot as module
from cluster.episodes.ingest_omniglot import SIDE, download_omniglot, ingest_omniglot, shrink
from cluster.episodes.store import EpisodeStore
from cluster.errors import IngestError, StoreError

REAL = Path(__file__).parents[4] / "shared/data/omniglot/images_background.zip"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("METAFLEET_CACHE", str(tmp_path_factory.mktemp("cache")))


def png(seed: int, side: int = SIDE) -> bytes:
    """A drawing as in Omniglot, 1 bit, black ink: a filled box whose place depends on ``seed``."""
    paper = np.ones((side, side), bool)
    paper[5 + seed : 40 + seed, 10 : 60 + seed] = False
    raw = io.BytesIO()
    Image.fromarray(paper).convert("1").save(raw, "PNG")
    return raw.getvalue()


def drawings(part: str = "images_background", alphabets: tuple[str, ...] = ("Greek", "Latin")) -> dict[str, bytes]:
    """Two characters an alphabet, three drawers a character."""
    names = [f"{part}/{a}/character{c:02}/{c:04}_{d:02}.png" for a in alphabets for c in (1, 2) for d in (1, 2, 3)]
    return {name: png(seed) for seed, name in enumerate(names)}


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return path


def unpacked(folder: Path, members: dict[str, bytes]) -> Path:
    for name, raw in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    return folder


def fails(tmp_path: Path, source: Path, *words: str) -> None:
    """The ingest of ``source`` is refused in one line with ``words``, and leaves nothing behind."""
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(IngestError) as caught:
        ingest_omniglot(source, tmp_path / "store")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value
    assert sorted(os.listdir(tmp_path)) == before


# ---------------------------------------------------------------------------------------------------------- resampling


@pytest.mark.parametrize("size", [8, 20, 28, 32, 64, 84, 105])
def test_shrinking_is_the_exact_area_average(size):
    bits = np.random.default_rng(size).integers(0, 2, (3, SIDE, SIDE), dtype=np.uint8)
    # A pixel cut into size × size equal pieces: each square then is a whole block of SIDE × SIDE pieces.
    blocks = bits.repeat(size, 1).reshape(3, size, SIDE, SIDE).sum(2, dtype=np.int64)
    blocks = blocks.repeat(size, 2).reshape(3, size, size, SIDE).sum(3)
    expected = (2 * 255 * blocks + SIDE**2) // (2 * SIDE**2)
    assert np.array_equal(shrink(bits, size), expected)


def test_shrinking_does_not_depend_on_how_many_are_done_at_once(monkeypatch):
    bits = np.random.default_rng(0).integers(0, 2, (7, SIDE, SIDE), dtype=np.uint8)
    whole = shrink(bits, 28)
    monkeypatch.setattr(module, "DRAWINGS_AT_ONCE", 2)
    assert np.array_equal(shrink(bits, 28), whole)


def test_ink_is_255_on_0(tmp_path):
    black = io.BytesIO()
    Image.new("1", (SIDE, SIDE), 0).save(black, "PNG")
    white = io.BytesIO()
    Image.new("1", (SIDE, SIDE), 1).save(white, "PNG")
    members = {
        f"images_background/A/character0{i}/000{i}_01.png": raw.getvalue() for i, raw in enumerate([black, white])
    }
    report = ingest_omniglot(zipped(tmp_path / "z.zip", members), tmp_path / "store")
    samples = EpisodeStore.open(tmp_path / "store").samples
    assert (samples[0] == 255).all() and (samples[1] == 0).all()
    assert report.header.description["polarity"] == "ink 255 on 0"


# ------------------------------------------------------------------------------------------------------------- sources


def test_a_zip_becomes_a_store(tmp_path):
    members = drawings()
    shuffled = dict(sorted(members.items(), key=lambda item: item[1]))
    report = ingest_omniglot(zipped(tmp_path / "images_background.zip", shuffled), tmp_path / "store", size=20)
    store = EpisodeStore.open(tmp_path / "store")
    assert store.classes == ("Greek/character01", "Greek/character02", "Latin/character01", "Latin/character02")
    assert store.class_metadata["alphabet"] == ("Greek", "Greek", "Latin", "Latin")
    assert store.class_metadata["part"] == ("background",) * 4
    assert store.sample_metadata("drawer") == ("01", "02", "03") * 4
    bits = np.stack([1 - np.asarray(Image.open(io.BytesIO(raw))).astype(np.uint8) for raw in members.values()])
    assert np.array_equal(store.samples[:, 0], shrink(bits, 20))
    assert (report.classes, report.samples, report.skipped, report.header) == (4, 12, (), store.header)
    assert report.seconds > 0


def test_every_layout_gives_the_same_store(tmp_path):
    members = drawings()
    raw = zipped(tmp_path / "images_background.zip", members)
    sources = {
        "zip": raw,
        "folder": unpacked(tmp_path / "a", members),
        "part itself": tmp_path / "a" / "images_background",
        "torchvision": unpacked(tmp_path / "b" / "omniglot-py", members).parent,
        "zip in folder": zipped(unpacked(tmp_path / "c", {"README": b""}) / "images_background.zip", members).parent,
        "deeper in zip": zipped(
            tmp_path / "d.zip", {f"./omniglot/python/{name}": raw for name, raw in members.items()}
        ),
    }
    zipped(tmp_path / "b" / "omniglot-py" / "images_background.zip", members)  # torchvision keeps it beside the folder
    digests = {}
    for number, (layout, source) in enumerate(sources.items()):
        report = ingest_omniglot(source, tmp_path / f"store{number}")
        digests[layout] = report.header.digest
        assert report.samples == 12, layout
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize(
    ("part", "alphabets"),
    [
        (None, {"Greek", "Latin"}),  # what recipes train on, whatever else lies beside it
        ("background", {"Greek", "Latin"}),
        ("evaluation", {"Atlantean", "Oriya"}),
        ("both", {"Greek", "Latin", "Atlantean", "Oriya"}),
    ],
)
def test_parts_are_told_apart_and_read_each_from_where_it_is(tmp_path, part, alphabets):
    unpacked(tmp_path / "in", drawings())
    zipped(tmp_path / "in" / "images_evaluation.zip", drawings("images_evaluation", ("Atlantean", "Oriya")))
    report = ingest_omniglot(tmp_path / "in", tmp_path / "store", part=part)
    store = EpisodeStore.open(tmp_path / "store")
    parts = dict(zip(store.class_metadata["alphabet"], store.class_metadata["part"], strict=True))
    assert parts == {a: "background" if a in ("Greek", "Latin") else "evaluation" for a in alphabets}
    assert report.classes == 2 * len(alphabets)


def test_a_part_that_is_there_alone_is_taken_and_one_that_is_not_is_refused(tmp_path):
    path = zipped(tmp_path / "z.zip", drawings("images_evaluation"))
    assert ingest_omniglot(path, tmp_path / "store").classes == 4
    with pytest.raises(IngestError, match="no usable Omniglot drawing of the background part"):
        ingest_omniglot(path, tmp_path / "other", part="background")


def test_an_existing_store_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "store").touch()
    monkeypatch.setattr(module, "_decode", None)
    with pytest.raises(StoreError, match="never overwritten"):
        ingest_omniglot(zipped(tmp_path / "z.zip", drawings()), tmp_path / "store")


@pytest.mark.parametrize("size", [7, 106])
def test_impossible_sizes_are_refused(tmp_path, size):
    with pytest.raises(IngestError, match=f"got {size}"):
        ingest_omniglot(zipped(tmp_path / "z.zip", drawings()), tmp_path / "store", size=size)


# -------------------------------------------------------------------------------------------------------- bad sources


def test_sources_without_drawings_are_refused(tmp_path):
    fails(tmp_path, tmp_path / "missing", "no such file")
    (tmp_path / "folder").mkdir()
    fails(tmp_path, tmp_path / "folder", "holds neither")
    (tmp_path / "note.txt").write_text("hello")
    fails(tmp_path, tmp_path / "note.txt", "not a readable zip")
    fails(tmp_path, zipped(tmp_path / "other.zip", {"cats/1.png": png(0)}), "no usable Omniglot drawing")
    cut = zipped(tmp_path / "cut.zip", drawings())
    cut.write_bytes(cut.read_bytes()[:-100])
    fails(tmp_path, cut, "not a readable zip")
    broken = {name: b"no picture" for name in drawings()}
    fails(tmp_path, zipped(tmp_path / "broken.zip", broken), "12 unusable")


def test_damaged_drawings_are_named_and_skipped(tmp_path):
    members = drawings()
    first, second, third, fourth, *_ = members
    members[first] = b"no picture"
    members[second] = png(0)[:-30]
    members[third] = png(0, side=64)
    members["images_background/Greek/character02/._0004_01.png"] = b"what macOS leaves"
    members[fourth] = png(3) + b"\0" * module.MEMBER_LIMIT
    path = zipped(tmp_path / "z.zip", members)
    report = ingest_omniglot(path, tmp_path / "store")
    reasons = dict(report.skipped)
    assert set(reasons) == {first, second, third, fourth}
    assert "not a readable picture" in reasons[first] and "64×64" in reasons[third] and "more than" in reasons[fourth]
    assert (report.samples, report.classes) == (8, 3)
    assert EpisodeStore.open(tmp_path / "store").class_count.tolist() == [2, 3, 3]


def test_a_member_with_a_wrong_checksum_is_skipped(tmp_path):
    members = drawings()
    path = tmp_path / "z.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    last = list(members)[-1]
    data = path.read_bytes()
    path.write_bytes(data.replace(members[last], members[last][:-1] + b"!"))
    report = ingest_omniglot(path, tmp_path / "store")
    assert [name for name, _ in report.skipped] == [last] and "CRC" in report.skipped[0][1]


@pytest.mark.parametrize(
    "name",
    ["../images_background/A/character01/0001_01.png", "/etc/images_background/A/character01/0001_01.png", "a/../../b",
     "..\\b", "C:\\b", "images_background/A/character01/../../../../x_01.png"],
)  # fmt: skip
def test_an_archive_that_points_outside_is_refused(tmp_path, name):
    path = zipped(tmp_path / "z.zip", {**drawings(), name: png(0)})
    fails(tmp_path, path, "points outside")


def test_links_in_an_archive_are_skipped(tmp_path):
    path = zipped(tmp_path / "z.zip", drawings())
    link = zipfile.ZipInfo("images_background/Greek/character01/0001_99.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert ingest_omniglot(path, tmp_path / "store").skipped == ((link.filename, "a symbolic link"),)


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    path = zipped(tmp_path / "z.zip", {**drawings(), "bomb": b"\0" * 2_000_000})
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(module, "TOTAL_LIMIT", 1_000_000)
    fails(tmp_path, path, "bytes in all")
    monkeypatch.undo()
    monkeypatch.setattr(module, "COUNT_LIMIT", 5)
    fails(tmp_path, path, "13 members")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_hides_its_size_is_never_unpacked_whole(tmp_path, method):
    members, bomb = drawings(), 300 << 20
    last = list(members)[-1]
    path = tmp_path / "z.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in members.items():
            archive.writestr(name, raw if name != last else b"\0" * bomb, method if name == last else None)
    path.write_bytes(path.read_bytes().replace(bomb.to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo(last).file_size == 1000
    program = (
        "import resource, sys\n"
        "from cluster.episodes.ingest_omniglot import ingest_omniglot\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "report = ingest_omniglot(sys.argv[1], sys.argv[2])\n"
        "print(len(report.skipped), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    argv = [sys.executable, "-c", program, path, tmp_path / "store"]
    skipped, grown_kib = subprocess.run(argv, capture_output=True, check=True, text=True).stdout.split()
    assert int(skipped) == 1
    assert int(grown_kib) < 100 << 10


def test_links_that_leave_the_folder_are_skipped(tmp_path):
    members = drawings()
    unpacked(tmp_path / "in", members)
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(0))
    folder = tmp_path / "in/images_background/Greek/character01"
    (folder / "0001_98.png").symlink_to(outside)
    (folder / "0001_97.png").symlink_to("0001_97.png")
    (folder / "0001_96.png").mkdir()
    (folder / "0001_95.png").symlink_to("0001_01.png")
    report = ingest_omniglot(tmp_path / "in", tmp_path / "store")
    reasons = {name.rpartition("_")[2]: reason for name, reason in report.skipped}
    assert set(reasons) == {"96.png", "97.png", "98.png"} and "leaves the folder" in reasons["98.png"]
    assert report.samples == len(members) + 1


# -------------------------------------------------------------------------------------------------------- download


class FakeOmniglot:
    """Stands for torchvision's data set: checks what it is asked, and leaves what the real one leaves."""

    asked: list[bool]
    failure: Exception | None

    def __init__(self, root: str, background: bool, download: bool) -> None:
        assert isinstance(root, str) and download
        type(self).asked.append(background)
        if type(self).failure is not None:
            raise type(self).failure
        part = "images_background" if background else "images_evaluation"
        unpacked(Path(root) / "omniglot-py", drawings(part, ("Greek",) if background else ("Oriya",)))


@pytest.fixture
def fake_torchvision(monkeypatch):
    FakeOmniglot.asked, FakeOmniglot.failure = [], None
    datasets = types.ModuleType("torchvision.datasets")
    datasets.Omniglot = FakeOmniglot
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_a_download_can_be_ingested(tmp_path, fake_torchvision):
    root = download_omniglot(tmp_path / "root")
    assert FakeOmniglot.asked == [True, False]
    assert ingest_omniglot(root, tmp_path / "store", part="both").classes == 4


@pytest.mark.parametrize(
    "failure", [OSError("Name or service not known"), RuntimeError("File not found or corrupted.")]
)
def test_a_failed_download_says_what_to_do(tmp_path, fake_torchvision, failure):
    FakeOmniglot.failure = failure
    with pytest.raises(IngestError, match=f"{failure}.*github.com/brendenlake"):
        download_omniglot(tmp_path / "root")


def test_importing_the_ingest_does_not_import_torchvision():
    assert "torchvision" not in module.__dict__


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.skipif(not REAL.exists(), reason="the Omniglot archive is not on this machine")
def test_the_real_archive(tmp_path):
    report = ingest_omniglot(REAL, tmp_path / "store")
    store = EpisodeStore.open(tmp_path / "store")
    assert (report.classes, report.samples, report.skipped) == (964, 19_280, ())
    assert store.samples.shape == (19_280, 1, 28, 28) and (store.class_count == 20).all()
    assert len(set(store.class_metadata["alphabet"])) == 30
    assert sorted(set(store.sample_metadata("drawer"))) == [f"{number:02}" for number in range(1, 21)]
    # Strokes cover a few percent of a drawing and are still nearly full ink where they are thickest.
    assert 0.05 < store.samples.mean() / 255 < 0.12 and np.median(store.samples.max((1, 2, 3))) > 200
    # Exact integer arithmetic: this digest is the same on every machine (until Arrow changes its file layout).
    assert store.digest == "1a41de75a5f16f653d6c59e94c03731e4403a7dedaaa207fe1b9ccc744d22260"
