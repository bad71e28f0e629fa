"""Checkpoints: bit for bit, whole or absent, refused when anything in them differs."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import CheckpointError
from cluster.flat import FlatSpec
from cluster.messages import Published
from coordinator import checkpoint as checkpoints
from coordinator.aggregators.base import Dropped
from coordinator.checkpoint import MANIFEST, TENSORS, Checkpoint
from coordinator.meta_state import MetaState
from tests.coordinator.harness import contribution

LAYOUT = FlatSpec(("bias", "scale", "weight"), ((3,), (), (2, 3)), torch.float32)
ODD = [0.0, -0.0, float("nan"), float("inf"), 1e-45, 3.4e38, 0.1]
"""Values whose bits a careless round trip changes."""

no_fixture_reset = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None
)


def state(version: int = 200, layout: FlatSpec = LAYOUT) -> MetaState:
    generator = torch.Generator().manual_seed(version)
    theta = torch.randn(layout.size, generator=generator)
    theta[: len(ODD)] = torch.tensor(ODD)[: layout.size]
    learner = {"mean.0": np.linspace(0, 1, 4), "count": np.array(7), "mask": np.array([[True, False]])}
    optimizer = {"step": torch.tensor(float(version)), "exp_avg": torch.randn(layout.size, generator=generator)}
    return MetaState(version, layout, theta, learner, optimizer)


def whole(version: int = 200) -> Checkpoint:
    recent = tuple(
        Published(v, np.full(LAYOUT.size, v, np.float32), {"mean.0": np.arange(v % 3, dtype=np.float32)})
        for v in (version - 2, version - 1)
    )
    bad = contribution(17, version - 1, ODD, loss=float("nan"), proposals={"mean": np.array([[np.nan], [2.0]])})
    pending = ((contribution(12, version, ODD[::-1]), True), (bad, False))
    drops = tuple(Dropped(shard, version - 9, "digest", "too stale") for shard in (13, 15))
    return Checkpoint(
        state(version),
        recent,
        pending,
        drops,
        18,
        "config",
        6400,
        12.5,
        {"worker_lost": 2},
        {"useful": 7, "lost": {"copy": 1}},
    )


def assert_equal_bits(a: Checkpoint, b: Checkpoint) -> None:
    assert a.state.version == b.state.version and a.state.layout == b.state.layout
    assert a.state.digest == b.state.digest
    same_array(a.state.theta.numpy(), b.state.theta.numpy())
    same_arrays(a.state.state, b.state.state)
    same_arrays(
        {name: t.numpy() for name, t in a.state.optimizer.items()},
        {name: t.numpy() for name, t in b.state.optimizer.items()},
    )
    assert [published.version for published in a.recent] == [published.version for published in b.recent]
    for one, other in zip(a.recent, b.recent, strict=True):
        same_array(one.theta, other.theta)
        same_arrays(one.state, other.state)
    for (one_c, one_finite), (other_c, other_finite) in zip(a.pending, b.pending, strict=True):
        assert one_finite is other_finite
        same_array(one_c.gradient, other_c.gradient)
        same_arrays(one_c.proposals, other_c.proposals)
        assert one_c.content_digest() == one_c.digest == other_c.digest == other_c.content_digest()
        assert (one_c.shard, one_c.base_version, one_c.episodes) == (
            other_c.shard,
            other_c.base_version,
            other_c.episodes,
        )
    for name in ("dropped", "next_id", "config_digest", "episodes", "seconds", "failures", "goodput"):
        assert getattr(a, name) == getattr(b, name)


def same_arrays(a: object, b: object) -> None:
    assert isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys()
    for name in a:
        same_array(a[name], b[name])


def same_array(a: np.ndarray, b: np.ndarray) -> None:
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# ----------------------------------------------------------------------------------------------------------- round trip


def test_every_bit_comes_back(tmp_path: Path) -> None:
    saved = whole()
    path, size = checkpoints.save(tmp_path, saved, epoch=3)
    assert path == tmp_path / "v00000200-e0003" and checkpoints.version_of(path) == (200, 3)
    assert entries(path) == [MANIFEST, TENSORS]
    assert size == sum(file.stat().st_size for file in path.iterdir())
    loaded = checkpoints.load(path, LAYOUT, "config")
    assert_equal_bits(saved, loaded)
    assert loaded.state.optimizer["step"].shape == () and loaded.state.state["count"].shape == ()
    again, _ = checkpoints.save(tmp_path, checkpoints.load(path, LAYOUT), epoch=4)
    assert (again / TENSORS).read_bytes() == (path / TENSORS).read_bytes()


def test_what_is_loaded_is_no_view_of_the_file_s_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = checkpoints.save(tmp_path, whole(), 1)
    read: dict[str, np.ndarray] = {}
    real = checkpoints.load_arrays
    monkeypatch.setattr(checkpoints, "load_arrays", lambda data: read.setdefault("all", real(data)))
    loaded = checkpoints.load(path, LAYOUT)
    arrays = [loaded.state.theta.numpy(), *(tensor.numpy() for tensor in loaded.state.optimizer.values())]
    arrays += [*loaded.state.state.values(), *(c.gradient for c, _ in loaded.pending)]
    for published in loaded.recent:
        arrays += [published.theta, *published.state.values()]
    assert len(arrays) == 12
    assert not any(np.shares_memory(array, other) for array in arrays for other in read["all"].values())


def test_a_first_checkpoint_has_no_optimizer_state_and_nothing_pending(tmp_path: Path) -> None:
    saved = Checkpoint(replace(state(0), optimizer={}, state={}), (), (), (), 0, "config", 0, 0.0, {}, {})
    assert_equal_bits(saved, checkpoints.load(checkpoints.save(tmp_path, saved, 1)[0], LAYOUT))


def test_a_checkpoint_that_this_epoch_has_written_is_not_written_again(tmp_path: Path) -> None:
    path, size = checkpoints.save(tmp_path, whole(), 1)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert checkpoints.save(tmp_path, replace(whole(), pending=()), 1) == (path, size)
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert entries(tmp_path) == [path.name]


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path, whole(), 1)[0]


@no_fixture_reset
@given(st.sampled_from([MANIFEST, TENSORS]), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_any_flipped_byte_is_refused(saved: Path, name: str, where: float, flip: int) -> None:
    original = (saved / name).read_bytes()
    damaged = bytearray(original)
    damaged[int(where * len(original))] ^= flip
    refused_with(saved, name, bytes(damaged), original)


@no_fixture_reset
@given(st.sampled_from([MANIFEST, TENSORS]), st.floats(0, 1, exclude_max=True))
def test_any_truncated_file_is_refused(saved: Path, name: str, where: float) -> None:
    original = (saved / name).read_bytes()
    refused_with(saved, name, original[: int(where * len(original))], original)


@no_fixture_reset
@given(st.sampled_from([MANIFEST, TENSORS]), st.binary(max_size=200), st.booleans())
def test_any_other_bytes_are_refused(saved: Path, name: str, data: bytes, appended: bool) -> None:
    original = (saved / name).read_bytes()
    if data:
        refused_with(saved, name, original + data if appended else data, original)


def refused_with(path: Path, name: str, damaged: bytes, original: bytes) -> None:
    (path / name).write_bytes(damaged)
    try:
        for read in (lambda: checkpoints.load(path, LAYOUT), lambda: checkpoints.read_manifest(path)):
            with pytest.raises(CheckpointError, match=f"checkpoint {path} is damaged: .*restore it from a backup"):
                read()
    finally:
        (path / name).write_bytes(original)


@pytest.mark.parametrize("body", [1, None, [], {}, [*checkpoints.FORMAT, "text", b""], [*checkpoints.FORMAT, b"", b""]])
def test_a_manifest_of_another_form_is_refused(saved: Path, body: object) -> None:
    (saved / MANIFEST).write_bytes(msgpack.packb(body))
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.load(saved, LAYOUT)


def test_a_manifest_beyond_all_size_is_refused_unread(saved: Path) -> None:
    os.truncate(saved / MANIFEST, checkpoints.LARGEST_MANIFEST + 1)
    start = time.process_time()
    with pytest.raises(CheckpointError, match="its manifest is too large"):
        checkpoints.load(saved, LAYOUT)
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"is no whole checkpoint: {name} is missing"):
        checkpoints.load(saved, LAYOUT)


def test_a_missing_checkpoint_is_an_error_and_so_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no whole checkpoint"):
        checkpoints.load(tmp_path / "v00000100-e0001", LAYOUT)
    (tmp_path / "v00000100-e0001").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is damaged: .*Not a directory"):
        checkpoints.load(tmp_path / "v00000100-e0001", LAYOUT)
    with pytest.raises(CheckpointError, match=r"its folder is not named like v00000200-e0001"):
        checkpoints.version_of(tmp_path / "v1")


def test_tensors_and_manifest_that_fit_each_other_but_not_the_run_digest_are_refused(tmp_path: Path) -> None:
    forged = whole()
    forged.state.__dict__["digest"] = "0" * 64
    path, _ = checkpoints.save(tmp_path, forged, 1)
    with pytest.raises(CheckpointError, match="does not give its own run digest"):
        checkpoints.load(path, LAYOUT)


def test_another_configuration_is_refused_where_it_matters(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="is of another configuration"):
        checkpoints.load(saved, LAYOUT, "other")
    checkpoints.load(saved, LAYOUT, None)


@pytest.mark.parametrize(
    ("names", "shapes", "says"),
    [
        (
            LAYOUT.names,
            ((3,), (), (3, 3)),
            r"10 parameters in 3 tensors, .* need 13 in 3 \(weight is \(2, 3\) there, \(3, 3",
        ),
        (
            LAYOUT.names,
            ((3,), (), (3, 2)),
            r"10 parameters in 3 .* need 10 in 3 \(weight is \(2, 3\) there, \(3, 2\) here\)",
        ),
        (("bias", "scale", "weights"), LAYOUT.shapes, r"need 10 in 3: model, way or sample shape differ"),
        (
            ("weight",),
            ((10,),),
            r"10 parameters in 3 .* need 10 in 1 \(weight is \(2, 3\) there, \(10,\) here\)",
        ),
        (("scale", "bias", "weight"), ((), (3,), (2, 3)), r"need 10 in 3: model"),
    ],
)
def test_another_shape_is_refused_and_named(saved: Path, names: tuple[str, ...], shapes: object, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        checkpoints.load(saved, FlatSpec(names, shapes, torch.float32))  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- whole or absent


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*: No such file or directory; earlier check"):
        checkpoints.save(tmp_path / "gone", whole(), 1)
    with pytest.raises(CheckpointError, match=r"cannot write .*best: No such file"):
        checkpoints.mark_best(tmp_path / "gone" / "v00000100-e0001", 0.5)


@contextmanager
def room(limit: int) -> Iterator[None]:
    """Files of this process may grow to ``limit`` bytes and no further, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 300, 1500])
def test_a_full_disk_leaves_nothing_behind_and_earlier_checkpoints_whole(tmp_path: Path, limit: int) -> None:
    path, _ = checkpoints.save(tmp_path, whole(100), 1)
    # Its manifest is what does not fit into 1500 bytes.
    large = replace(whole(200), dropped=(Dropped(0, 0, "d" * 2000, "late"),))
    assert (path / TENSORS).stat().st_size < 1500
    message = f"cannot write checkpoint {tmp_path}/v00000200-e0001: File too large; earlier checkpoints are whole"
    with room(limit), pytest.raises(CheckpointError, match=message):
        checkpoints.save(tmp_path, large, 1)
    with room(0), pytest.raises(CheckpointError, match=r"cannot write .*best: File too large"):
        checkpoints.mark_best(path, 0.5)
    assert entries(tmp_path) == ["v00000100-e0001"]
    assert_equal_bits(whole(100), checkpoints.load(path, LAYOUT))


@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace", "rename"])
def test_a_writer_killed_at_any_moment_leaves_no_checkpoint_that_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The process dies just before the n-th system call of a kind, for every n, and can clean nothing up."""

    class Killed(BaseException):
        pass

    path, real = tmp_path / "v00000200-e0001", getattr(os, call)
    checkpoints.save(tmp_path, whole(100), 1)
    died = 0
    for at in range(1, 20):
        calls = 0

        def dying(*args: object, at: int = at, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls >= at:
                raise Killed
            return real(*args, **options)

        with monkeypatch.context() as context:
            context.setattr(os, call, dying)
            context.setattr(os, "unlink", dying_cleanup)
            context.setattr(shutil, "rmtree", dying_cleanup)
            try:
                checkpoints.save(tmp_path, whole(), 1)
            except (Killed, CleanupError):
                died += 1
            else:
                break
        found = checkpoints.list_checkpoints(tmp_path)
        assert found in ([tmp_path / "v00000100-e0001"], [tmp_path / "v00000100-e0001", path])
        for checkpoint in found:
            checkpoints.load(checkpoint, LAYOUT)
        if path.exists():
            shutil.rmtree(path)
        checkpoints.sweep(tmp_path)
        assert entries(tmp_path) == ["v00000100-e0001"]
    assert died > 0
    assert_equal_bits(whole(), checkpoints.load(path, LAYOUT))


class CleanupError(BaseException):
    """A killed process cleans nothing up."""


def dying_cleanup(*args: object, **options: object) -> None:
    raise CleanupError


def test_what_killed_writers_left_is_swept_and_nothing_else(saved: Path) -> None:
    folder = saved.parent
    checkpoints.mark_best(saved, 0.5)
    (folder / ".v00000300-e0001.77.partial").mkdir()
    (folder / ".v00000300-e0001.77.partial" / TENSORS).write_bytes(b"half")
    (folder / ".best.77-abcd.partial").write_bytes(b"")
    assert checkpoints.list_checkpoints(folder) == [saved]
    checkpoints.sweep(folder)
    assert entries(folder) == ["best", saved.name]
    checkpoints.sweep(folder / "gone")


# ----------------------------------------------------------------------------------------------------- which are kept


def fill(folder: Path, *versions: tuple[int, int]) -> None:
    for version, epoch in versions:
        checkpoints.save(folder, whole(version), epoch)


def names(folder: Path) -> list[tuple[int, int]]:
    return [checkpoints.version_of(path) for path in checkpoints.list_checkpoints(folder)]


def test_checkpoints_are_listed_by_version_then_epoch(tmp_path: Path) -> None:
    fill(tmp_path, (900, 2), (99_999_999, 1), (900, 9999), (100_000_000, 1), (900, 10_000))
    (tmp_path / "v00000950-e0001.old").mkdir()
    (tmp_path / "notes.txt").touch()
    assert names(tmp_path) == [(900, 2), (900, 9999), (900, 10_000), (99_999_999, 1), (100_000_000, 1)]
    assert checkpoints.list_checkpoints(tmp_path / "gone") == []


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_last_ones_and_the_best_are_kept(tmp_path: Path, keep: int) -> None:
    everything = [(100, 1), (200, 1), (200, 2), (300, 2)]
    fill(tmp_path, *everything)
    assert (checkpoints.best_of(tmp_path), checkpoints.best_score(tmp_path)) == (None, None)
    checkpoints.mark_best(tmp_path / "v00000100-e0001", 0.75)
    checkpoints.prune(tmp_path, keep)
    assert names(tmp_path) == [(100, 1), *everything[1:][-keep:]]
    assert checkpoints.best_of(tmp_path) == tmp_path / "v00000100-e0001"
    assert checkpoints.best_score(tmp_path) == 0.75
    checkpoints.mark_best(tmp_path / "v00000300-e0002", 0.8)
    checkpoints.prune(tmp_path, keep)
    assert names(tmp_path) == everything[-keep:]
    assert entries(tmp_path) == ["best", *(checkpoints.name_of(*each) for each in everything[-keep:])]


def test_a_checkpoint_removed_half_way_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, (100, 1), (200, 1))
    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", lambda path, ignore_errors: os.unlink(Path(path) / TENSORS))
        checkpoints.prune(tmp_path, 1)
    assert names(tmp_path) == [(200, 1)]
    checkpoints.sweep(tmp_path)
    assert entries(tmp_path) == ["v00000200-e0001"]


def test_a_best_that_is_gone_is_none_and_a_damaged_mark_is_refused(saved: Path) -> None:
    folder = saved.parent
    checkpoints.mark_best(saved, 0.5)
    mark = (folder / "best").read_bytes()
    for at in range(len(mark)):
        for damaged in (mark[:at], mark[:at] + bytes([mark[at] ^ 4]) + mark[at + 1 :]):
            (folder / "best").write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"best is damaged .*remove it to go on without"):
                checkpoints.best_of(folder)
    (folder / "best").write_bytes(mark)
    shutil.rmtree(saved)
    assert (checkpoints.best_of(folder), checkpoints.best_score(folder)) == (None, None)
