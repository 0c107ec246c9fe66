"""Searches of folders as `m3 encode` really writes them, against a naive ranking of what the files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3cli.jobs.search.bm25 import plain_terms
from m3cli.records import TokenMatrices
from m3cli.store.reader import iter_parts, open_folder
from tests.functional.conftest import EncodeWith
from tests.jobs.test_search import Written, check_hits, rank_naively, roll_up, run_search, score_rows
from tests.retrieval.test_bm25 import by_formula

ROWS = [
    {"id": "fox", "text": "the quick brown fox jumps over the lazy dog"},
    {"id": "long", "text": " ".join(f"word{number} and other words" for number in range(20))},
    {"id": "data", "text": "数据 中文 数据"},
    {"id": "long", "text": "the same name, and again many words: " + "fox dog " * 30},
    {"id": "dogs", "text": "a dog and a dog. " * 12},
]
QUERIES = [{"id": "q0", "text": "a quick fox"}, {"id": "q1", "text": "数据 and words"}, {"id": "q2", "text": "dog"}]
STORED: dict[str, dict[str, Any]] = {
    "int8": {"colbert_dtype": "int8"},
    "binary": {"colbert_dtype": "binary"},
    "pooled": {"colbert_pool": 2},
    "own rows": {"long_docs": "both"},
}
SEARCHES: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "sparse": {"mode": "sparse"},
    "colbert": {"mode": "colbert"},
    "weighted": {"mode": "hybrid", "weights": (1.0, 0.3, 1.0)},
    "few candidates": {"mode": "hybrid", "candidates": 2, "weights": (0.2, 0.5, 0.3)},
    "ranks": {"mode": "hybrid", "fusion": "rrf"},
}


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=[(name, form) for name in STORED for form in ("parquet", "npy")], ids=str)
def stored(request: Any, tmp_path_factory: pytest.TempPathFactory, encode_with: EncodeWith) -> Path:
    """c.m3, stored in one of the ways, and q.m3."""
    name, form = request.param
    root = tmp_path_factory.mktemp("stored")
    corpus = write_rows(root / "c.jsonl", ROWS)
    assert encode_with(corpus, out=root / "c.m3", format=form, keep_text=True, shard_size=200, **STORED[name]) == 0
    assert encode_with(write_rows(root / "q.jsonl", QUERIES), out=root / "q.m3") == 0
    if name == "own rows":
        index = [row for part in iter_parts(open_folder(root / "c.m3")) for row in part.rows["chunk_index"].to_pylist()]
        assert index[index.index(-1) - 1] > 0, "a document's own row stands behind its chunks"
    return root


def decode(matrices: TokenMatrices) -> np.ndarray:
    vectors = np.asarray(matrices.vectors)
    if vectors.dtype == np.uint8:
        signs = np.unpackbits(vectors, axis=1).astype(float) * 2 - 1
        return np.asarray(signs / np.sqrt(signs.shape[1]))
    scales = 1.0 if matrices.scales is None else matrices.scales[:, None].astype(float)
    return np.asarray(vectors.astype(float) * scales)


def read_all(path: Path, *, chunks: bool = False) -> tuple[Written, list[str]]:
    """What the folder's rows are called, and their vectors as float64; and their texts. Own rows are left out."""
    folder = open_folder(path)
    ids, index, texts = list[str](), list[int](), list[str]()
    dense, sparse, colbert = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for part in iter_parts(folder):
        made = part.embeddings
        assert made.dense_vecs is not None
        assert made.lexical_weights is not None
        assert made.colbert_vecs is not None
        vectors, weights = decode(made.colbert_vecs), made.lexical_weights
        for row, words in enumerate(part.rows.to_pylist()):
            if words["chunk_index"] < 0:
                continue
            ids.append(f"{words['id']}#{words['chunk_index']}" if chunks else words["id"])
            index.append(words["chunk_index"])
            texts.append(words.get("text") or "")
            dense.append(np.asarray(made.dense_vecs[row], float))
            run = slice(weights.indptr[row], weights.indptr[row + 1])
            sparse.append(np.zeros(folder.run.checkpoint.vocabulary))
            sparse[-1][weights.indices[run]] = weights.values[run]
            colbert.append(vectors[made.colbert_vecs.indptr[row] : made.colbert_vecs.indptr[row + 1]])
    return Written(ids=ids, chunk_index=index, dense=np.stack(dense), sparse=np.stack(sparse), colbert=colbert), texts


@pytest.mark.parametrize("level", ["document", "chunk"])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_the_naive_ranking_of_what_is_stored(stored: Path, name: str, level: str) -> None:
    corpus, _ = read_all(stored / "c.m3", chunks=level == "chunk")
    queries, _ = read_all(stored / "q.m3")
    code, found, _ = run_search(stored / "c.m3", stored / "q.m3", level=level, top_k=6, **SEARCHES[name])
    assert (code, [each["id"] for each in found]) == (0, queries.ids)
    asked = {flag: value for flag, value in SEARCHES[name].items() if flag != "mode"}
    for number, each in enumerate(found):
        parts = score_rows(queries, corpus, number)
        check_hits(each, rank_naively(parts, corpus.ids, SEARCHES[name]["mode"], **asked), top_k=6)


@pytest.mark.parametrize("level", ["document", "chunk"])
def test_bm25_is_the_naive_ranking_of_what_is_stored(stored: Path, level: str) -> None:
    corpus, texts = read_all(stored / "c.m3", chunks=level == "chunk")
    terms = plain_terms(texts)
    for words in ("fox", "quick dog words", "数据"):
        _, (found,), _ = run_search(stored / "c.m3", words, mode="bm25", tokenizer="plain", level=level)
        scores = np.array([by_formula(words, each, terms) for each in terms])
        expected = {name: score for name, score in roll_up(scores, corpus.ids).items() if score > 0}
        check_hits(found, expected, top_k=100)
