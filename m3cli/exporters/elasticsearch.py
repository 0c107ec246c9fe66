"""Targets `elasticsearch` and `opensearch`: bulk files of JSON lines, and the index they go into."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import orjson

from m3cli.errors import UsageError
from m3cli.exporters.rows import (
    README_NAME,
    LeftOut,
    OpenFile,
    Part,
    Read,
    Shape,
    Sink,
    Target,
    check_names,
    cut_part,
    decode_vectors,
    drop_infinite,
    drop_long_keys,
    fill_template,
    kind_of,
    plain_columns,
    sparse_json,
    widen,
)

INDEX_NAME = "index.json"
MAX_ID = 512
"bytes"
FILE_BYTES = 64 << 20
BLOCK_BYTES = 4 << 20
"of vectors and texts that are made into JSON together"
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
_TYPES: dict[str, dict[str, Any]] = {
    # Lucene takes no term of more than 32,766 bytes: 8,191 characters have at most 32,764.
    "text": {"type": "keyword", "ignore_above": 8191},
    "int": {"type": "long"},
    "float": {"type": "double"},
    "bool": {"type": "boolean"},
}


def make_index(shape: Shape, *, opensearch: bool) -> dict[str, Any]:
    """Return settings and mappings of the index."""
    properties: dict[str, Any] = {name: {"type": "keyword"} for name in ("key", "id")}
    properties |= {name: {"type": "long"} for name in ("chunk_index", "char_start", "char_end")}
    properties |= {
        field.name: {"type": "text"} if field.name == "text" else _TYPES[kind_of(field.type)] for field in shape.kept
    }
    vectors = _opensearch_vectors(shape) if opensearch else _elasticsearch_vectors(shape)
    mappings = {"mappings": {"dynamic": "strict", "properties": properties | vectors}}
    return {"settings": {"index": {"knn": True}}, **mappings} if opensearch else mappings


def _elasticsearch_vectors(shape: Shape) -> dict[str, Any]:
    bits = {"element_type": "bit"} if shape.colbert_dtype == "binary" else {}
    kinds: dict[str, dict[str, Any]] = {
        "dense_vecs": {
            "type": "dense_vector",
            "dims": shape.dim,
            "index": True,
            "similarity": "dot_product",
            "index_options": {"type": "hnsw"},
        },
        "lexical_weights": {"type": "sparse_vector", "index_options": {"prune": False}},
        "colbert_vecs": {"type": "rank_vectors", "dims": shape.dim, **bits},
    }
    chosen = dict(zip(("dense", "sparse", "colbert"), kinds, strict=True))
    return {chosen[output]: kinds[chosen[output]] for output in shape.outputs}


def _opensearch_vectors(shape: Shape) -> dict[str, Any]:
    method = {"name": "hnsw", "engine": "faiss", "space_type": "innerproduct"}
    kinds: dict[str, Any] = {}
    if "dense" in shape.outputs:
        kinds["dense_vecs"] = {"type": "knn_vector", "dimension": shape.dim, "method": method}
    if "sparse" in shape.outputs:
        kinds["lexical_weights"] = {"type": "rank_features"}
    return kinds


def write(read: Read, open_file: OpenFile, shape: Shape, lost: LeftOut) -> None:
    """Write a shard as files of at most FILE_BYTES, unless a row has more."""
    sink: Sink | None = None
    size = files = 0
    for part in read(None):
        for block in cut_part(part, BLOCK_BYTES):
            lines = make_lines(block, shape, lost)
            while lines:
                if sink is None:
                    sink, size, files = open_file(f"-{files:03d}.ndjson"), 0, files + 1
                ends = np.cumsum([len(line) for line in lines])
                fit = max(int(np.searchsorted(ends, FILE_BYTES - size, side="right")), int(size == 0))
                sink.write(b"".join(lines[:fit]))
                size += sum(map(len, lines[:fit]))
                lines = lines[fit:]
                sink = None if lines else sink


def make_lines(part: Part, shape: Shape, lost: LeftOut) -> list[bytes]:
    """Return what is to be done with a row and the row, two lines each; an output that a row lacks is not written."""
    part = drop_long_keys(part, MAX_ID, lost)
    rows = drop_infinite(part, plain_columns(part, lost), lost).to_pylist()
    embeddings = part.embeddings
    outputs: dict[str, Callable[[int], Any]] = {}
    if embeddings.dense_vecs is not None:
        dense = widen(embeddings.dense_vecs)
        # Stored as float16 they are unit only to its tolerance, which Elasticsearch refuses.
        outputs["dense_vecs"] = (dense / np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)).__getitem__
    if embeddings.lexical_weights is not None:
        weights = sparse_json(embeddings.lexical_weights)
        outputs["lexical_weights"] = lambda row: orjson.Fragment(weights[row]) if len(weights[row]) > 2 else None
    if (colbert := embeddings.colbert_vecs) is not None:
        vectors = colbert.vectors.view(np.int8) if shape.colbert_dtype == "binary" else decode_vectors(colbert)
        spans = [slice(*ends) for ends in pairwise(colbert.indptr.tolist())]
        outputs["colbert_vecs"] = lambda row: vectors[spans[row]] if spans[row].stop > spans[row].start else None
    lines = []
    for place, (key, row) in enumerate(zip(part.keys.to_pylist(), rows, strict=True)):
        made = {name: value for name, make in outputs.items() if (value := make(place)) is not None}
        action = orjson.dumps({"index": {"_id": key}}, option=orjson.OPT_APPEND_NEWLINE)
        lines.append(action + orjson.dumps({"key": key, **row, **made}, option=_OPTIONS))
    return lines


def describe(shape: Shape, *, opensearch: bool) -> Mapping[str, bytes]:
    """Write the index and the README."""
    template = "opensearch.md" if opensearch else "elasticsearch.md"
    index = orjson.dumps(make_index(shape, opensearch=opensearch), option=orjson.OPT_INDENT_2)
    return {INDEX_NAME: index + b"\n", README_NAME: fill_template(template, name=shape.name)}


def check(shape: Shape) -> None:
    """Check that kept fields can be fields of an index."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,254}", shape.name):
        raise UsageError(f"--name {shape.name!r}: an index' name has small letters, digits, '_', '-' and '.' only")
    taken = ("key", "dense_vecs", "lexical_weights", "colbert_vecs")
    check_names(shape, taken, re.compile(r"[^_.\s][^.\s]*").fullmatch, "an index")


TARGETS = {
    "elasticsearch": Target(
        outputs=("dense", "sparse", "colbert"),
        write=write,
        describe=partial(describe, opensearch=False),
        check=check,
        binary=True,
        number_bytes=12.4,
        weight_bytes=20,
    ),
    "opensearch": Target(
        outputs=("dense", "sparse"),
        write=write,
        describe=partial(describe, opensearch=True),
        check=check,
        number_bytes=12.4,
        weight_bytes=20,
    ),
}
