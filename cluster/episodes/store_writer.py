"""Writing an episode store: the columns, the data file, then its header. The format is in `cluster.episodes.store`."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.durable import write_atomically
from cluster.episodes.store_header import StoreHeader, header_path, write_header
from cluster.errors import StoreError

ROWS_AT_ONCE = 4096
"""Rows copied or checked at a time where all samples at once could be more than the memory."""


@dataclass(frozen=True)
class ClassTable:
    """The classes of a store, in order, with their metadata."""

    names: tuple[str, ...]
    metadata: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Columns of class metadata, each one value a class."""


def data_schema(header: StoreHeader) -> pa.Schema:
    """The one schema that a data file with this header has."""
    tensor = pa.fixed_shape_tensor(pa.from_numpy_dtype(np.dtype(header.dtype)), list(header.sample_shape))
    names = ["class", *(f"class.{name}" for name in header.class_columns)]
    names += [f"sample.{name}" for name in header.sample_columns]
    text = pa.dictionary(pa.int32(), pa.string())
    return pa.schema([pa.field("sample", tensor, False), *(pa.field(name, text, False) for name in names)])


def write_store(
    path: str | os.PathLike[str],
    samples: np.ndarray,
    class_index: np.ndarray,
    classes: ClassTable,
    sample_metadata: Mapping[str, Sequence[str]],
    description: Mapping[str, str],
) -> StoreHeader:
    """Write an episode store and its header; the same arguments give the same bytes.

    ``samples`` is ``[sample, channel, height, width]`` uint8 or ``[sample, features]`` float32 and may be a memory map
    larger than the memory; ``class_index`` is ``[sample]``, indices into ``classes.names``; each column of
    ``sample_metadata`` has one value a sample. Rows are sorted by class, otherwise their order is kept.

    The data file is put in place first, then the header: a crash between the two leaves a file that `EpisodeStore.open`
    refuses. Two writers of one path at one time leave one whole store, or one that is refused by its digest.

    Raises:
        StoreError: something lies at ``path`` already, the arguments do not fit together, or the disk refuses.
    """
    path = Path(path)
    refuse_existing(path)
    draft = _draft_header(path, samples, class_index, classes, sample_metadata, description)
    order = np.argsort(class_index, kind="stable")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _in_order(path, samples, order) as rows:
            batch = _batch(rows, class_index[order], classes, sample_metadata, order, draft)
            written = replace(draft, **_write_batch(path, batch))
        try:
            write_header(path, written)
        except BaseException:
            path.unlink()  # a data file without a header would only be in the way of the next try
            raise
    except UnicodeEncodeError as error:
        raise StoreError(f"{path}: {error.object!r} is not valid Unicode: rename it in the source") from None
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written ({error.strerror or error}): check the folder and the disk"
        ) from error
    return written


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Refuse to write where something lies: an ingest calls this before its work, `write_store` again.

    Raises:
        StoreError: a file, folder or header is at ``path`` already.
    """
    for occupied in (Path(path), header_path(path)):
        if os.path.lexists(occupied):
            raise StoreError(
                f"{occupied}: exists already, and a store is never overwritten: remove it or choose another"
            )


@contextlib.contextmanager
def scratch_array(store: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """A writable array in a nameless file on the disk of ``store``: it may exceed the memory and leaves nothing.

    Raises:
        OSError: the disk has no room for it.
    """
    folder = next(folder for folder in store.absolute().parents if folder.is_dir())
    with tempfile.TemporaryFile(dir=folder) as file:
        # Reserved at once: a write to a mapping for which the disk has no room kills the process.
        size = math.prod(shape) * dtype.itemsize
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        yield np.memmap(file, dtype=dtype, mode="r+", shape=shape)


def _draft_header(
    path: Path,
    samples: np.ndarray,
    class_index: np.ndarray,
    classes: ClassTable,
    sample_metadata: Mapping[str, Sequence[str]],
    description: Mapping[str, str],
) -> StoreHeader:
    """The header but for size and digest, once the arguments are known to fit together."""
    draft = StoreHeader(
        digest="0" * 64,
        size=0,
        sample_shape=tuple(int(length) for length in samples.shape[1:]),
        dtype=samples.dtype.name if samples.dtype.isnative else samples.dtype.str,
        samples=len(samples),
        classes=len(classes.names),
        class_columns=tuple(sorted(classes.metadata)),
        sample_columns=tuple(sorted(sample_metadata)),
        description=dict(description),
    )
    if problem := draft.problem():
        raise StoreError(f"{path}: cannot be written: {problem}")
    if class_index.shape != (draft.samples,) or class_index.dtype.kind not in "iu":
        raise StoreError(
            f"{path}: class_index must be {draft.samples} integers, got {class_index.dtype} {class_index.shape}"
        )
    if len(set(classes.names)) != draft.classes or not all(classes.names):
        raise StoreError(f"{path}: class names must be distinct and not empty")
    if class_index.min() < 0 or class_index.max() >= draft.classes:
        raise StoreError(f"{path}: class_index must lie in 0 … {draft.classes - 1}")
    if empty := np.flatnonzero(np.bincount(class_index, minlength=draft.classes) == 0).tolist():
        raise StoreError(f"{path}: class {classes.names[empty[0]]!r} has no samples: leave it out")
    columns: list[tuple[str, Sequence[str], int]]
    columns = [(name, values, draft.classes) for name, values in classes.metadata.items()]
    columns += [(name, values, draft.samples) for name, values in sample_metadata.items()]
    for name, values, length in columns:
        if len(values) != length:
            raise StoreError(f"{path}: metadata column {name!r} must have {length} values, got {len(values)}")
    for start in range(0, draft.samples if draft.dtype == "float32" else 0, ROWS_AT_ONCE):
        if not np.isfinite(samples[start : start + ROWS_AT_ONCE]).all():
            raise StoreError(f"{path}: samples from row {start} hold values that are not finite: clean the source")
    return draft


@contextlib.contextmanager
def _in_order(path: Path, samples: np.ndarray, order: np.ndarray) -> Iterator[np.ndarray]:
    """The samples in row order, contiguous: themselves if they are so already, else a copy in a scratch file."""
    if samples.flags.c_contiguous and bool((order[1:] > order[:-1]).all()):
        yield samples
        return
    with scratch_array(path, samples.shape, samples.dtype) as rows:
        for start in range(0, len(order), ROWS_AT_ONCE):
            rows[start : start + ROWS_AT_ONCE] = samples[order[start : start + ROWS_AT_ONCE]]
        yield rows


def _batch(
    rows: np.ndarray,
    class_index: np.ndarray,
    classes: ClassTable,
    sample_metadata: Mapping[str, Sequence[str]],
    order: np.ndarray,
    header: StoreHeader,
) -> pa.RecordBatch:
    schema = data_schema(header)
    tensor = schema.field("sample").type
    values = pa.Array.from_buffers(tensor.value_type, rows.size, [None, pa.py_buffer(rows)])
    storage = pa.FixedSizeListArray.from_arrays(values, tensor.storage_type.list_size)
    columns = [pa.ExtensionArray.from_storage(tensor, storage), _dictionary(class_index, classes.names)]
    for name in header.class_columns:
        codes, names = _codes(classes.metadata[name])
        columns.append(_dictionary(codes[class_index], names))
    for name in header.sample_columns:
        codes, names = _codes(sample_metadata[name])
        columns.append(_dictionary(codes[order], names))
    return pa.record_batch(columns, schema=schema)


def _codes(values: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    names = sorted(set(values))
    code = {name: position for position, name in enumerate(names)}
    return np.fromiter((code[value] for value in values), np.int32, len(values)), names


def _dictionary(codes: np.ndarray, names: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(names, pa.string()))


def _write_batch(path: Path, batch: pa.RecordBatch) -> dict[str, Any]:
    """Write the data file; its size in bytes and its digest, read back from the file itself."""
    found: dict[str, Any] = {}

    def write(file: Any) -> None:
        # Without allow_64bit, Arrow refuses more than 2³¹ elements in all samples together.
        options = pa.ipc.IpcWriteOptions(allow_64bit=True)
        with pa.ipc.new_file(pa.PythonFile(file, "w"), batch.schema, options=options) as writer:
            writer.write_batch(batch)
        found["size"] = file.tell()
        file.seek(0)
        found["digest"] = hashlib.file_digest(file, "sha256").hexdigest()

    write_atomically(path, write)
    return found
