"""What is wrong with a folder, and what mends it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from m3cli.store.reading import UNREADABLE

Cure = Literal["redo", "remove", "manifest", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong."""

    file: str
    "path below the folder, with '/'"
    shard: int | None
    "the shard it belongs to, None for what belongs to the folder"
    what: str
    "what is wrong, for people"
    cure: Cure
    "redo: the shard is to be done again; remove: the file belongs to nothing; manifest: is written anew; none: no cure"


@dataclass(slots=True)
class ShardCheck:
    """What was found in one shard."""

    index: int
    faults: list[Fault] = field(default_factory=list)
    id_hashes: list[NDArray[np.int64]] = field(default_factory=list)

    def say(self, name: str, *found: str) -> None:
        """Note what is wrong with a file."""
        self.faults += [Fault(file=name, shard=self.index, what=what, cure="redo") for what in found]

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Note a file that cannot be read as what it is meant to be."""
        try:
            yield
        except UNREADABLE as error:
            self.say(name, f"cannot be read: {' '.join(str(error).split())}")
