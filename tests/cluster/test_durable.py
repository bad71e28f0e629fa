from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.durable import (
    fsync_directory,
    fsync_file,
    write_atomically,
    write_bytes_atomically,
)


def test_writes_the_whole_file_and_nothing_beside_it(tmp_path):
    target = tmp_path / "file"
    write_atomically(target, lambda file: file.write(b"one") and None)
    write_atomically(str(target), lambda file: file.write(b"two") and None)
    assert target.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failing_write_leaves_the_old_file_and_no_partial_one(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def write(file):
        file.write(b"half of the ne")
        file.flush()
        assert target.read_bytes() == b"old"
        raise RuntimeError("scripted")

    with pytest.raises(RuntimeError, match="scripted"):
        write_atomically(target, write)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failing_rename_leaves_no_partial_file(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file", lambda file: None)
    assert os.listdir(tmp_path) == ["file"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    script = (
        "import os, sys\nfrom cluster.durable import write_atomically\n"
        "def write(file):\n    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)\n"
        "write_atomically(sys.argv[1], write)\n"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", script, str(target)], cwd=root, check=False)
    assert killed.returncode == -9
    assert target.read_bytes() == b"old"


def test_data_reaches_the_disk_before_the_name_and_the_folder_after_it(tmp_path, monkeypatch):
    target = tmp_path / "file"
    events = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("fsync folder" if is_folder else f"fsync {os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def spy_replace(source, to):
        events.append("rename")
        replace(source, to)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_atomically(target, lambda file: file.write(b"12345") and None)
    assert events == ["fsync 5 bytes", "rename", "fsync folder"]


def test_what_was_written_can_be_read_back_inside_write(tmp_path):
    seen = []

    def write(file):
        file.write(b"content")
        file.seek(0)
        seen.append(file.read())

    write_atomically(tmp_path / "file", write)
    assert seen == [b"content"]


def test_bytes_at_hand(tmp_path):
    write_bytes_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "file", lambda file: None)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_fsync_directory_refuses_what_is_no_folder(tmp_path):
    fsync_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        fsync_directory(tmp_path / "file")


def test_fsync_file_forces_what_anyone_wrote_and_closes_the_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"12345")
    sizes, open_files = [], len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    fsync_file(tmp_path / "file")
    assert sizes == [5] and len(os.listdir("/proc/self/fd")) == open_files
    with pytest.raises(FileNotFoundError):
        fsync_file(tmp_path / "gone")
