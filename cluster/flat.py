"""Named tensors as one flat buffer and back, and digests over them.

What crosses a process border is one contiguous buffer; what learners see is an ordered dict of named tensors.
``FlatSpec`` is the fixed layout between the two. Digests are SHA-256 over (name, dtype, shape, bytes) sorted by name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Tensors = dict[str, Tensor]
"""Named tensors in a fixed order (the order of insertion)."""


def some_tensor(tensors: Mapping[str, Tensor]) -> Tensor:
    """The first of them, where they share device and dtype."""
    return next(iter(tensors.values()))


@dataclass(frozen=True)
class FlatSpec:
    """The layout of named tensors in one flat buffer: names, shapes and offsets in elements.

    All tensors of one spec share one floating dtype.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> FlatSpec:
        """The layout of ``tensors`` in their own order.

        Raises:
            TypeError: the tensors do not share one dtype.
        """
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) > 1:
            raise TypeError(f"one flat buffer holds one dtype, got {sorted(map(str, dtypes))}")
        dtype = dtypes.pop() if dtypes else torch.float32
        return FlatSpec(tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()), dtype)

    @property
    def size(self) -> int:
        """Elements in the flat buffer."""
        return sum(math.prod(shape) for shape in self.shapes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One new contiguous buffer ``[size]`` with the tensors of this spec, in its order."""
        if not self.names:
            return torch.empty(0, dtype=self.dtype)
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.names])

    def unflatten(self, flat: Tensor) -> Tensors:
        """Views into ``flat`` (``[size]``), by name."""
        if flat.numel() != self.size:
            raise ValueError(f"flat buffer has {flat.numel()} elements, the layout needs {self.size}")
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = torch.split(flat, sizes) if sizes else ()
        return {name: part.view(shape) for name, shape, part in zip(self.names, self.shapes, parts, strict=True)}


def update_digest(digest: hashlib._Hash, name: str, array: np.ndarray) -> None:
    """Add one named array to a running SHA-256: name, dtype, shape and bytes."""
    contiguous = np.ascontiguousarray(array)
    digest.update(f"{name}|{contiguous.dtype.str}|{tuple(array.shape)}|".encode())
    digest.update(contiguous.data if contiguous.size else b"")


def tensors_digest(groups: Mapping[str, Mapping[str, Tensor]], version: int) -> str:
    """The run digest: SHA-256 (hex) over the version and the sorted (name, dtype, shape, bytes) of every group.

    Args:
        groups: for instance ``{"theta": ..., "state": ..., "optimizer": ...}``; names are prefixed by their group.
        version: how many outer updates θ has had.
    """
    digest = hashlib.sha256(f"version|{version}|".encode())
    named = {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
    for name in sorted(named):
        update_digest(digest, name, named[name].detach().cpu().numpy())
    return digest.hexdigest()
