"""What a submitted job takes along: a survey of a folder, judged by size, and the zip file made of it.

Ray packs folders itself, but says neither what it leaves out nor how much it sends, and loses what .gitignore names.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathspec import GitIgnoreSpec

from cluster.errors import ConfigError

EXCLUDES = (
    *(".git", ".venv/", "venv/", "node_modules/", "/runs/", "__pycache__/", "*.pyc", "*.egg-info/", ".*_cache/"),
    *("*.arrow", "*.arrow.header", "*.safetensors"),
)
"""Patterns, as .gitignore has them, of what never goes along."""

SECRETS = (
    *(".env", ".env.*", ".envrc", ".netrc", ".npmrc", ".pypirc", ".git-credentials", "auth_token"),
    *(".ssh", ".aws", ".kube", ".ray", ".docker", "*.pem", "*.key"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "credentials*", "*_token", "!*.py"),
)
"""Patterns of secrets, where people keep them beside their code: they never go along either, and are named."""

IGNORE_FILES = (".gitignore", ".rayignore")
"""Files whose patterns hold for the folder that they are in, as for Ray's own packages."""

NAMED = 3
"""Entries that a refusal names."""

MIB = 1 << 20
_Rules = list[tuple[Path, GitIgnoreSpec]]
"""Patterns, each with the folder that they count from."""
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Survey:
    """What would be shipped of a folder."""

    folder: Path
    sizes: Mapping[Path, int]
    """Bytes of each file, by its path in the folder, sorted."""
    ignored_recipes: tuple[Path, ...]
    """TOML files that an ignore file leaves out: a recipe may be among them."""
    secrets: tuple[Path, ...]
    """What ``SECRETS`` names and no ignore file does."""
    links: tuple[Path, ...]
    """Links to folders, to nothing, and out of the folder: they are not followed."""

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(self.sizes.values())


def survey(folder: Path, excludes: Sequence[str] = ()) -> Survey:
    """What ``folder`` holds, but for ``EXCLUDES``, ``SECRETS``, ``excludes`` and what its ignore files name.

    Raises:
        ConfigError: no folder, or one that cannot be read.
    """
    if not os.path.isdir(folder):  # which does not raise
        raise ConfigError(f"--working-dir {folder} is no folder: give the one to ship, or leave it out")
    fixed = _spec([*EXCLUDES, *excludes], "--exclude")
    sizes: dict[Path, int] = {}
    recipes, secrets, links = [], [], []
    with _readable():
        for path, left_out in _walk(folder, fixed):
            inner = path.relative_to(folder)
            if left_out == "ignored":
                recipes += [inner] if path.suffix == ".toml" else []
            elif left_out == "secret":
                secrets.append(inner)
            elif path.is_dir() or _leads_out(path, folder):
                links.append(inner)
            elif path.is_file():
                sizes[inner] = path.stat().st_size
    named = (tuple(sorted(paths)) for paths in (recipes, secrets, links))
    return Survey(folder, dict(sorted(sizes.items())), *named)


def refuse_too_large(found: Survey, limit: int) -> None:
    """Refuse more than ``limit`` bytes.

    Raises:
        ConfigError: with the largest entries of the folder.
    """
    if found.size <= limit:
        return
    entries: dict[str, int] = {}
    for path, size in found.sizes.items():
        top = path.parts[0] + ("/" if len(path.parts) > 1 else "")
        entries[top] = entries.get(top, 0) + size
    largest = sorted(entries, key=lambda entry: -entries[entry])[:NAMED]
    raise ConfigError(
        f"--working-dir {found.folder} has {mib(found.size)} to ship, more than {mib(limit)}: leave something out by "
        f"--exclude PATTERN, or raise --max-size; largest: "
        + ", ".join(f"{entry} {mib(entries[entry])}" for entry in largest)
    )


def write_package(path: Path, found: Survey | None, texts: Mapping[str, str]) -> None:
    """Write a zip file of the files found and of ``texts``, by name; a text goes before a file of the same name.

    Equal contents give equal bytes, whatever their times: Ray sends a package that the cluster has only once.

    Raises:
        ConfigError: a file cannot be read.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(texts.items()):
            archive.writestr(_entry(name, 0o644), text)
        if found is None:
            return
        for inner in found.sizes:
            if (name := inner.as_posix()) not in texts:
                file = found.folder / inner
                with _readable():
                    mode, body = file.stat().st_mode & 0o777, file.read_bytes()
                archive.writestr(_entry(name, mode), body)


def mib(size: int) -> str:
    """Bytes as text in MiB."""
    return f"{size / MIB:.1f} MiB"


def _walk(folder: Path, fixed: GitIgnoreSpec) -> Iterator[tuple[Path, Literal["ignored", "secret", None]]]:
    """Files, links to folders, and folders that are secrets, but for what ``fixed`` names; each with why it stays here.

    Raises:
        OSError: a folder or an ignore file cannot be read, and no ignore file names it or what it is in.
    """
    rules: dict[Path, _Rules] = {folder.parent: []}
    secrets = _spec(SECRETS, "secrets")

    def unreadable(error: OSError) -> None:
        path = Path(error.filename)
        if not _named(path, "/", rules[path.parent]):
            raise error

    for here, folders, files in os.walk(folder, onerror=unreadable):
        current = Path(here)
        above = rules[current.parent]
        ignored = _named(current, "/", above)
        own = [(current, _patterns(current / name)) for name in IGNORE_FILES if name in files and not ignored]
        rules[current] = above + own
        entries = [(current / name, "/") for name in folders] + [(current / name, "") for name in files]
        kept = [(path, mark) for path, mark in entries if not _named(path, mark, [(folder, fixed)])]
        secret = {path for path, mark in kept if _named(path, mark, [(folder, secrets)])}
        folders[:] = [path.name for path, mark in kept if mark and path not in secret]
        for path, mark in kept:
            if path in secret or not mark or os.path.islink(path):  # which does not raise
                ignored = _named(path, mark, rules[current])
                yield path, "ignored" if ignored else "secret" if path in secret else None


def _leads_out(path: Path, folder: Path) -> bool:
    """Whether it is a link to what is not there, or not in the folder."""
    return path.is_symlink() and not (path.exists() and path.resolve().is_relative_to(folder.resolve()))


def _named(path: Path, mark: str, rules: _Rules) -> bool:
    """Whether a rule names the path; ``mark`` is a slash for a folder."""
    return any(spec.match_file(path.relative_to(base).as_posix() + mark) for base, spec in rules)


def _patterns(path: Path) -> GitIgnoreSpec:
    """What an ignore file names."""
    return _spec(path.read_text("utf-8", errors="replace").splitlines(), str(path))


def _spec(patterns: Sequence[str], where: str) -> GitIgnoreSpec:
    try:
        return GitIgnoreSpec.from_lines(patterns)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}; give patterns as .gitignore has them") from error


@contextmanager
def _readable() -> Iterator[None]:
    """Refuses what cannot be read in the block.

    Raises:
        ConfigError: instead of OSError.
    """
    try:
        yield
    except OSError as error:
        why = f"cannot ship {error.filename}: {error.strerror}; leave it out by --exclude PATTERN"
        raise ConfigError(why) from error


def _entry(name: str, mode: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.external_attr, entry.compress_type = mode << 16, zipfile.ZIP_DEFLATED
    return entry
