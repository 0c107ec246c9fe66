"""What goes to a contender's process and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Texts that are run and timed together."""

    texts: list[str]
    lengths: list[int]
    "tokens of each, <s> and </s> included, cut to what the model takes"
    batch: int | None = None
    "texts in a peer's batch, in place of what its name says"

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a run over a group tells."""

    positions: int
    "that the model ran: tokens and padding"
    stages: dict[str, float] = field(default_factory=dict)
    "seconds by stage"


Runner = Callable[[Group], Made]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was measured of a contender on a group."""

    seconds: float
    positions: int
    stages: dict[str, float]
    peak_bytes: int
    "the most memory that the process had held by then"
