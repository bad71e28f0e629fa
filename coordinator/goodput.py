"""Goodput: how much of what was computed counted, and what the rest was lost to.

goodput = shards that a commit counted / shards that workers computed or were computing when they were lost
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Loss = Literal[
    "copy",
    "verification",
    "nonfinite",
    "stale",
    "damaged",
    "error",
    "unreachable",
    "worker",
    "deadline",
    "late",
    "stopped",
    "driver",
]
"""What work can be lost to: the slower of two copies, a second opinion, a non-finite or too stale contribution, a reply
damaged on its way, an exception, a call that did not get through, a lost worker, a deadline, a reply that nobody waited
for any more, the end of the run while it was computed, a lost driver."""

LOSSES: tuple[Loss, ...] = get_args(Loss)


@dataclass
class Goodput:
    """Counts over a whole run, all its drivers together."""

    useful: int = 0
    """Shards that commits counted."""
    lost: Counter[str] = field(default_factory=Counter)
    """Shards computed, or being computed, for nothing, by cause."""
    lost_seconds: Counter[str] = field(default_factory=Counter)
    """Seconds of workers that went into them."""
    recoveries: int = 0
    """Workers that came in the place of lost ones."""
    recovery_seconds: float = 0.0
    """Sum of the times from a loss until its slot had a worker again."""
    longest_recovery: float = 0.0

    def lose(self, cause: Loss, seconds: float = 0.0, shards: int = 1) -> None:
        """Shards were computed for nothing."""
        if not shards:
            return
        self.lost[cause] += shards
        self.lost_seconds[cause] += seconds  # type: ignore[assignment]

    def recovered(self, seconds: float) -> None:
        """A lost worker's slot has one again."""
        self.recoveries += 1
        self.recovery_seconds += seconds
        self.longest_recovery = max(self.longest_recovery, seconds)

    @property
    def share(self) -> float:
        """Goodput as a fraction; 1 before anything was computed."""
        computed = self.useful + sum(self.lost.values())
        return self.useful / computed if computed else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        mean = self.recovery_seconds / self.recoveries if self.recoveries else None
        return {
            "goodput": self.share,
            "useful_shards": self.useful,
            "lost_shards": {cause: count for cause, count in self.lost.items() if count},
            "lost_seconds": {cause: seconds for cause, seconds in self.lost_seconds.items() if seconds},
            "recoveries": self.recoveries,
            "mean_recovery_seconds": mean,
            "longest_recovery_seconds": self.longest_recovery if self.recoveries else None,
        }

    def pack(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {**vars(self), "lost": dict(self.lost), "lost_seconds": dict(self.lost_seconds)}

    def restore(self, packed: Mapping[str, Any]) -> None:
        """Add what ``pack`` gave to what was counted since."""
        for name, value in packed.items():
            before = getattr(self, name)
            if isinstance(before, Counter):
                before.update(value)
            else:
                setattr(self, name, max(before, value) if name == "longest_recovery" else before + value)
