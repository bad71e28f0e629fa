"""Fuzz of the episode store: 5,400 mutated stores and headers, each refused in one line or read as it was written.

Everything is drawn from fixed seeds. What other fuzz tests use as well:

mutated         bytes with a few random changes: flips, runs, cuts, copies, swaps, splices, lengths, nesting, pickles
altered         a tree of plain data with one value changed: what stays well-formed and gets past a digest
Booby           a pickle of it makes a file when it is loaded
Trial           reads what a mutation left, and keeps what is neither a refusal as documented nor an allowed content
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
import random
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pytest

from cluster.episodes.store import ClassTable, EpisodeStore, write_store
from cluster.errors import MetafleetError, StoreError

CASE_SECONDS = 2.0
"""Processor time of one read: these files are a few kilobytes."""
MEMORY_LIMIT = 256 << 20
"""Memory that reading them may add at its peak, bytes."""
LONGEST_MESSAGE = 5000

# ------------------------------------------------------------------------------------------------------------ mutations

HUGE = (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")
"""msgpack's array, map, bin, str and ext with a length of four bytes."""


class Booby:
    """Loading a pickle of it makes the file ``marker``: somebody's code has run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def pickles(marker: Path) -> list[bytes]:
    """Pickles that betray whoever loads them, bare and as a record of msgpack."""
    bare = [pickle.dumps(Booby(marker), protocol) for protocol in (0, 2, 4)]
    return [*bare, msgpack.packb(bare[2]), msgpack.packb(["metafleet", 1, bare[2], hashlib.sha256(bare[2]).digest()])]


def mutated(data: bytes, donors: Sequence[bytes], rng: random.Random) -> bytes:
    """``data`` with one to three random changes, never ``data`` itself; ``donors`` are spliced in."""
    while True:
        result = data
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            result = rng.choice(CHANGES)(result, donors, rng)
        if result != data:
            return result


def _flip(data: bytes, donors: Sequence[bytes], rng: random.Random) -> bytes:
    flipped = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _overwrite(data: bytes, donors: Sequence[bytes], rng: random.Random) -> bytes:
    at, length = _span(data, rng)
    run = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return data[:at] + run + data[at + length :]


def _truncate(data: bytes, donors: Sequence[bytes], rng: random.Random) -> bytes:
    return data[: rng.randint(0, len(data))]


def _insert(data: bytes, donors: Sequence[bytes], rng: random.Random) -> bytes:
    at, length = rng.randint(0, len(data)), rng.choice((1, 2, 4, 8, 64))
    return data[:at] + rng.randbytes(length) + data[at:]


def _delete(data: bytes, donors: Sequence[bytes], rng: random.Random) -> bytes:
    at, length = _span(data, rng)
    return data[:at] + data[at + length :]


def _duplicate(data: bytes, donors: Sequence[bytes], rng: random.Random) -> bytes:
    at, length = _span(data, rng)
    return data[: at + length] * rng.choice((1, 1, 3)) + data[at:]


def _swap(data: bytes, donors: Sequence[bytes], rng: random.Random) -> bytes:
    a, b, c, d = sorted(rng.randint(0, len(data)) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _splice(data: bytes, donors: Sequence[bytes], rng: random.Random) -> bytes:
    donor = rng.choice(donors)
    if rng.random() < 0.2:
        return donor
    start, size = _span(donor, rng)
    at, length = _span(data, rng)
    return data[:at] + donor[start : start + size] + data[at + rng.choice((0, length, size)) :]


def _huge_length(data: bytes, donors: Sequence[bytes], rng: random.Random) -> bytes:
    at = rng.choice((0, rng.randint(0, len(data))))
    length = rng.choice((0xFFFFFFFF, 0x7FFFFFFF, 0x40000000, len(data) + 1)).to_bytes(4, "big")
    return data[:at] + rng.choice(HUGE) + length + data[at + rng.choice((0, 5)) :]


def _nest(data: bytes, donors: Sequence[bytes], rng: random.Random) -> bytes:
    at, depth = rng.choice((0, rng.randint(0, len(data)))), rng.choice((10, 500, 1000, 20_000))
    return data[:at] + rng.choice((b"\x91", b"\x81\x01", b"[", b"{")) * depth + data[at:]


CHANGES = (
    *(_flip, _overwrite, _truncate, _insert, _delete, _duplicate, _swap, _splice, _splice, _huge_length),
    _nest,
)


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    """Offset and length, at most half of ``data`` and mostly short."""
    length = rng.choice((1, 2, 4, 8, 32, max(1, len(data) // 2)))
    return rng.randint(0, max(0, len(data) - length)), length


def nested(depth: int) -> Any:
    """A list in a list in a list …"""
    deep: Any = []
    for _ in range(depth):
        deep = [deep]
    return deep


def odd_value(rng: random.Random, marker: Path) -> Any:
    """A value where another one was meant."""
    numbers = [0, -1, 1, 2**31, 2**63, 2**64 - 1, -(2**63), 1.5, float("nan"), float("inf"), -float("inf"), True]
    texts = ["", "x", "\0", "..", "/", "a\nb", "x" * 300, "../" * 40, "θ", b"", b"\xff", pickles(marker)[1]]
    trees = [None, [], {}, [[]], [1, 2, 3], {"a": 1}, nested(rng.choice((50, 400))), {"x" * 40: [None] * 100}]
    return rng.choice((*numbers, *texts, *trees, msgpack.Timestamp(5, 6), msgpack.ExtType(7, b"ext")))


def altered(tree: Any, rng: random.Random, marker: Path) -> Any:
    """A copy of plain data in which one value was exchanged, left out, doubled or moved."""
    if not isinstance(tree, list | dict) or not tree or rng.random() < 0.05:
        return odd_value(rng, marker)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = rng.choice(keys)
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if isinstance(tree[key], list | dict) and tree[key] and rng.random() < 0.7:
        copy[key] = altered(tree[key], rng, marker)
        return copy
    match rng.randrange(5):
        case 0:
            del copy[key]
        case 1:
            other = rng.choice(keys)
            copy[key], copy[other] = copy[other], copy[key]
        case 2 if isinstance(copy, list):
            copy.insert(key, copy[key])
        case _:
            copy[key] = odd_value(rng, marker)
    return copy


# --------------------------------------------------------------------------------------------------------------- trials


@dataclass
class Trial:
    """Reads mutated files one after another; ``finish`` fails if one of them did what none may do."""

    read: Callable[[], Any]
    """Reads the file and returns what it holds, in a form that ``==`` compares."""
    error: type[MetafleetError]
    """How damage is reported."""
    names: Sequence[Path]
    """A refusal names one of these."""
    marker: Path
    """The file that a loaded pickle makes."""
    allowed: Sequence[Any] | None = None
    """What may be read; ``None`` where a mutation can make a valid file of other content."""
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)
    """The first example of each kind of finding."""

    def __post_init__(self) -> None:
        self._memory = peak_memory()

    def case(self, describe: Callable[[], str]) -> None:
        """Read once; ``describe`` gives the mutation in words, should it be needed."""
        before = time.process_time()
        try:
            outcome, said = self._judged()
        except Exception as error:
            outcome, said = f"{type(error).__name__} escapes from {_product_line(error)}", str(error)
        took = time.process_time() - before
        self.outcomes[outcome] += 1
        if outcome not in ("refused", "read"):
            self.findings.setdefault(outcome, f"{said[:120]!r}; {describe()}")
        if took > CASE_SECONDS:
            self.findings.setdefault(f"takes more than {CASE_SECONDS} s", f"{took:.1f} s; {describe()}")
        if self.marker.exists():
            self.marker.unlink()
            self.findings.setdefault("a pickle was loaded", describe())

    def _judged(self) -> tuple[str, str]:
        """The kind of outcome of one read, and the message or content that shows it."""
        try:
            content = self.read()
        except self.error as error:
            message = str(error)
            if not message or "\n" in message or len(message) > LONGEST_MESSAGE:
                return "a message that is no short line", message
            if not any(str(name) in message for name in self.names):
                return "a message that does not name the file", message
            return "refused", message
        if self.allowed is not None and content not in self.allowed:
            return "other content is read as if it were whole", str(content)
        return "read", ""

    def finish(self, cases: int, *, both: bool = True) -> None:
        """Assert that ``cases`` were tried without a finding, and (``both``) that some were refused and some read."""
        if (grown := peak_memory() - self._memory) > MEMORY_LIMIT:
            self.findings["memory"] = f"the peak has grown by {grown >> 20} MiB"
        counts = [f"{count} × {outcome}" for outcome, count in self.outcomes.most_common()]
        assert not self.findings, "\n".join(["findings:", *map(": ".join, self.findings.items()), "counts:", *counts])
        assert sum(self.outcomes.values()) == cases
        assert self.outcomes["refused"] > 0
        assert self.outcomes["read"] > 0 or not both


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _product_line(error: BaseException) -> str:
    """The innermost line of ours, outside the tests, that an exception has passed."""
    root = str(Path(__file__).parents[3]) + "/"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(root)]
    ours = [f for f in frames if not f.filename.startswith((root + "tests/", root + ".venv/"))]
    return f"{ours[-1].filename.removeprefix(root)}:{ours[-1].lineno}" if ours else "outside"


# --------------------------------------------------------------------------------------------------------------- stores


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFLEET_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    class_index = np.repeat(np.arange(3), [3, 2, 4])
    samples = np.random.default_rng(0).integers(0, 256, (9, 1, 2, 3), dtype=np.uint8)
    classes = ClassTable(("ash", "beech", "élm"), {"family": ("olive", "oak", "olive")})
    drawers = [f"drawer {number % 2}" for number in range(9)]
    write_store(tmp_path / "s", samples, class_index, classes, {"drawer": drawers}, {"source": "test"})
    return tmp_path / "s"


def content(path: Path) -> tuple[Any, ...]:
    """Everything that a store gives its users."""
    opened = EpisodeStore.open(path)
    tables = (opened.class_start.tolist(), opened.class_count.tolist(), dict(opened.class_metadata))
    drawers = {name: opened.sample_metadata(name) for name in opened.header.sample_columns}
    return opened.samples.shape, opened.samples.tobytes(), opened.classes, *tables, drawers, opened.header


def files_of(path: Path) -> tuple[bytes, bytes]:
    return path.read_bytes(), path.with_name("s.header").read_bytes()


def put(path: Path, data: bytes, header: bytes) -> None:
    path.write_bytes(data)
    path.with_name("s.header").write_bytes(header)


def vouched(body: dict[str, Any], data: bytes) -> bytes:
    """A header like ``body`` for the data file ``data``, all its digests right."""
    return sealed(msgpack.packb({**body, "digest": hashlib.sha256(data).hexdigest(), "size": len(data)}))


def sealed(packed: bytes) -> bytes:
    raw: bytes = msgpack.packb([packed, hashlib.sha256(packed).digest()])
    return raw


def test_2400_damaged_data_files_and_headers(store: Path, tmp_path: Path) -> None:
    """1,200 of each: nothing but the store as it was written is ever opened."""
    rng, marker = random.Random(1), tmp_path / "marker"
    data, header = files_of(store)
    donors = [data, header, *pickles(marker)]
    trial = Trial(lambda: content(store), StoreError, [store], marker, [content(store)])
    for number in range(1200):
        for files in ((mutated(data, donors, rng), header), (data, mutated(header, donors, rng))):
            put(store, *files)
            trial.case(lambda n=number, files=files: f"case {n}: {len(files[0])} + {len(files[1])} bytes")
    trial.finish(2400, both=False)


def test_1000_headers_whose_checksum_is_right(store: Path, tmp_path: Path) -> None:
    """500 with one value of the header changed, 500 with its bytes changed, each with the checksum made right."""
    rng, marker = random.Random(2), tmp_path / "marker"
    data, header = files_of(store)
    packed = msgpack.unpackb(header)[0]
    # A description is free text: of what else differs, nothing may be opened.
    whole = content(store)[:-1]
    trial = Trial(lambda: content(store)[:-1], StoreError, [store], marker, [whole])
    for number in range(500):
        changed = msgpack.packb(altered(msgpack.unpackb(packed), rng, marker))
        for body in (changed, mutated(packed, [data, header, *pickles(marker)], rng)):
            put(store, data, sealed(body))
            trial.case(lambda n=number, body=body: f"case {n}: {body!r}")
    trial.finish(1000)


# ----------------------------------------------------------------------------------------------- Arrow, past the digest


def compressed(data: bytes, codec: str) -> bytes:
    batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
    return arrow_file(batch, pa.ipc.IpcWriteOptions(compression=codec))


def arrow_file(batch: pa.RecordBatch, options: pa.ipc.IpcWriteOptions | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    raw: bytes = sink.getvalue().to_pybytes()
    return raw


def with_pickled_type(data: bytes, marker: Path) -> bytes:
    """The store with its first column marked as a type that old versions of Arrow unpickled."""
    batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
    keys = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickles(marker)[1]}
    fields = [pa.field("sample", batch.column(0).storage.type, False, metadata=keys), *list(batch.schema)[1:]]
    columns = [batch.column(0).storage, *batch.columns[1:]]
    return arrow_file(pa.record_batch(columns, schema=pa.schema(fields)))


def metadata_spans(data: bytes) -> list[tuple[int, int]]:
    """Where the metadata of Arrow's messages and the footer lie, start and end."""
    starts = [at for at in range(0, len(data) - 8, 8) if data[at : at + 4] == b"\xff\xff\xff\xff"]
    spans = [(at, at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")) for at in starts]
    footer = int.from_bytes(data[-10:-6], "little")
    return [*spans, (len(data) - 10 - footer, len(data))]


def mutated_arrow(data: bytes, donors: Sequence[bytes], rng: random.Random) -> bytes:
    """``data`` with a change, in most cases of its metadata: a word of it, or any bytes."""
    kind = rng.random()
    if kind < 0.15:
        return mutated(data, donors, rng)
    start, end = rng.choice(metadata_spans(data))
    if kind < 0.3:
        return data[:start] + mutated(data[start:end], donors, rng) + data[end:]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = rng.choice((1, 2, 4, 8))
        at = rng.randint(start, end - size)
        old = int.from_bytes(changed[at : at + size], "little")
        new = rng.choice((0, old + 1, old - 1, old ^ (1 << rng.randrange(8 * size)), -1, 1 << 8 * size - 1, old * 8))
        changed[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(changed)


def open_forged(path: Path, files: Sequence[tuple[bytes, bytes]], marker: Path, report: Path) -> None:
    """In a child: open one forged store after another; says in ``report`` which one is next, and what was found."""
    trial = Trial(lambda: content(path), StoreError, [path], marker)
    with report.open("w") as log:
        for number, (data, header) in enumerate(files):
            print(f"case {number}", file=log, flush=True)
            put(path, data, header)
            trial.case(lambda n=number: f"case {n}")
        if (peak := pa.default_memory_pool().max_memory()) > MEMORY_LIMIT:
            trial.findings["Arrow's memory"] = f"{peak >> 20} MiB at its peak"
        print(json.dumps([trial.outcomes, trial.findings]), file=log)


@pytest.mark.timeout(200)
def test_2000_arrow_files_whose_digest_is_right(store: Path, tmp_path: Path) -> None:
    """Arrow's own reader, on files that it may die of, in four children of 500: none dies, hangs or loads a pickle.

    A valid file of other content is no finding here: its header vouches for it.
    """
    marker = tmp_path / "marker"
    data, header = files_of(store)
    body = msgpack.unpackb(msgpack.unpackb(header)[0])
    seeds = [data, compressed(data, "lz4"), compressed(data, "zstd"), with_pickled_type(data, marker)]
    outcomes: Counter[str] = Counter()
    for seed in range(4):
        rng = random.Random(100 + seed)
        forged = list(seeds)
        while len(forged) < 500:
            forged.append(mutated_arrow(rng.choice(seeds[:1] * 3 + seeds), [*seeds, header, *pickles(marker)], rng))
        files = [(file, vouched(body, file)) for file in forged]
        report = tmp_path / f"report-{seed}"
        child = multiprocessing.get_context("fork").Process(target=open_forged, args=(store, files, marker, report))
        child.start()
        child.join(40)
        if child.is_alive():
            child.kill()
            child.join()
        *_, last = report.read_text().splitlines()
        assert child.exitcode == 0, f"child {seed} ended with {child.exitcode} in {last}"
        found, findings = json.loads(last)
        assert not findings, "\n".join(map(": ".join, findings.items()))
        outcomes += Counter(found)
    assert not marker.exists()
    assert sum(outcomes.values()) == 2000 and outcomes.keys() == {"refused", "read"}
