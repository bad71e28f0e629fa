"""The episode store: an immutable, memory-mapped Arrow IPC file of samples, with a sidecar header.

One file, one record batch, rows sorted by class, so that each class is a contiguous range of rows:

    sample         fixed-shape tensor: uint8 images ``[channel, height, width]`` or float32 vectors ``[features]``
    class          dictionary-encoded string; the dictionary is the list of classes, in order
    class.NAME     class metadata (the alphabet), dictionary-encoded string, constant within a class
    sample.NAME    sample metadata (who drew it), dictionary-encoded string

`write_store` makes one, once; `EpisodeStore.open` maps one. All processes of a node share one copy in the page cache.
`store_header` holds the sidecar header and checks the digest before Arrow sees a byte, `store_writer` the writing;
neither knows this module.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.episodes.store_header import INGEST_AGAIN, StoreHeader, file_identity, read_header, verify
from cluster.episodes.store_writer import ClassTable, data_schema, write_store
from cluster.errors import StoreError

__all__ = ["ClassTable", "EpisodeStore", "StoreHeader", "read_header", "write_store"]


@dataclass(frozen=True, eq=False)
class EpisodeStore:
    """An open store. Arrays are read-only views of the mapped file, or small tables about its classes."""

    path: Path
    header: StoreHeader
    samples: np.ndarray = field(repr=False)
    """All samples, ``[sample, *sample_shape]``, uint8 or float32: a view of the mapping, sorted by class."""
    classes: tuple[str, ...]
    class_start: np.ndarray
    """Row of each class's first sample, int64 ``[class]``."""
    class_count: np.ndarray
    """Samples of each class, int64 ``[class]``, at least 1."""
    class_metadata: Mapping[str, tuple[str, ...]]
    """Class metadata columns, each one value a class."""
    _sample_columns: Mapping[str, pa.DictionaryArray] = field(repr=False)

    @property
    def digest(self) -> str:
        """The store digest: SHA-256 of the data file, hex."""
        return self.header.digest

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """``(channel, height, width)`` or ``(features,)``."""
        return self.header.sample_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the samples: uint8 or float32."""
        return self.samples.dtype

    def sample_metadata(self, column: str) -> tuple[str, ...]:
        """One value a sample, in row order.

        Raises:
            StoreError: the store has no such sample metadata column.
        """
        if column not in self._sample_columns:
            raise StoreError(
                f"{self.path}: has no sample metadata column {column!r}: it has {list(self._sample_columns) or 'none'}"
            )
        values = self._sample_columns[column].dictionary.to_pylist()
        return tuple(values[code] for code in _codes_of(self._sample_columns[column]).tolist())

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> EpisodeStore:
        """Map the store ``path`` after checking all of it: header, size, digest, schema, contents.

        Raises:
            StoreMissingError: there is nothing at ``path``.
            StoreError: it is foreign, truncated, altered, or breaks a rule of the format.
        """
        path = Path(path)
        header = read_header(path)
        identity = verify(path, header)
        try:
            batch = _map(path, header)
            if file_identity(path) != identity:
                raise ValueError("it changed while it was opened")
            return cls(path, header, *_contents(batch, header))
        except (pa.ArrowException, ValueError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise StoreError(f"{path}: is not a valid episode store ({reason}): {INGEST_AGAIN}") from None


def _map(path: Path, header: StoreHeader) -> pa.RecordBatch:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if not reader.schema.equals(data_schema(header)):
        raise ValueError("its columns are not those its header names")
    if reader.num_record_batches != 1:
        raise ValueError(f"{reader.num_record_batches} record batches where there must be one")
    batch = reader.get_batch(0)
    batch.validate(full=True)
    if batch.num_rows != header.samples:
        raise ValueError(f"{batch.num_rows} samples where its header says {header.samples}")
    return batch


def _contents(batch: pa.RecordBatch, header: StoreHeader) -> tuple[Any, ...]:
    """The fields of an `EpisodeStore` after its header."""
    if any(column.null_count for column in batch.columns):
        raise ValueError("it holds nulls")
    codes = _codes_of(batch.column("class"))
    names = _names_of(batch.column("class"))
    count = np.bincount(codes, minlength=len(names)).astype(np.int64)
    if len(names) != header.classes or len(set(names)) != len(names) or (count < 1).any():
        raise ValueError(f"its classes are not {header.classes} distinct ones with a sample each")
    if (np.diff(codes) < 0).any():
        raise ValueError("its rows are not sorted by class")
    start = np.cumsum(count) - count
    metadata = {}
    for column in header.class_columns:
        of_row = _codes_of(batch.column(f"class.{column}"))
        if (of_row != np.repeat(of_row[start], count)).any():
            raise ValueError(f"its column class.{column} varies within a class")
        values = _names_of(batch.column(f"class.{column}"))
        metadata[column] = tuple(values[code] for code in of_row[start].tolist())
    for table in (start, count):
        table.flags.writeable = False
    flat = batch.column("sample").storage.flatten().to_numpy(zero_copy_only=True)
    samples = flat.reshape(header.samples, *header.sample_shape)
    sample_columns = {column: batch.column(f"sample.{column}") for column in header.sample_columns}
    for column in sample_columns.values():
        _names_of(column)
    return samples, tuple(names), start, count, metadata, sample_columns


def _codes_of(column: pa.DictionaryArray) -> np.ndarray:
    codes: np.ndarray = column.indices.to_numpy(zero_copy_only=True)
    return codes


def _names_of(column: pa.DictionaryArray) -> list[str]:
    names: list[str] = column.dictionary.to_pylist()
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a dictionary holds nulls")
    return names
