"""The ids of a folder's documents, as 64-bit hashes: 8 bytes a document are held, whatever its ids are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from m3cli.store.layout import rows_name
from m3cli.store.reading import reading
from m3cli.store.verify.rows import hash_ids


def read_id_hashes(root: Path, shards: Iterable[int]) -> dict[int, NDArray[np.int64]]:
    """Read the hashed id of each document, by shard."""
    return {
        index: np.concatenate([np.empty(0, np.int64), *(hashed for _, hashed in iter_ids(root, [index]))])
        for index in shards
    }


def iter_ids(root: Path, shards: Iterable[int]) -> Iterator[tuple[Any, NDArray[np.int64]]]:
    """Yield the ids of documents, an Arrow column at a time, with their hashes, which hold for this process."""
    for index in shards:
        with reading(root, index):
            file = pq.ParquetFile(root / rows_name(index))
        with file:
            for group in range(file.num_row_groups):
                with reading(root, index):
                    table = file.read_row_group(group, columns=["id", "chunk_index"], use_threads=False)
                    ids = table.column("id").take(np.flatnonzero(table.column("chunk_index").to_numpy() == 0))
                    hashes = hash_ids(ids)
                yield ids, hashes
