"""Ids that more than one document of a folder carries: no fault, as they are the corpus' own, but worth a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from m3cli.store.layout import rows_name
from m3cli.store.reading import reading
from m3cli.store.verify.rows import hash_ids

NUM_EXAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateIds:
    """What is to be said of them."""

    count: int
    "ids that occur more than once"
    examples: tuple[str, ...]


def find_duplicate_ids(root: Path, hashes: Mapping[int, NDArray[np.int64]]) -> DuplicateIds:
    """Find ids of more than one document, from the 64-bit hash of each document's id, by shard."""
    together = np.sort(np.concatenate([np.empty(0, np.int64), *hashes.values()]))
    twice = np.unique(together[1:][together[1:] == together[:-1]])
    examples: list[str] = []
    for wanted in twice[:NUM_EXAMPLES]:
        shard = next(shard for shard, found in hashes.items() if (found == wanted).any())
        examples += _look_up(root, shard, wanted)
    return DuplicateIds(count=len(twice), examples=tuple(examples))


def _look_up(root: Path, shard: int, wanted: np.int64) -> list[str]:
    with reading(root, shard), pq.ParquetFile(root / rows_name(shard)) as file:
        for group in range(file.num_row_groups):
            ids = file.read_row_group(group, columns=["id"], use_threads=False).column("id")
            places = np.flatnonzero(hash_ids(ids) == wanted)
            if len(places):
                return [ids[int(places[0])].as_py()]
    return []
