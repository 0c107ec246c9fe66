"""The encoder against FlagEmbedding itself (a dev dependency) on a random checkpoint, float32, before float16 storage.

Tolerances are DESIGN's: dense within 1e-5, sparse and colbert within 1e-4; what is seen is below 1e-6.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.chunker import Cutting, chunk_documents
from m3cli.encoder.embeddings import restore_order
from m3cli.encoder.encode import batch_rows, pack_rows
from m3cli.encoder.model import load_model, run_model
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.records import Chunks, Document, Embeddings
from tests.at_once import compute_embeddings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

Encode = Callable[..., Embeddings]

WORDS = [
    *("the", "quick", "狐狸", "跳过", "lazy", "Κόσμος", "мир", "hello", "supercalifragilistic", "日本語", "テスト"),
    *("naïve", "café", "123", "3.14", "e-mail", "한국어", "عربي", "🙂"),
]
ODD = ["x", "", " ", "trailing  ", "  two  blanks", "a\x00b", "ﬁ ligature ½", "\u202ertl\u202c", "�", "<s> </s> <unk>"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(7)
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584, 4181, 6765]
    return [" ".join(draw.choices(WORDS, k=k)) for k in lengths] + ODD


@pytest.fixture(scope="module")
def reference(tiny_m3: Path, texts: list[str]) -> dict[str, Any]:
    from FlagEmbedding import BGEM3FlagModel  # noqa: PLC0415  6 s, only where this runs

    model = BGEM3FlagModel(str(tiny_m3), use_fp16=False, devices="cpu")
    outputs: dict[str, Any] = model.encode(
        texts, batch_size=4, max_length=8192, return_dense=True, return_sparse=True, return_colbert_vecs=True
    )
    return outputs


@pytest.fixture(scope="module")
def chunks(tiny_m3: Path, texts: list[str]) -> Chunks:
    documents = [
        Document(id=str(i), text=text, text_hash=(0, 0), has_own_id=True, position=i) for i, text in enumerate(texts)
    ]
    tokenizer = load_tokenizer(read_checkpoint(tiny_m3))
    return chunk_documents(documents, tokenizer, Cutting(max_length=8192, long_docs="truncate"))


@pytest.fixture(scope="module")
def encode(tiny_m3: Path, chunks: Chunks) -> Encode:
    def run(
        *, dtype: Any = "float32", max_batch_tokens: int = 8192, start: int = 0, stop: int | None = None
    ) -> Embeddings:
        checkpoint = read_checkpoint(tiny_m3)
        model = load_model(checkpoint, device="cpu", dtype=dtype)
        end = chunks.num_rows if stop is None else stop
        made = [
            compute_embeddings(
                model,
                batch,
                *run_model(model, batch),
                outputs=("dense", "sparse", "colbert"),
                special_ids=frozenset({0, 1, 2, 3}),
                dense_dtype="float32",
                colbert_dtype="float32",
            )
            for rows in batch_rows(chunks.num_tokens[start:end], max_batch_tokens=max_batch_tokens)
            for batch in [pack_rows(chunks, rows + start)]
        ]
        return restore_order(made, start=start, stop=end)

    return run


def matrix(made: Embeddings, row: int) -> np.ndarray:
    assert made.colbert_vecs is not None
    first, last = made.colbert_vecs.indptr[row : row + 2]
    return made.colbert_vecs.vectors[first:last]


def weights(made: Embeddings, row: int) -> dict[str, float]:
    """FlagEmbedding's form: ids as strings."""
    assert made.lexical_weights is not None
    first, last = made.lexical_weights.indptr[row : row + 2]
    ids, values = made.lexical_weights.indices[first:last], made.lexical_weights.values[first:last]
    return dict(zip(map(str, ids.tolist()), values.tolist(), strict=True))


def test_the_lengths_reach_from_2_to_8192_tokens(chunks: Chunks) -> None:
    assert chunks.num_tokens.min() == 2
    assert chunks.num_tokens.max() == 8192


def test_all_three_outputs_equal_flagembedding(reference: dict[str, Any], encode: Encode, texts: list[str]) -> None:
    made = encode()
    assert made.dense_vecs is not None
    assert np.abs(made.dense_vecs - reference["dense_vecs"]).max() < 1e-5
    for row in range(len(texts)):
        expected = reference["lexical_weights"][row]
        mine = weights(made, row)
        assert mine.keys() == expected.keys()
        assert all(abs(mine[token] - float(expected[token])) < 1e-4 for token in mine)
        assert matrix(made, row).shape == reference["colbert_vecs"][row].shape
        assert np.abs(matrix(made, row) - reference["colbert_vecs"][row]).max(initial=0) < 1e-4


@pytest.mark.parametrize("max_batch_tokens", [1, 100, 1000, 100_000])
def test_vectors_do_not_depend_on_batch_neighbours(encode: Encode, texts: list[str], max_batch_tokens: int) -> None:
    usual, other = encode(), encode(max_batch_tokens=max_batch_tokens)
    assert usual.dense_vecs is not None
    assert other.dense_vecs is not None
    assert np.abs(usual.dense_vecs - other.dense_vecs).max() < 1e-5
    for row in range(len(texts)):
        assert np.abs(matrix(usual, row) - matrix(other, row)).max(initial=0) < 1e-4
        assert weights(usual, row) == pytest.approx(weights(other, row), abs=1e-4)


def test_vectors_do_not_depend_on_the_window(encode: Encode) -> None:
    usual, part = encode(), encode(start=3, stop=9)
    assert usual.dense_vecs is not None
    assert part.dense_vecs is not None
    assert np.abs(usual.dense_vecs[3:9] - part.dense_vecs).max() < 1e-5
    assert np.abs(matrix(usual, 5) - matrix(part, 2)).max() < 1e-4


def test_bfloat16_keeps_cosine_above_0_999(reference: dict[str, Any], encode: Encode, texts: list[str]) -> None:
    made = encode(dtype="bfloat16")
    assert made.dense_vecs is not None
    assert (made.dense_vecs * reference["dense_vecs"]).sum(1).min() > 0.999
    for row in range(len(texts)):
        assert (matrix(made, row) * reference["colbert_vecs"][row]).sum(1).mean() > 0.999
