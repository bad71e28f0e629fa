from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import msgpack
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.episodes import store as store_module
from cluster.episodes import store_header, store_writer
from cluster.episodes.store import ClassTable, EpisodeStore, StoreHeader, read_header, write_store
from cluster.errors import StoreError

NAMES = ("ash", "beech", "cedar", "élm")
CLASSES = ClassTable(NAMES, {"family": ("olive", "oak", "pine", "olive"), "genus": ("a", "b", "c", "d")})


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("METAFLEET_CACHE", str(folder))
    return folder


def content(seed: int = 0):
    """Shuffled images of unequal classes: samples, class indices, who drew them."""
    rng = np.random.default_rng(seed)
    class_index = rng.permutation(np.repeat(np.arange(4), [3, 5, 1, 4]))
    samples = rng.integers(0, 256, (13, 1, 5, 6), dtype=np.uint8)
    return samples, class_index, [f"drawer {number}" for number in rng.integers(0, 3, 13)]


def make(path: Path, seed: int = 0) -> StoreHeader:
    samples, class_index, drawer = content(seed)
    return write_store(path, samples, class_index, CLASSES, {"drawer": drawer}, {"source": "test", "polarity": "none"})


def refused(path: Path, *words: str) -> None:
    """Opening ``path`` is refused with one line that names it and holds ``words``."""
    with pytest.raises(StoreError) as caught:
        EpisodeStore.open(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and all(word in message for word in words), message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


# --------------------------------------------------------------------------------------------------------- round trips


def test_what_was_written_is_read_back_sorted_by_class(tmp_path):
    header = make(tmp_path / "s")
    store = EpisodeStore.open(tmp_path / "s")
    samples, class_index, drawer = content()
    order = np.argsort(class_index, kind="stable")
    assert np.array_equal(store.samples, samples[order])
    assert store.sample_metadata("drawer") == tuple(drawer[row] for row in order)
    assert store.classes == NAMES
    assert store.class_count.tolist() == [3, 5, 1, 4] and store.class_start.tolist() == [0, 3, 8, 9]
    assert store.class_count.dtype == store.class_start.dtype == np.int64
    assert store.class_metadata == CLASSES.metadata
    assert (store.sample_shape, store.dtype, store.path) == ((1, 5, 6), np.uint8, tmp_path / "s")
    assert store.header == header == read_header(str(tmp_path / "s"))
    assert store.digest == hashlib.sha256((tmp_path / "s").read_bytes()).hexdigest()
    assert header.description == {"source": "test", "polarity": "none"}


def test_vectors_without_any_metadata(tmp_path):
    samples = np.arange(12, dtype=np.float32).reshape(4, 3)
    write_store(tmp_path / "s", samples, np.array([0, 0, 1, 1]), ClassTable(("x", "y")), {}, {})
    store = EpisodeStore.open(tmp_path / "s")
    assert np.array_equal(store.samples, samples) and store.samples.dtype == np.float32
    assert store.class_metadata == {}
    with pytest.raises(StoreError, match="no sample metadata column 'drawer'"):
        store.sample_metadata("drawer")


def test_the_samples_are_a_read_only_view_of_the_file(tmp_path):
    make(tmp_path / "s")
    before = pa.total_allocated_bytes()
    store = EpisodeStore.open(tmp_path / "s")
    with pytest.raises(ValueError):
        store.samples[0] = 0
    for table in (store.class_start, store.class_count):
        with pytest.raises(ValueError):
            table[0] = 1
    address = store.samples.ctypes.data
    ranges = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(tmp_path / "s"))
    ]
    bounds = [[int(end, 16) for end in line[0].split("-")] for line in ranges]
    assert any(low <= address < high for low, high in bounds)
    assert pa.total_allocated_bytes() - before < store.samples.nbytes


def test_the_same_input_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        make(tmp_path / name)
    for suffix in ("", ".header"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    samples, class_index, drawer = content()
    description = {"polarity": "none", "source": "test"}
    write_store(tmp_path / "four", samples, class_index, CLASSES, {"drawer": drawer}, description)
    assert (tmp_path / "four.header").read_bytes() == (tmp_path / "one.header").read_bytes()
    assert make(tmp_path / "three", seed=1).digest != read_header(tmp_path / "one").digest


def test_a_memory_map_gives_the_same_store_as_an_array(tmp_path, monkeypatch):
    samples, class_index, drawer = content()
    mapped = np.memmap(tmp_path / "raw", np.uint8, "w+", shape=samples.shape)
    mapped[:] = samples
    monkeypatch.setattr(store_writer, "ROWS_AT_ONCE", 2)
    header = write_store(tmp_path / "m", mapped, class_index, CLASSES, {"drawer": drawer}, {})
    assert header.digest == make(tmp_path / "s").digest


def test_a_store_is_never_overwritten(tmp_path):
    make(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(StoreError, match="never overwritten"):
        make(tmp_path / "s", seed=1)
    assert (tmp_path / "s").read_bytes() == before
    (tmp_path / "s").unlink()
    with pytest.raises(StoreError, match=r"s\.header: exists already"):
        make(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": np.zeros((13, 5), np.uint8)}, "a uint8 sample cannot have the shape"),
        ({"samples": np.zeros((13, 5), np.float64)}, "neither uint8"),
        ({"samples": np.zeros((13, 5), ">f4")}, "neither uint8"),
        ({"samples": np.full((13, 5), np.nan, np.float32)}, "not finite"),
        ({"class_index": np.zeros(12, int)}, "class_index must be 13 integers"),
        ({"class_index": np.zeros(13)}, "class_index must be 13 integers"),
        ({"class_index": np.full(13, 4)}, "must lie in 0 … 3"),
        ({"class_index": np.full(13, -1)}, "must lie in 0 … 3"),
        ({"class_index": np.zeros(13, int)}, "class 'beech' has no samples"),
        ({"classes": ClassTable(("a", "a", "b", "c"))}, "distinct"),
        ({"classes": ClassTable(("a", "", "b", "c"))}, "not empty"),
        ({"classes": ClassTable(())}, "0 classes"),
        ({"classes": ClassTable(NAMES, {"family": ("x",)})}, "'family' must have 4 values, got 1"),
        ({"sample_metadata": {"drawer": ["x"]}}, "'drawer' must have 13 values, got 1"),
        ({"classes": ClassTable(("a", "\udcff", "b", "c"))}, "not valid Unicode"),
        ({"sample_metadata": {"The drawer": ["x"] * 13}}, "lower-case names"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, change, words):
    samples, class_index, _ = content()
    arguments = {"samples": samples, "class_index": class_index, "classes": CLASSES, "sample_metadata": {}}
    with pytest.raises(StoreError, match=words):
        write_store(tmp_path / "s", **{**arguments, **change}, description={})
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_a_store_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        make(tmp_path / "file" / "s")


# ------------------------------------------------------------------------------------------------------------ damage


def test_what_is_no_store_is_refused(tmp_path):
    refused(tmp_path / "missing", "no such episode store", "metafleet ingest")
    refused(tmp_path, "is a folder")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "has no empty.header")
    make(tmp_path / "s")
    shutil.copy(tmp_path / "s", tmp_path / "arrow")
    refused(tmp_path / "arrow", "has no arrow.header", "ingest again")
    (tmp_path / "s").unlink()
    refused(tmp_path / "s", "no such episode store")
    with pytest.raises(StoreError, match="no such episode store"):
        read_header(tmp_path / "s")


def test_a_crash_between_data_and_header_leaves_a_store_that_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "write_header", lambda path, header: os.kill(os.getpid(), signal.SIGKILL))
    writer = multiprocessing.get_context("fork").Process(target=make, args=(tmp_path / "s",))
    writer.start()
    writer.join(30)
    assert writer.exitcode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["s"]
    refused(tmp_path / "s", "its ingest was interrupted")


def test_a_failure_between_data_and_header_leaves_nothing(tmp_path, monkeypatch):
    def full(path, header):
        assert path.exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_writer, "write_header", full)
    with pytest.raises(StoreError, match="No space left"):
        make(tmp_path / "s")
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    samples, class_index, _ = content()
    with pytest.raises(StoreError, match="shorten it"):
        write_store(tmp_path / "s", samples, class_index, CLASSES, {}, {"source": "x" * store_header.HEADER_LIMIT})
    assert os.listdir(tmp_path) == []


def test_a_header_of_another_store_is_refused(tmp_path):
    make(tmp_path / "s")
    make(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other.header", tmp_path / "s.header")
    refused(tmp_path / "s", "SHA-256", "damaged or altered")


def test_a_truncated_file_is_refused_without_hashing_it(tmp_path, monkeypatch):
    make(tmp_path / "s")
    os.truncate(tmp_path / "s", 100)
    hashed = count_hashes(monkeypatch)
    refused(tmp_path / "s", "has 100 bytes where its header says", "truncated")
    assert hashed == []


def test_a_file_exchanged_between_check_and_use_is_refused(tmp_path, monkeypatch):
    make(tmp_path / "s")
    make(tmp_path / "other", seed=1)
    verify = store_module.verify

    def verify_then_lose(path, header):
        identity = verify(path, header)
        os.replace(tmp_path / "other", path)
        return identity

    monkeypatch.setattr(store_module, "verify", verify_then_lose)
    refused(tmp_path / "s", "changed while it was opened")


def test_another_schema_version_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(store_header, "SCHEMA_VERSION", 2)
    make(tmp_path / "s")
    monkeypatch.undo()
    refused(tmp_path / "s", "schema version 2, this Metafleet reads 1")


def test_an_oversized_or_noncanonical_header_is_refused(tmp_path):
    make(tmp_path / "s")
    header = tmp_path / "s.header"
    body, digest = msgpack.unpackb(header.read_bytes())
    header.write_bytes(msgpack.packb([body.replace(b"test", b"rest"), digest]))
    refused(tmp_path / "s", "checksum")
    reordered = msgpack.packb(dict(reversed(msgpack.unpackb(body).items())))
    header.write_bytes(msgpack.packb([reordered, hashlib.sha256(reordered).digest()]))
    refused(tmp_path / "s", "canonical")
    header.write_bytes(b"\0" * (store_header.HEADER_LIMIT + 1))
    refused(tmp_path / "s", "larger than")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bytes of a store's data file and header."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder / "s")
    return (folder / "s").read_bytes(), (folder / "s.header").read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.sampled_from([0, 1]), cut=st.booleans(), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_truncation_and_bit_flip_is_refused(tmp_path, whole, which, cut, where, bit):
    parts = [bytearray(part) for part in whole]
    position = int(where * len(parts[which]))
    if cut:
        del parts[which][position:]
    else:
        parts[which][position] ^= 1 << bit
    (tmp_path / "s").write_bytes(parts[0])
    (tmp_path / "s.header").write_bytes(parts[1])
    with pytest.raises(StoreError, match="s"):
        EpisodeStore.open(tmp_path / "s")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_arrow_survives_bytes_that_a_forged_header_vouches_for(tmp_path, whole, where, value):
    """Past the digest, a damaged file opens as a valid store (a changed pixel) or is refused; it never crashes."""
    data = bytearray(whole[0])
    data[int(where * len(data))] = value
    (tmp_path / "s").write_bytes(data)
    body = msgpack.unpackb(msgpack.unpackb(whole[1])[0])
    packed = msgpack.packb({**body, "digest": hashlib.sha256(data).hexdigest()})
    (tmp_path / "s.header").write_bytes(msgpack.packb([packed, hashlib.sha256(packed).digest()]))
    try:
        store = EpisodeStore.open(tmp_path / "s")
    except StoreError:
        return
    assert store.samples.shape == (13, 1, 5, 6) and int(store.samples.sum()) >= 0
    assert len(store.sample_metadata("drawer")) == 13


def forged(path: Path, batches: list[pa.RecordBatch], **changes: object) -> None:
    """A store whose header vouches for a data file that breaks a rule of the format."""
    with pa.ipc.new_file(path, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    data = path.read_bytes()
    fields = {
        "sample_shape": (1, 5, 6),
        "dtype": "uint8",
        "samples": 13,
        "classes": 4,
        "class_columns": ("family", "genus"),
        "sample_columns": ("drawer",),
        "description": {},
        **changes,
    }
    header = StoreHeader(hashlib.sha256(data).hexdigest(), len(data), **fields)
    store_header.write_header(path, header)


def test_files_that_break_the_format_are_refused_even_with_a_valid_digest(tmp_path):
    make(tmp_path / "s")
    batch = pa.ipc.open_file(tmp_path / "s").get_batch(0)
    forged(tmp_path / "fine", [batch])
    EpisodeStore.open(tmp_path / "fine")

    forged(tmp_path / "two", [batch, batch])
    refused(tmp_path / "two", "2 record batches")
    forged(tmp_path / "columns", [batch], sample_columns=("colour",))
    refused(tmp_path / "columns", "columns are not those")
    forged(tmp_path / "short", [batch.slice(0, 9)])
    refused(tmp_path / "short", "9 samples where its header says 13")
    forged(tmp_path / "shuffled", [batch.take(pa.array([12, *range(12)]))])
    refused(tmp_path / "shuffled", "not sorted by class")
    forged(tmp_path / "empty_class", [batch.take(pa.array([0] * 8 + [9] * 5))])
    refused(tmp_path / "empty_class", "distinct ones")

    def replaced(column: str, codes: list[int], names: list[str | None]) -> pa.RecordBatch:
        indices = pa.Array.from_buffers(pa.int32(), 13, [None, pa.py_buffer(np.array(codes, np.int32))])
        array = pa.DictionaryArray.from_arrays(indices, pa.array(names, pa.string()), safe=False)
        place = batch.schema.get_field_index(column)
        return batch.set_column(place, batch.schema.field(column), array)

    forged(tmp_path / "varies", [replaced("class.family", [0] * 12 + [1], ["x", "y"])])
    refused(tmp_path / "varies", "class.family varies within a class")
    forged(tmp_path / "wild", [replaced("sample.drawer", [1 << 30] * 13, ["x"])])
    refused(tmp_path / "wild")
    forged(tmp_path / "null", [replaced("sample.drawer", [0] * 13, [None])])
    refused(tmp_path / "null", "null")
    place = batch.schema.get_field_index("sample.drawer")
    absent = pa.DictionaryArray.from_arrays(pa.array([None, *[0] * 12], pa.int32()), pa.array(["x"]))
    forged(tmp_path / "absent", [batch.set_column(place, batch.schema.field(place), absent)])
    refused(tmp_path / "absent", "null")
    forged(tmp_path / "twice", [replaced("class", [0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3], ["a", "a", "b", "c"])])
    refused(tmp_path / "twice", "distinct ones")


# ------------------------------------------------------------------------------------------------------------- stamps


def count_hashes(monkeypatch) -> list[str]:
    hashed = []
    digest = hashlib.file_digest

    def counted(file, name):
        hashed.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return hashed


def settle(monkeypatch) -> None:
    """Every file counts as old enough to be stamped."""
    monkeypatch.setattr(store_header, "SETTLED_SECONDS", -1.0)


def test_a_settled_store_is_hashed_once(tmp_path, monkeypatch):
    make(tmp_path / "s")
    settle(monkeypatch)
    hashed = count_hashes(monkeypatch)
    for _ in range(3):
        EpisodeStore.open(tmp_path / "s")
    (tmp_path / "link").symlink_to("s")
    (tmp_path / "link.header").symlink_to("s.header")
    EpisodeStore.open(tmp_path / "link")
    assert hashed == [str(tmp_path / "s")]


def test_a_store_changed_a_moment_ago_is_hashed_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(store_header, "SETTLED_SECONDS", 3600.0)
    make(tmp_path / "s")
    hashed = count_hashes(monkeypatch)
    for _ in range(2):
        EpisodeStore.open(tmp_path / "s")
    assert len(hashed) == 2


def test_a_change_after_the_stamp_is_found_even_if_size_and_mtime_are_kept(tmp_path, monkeypatch):
    make(tmp_path / "s")
    settle(monkeypatch)
    EpisodeStore.open(tmp_path / "s")
    times = (tmp_path / "s").stat()
    with open(tmp_path / "s", "r+b") as file:
        file.seek(times.st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    while (tmp_path / "s").stat().st_ctime_ns == times.st_ctime_ns:  # the file system's clock ticks in milliseconds
        os.utime(tmp_path / "s")
    os.utime(tmp_path / "s", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (tmp_path / "s").stat().st_mtime_ns == times.st_mtime_ns
    refused(tmp_path / "s", "SHA-256")


def test_a_damaged_stamp_is_no_stamp(tmp_path, monkeypatch, cache):
    make(tmp_path / "s")
    settle(monkeypatch)
    EpisodeStore.open(tmp_path / "s")
    [stamp] = [path for path in (cache / "verified").iterdir() if path.suffix != ".lock"]
    stamp.write_bytes(b"\xc1 nonsense")
    hashed = count_hashes(monkeypatch)
    EpisodeStore.open(tmp_path / "s")
    EpisodeStore.open(tmp_path / "s")
    assert len(hashed) == 1


def test_without_a_writable_cache_the_store_is_just_hashed(tmp_path, monkeypatch):
    make(tmp_path / "s")
    settle(monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setenv("METAFLEET_CACHE", str(tmp_path / "file"))
    hashed = count_hashes(monkeypatch)
    for _ in range(2):
        EpisodeStore.open(tmp_path / "s")
    assert len(hashed) == 2


def test_a_user_without_a_home_can_open_a_store(tmp_path, monkeypatch):
    def homeless(cls):
        raise RuntimeError("Could not determine home directory.")

    make(tmp_path / "s")
    monkeypatch.delenv("METAFLEET_CACHE")
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    hashed = count_hashes(monkeypatch)
    EpisodeStore.open(tmp_path / "s")
    assert len(hashed) == 1


def _open_counting(path: Path, start, log: Path) -> None:
    digest = hashlib.file_digest

    def counted(file, name):
        with open(log, "a") as out:
            out.write("hashed\n")
        time.sleep(0.1)  # long enough for the others to come by, were it not for the lock
        return digest(file, name)

    hashlib.file_digest = counted
    store_header.SETTLED_SECONDS = -1.0
    start.wait(30)
    assert len(EpisodeStore.open(path).classes) == 4
    with open(log, "a") as out:
        out.write("opened\n")


def test_four_workers_that_start_at_once_hash_once(tmp_path):
    make(tmp_path / "s")
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    arguments = (tmp_path / "s", start, tmp_path / "log")
    workers = [context.Process(target=_open_counting, args=arguments, daemon=True) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    lines = (tmp_path / "log").read_text().split()
    assert lines.count("opened") == 4 and lines.count("hashed") == 1
