"""The classes of a split grouped by a metadata column, for episodes within one alphabet or script."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from cluster.errors import SplitError


@dataclass(frozen=True)
class Groups:
    """Class indices, those of one group after another, the groups in the order of their names."""

    column: str
    names: tuple[str, ...]
    classes: Int64[np.ndarray, " class"]
    start: Int64[np.ndarray, " group"]
    """Where each group begins in ``classes``."""
    count: Int64[np.ndarray, " group"]

    @staticmethod
    def of(column: str, values: np.ndarray, classes: np.ndarray) -> Groups:
        """Group ``classes`` by their ``values``, text ``[class of the store]``."""
        names, member = np.unique(values[classes], return_inverse=True)
        count = np.bincount(member, minlength=len(names)).astype(np.int64)
        order = np.argsort(member, kind="stable")
        return Groups(column, tuple(map(str, names)), classes[order], np.cumsum(count) - count, count)

    def at_least(self, way: int) -> Int64[np.ndarray, " group"]:
        """The groups with so many classes.

        Raises:
            SplitError: there is none.
        """
        found = np.flatnonzero(self.count >= way)
        if not len(found):
            largest = self.names[int(self.count.argmax())]
            raise SplitError(
                f"way {way} is more than any {self.column} has (the largest, {largest!r}, has {self.count.max()} "
                f"classes); lower way, or leave within out"
            )
        return found
