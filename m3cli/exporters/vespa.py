"""Target `vespa`: operations for `vespa feed`, and the application that takes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import orjson
import pyarrow.compute as pc

from m3cli.errors import UsageError
from m3cli.exporters.rows import (
    README_NAME,
    LeftOut,
    OpenFile,
    Part,
    Read,
    Shape,
    Target,
    change_texts,
    check_names,
    cut_part,
    decode_vectors,
    drop_infinite,
    drop_long_keys,
    drop_rows,
    fill_template,
    kind_of,
    plain_columns,
    sparse_json,
)

MAX_KEY = 60_000
"bytes; an id has at most 64 KiB"
BLOCK_BYTES = 4 << 20
"of vectors and texts that are made into JSON together"
_NO_TEXT = "[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]"
"characters that Vespa takes in no text"
_TYPES = {"text": "string", "int": "long", "float": "double", "bool": "bool"}


def list_fields(shape: Shape) -> dict[str, str]:
    """Return the type of each field."""
    fields = {"key": "string", "id": "string", **dict.fromkeys(("chunk_index", "char_start", "char_end"), "long")}
    fields |= {field.name: _TYPES[kind_of(field.type)] for field in shape.kept}
    bits = shape.colbert_dtype == "binary"
    vectors = {
        "dense": ("dense_vecs", f"tensor<bfloat16>(x[{shape.dim}])"),
        "sparse": ("lexical_weights", "tensor<float>(t{})"),
        "colbert": (
            "colbert_vecs",
            f"tensor<{'int8' if bits else 'bfloat16'}>(t{{}},x[{shape.dim // (8 if bits else 1)}])",
        ),
    }
    return fields | dict(vectors[output] for output in shape.outputs)


def write(read: Read, open_file: OpenFile, shape: Shape, lost: LeftOut) -> None:
    """Write a shard as one file of operations, a line each."""
    sink = open_file(".jsonl")
    for part in read(None):
        for block in cut_part(part, BLOCK_BYTES):
            sink.write(b"".join(make_lines(block, shape, lost)))


def make_lines(part: Part, shape: Shape, lost: LeftOut) -> list[bytes]:
    """Return the operations that put rows; an empty tensor, or a field that is null, is left out of its operation."""
    part = drop_rows(part, np.flatnonzero(_has_control(part.keys)), lost, "control character in the key")
    part = drop_long_keys(part, MAX_KEY, lost)
    words = ("control characters removed", "control character in a text")
    rows = change_texts(
        part, plain_columns(part, lost), _has_control, lambda text: re.sub(_NO_TEXT, "", text), lost, words
    )
    rows = drop_infinite(part, rows, lost).to_pylist()
    embeddings = part.embeddings
    dense = [] if embeddings.dense_vecs is None else hex_rows(embeddings.dense_vecs)
    weights = [] if embeddings.lexical_weights is None else sparse_json(embeddings.lexical_weights)
    colbert, blocks, ends = embeddings.colbert_vecs, list[str](), list[tuple[int, int]]()
    if colbert is not None:
        ends = list(pairwise(colbert.indptr.tolist()))
        binary = shape.colbert_dtype == "binary"
        blocks = [row.tobytes().hex() for row in colbert.vectors] if binary else hex_rows(decode_vectors(colbert))
    lines = []
    for place, (key, row) in enumerate(zip(part.keys.to_pylist(), rows, strict=True)):
        fields: dict[str, Any] = {"key": key, **{name: value for name, value in row.items() if value is not None}}
        if dense:
            fields["dense_vecs"] = {"values": dense[place]}
        if weights and len(weights[place]) > 2:
            fields["lexical_weights"] = {"cells": orjson.Fragment(weights[place])}
        if ends and ends[place][1] > ends[place][0]:
            fields["colbert_vecs"] = {"blocks": dict(zip(_count_up(), blocks[slice(*ends[place])], strict=False))}
        operation = {"put": f"id:{shape.name}:{shape.name}::{key}", "fields": fields}
        lines.append(orjson.dumps(operation, option=orjson.OPT_APPEND_NEWLINE))
    return lines


def _count_up() -> Any:
    return map(str, range(1 << 31))


def _has_control(column: Any) -> Any:
    return pc.fill_null(pc.match_substring_regex(column, _NO_TEXT), fill_value=False).to_numpy(zero_copy_only=False)


def hex_rows(vectors: Any) -> list[str]:
    """Return each vector's numbers as bfloat16, rounded to the nearest, in hexadecimal."""
    bits = np.ascontiguousarray(vectors, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    text, size = rounded.astype(">u2").tobytes().hex(), 4 * vectors.shape[1]
    return [text[start : start + size] for start in range(0, len(text), size)]


def describe(shape: Shape) -> Mapping[str, bytes]:
    """Write the application's schema and services, and the README."""
    lines, values = [], {"name": shape.name, "dim": shape.dim}
    for name, kind in list_fields(shape).items():
        indexing = {"dense_vecs": "attribute | index", "text": "index | summary"}.get(name, "attribute")
        indexing += " | summary" if indexing == "attribute" and not kind.startswith("tensor") else ""
        lines += [f"field {name} type {kind} {{", f"    indexing: {indexing}"]
        lines += ["    attribute {", "        distance-metric: prenormalized-angular", "    }"] * (name == "dense_vecs")
        lines.append("}")
    fields = "\n".join(f"        {line}" for line in lines)
    schema = fill_template("vespa.sd", fields=fields, profiles="".join(_list_profiles(shape)), **values)
    services, readme = fill_template("vespa_services.xml", **values), fill_template("vespa.md", **values)
    return {f"{shape.name}.sd": schema, "services.xml": services, README_NAME: readme}


def _list_profiles(shape: Shape) -> list[str]:
    """Return a rank profile for each output that is a number of M3's."""
    scores = {
        "dense": (f"q_dense) tensor<float>(x[{shape.dim}])", "sum(query(q_dense) * attribute(dense_vecs))"),
        "sparse": ("q_sparse) tensor<float>(t{})", "sum(query(q_sparse) * attribute(lexical_weights))"),
        "colbert": (
            f"q_colbert) tensor<float>(qt{{}},x[{shape.dim}])",
            # MaxSim is a sum over the query's vectors; M3's score is their mean.
            "sum(reduce(sum(query(q_colbert) * attribute(colbert_vecs), x), max, t), qt) / query(q_vectors)",
        ),
    }
    if shape.colbert_dtype == "binary":
        del scores["colbert"]
    profiles = []
    for output, (given, score) in scores.items():
        if output in shape.outputs:
            more = "\n            query(q_vectors) double" if output == "colbert" else ""
            lines = f"        inputs {{\n            query({given}{more}\n        }}\n"
            profiles.append(
                f"    rank-profile {output} {{\n{lines}        first-phase {{ expression: {score} }}\n    }}\n"
            )
    return profiles


def check(shape: Shape) -> None:
    """Check that kept fields can be fields of a document type."""
    is_name = re.compile(r"[A-Za-z_][A-Za-z0-9_]*").fullmatch
    if not is_name(shape.name):
        raise UsageError(f"--name {shape.name!r}: a document type's name has letters, digits and underscores only")
    check_names(shape, ("key", "dense_vecs", "lexical_weights", "colbert_vecs"), is_name, "a Vespa document")


TARGET = Target(
    outputs=("dense", "sparse", "colbert"),
    write=write,
    describe=describe,
    check=check,
    binary=True,
    number_bytes=4,
    weight_bytes=20,
)
