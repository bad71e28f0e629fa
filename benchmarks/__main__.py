"""``python -m benchmarks``: run the subjects one after another, print their tables, write the numbers as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import THREADS, describe
from benchmarks.report import Floor, Result, floors_table

SUBJECTS = (
    "inner_loop",
    "scaling",
    "coordinator_share",
    "straggler",
    "sampler",
    "store",
    "monitoring",
    "authentication",
    "memory_use",
)
"""Modules with a ``measure(quick) -> Result``, in the order in which they run."""

LATEST = Path(__file__).parent / "results" / "latest.json"


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    # Before torch is imported, also for the processes started from this one.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(THREADS)
    console = Console(width=None if sys.stdout.isatty() else 160)
    found: dict[str, Any] = {"machine": describe(), "quick": arguments.quick, "subjects": {}}
    console.print_json(data=found["machine"])
    floors: list[Floor] = []
    began = time.monotonic()
    for subject in arguments.only:
        print(f"measuring {subject} …", file=sys.stderr)
        started = time.monotonic()
        result: Result = import_module(f"benchmarks.{subject}").measure(arguments.quick)
        found["subjects"][subject] = {"seconds": time.monotonic() - started} | result.to_json()
        floors += result.floors
        for sheet in result.sheets:
            console.print(sheet.table(), "")
    found |= {"seconds": time.monotonic() - began, "load_average_after": list(os.getloadavg())}
    if floors:
        console.print(floors_table(floors))
    for path in {LATEST, arguments.json or LATEST}:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(f"written to {path}", file=sys.stderr)
    print(f"took {found['seconds']:.0f} s", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed side by side on this machine.")
    parser.add_argument(
        "--only", nargs="+", choices=SUBJECTS, default=SUBJECTS, metavar="NAME", help=", ".join(SUBJECTS)
    )
    parser.add_argument(
        "--quick", action="store_true", help="few short rounds: tries the harness, its numbers mean little"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help=f"write the numbers there too (always: {LATEST})")
    return parser.parse_args()


if __name__ == "__main__":
    main()
