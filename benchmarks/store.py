"""Opening an episode store, and what four workers on one store cost in memory.

The store is a copy of the embedded glyphs (28×28, some 100,000 samples), so that no other process maps it. Opened
first, its digest is computed from the whole file; later opens on the node trust the stamp of the first. In both, the
file is in the page cache.

Memory is what the kernel says of four processes that all have the store open and have read every sample of it: in
``/proc/PID/smaps_rollup`` of the whole process, in ``/proc/PID/smaps`` of the mapped store alone. RSS counts a shared
page in each process, PSS divides it among those who map it, USS leaves it out: a store that is mapped once has a PSS of
its size over four in each process, and no USS.
"""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.machine import environment
from benchmarks.report import Cell, Floor, Result, Sheet
from benchmarks.rounds import Spread, interleave, seconds
from cluster.episodes.glyphs import GLYPHS_SPLIT, glyphs_store
from cluster.episodes.sampler import StoreSource
from cluster.episodes.store import EpisodeStore
from cluster.episodes.store_header import SETTLED_SECONDS, header_path

WORKERS = 4
PATIENCE = 120.0
"""Seconds after which a silent process is given up."""
MEBI = 2**20


def measure(quick: bool) -> Result:
    """Open times, then memory."""
    original = glyphs_store(28)
    with TemporaryDirectory(prefix="metafleet-benchmark-") as name:
        folder = Path(name)
        path = folder / "copy.arrow"
        shutil.copyfile(original, path)
        shutil.copyfile(header_path(original), header_path(path))
        time.sleep(SETTLED_SECONDS + 0.1)  # a younger file is not trusted to its stamp
        size = path.stat().st_size
        opening = _opening(path, folder, rounds=3 if quick else 9)
        with environment({"METAFLEET_CACHE": str(folder / "cache")}):
            memory, pss, rss = _memory(path)
    shared = Floor("four workers: PSS of the store in all together, in sizes of the store", pss / size, 1.1, False)
    return Result(
        [
            Sheet(
                f"Opening a store of {size / MEBI:.1f} MiB", [opening], "median (least–most) over interleaved rounds"
            ),
            Sheet(
                f"Memory of {WORKERS} workers on that store, all samples read, MiB",
                memory,
                f"the store is mapped in all of them ({rss / MEBI:.0f} MiB of RSS together) and in memory once "
                f"({pss / MEBI:.0f} MiB of PSS together)",
            ),
        ],
        [shared],
    )


def _opening(path: Path, folder: Path, rounds: int) -> dict[str, Cell]:
    """Seconds to open the store with a cache that does not know it, and with one that does."""
    fresh = (folder / f"cache-{number}" for number in range(rounds))
    current = folder

    def first() -> float:
        nonlocal current
        current = next(fresh)
        with environment({"METAFLEET_CACHE": str(current)}):
            return seconds(lambda: EpisodeStore.open(path))

    def later() -> float:
        with environment({"METAFLEET_CACHE": str(current)}):
            return seconds(lambda: EpisodeStore.open(path))

    found = interleave(rounds, {"first, with digest check, ms": first, "later, by its stamp, ms": later})
    return {name: Spread.of([1e3 * t for t in times]) for name, times in found.items()}


# ------------------------------------------------------------------------------------------------------------- memory


def _memory(path: Path) -> tuple[list[dict[str, Cell]], float, float]:
    """A row for each process; PSS and RSS of the store in all of them, bytes."""
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    for _ in range(WORKERS):
        here, there = context.Pipe()
        process = context.Process(target=_hold, args=(path, there), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    try:
        for pipe in pipes:
            if not pipe.poll(PATIENCE):
                raise TimeoutError(f"a process on the store has said nothing for {PATIENCE:g} s")
            pipe.recv()
        rows: list[dict[str, Cell]] = []
        pss = rss = 0.0
        for number, process in enumerate(processes):
            whole = _sizes(Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines())
            store = _sizes(_mapping(Path(f"/proc/{process.pid}/smaps").read_text().splitlines(), path))
            row: dict[str, Cell] = {"worker": number}
            for name, found in (("process", whole), ("store", store)):
                row |= {f"{name} {kind}": bytes_ / MEBI for kind, bytes_ in found.items()}
            rows.append(row)
            pss += store["PSS"]
            rss += store["RSS"]
        totals = {name: sum(_float(row[name]) for row in rows) for name in rows[0] if name != "worker"}
        return [*rows, {"worker": "all", **totals}], pss, rss
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(PATIENCE)


def _float(cell: Cell) -> float:
    assert isinstance(cell, float)
    return cell


def _hold(path: Path, pipe: Connection) -> None:
    """A process: opens the store, draws episodes, reads every sample, and waits for the pipe to be closed."""
    import torch

    torch.set_num_threads(1)
    store = EpisodeStore.open(path)
    source = StoreSource(store, GLYPHS_SPLIT, 0, rotations=True)
    for first in range(0, 512, 32):
        source.sample("train", first, 32, 5, 1, 15)
    pipe.send(int(store.samples.max()))
    try:
        pipe.recv()
    except EOFError:
        return


def _mapping(smaps: list[str], path: Path) -> Iterator[str]:
    """The lines of ``/proc/PID/smaps`` about the mappings of ``path``."""
    wanted = False
    for line in smaps:
        if "-" in line.split(" ", 1)[0]:  # a mapping's first line starts with its addresses
            wanted = line.endswith(str(path))
        if wanted:
            yield line


def _sizes(lines: Iterator[str] | list[str]) -> dict[str, float]:
    """RSS, PSS and USS in bytes, summed over the lines of ``/proc/PID/smaps`` or ``smaps_rollup``."""
    names = {"Rss:": "RSS", "Pss:": "PSS", "Private_Clean:": "USS", "Private_Dirty:": "USS"}
    found = dict.fromkeys(("RSS", "PSS", "USS"), 0.0)
    for line in lines:
        name, *rest = line.split()
        if name in names:
            found[names[name]] += 1024 * int(rest[0])
    return found
