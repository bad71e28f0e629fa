"""Fuzz of a run's files: 10,600 mutated checkpoints, manifests, logs, identities, marks and configurations.

Each is refused in one line that names it, or read as it was written; of a log, whose torn tail is dropped by design,
as it was written up to some record. Where the test makes digest or CRC right again, a mutation can make a valid file
of other content: then only how it is refused is looked at. Everything is drawn from fixed seeds, and pickles are
among what is spliced in: none may ever be loaded.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from cluster.config.loading import load_resolved
from cluster.errors import CheckpointError, ConfigError, RunDirectoryError
from cluster.flat import FlatSpec
from cluster.messages import Published
from cluster.records import FRAME, FileKind, scan
from coordinator import checkpoint as checkpoints
from coordinator.aggregators.base import Counted, Dropped
from coordinator.checkpoint import BEST, FORMAT, MANIFEST, TENSORS, Checkpoint
from coordinator.commit_log import KIND as LOG_KIND
from coordinator.commit_log import CommitLog, Entry, read_log
from coordinator.history import KIND as HISTORY_KIND
from coordinator.history import CommitRecord, History, HistoryWriter, ValidationRecord, read_history
from coordinator.inspect import inspect_command
from coordinator.meta_state import MetaState
from coordinator.run_dir import IDENTITY, RunDirectory
from tests.cluster.episodes.test_fuzz_store import Trial, altered, mutated, nested, odd_value, pickles
from tests.coordinator.harness import contribution, new_run

LAYOUT = FlatSpec(("bias", "weight"), ((3,), (2, 2)), torch.float32)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of two drivers: the second went on from version 4, when the first had made version 6."""
    made = new_run(tmp_path / "run")
    for start, stop in ((0, 6), (4, 8)):
        log = CommitLog(made, made.claim_epoch(), start, f"digest {start}", "config")
        for version in range(start + 1, stop + 1):
            counted = (Counted(2 * version, version - 1, 1.0, "a" * 8, "f"), Counted(2 * version + 1, 0, 0.5, "b", "f"))
            log.append(Entry(version, counted, (Dropped(99, 0, "c", "too stale"),), f"digest {version}"))
        log.close()
    history = HistoryWriter(made.history)
    for version in (1, 2, 3, 4, 5, 6):
        history.commit(CommitRecord(version, 0.5 / version, 0.8, 1.5, 32, version * 0.1, 320.0, 0.25, 4))
        if version == 4:
            history.validation(ValidationRecord(4, (0.2, 0.6), (0.01, 0.02)))
    history.resume(4)
    history.commit(CommitRecord(5, 0.1, 0.8, 1.5, 32, 0.5, 320.0, 0.25, 4))
    history.close()
    checkpoints.mark_best(checkpoints.save(made.checkpoints, small(), 1)[0], 0.75, "val")
    return made


def small() -> Checkpoint:
    rng = np.random.default_rng(0)
    theta, exp_avg = (torch.from_numpy(rng.standard_normal(LAYOUT.size, dtype=np.float32)) for _ in range(2))
    state = MetaState(4, LAYOUT, theta, {"mean": np.arange(3.0)}, {"step": torch.tensor(4.0), "exp_avg": exp_avg})
    recent = (Published(3, np.ones(LAYOUT.size, np.float32), {"mean": np.zeros(3)}),)
    pending = ((contribution(9, 4, range(LAYOUT.size), proposals={"mean": np.ones((1, 3))}), True),)
    drops = (Dropped(7, 1, "digest", "too stale"),)
    start = Checkpoint.of_start(state, "config")
    return replace(start, recent=recent, pending=pending, dropped=drops, next_id=10, failures={"worker_lost": 1})


def shown(checkpoint: Checkpoint) -> tuple[Any, ...]:
    """All of a checkpoint, comparable."""
    state = checkpoint.state
    arrays = checkpoints._arrays(checkpoint)
    bits = {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}
    return state.version, state.digest, bits, checkpoints._manifest(checkpoint, 1, b"")


def donors_of(run: RunDirectory, marker: Path) -> list[bytes]:
    """Every file of the run, to be spliced into the others, and pickles."""
    files = sorted(path for path in run.path.rglob("*") if path.is_file() and path.stat().st_size > 0)
    return [*(path.read_bytes() for path in files), *pickles(marker)]


def sealed(head: Sequence[Any], packed: Any) -> bytes:
    """``packed`` with its digest, as manifest, identity and mark have it."""
    raw: bytes = msgpack.packb([*head, packed, hashlib.sha256(packed).digest()])
    return raw


def either(packed: bytes, donors: Sequence[bytes], rng: random.Random, marker: Path) -> bytes:
    """The msgpack ``packed`` with its bytes mutated, or (mostly) with a value of it changed."""
    if rng.random() < 0.25:
        return mutated(packed, donors, rng)
    changed: bytes = msgpack.packb(altered(msgpack.unpackb(packed, strict_map_key=False), rng, marker))
    return changed


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_1000_damaged_files_of_a_checkpoint(run: RunDirectory, marker: Path, name: str) -> None:
    """1,000 each: both readers refuse, or find what was saved."""
    rng, donors = random.Random(f"damaged {name}"), donors_of(run, marker)
    path = checkpoints.list_checkpoints(run.checkpoints)[0]
    data = (path / name).read_bytes()

    def read() -> Any:
        loaded = checkpoints.load(path, LAYOUT, "config")
        checkpoints.read_manifest(path)
        return shown(loaded)

    trial = Trial(read, CheckpointError, [path], marker, [shown(small())])
    for number in range(1000):
        wrong = mutated(data, donors, rng)
        (path / name).write_bytes(wrong)
        trial.case(lambda n=number, wrong=wrong: f"case {n}: {wrong!r:.300}")
    trial.finish(1000, both=False)


def test_1200_manifests_whose_digest_is_right(run: RunDirectory, marker: Path) -> None:
    """The body with a value changed or its bytes mutated, and its digest computed from that."""
    rng, donors = random.Random(3), donors_of(run, marker)
    path = checkpoints.list_checkpoints(run.checkpoints)[0]
    packed = msgpack.unpackb((path / MANIFEST).read_bytes())[2]
    trial = Trial(lambda: checkpoints.load(path, LAYOUT, "config"), CheckpointError, [path], marker)
    for number in range(1200):
        body = either(packed, donors, rng, marker)
        (path / MANIFEST).write_bytes(sealed(FORMAT, body))
        trial.case(lambda n=number, body=body: f"case {n}: {body!r:.2000}")
    trial.finish(1200)


def test_300_manifests_of_another_form(run: RunDirectory, marker: Path) -> None:
    """What is around the body changed, with deep nesting where a name and a number should be."""
    rng = random.Random(4)
    path = checkpoints.list_checkpoints(run.checkpoints)[0]
    whole = msgpack.unpackb((path / MANIFEST).read_bytes())
    trial = Trial(lambda: shown(checkpoints.load(path, LAYOUT)), CheckpointError, [path], marker, [shown(small())])
    for number in range(300):
        tree = altered(whole, rng, marker)
        if number < 10:
            tree = [nested(rng.randrange(100, 1000)), *whole[1:]]
        (path / MANIFEST).write_bytes(msgpack.packb(tree))
        trial.case(lambda n=number, tree=tree: f"case {n}: {msgpack.packb(tree)!r:.300}")
    trial.finish(300, both=False)


def test_1000_tensors_whose_digests_are_right(run: RunDirectory, marker: Path) -> None:
    """Absurd headers of safetensors, and any other bytes, with the manifest's digest of them made right."""
    rng, donors = random.Random(5), donors_of(run, marker)
    path = checkpoints.list_checkpoints(run.checkpoints)[0]
    data, manifest = (path / TENSORS).read_bytes(), msgpack.unpackb((path / MANIFEST).read_bytes())
    body = msgpack.unpackb(manifest[2])
    trial = Trial(lambda: checkpoints.load(path, LAYOUT, "config"), CheckpointError, [path], marker)
    for number in range(1000):
        wrong = mutated(data, donors, rng) if rng.random() < 0.2 else absurd_tensors(data, rng, marker)
        digests = {"tensors_digest": hashlib.sha256(wrong).hexdigest(), "tensors_bytes": len(wrong)}
        (path / TENSORS).write_bytes(wrong)
        (path / MANIFEST).write_bytes(sealed(FORMAT, msgpack.packb(body | digests)))
        trial.case(lambda n=number, wrong=wrong: f"case {n}: {wrong!r:.900}")
    trial.finish(1000)


def absurd_tensors(data: bytes, rng: random.Random, marker: Path) -> bytes:
    """A safetensors file with one thing wrong: its header's length, or a tensor's dtype, shape, offsets or name."""
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    tensor = header[name]
    match rng.randrange(8):
        case 0:
            wrong = rng.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1))
            return wrong.to_bytes(8, "little") + data[8:]
        case 1:
            dtypes = ("BF16", "F64", "F16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "O", "", "f4", 3)
            tensor["dtype"] = rng.choice(dtypes)
        case 2:
            shapes = ([2**62, 4], [2**63], [-1], [0], [], [1] * 200, [2**32, 2**32], [1.5], "7", None, [7, 0, 2**62])
            tensor["shape"] = rng.choice(shapes)
        case 3:
            start, end = tensor["data_offsets"]
            spans = ([end, start], [0, 2**63], [start, end + 4], [start + 1, end + 1], [2**64 - 1, 2**64 - 1], [0], [])
            tensor["data_offsets"] = rng.choice((*spans, [0, end - start], [-1, end]))
        case 4:
            names = ("theta", "recent/3/theta", "pending/0/proposal/x", "state/x", "", "x")
            header[rng.choice(names)] = header.pop(name)
        case 5:
            tensor["dtype"], tensor["shape"] = "U8", [tensor["data_offsets"][1] - tensor["data_offsets"][0]]
        case 6:
            header["__metadata__"] = rng.choice(({"a": 1}, [], None, {"a": "b" * 1000}, {"pickle": "cos\nsystem"}))
        case _:
            del header[name]
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = mutated(text, pickles(marker), rng)
    return len(text).to_bytes(8, "little") + text + rest


def test_600_marks_of_the_best_checkpoint(run: RunDirectory, marker: Path) -> None:
    """300 damaged ones, and 300 whose digest is right; what a mark names is a checkpoint of this folder or nothing."""
    rng, donors = random.Random(6), donors_of(run, marker)
    path = run.checkpoints / BEST
    data = path.read_bytes()
    packed = msgpack.unpackb(data)[0]
    named = checkpoints.list_checkpoints(run.checkpoints)[0]

    def read() -> Any:
        return checkpoints.best_of(run.checkpoints), checkpoints.best_score(run.checkpoints, "val")

    damaged = Trial(read, CheckpointError, [path], marker, [(named, 0.75)])
    forged = Trial(lambda: read()[0], CheckpointError, [path], marker, [named, None])
    for number in range(300):
        for trial, wrong in (
            (damaged, mutated(data, donors, rng)),
            (forged, sealed([], either(packed, donors, rng, marker))),
        ):
            path.write_bytes(wrong)
            trial.case(lambda n=number, wrong=wrong: f"case {n}: {wrong!r:.300}")
    damaged.finish(300, both=False)
    forged.finish(300)


# ---------------------------------------------------------------------------------------------- identity, configuration


def test_1000_identities(run: RunDirectory, marker: Path) -> None:
    """500 damaged ones, and 500 whose digest is right."""
    rng, donors = random.Random(7), donors_of(run, marker)
    path = run.path / IDENTITY
    data = path.read_bytes()
    head, packed = msgpack.unpackb(data)[:2], msgpack.unpackb(data)[2]
    damaged = Trial(run.identity, RunDirectoryError, [path], marker, [run.identity()])
    forged = Trial(lambda: {field.name for field in fields(run.identity())}, RunDirectoryError, [path], marker)
    for number in range(500):
        for trial, wrong in (
            (damaged, mutated(data, donors, rng)),
            (forged, sealed(head, either(packed, donors, rng, marker))),
        ):
            path.write_bytes(wrong)
            trial.case(lambda n=number, wrong=wrong: f"case {n}: {wrong!r:.300}")
    damaged.finish(500, both=False)
    forged.finish(500)


TOML = (
    b"x = " + b"[" * 5000,
    b"x = " + b"[" * 200 + b"]" * 200,
    b"x = " + b"{a=" * 2000,
    b"a." * 3000 + b"b = 1",
    b"[" + b"a." * 3000 + b"b]",
    b"steps = " + b"9" * 5000,
    b"steps = 0x" + b"f" * 5000,
    b"steps = 1e999",
    b"seed = nan",
    b"seed = -inf",
    b"seed = 1979-05-27T07:32:00Z",
    b'name = "\\ud800"',
    b'name = "a\\nb"',
    b'"a\\nb" = 1',
    b"name = '''\na\nb'''",
    b"\xef\xbb\xbf",
    b"[[steps]]",
    b"[data]",
    b'"" = {}',
)
"""Lines of TOML that a configuration does not expect."""


def test_1000_configurations(run: RunDirectory, marker: Path) -> None:
    """Damaged bytes, odd lines put in or exchanged: text has no digest, and another valid configuration may result."""
    rng, donors = random.Random(8), donors_of(run, marker)
    data = run.config.read_bytes()
    trial = Trial(lambda: load_resolved(run.config), ConfigError, [run.config], marker)
    for number in range(1000):
        wrong = mutated(data, donors, rng)
        if rng.random() < 0.4:
            lines = data.split(b"\n")
            at = rng.randrange(len(lines))
            value = rng.choice((json.dumps(str(odd_value(rng, marker))).encode(), b"[[[]]]", b"-1", b"1e400"))
            odd = rng.choice((*TOML, lines[at].split(b"=")[0] + b"= " + value))
            lines[at : at + rng.choice((0, 1))] = [odd]
            wrong = b"\n".join(lines)
        run.config.write_bytes(wrong)
        trial.case(lambda n=number, wrong=wrong: f"case {n}: {wrong!r:.1500}")
    trial.finish(1000)


# ----------------------------------------------------------------------------------------------------------------- logs


def record(body: bytes) -> bytes:
    """A record with this body, its CRC and length right."""
    return FRAME.pack(b"\x92\xce", zlib.crc32(body), b"\xc6", len(body)) + body


def bodies_of(data: bytes) -> list[bytes]:
    """The bodies of the records of ``data``."""
    bodies, at = [], 0
    while at < len(data):
        length = FRAME.unpack_from(data, at)[3]
        bodies.append(data[at + FRAME.size : at + FRAME.size + length])
        at += FRAME.size + length
    return bodies


def cut_anywhere(path: Path, read: Callable[[], Any]) -> list[Any]:
    """What ``read`` gives of the file at ``path`` after each of its records: what may be left of it by a tear."""
    data = path.read_bytes()
    bodies = bodies_of(data)
    results = []
    for count in range(len(bodies) + 1):
        path.write_bytes(b"".join(map(record, bodies[:count])))
        results.append(read())
    path.write_bytes(data)
    return results


def unless_more_follows(path: Path, frames: Sequence[bytes], read: Callable[[], Any]) -> Any:
    """What ``read`` gives of ``path``, if none of the records ``frames`` lies whole behind those that it kept."""
    content = read()
    rest = path.read_bytes()[scan(path)[1] :]
    return "whole records behind the damage are dropped" if any(frame in rest for frame in frames) else content


def records_changed(bodies: Sequence[bytes], others: Sequence[bytes], rng: random.Random, marker: Path) -> bytes:
    """A file of whole records, of which one was changed, lost, doubled, moved, or is another file's."""
    changed = list(bodies)
    at = rng.randrange(len(changed))
    match rng.randrange(8):
        case 0:
            del changed[at]
        case 1:
            changed.insert(rng.randrange(len(changed)), changed[at])
        case 2:
            changed[at] = rng.choice(others)
        case 3:
            changed[at] = rng.choice((b"", b"\xdd\xff\xff\xff\xff", b"\x91" * rng.choice((300, 900, 5000)), b"\xc1"))
        case 4:
            changed[at] = msgpack.packb(nested(rng.randrange(100, 1000)))
        case _:
            changed[at] = either(changed[at], others, rng, marker)
    return b"".join(map(record, changed))


def listed(history: History) -> tuple[Any, ...]:
    """All of a history, comparable."""
    columns = [getattr(history, name).tolist() for name in CommitRecord._fields]
    return columns, history.validations, history.resumes


@pytest.mark.parametrize("epoch", [1, 2])
def test_600_damaged_commit_logs(run: RunDirectory, marker: Path, epoch: int) -> None:
    """600 of either segment: what is read is what was committed, up to some version."""
    rng, donors = random.Random(10 + epoch), donors_of(run, marker)
    path = run.log(epoch)
    data, whole = path.read_bytes(), read_log(run)
    assert [entry.version for entry in whole] == list(range(1, 9))
    frames = list(map(record, bodies_of(data)))
    allowed = [whole[:count] for count in range(9)]
    read = partial(unless_more_follows, path, frames, lambda: read_log(run))
    trial = Trial(read, CheckpointError, [run.path], marker, allowed)
    for number in range(600):
        wrong = mutated(data, donors, rng)
        path.write_bytes(wrong)
        trial.case(lambda n=number, wrong=wrong: f"case {n}: {wrong!r:.300}")
    trial.finish(600)


def test_800_commit_logs_of_whole_records(run: RunDirectory, marker: Path) -> None:
    """Records that check, but are not what belongs there."""
    rng, path = random.Random(13), run.log(2)
    bodies = bodies_of(path.read_bytes())
    others = [*bodies_of(run.history.read_bytes()), *bodies_of(run.log(1).read_bytes()), *pickles(marker)]
    trial = Trial(lambda: read_log(run), CheckpointError, [run.path], marker)
    for number in range(800):
        wrong = records_changed(bodies, others, rng, marker)
        path.write_bytes(wrong)
        trial.case(lambda n=number, wrong=wrong: f"case {n}: {wrong!r:.900}")
    trial.finish(800)


def test_800_damaged_histories(run: RunDirectory, marker: Path) -> None:
    """What is read is what was recorded, up to some record."""
    rng, donors, path = random.Random(14), donors_of(run, marker), run.history
    data = path.read_bytes()
    allowed = cut_anywhere(path, lambda: listed(read_history(path)))
    assert allowed[-1][2] == (4,) and len(scan(path)[0]) + 1 == len(allowed)
    frames = list(map(record, bodies_of(data)))
    read = partial(unless_more_follows, path, frames, lambda: listed(read_history(path)))
    trial = Trial(read, CheckpointError, [path], marker, allowed)
    for number in range(800):
        wrong = mutated(data, donors, rng)
        path.write_bytes(wrong)
        trial.case(lambda n=number, wrong=wrong: f"case {n}: {wrong!r:.300}")
    trial.finish(800)


def test_700_histories_of_whole_records(run: RunDirectory, marker: Path) -> None:
    """Records that check, but are not what belongs there."""
    rng, path = random.Random(15), run.history
    bodies = bodies_of(path.read_bytes())
    others = [*bodies_of(run.log(1).read_bytes()), *pickles(marker)]
    trial = Trial(lambda: listed(read_history(path)), CheckpointError, [path], marker)
    for number in range(700):
        wrong = records_changed(bodies, others, rng, marker)
        path.write_bytes(wrong)
        trial.case(lambda n=number, wrong=wrong: f"case {n}: {wrong!r:.900}")
    trial.finish(700)


CRAFTED = {
    "beginnings of long records": FRAME.pack(b"\x92\xce", 1, b"\xc6", 60_000) * 900_000,
    "beginnings of records as long as the file": FRAME.pack(b"\x92\xce", 1, b"\xc6", 5_000_000) * 900_000,
    "beginnings of empty records": FRAME.pack(b"\x92\xce", 1, b"\xc6", 0) * 900_000,
    "beginnings that overlap": b"\x92\xce\xc6\0" * 2_500_000,
    "bodies that are no msgpack": record(b"\xc1" * 20) * 320_000,
}
"""What 10 MB behind a damage may be made of so that a search for the next record takes long."""


@pytest.mark.parametrize("name", CRAFTED)
@pytest.mark.parametrize("kind", [HISTORY_KIND, LOG_KIND], ids=lambda kind: kind.name)
def test_a_crafted_file_of_10_mb_is_read_in_seconds(tmp_path: Path, kind: FileKind, name: str) -> None:
    path = tmp_path / "crafted"
    path.write_bytes(record(msgpack.packb(["header"])) + b"!" + CRAFTED[name])
    start = time.process_time()
    try:
        assert scan(path, kind=kind)[0] == [["header"]]
    except CheckpointError as error:
        assert f"{path} is damaged at byte 19 of" in str(error)
    assert time.process_time() - start < 5


def test_a_record_longer_than_its_kind_has_is_no_torn_tail_of_it(run: RunDirectory) -> None:
    run.history.write_bytes(record(bytes(1 << 16))[:-1])
    with pytest.raises(CheckpointError, match="is no metric history: it starts with"):
        read_history(run.history)


# --------------------------------------------------------------------------------- what fuzzing of bytes does not reach


@pytest.mark.parametrize("kind", ["folder", "loop of links"])
@pytest.mark.parametrize("name", ["best", "history", "history to write", "log", "log to write"])
def test_what_cannot_be_read_is_named_with_the_system_s_reason(run: RunDirectory, name: str, kind: str) -> None:
    path, read = {
        "best": (run.checkpoints / BEST, lambda: checkpoints.best_of(run.checkpoints)),
        "history": (run.history, lambda: read_history(run.history)),
        "history to write": (run.history, lambda: HistoryWriter(run.history)),
        "log": (run.log(2), lambda: read_log(run)),
        "log to write": (run.log(2), lambda: CommitLog(run, 2, 0, "digest 0", "config")),
    }[name]
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    reason = "Is a directory" if kind == "folder" else "Too many levels of symbolic links"
    with pytest.raises(CheckpointError) as caught:
        read()
    assert str(path) in str(caught.value) and reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_record_of_an_unknown_kind_is_no_resume(run: RunDirectory) -> None:
    with run.history.open("ab") as file:
        file.write(record(msgpack.packb([4, 0])))
    with pytest.raises(CheckpointError, match=r"history.msgpack holds a record of another form \(there is no kind 4\)"):
        read_history(run.history)


@pytest.mark.parametrize("start", [-1, float("inf"), 1.0, True, 1 << 63])
def test_a_log_that_starts_at_no_version_is_refused(run: RunDirectory, start: object) -> None:
    run.log(2).write_bytes(record(msgpack.packb(["metafleet-commit-log", 1, 2, start, "digest 4", "config"])))
    with pytest.raises(CheckpointError, match=r"0002.msgpack holds a record that is no commit \(3: "):
        read_log(run)


@pytest.mark.parametrize("name", ["../checkpoints", "..", "/", "v00000004-e0001/../..", "v" + "1" * 300 + "-e0001"])
def test_a_mark_of_no_checkpoint_is_refused(run: RunDirectory, name: str) -> None:
    (run.checkpoints / BEST).write_bytes(sealed([], msgpack.packb([name, 0.5, "val"])))
    with pytest.raises(CheckpointError, match=r"best is damaged \(it names .*, which is no checkpoint\): remove it"):
        checkpoints.best_of(run.checkpoints)


def test_an_identity_nested_deep_is_refused(run: RunDirectory) -> None:
    for depth in range(100, 1000, 50):
        (run.path / IDENTITY).write_bytes(msgpack.packb([nested(depth), nested(depth), b"", b""]))
        with pytest.raises(RunDirectoryError, match=r"run.msgpack is damaged \(it is a list a list, expected"):
            run.identity()


def test_a_manifest_without_a_field_is_refused_wherever_it_is_read(run: RunDirectory) -> None:
    path = checkpoints.list_checkpoints(run.checkpoints)[0]
    body = msgpack.unpackb(msgpack.unpackb((path / MANIFEST).read_bytes())[2])
    for name in body:
        rest = {key: value for key, value in body.items() if key != name}
        (path / MANIFEST).write_bytes(sealed(FORMAT, msgpack.packb(rest)))
        for read in (lambda: checkpoints.load(path, LAYOUT), lambda: inspect_command(path, as_json=True)):
            with pytest.raises(CheckpointError, match=f"{path} is damaged: {name}: Field required; restore"):
                read()
