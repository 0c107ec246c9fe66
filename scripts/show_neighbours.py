#!/usr/bin/env python3
"""Shows for a few texts of an encoded corpus which texts are nearest, by each of the three outputs.

    scripts/show_neighbours.py DIR [ID ...]

DIR is a Parquet folder that `m3 encode --keep-text` wrote, and is read as anyone would read it: with pyarrow and numpy.
Without ids, two English texts of the sample corpus are taken. Only short rows are compared, so that it takes seconds:

- dense: the dot product of the two vectors;
- sparse: the sum of q times p over the tokens that both have;
- colbert: the mean over the query's vectors of the best dot product with one of the passage's.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

MAX_TOKENS = 64
NUM_NEIGHBOURS = 3
COLUMNS = ("id", "text", "chunk_index", "num_tokens", "dense_vecs", "lexical_weights", "colbert_vecs")
# Words that tell the sentences which are shown; where a catalogue has lost one, the next best is taken.
WANTED = ("image", "page")

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Short rows of a folder."""

    ids: list[str]
    texts: list[str]
    dense: Floats
    "[R, D]"
    weights: list[dict[int, float]]
    "token id to weight, a row"
    vectors: Floats
    "[N, D]: the ColBERT vectors of all rows, one row after the other"
    starts: NDArray[np.int64]
    "[R]: where a row's vectors begin"


def read_rows(folder: Path) -> Rows:
    """Read the rows that are whole documents of at most MAX_TOKENS."""
    table = pq.read_table(folder / "rows", columns=list(COLUMNS))
    table = table.filter((pc.field("num_tokens") <= MAX_TOKENS) & (pc.field("chunk_index") == 0)).combine_chunks()
    dim = table.schema.field("dense_vecs").type.list_size
    matrices = [np.frombuffer(cell, np.float16).reshape(-1, dim) for cell in table["colbert_vecs"].to_pylist()]
    lengths = np.array([len(matrix) for matrix in matrices])
    return Rows(
        ids=table["id"].to_pylist(),
        texts=table["text"].to_pylist(),
        dense=flatten(table["dense_vecs"]).astype(np.float32).reshape(-1, dim),
        weights=[
            dict(zip(cell["indices"], cell["values"], strict=True)) for cell in table["lexical_weights"].to_pylist()
        ],
        vectors=np.concatenate(matrices).astype(np.float32),
        starts=np.cumsum(lengths) - lengths,
    )


def flatten(column: Any) -> NDArray[Any]:
    """Return the values of a column of lists, one list after the other."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks])


def score_all(rows: Rows, query: int) -> dict[str, Floats]:
    """Score every row against one of them."""
    weights = rows.weights[query]
    ends = np.append(rows.starts[1:], len(rows.vectors))
    similarity = rows.vectors[rows.starts[query] : ends[query]] @ rows.vectors.T
    return {
        "dense": rows.dense @ rows.dense[query],
        "sparse": np.array(
            [sum(weight * other.get(token, 0.0) for token, weight in weights.items()) for other in rows.weights],
            dtype=np.float32,
        ),
        "colbert": np.maximum.reduceat(similarity, rows.starts, axis=1).mean(axis=0),
    }


def choose(rows: Rows, ids: Sequence[str]) -> list[int]:
    """Return the places of the wanted rows; without ids, of two English ones."""
    if ids:
        return [rows.ids.index(row_id) for row_id in ids]
    english = sorted((row_id, place) for place, row_id in enumerate(rows.ids) if "/en/" in row_id)
    chosen: list[int] = []
    for word in WANTED:
        places = [place for _, place in english if place not in chosen]
        chosen += [next((place for place in places if word in rows.texts[place]), places[0])] if places else []
    return chosen


def show(rows: Rows, query: int, width: int) -> None:
    """Print a text and its neighbours."""
    print(f"\n{rows.ids[query]}: {rows.texts[query]}")
    for output, scores in score_all(rows, query).items():
        scores[query] = -np.inf
        for place in np.argsort(-scores, kind="stable")[:NUM_NEIGHBOURS]:
            line = f"  {output:8}{scores[place]:6.3f}  {rows.ids[place]:26} {rows.texts[place]}"
            print(line if len(line) <= width else f"{line[: width - 3]}...")


def main(argv: Sequence[str] | None = None) -> int:
    """Print neighbours by each output."""
    parser = argparse.ArgumentParser(description="Show which texts of an encoded corpus are nearest to some of them.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="what m3 encode --keep-text wrote, as Parquet")
    parser.add_argument("ids", nargs="*", metavar="ID", help="texts to show the neighbours of")
    options = parser.parse_args(argv)
    try:
        rows = read_rows(options.folder)
        places = choose(rows, options.ids)
    except (OSError, ValueError, KeyError) as error:
        print(f"show_neighbours: error: {error}", file=sys.stderr)
        return 1
    for place in places:
        show(rows, place, max(60, shutil.get_terminal_size((120, 24)).columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
