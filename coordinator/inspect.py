"""``metafleet inspect`` for runs and checkpoints: what they are, without starting anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.config.loading import RESOLVED_NAME, load_resolved
from cluster.errors import CheckpointError, MetafleetError
from coordinator import checkpoint as checkpoints
from coordinator.commit_log import log_problem, read_log
from coordinator.run_dir import RunDirectory


def inspect_command(path: Path, *, as_json: bool) -> dict[str, Any]:
    """Describe a run directory or a checkpoint.

    Raises:
        RunDirectoryError, CheckpointError: it is neither, or damaged.
    """
    path = path.parent if path.is_file() else path
    report = _checkpoint(path) if (path / checkpoints.MANIFEST).exists() else _run(RunDirectory.open(path))
    if not as_json:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in report.items():
            if name != "config":
                table.add_row(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        Console().print(table)
    return report


def _run(run: RunDirectory) -> dict[str, Any]:
    config, identity, entries = load_resolved(run.config), run.identity(), read_log(run)
    found = checkpoints.list_checkpoints(run.checkpoints)
    best = checkpoints.best_of(run.checkpoints)
    return {
        "kind": "run",
        "path": str(run.path),
        "recipe": config.name,
        "version": len(entries),
        "total": config.steps,
        "digest": entries[-1].digest if entries else identity.initial_digest,
        "initial_digest": identity.initial_digest,
        "store_digest": identity.store_digest,
        "split_digest": identity.split_digest,
        "config_digest": identity.config_digest,
        "fingerprint": identity.fingerprint,
        "hardware": ", ".join(f"{name} {value}" for name, value in identity.fingerprint_detail.items()),
        "epochs": len(run.epochs()),
        "shards": sum(len(entry.counted) for entry in entries),
        "dropped": sum(len(entry.dropped) for entry in entries),
        "max_staleness": max(
            (entry.version - 1 - c.base_version for entry in entries for c in entry.counted), default=0
        ),
        "checkpoints": [path.name for path in found],
        "best": None if best is None else best.name,
        "best_score": checkpoints.best_score(run.checkpoints),
        "log_problem": log_problem(run, entries),
        "checkpoint_problems": [problem for problem in map(_problem, found) if problem is not None],
        "config": config.model_dump(mode="json"),
    }


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything; naming damage is the purpose here."""
    try:
        checkpoints.read_manifest(path)
    except CheckpointError as error:
        return str(error)
    return None


def _checkpoint(path: Path) -> dict[str, Any]:
    manifest = checkpoints.read_manifest(path)
    report: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(path),
        "version": manifest.version,
        "digest": manifest.run_digest,
        "epoch": manifest.epoch,
        "episodes": manifest.episodes,
        "bytes": manifest.tensors_bytes,
        "tensors": [f"{name} {shape}" for name, shape in zip(manifest.names, manifest.shapes, strict=True)],
        "pending": len(manifest.pending),
        "config_digest": manifest.config_digest,
    }
    config = path.parent.parent / RESOLVED_NAME
    if config.exists():
        try:
            report["config"] = load_resolved(config).model_dump(mode="json")
        except MetafleetError as error:
            report["config"] = None
            report["config_problem"] = str(error)
    return report
