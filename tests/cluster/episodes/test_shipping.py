"""Stores on their way into a node's cache."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import pickle
import resource
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.episodes import shipping
from cluster.episodes.shipping import Arrival, read_chunk
from cluster.episodes.store import ClassTable, EpisodeStore, StoreHeader, read_header, write_store
from cluster.episodes.store_header import header_path, write_header
from cluster.errors import StoreError, StoreMissingError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stores of this node lie; chunks are so small that each store takes several."""
    monkeypatch.setenv("METAFLEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shipping, "CHUNK_BYTES", 512)
    return tmp_path / "cache" / "stores"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The sender's store."""
    return made(tmp_path / "store.arrow", {"source": "test"})


def made(path: Path, description: dict[str, str]) -> Path:
    samples = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
    write_store(path, samples, np.repeat(np.arange(3), 4), ClassTable(("a", "b", "c")), {}, description)
    return path


def send(store: Path, header: StoreHeader | None = None) -> tuple[Path, int]:
    """Bring a store into the cache; where it is then, and how many chunks that took."""
    arrival, chunks = Arrival(header or read_header(store)), 0
    while (wanted := arrival.wanted) is not None:
        arrival.add(read_chunk(store, wanted))
        chunks += 1
    return arrival.path, chunks


def is_there(path: Path, store: Path) -> None:
    """The cache holds the store, the lock, and nothing else."""
    assert path.read_bytes() == store.read_bytes()
    assert header_path(path).read_bytes() == header_path(store).read_bytes()
    assert (EpisodeStore.open(path).samples == EpisodeStore.open(store).samples).all()
    assert only(path.parent) == {path.name, header_path(path).name, path.with_suffix(".lock").name}


def only(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.exists() else set()


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """One line with these words, that survives the way to another process."""
    with pytest.raises(StoreError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def is_free(lock: Path) -> bool:
    """Nobody holds the lock."""
    with open(lock, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


# ------------------------------------------------------------------------------------------------------ as it should be


def test_a_store_comes_chunk_by_chunk_and_once(store: Path, cache: Path) -> None:
    path, chunks = send(store)
    assert path == cache / f"{read_header(store).digest}.arrow"
    assert chunks == -(-store.stat().st_size // 512) > 3
    is_there(path, store)
    before = path.stat()
    assert send(store) == (path, 0)
    assert path.stat() == before and is_free(path.with_suffix(".lock"))


def test_another_description_is_another_source_and_not_another_store(store: Path, tmp_path: Path) -> None:
    other = made(tmp_path / "other.arrow", {"source": "elsewhere"})
    path, _ = send(store)
    assert send(other) == (path, 0)
    is_there(path, store)


def test_a_cache_that_cannot_be_written_but_has_the_store_will_do(
    store: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = send(store)
    path.with_suffix(".lock").unlink()
    path.with_suffix(".lock").mkdir()  # not even root can open it for writing
    assert send(store) == (path, 0)


def _arrive(store: Path, start: Any, results: Any) -> None:
    start.wait()
    path, chunks = send(store)
    EpisodeStore.open(path)
    results.put(chunks)


def test_of_many_processes_one_is_sent_the_store(store: Path, cache: Path) -> None:
    start, results = FORK.Barrier(6), FORK.Queue()
    workers = [FORK.Process(target=_arrive, args=(store, start, results)) for _ in range(6)]
    for worker in workers:
        worker.start()
    chunks = sorted(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert chunks[:5] == [0] * 5 and chunks[5] > 3
    is_there(cache / f"{read_header(store).digest}.arrow", store)


# ----------------------------------------------------------------------------------------------------- damaged, foreign


@pytest.mark.parametrize("damage", ["flipped", "truncated", "no header", "bad header", "data of another", "no data"])
def test_a_damaged_store_in_the_cache_is_replaced(store: Path, damage: str) -> None:
    path, _ = send(store)
    match damage:
        case "flipped":
            data = bytearray(path.read_bytes())
            data[700] ^= 1
            path.write_bytes(data)
        case "truncated":
            os.truncate(path, 100)
        case "no header":
            header_path(path).unlink()
        case "bad header":
            header_path(path).write_bytes(b"no header")
        case "data of another":
            path.unlink()
            header_path(path).unlink()
            samples = np.zeros((3, 1, 8, 8), np.uint8)
            write_store(path, samples, np.arange(3), ClassTable(("a", "b", "c")), {}, {})
        case "no data":
            path.unlink()
    assert send(store)[1] > 3
    is_there(path, store)


def test_bytes_of_another_store_are_refused_and_leave_nothing(store: Path, cache: Path) -> None:
    header = replace(read_header(store), digest="0" * 64)
    with refused("what came is not the store 000000000000…", "start the run again"):
        send(store, header)
    assert only(cache) == {f"{'0' * 64}.lock"} and is_free(cache / f"{'0' * 64}.lock")


def test_more_bytes_than_the_header_says_are_refused(store: Path, cache: Path) -> None:
    header = read_header(store)
    arrival = Arrival(replace(header, size=700))
    arrival.add(bytes(512))
    with refused("what came is not the store"):
        arrival.add(bytes(512))
    assert only(cache) == {f"{header.digest}.lock"}


# ---------------------------------------------------------------------------------------------------------- interrupted


def test_what_is_given_up_leaves_nothing(store: Path, cache: Path) -> None:
    arrival = Arrival(read_header(store))
    arrival.add(read_chunk(store, 0))
    lock = arrival.path.with_suffix(".lock")
    assert arrival.wanted == 512 and not is_free(lock)
    assert not arrival.path.exists()
    arrival.close()
    assert only(cache) == {lock.name} and is_free(lock)


def _arrive_and_die(store: Path) -> None:
    arrival = Arrival(read_header(store))
    arrival.add(read_chunk(store, 0))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_leaves_no_store_and_its_successor_begins_anew(store: Path, cache: Path) -> None:
    worker = FORK.Process(target=_arrive_and_die, args=(store,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    digest = read_header(store).digest
    assert only(cache) == {f"{digest}.lock", f"{digest}.partial"}
    assert send(store)[1] > 3
    is_there(cache / f"{digest}.arrow", store)


def test_a_worker_killed_between_data_and_header_is_succeeded(
    store: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "write_header", lambda path, header: os.kill(os.getpid(), signal.SIGKILL))
    worker = FORK.Process(target=send, args=(store,))
    worker.start()
    worker.join(60)
    monkeypatch.undo()
    monkeypatch.setenv("METAFLEET_CACHE", str(cache.parent))
    path = cache / f"{read_header(store).digest}.arrow"
    assert worker.exitcode == -signal.SIGKILL and path.exists()
    assert send(store)[1] > 0
    is_there(path, store)


# ---------------------------------------------------------------------------------------------------- disks that refuse


def test_a_cache_that_cannot_be_written_is_said(store: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder must be")
    with refused(str(tmp_path / "cache" / "stores"), "cannot be kept there", "METAFLEET_CACHE"):
        send(store)


def test_no_home_folder_is_said(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(shipping, "cache_folder", homeless)
    with refused("no home folder", "METAFLEET_CACHE"):
        send(store)


def test_a_disk_without_room_says_so_before_anything_is_sent(
    store: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        assert length == store.stat().st_size
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with refused(str(cache), "No space left on device", "METAFLEET_CACHE"):
        Arrival(read_header(store))
    assert only(cache) == {f"{read_header(store).digest}.lock"}


def _arrive_in_little_room(store: Path, results: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    del os.posix_fallocate
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        send(store)
    except StoreError as error:
        results.put((str(error), sorted(os.listdir(Path(os.environ["METAFLEET_CACHE"]) / "stores"))))


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(store: Path, cache: Path) -> None:
    results = FORK.Queue()
    worker = FORK.Process(target=_arrive_in_little_room, args=(store, results))
    worker.start()
    message, left = results.get(timeout=60)
    worker.join(60)
    assert str(cache) in message and "METAFLEET_CACHE" in message and "File too large" in message, message
    assert left == [f"{read_header(store).digest}.lock"]


# ----------------------------------------------------------------------------------------------------- the sending side


def test_a_source_that_goes_or_shrinks_is_said(store: Path) -> None:
    with refused(str(store), "ends at 1000000 bytes", "do not change it"):
        read_chunk(store, 1_000_000)
    store.unlink()
    with refused(str(store), "cannot be read (No such file"):
        read_chunk(store, 0)


def test_only_what_is_not_there_is_missing(tmp_path: Path, store: Path) -> None:
    for absent in (tmp_path / "absent", store / "below a file", tmp_path / "absent" / "deep"):
        with pytest.raises(StoreMissingError, match="no such episode store"):
            read_header(absent)
    header = read_header(store)
    (tmp_path / "loop").symlink_to("loop")
    header_path(store).unlink()
    for path, why in ((tmp_path, "is a folder"), (tmp_path / "loop", "cannot be read"), (store, "has no store.arrow")):
        with pytest.raises(StoreError, match=why) as caught:
            read_header(path)
        assert not isinstance(caught.value, StoreMissingError)
    write_header(store, header)
    assert read_header(store) == header
