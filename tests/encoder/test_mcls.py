from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from hypothesis import given
from hypothesis import strategies as st

from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.chunker import Cutting, chunk_documents, fit_length, lengths_with_mcls
from m3cli.encoder.encode import BatchEncoder, pack_rows
from m3cli.encoder.heads import OutputOptions
from m3cli.encoder.model import Model, load_model
from m3cli.encoder.tokenizer import Tokenizer, load_tokenizer
from m3cli.records import Document, Embeddings

EVERY = 16
TEXTS = ("short", "what <s> stands in a text itself " * 9, "a longer text goes on and on, " * 30, "x" * 15 + " y" * 16)


@pytest.fixture(scope="module")
def tokenizer(tiny_m3: Path) -> Tokenizer:
    return load_tokenizer(read_checkpoint(tiny_m3))


@pytest.fixture(scope="module")
def model(tiny_m3: Path) -> Model:
    return load_model(read_checkpoint(tiny_m3), device="cpu", dtype="float32")


def encode(model: Model, tokenizer: Tokenizer, *, mcls: int) -> list[Embeddings]:
    documents = [
        Document(id=str(i), text=text, text_hash=(0, 0), has_own_id=True, position=i) for i, text in enumerate(TEXTS)
    ]
    chunks = chunk_documents(documents, tokenizer, Cutting(max_length=8192))
    encoder = BatchEncoder(
        model,
        OutputOptions(
            outputs=("dense", "sparse", "colbert"),
            special_ids=tokenizer.special_ids,
            dense_dtype="float32",
            colbert_dtype="float32",
        ),
        mcls=mcls,
    )
    result = []
    for batch in [pack_rows(chunks, np.argsort(-chunks.num_tokens, kind="stable"))]:
        result += [each for each in encoder.encode(batch) if isinstance(each, Embeddings)]
    return result


@torch.inference_mode()
def encode_naively(folder: Path, text: str, tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor, int]:
    """MCLS as the paper's Appendix B.2 has it, with transformers' own model."""
    from transformers import XLMRobertaModel  # noqa: PLC0415  slow to import

    reference = XLMRobertaModel.from_pretrained(folder, add_pooling_layer=False).train(mode=False)
    body = tokenizer.encode([text])[0].tolist()[1:-1]
    ids: list[int] = []
    marks: list[int] = []
    for index in range(0, max(len(body), 1), EVERY):
        marks.append(len(ids))
        ids += [tokenizer.bos_id, *body[index : index + EVERY]]
    ids.append(tokenizer.eos_id)
    hidden = reference(torch.tensor([ids])).last_hidden_state[0]
    head = torch.load(folder / "colbert_linear.pt", weights_only=True)
    kept = [index for index in range(len(ids)) if index not in marks]
    vectors = F.linear(hidden[kept], head["weight"].float(), head["bias"].float())
    return F.normalize(hidden[marks].mean(0), dim=-1), F.normalize(vectors, dim=-1), len(body)


def test_outputs_are_those_of_a_naive_encoder(tiny_m3: Path, model: Model, tokenizer: Tokenizer) -> None:
    (result,) = encode(model, tokenizer, mcls=EVERY)
    assert result.dense_vecs is not None
    assert result.colbert_vecs is not None
    for index, row in enumerate(result.rows.tolist()):
        dense, vectors, num_tokens = encode_naively(tiny_m3, TEXTS[row], tokenizer)
        np.testing.assert_allclose(result.dense_vecs[index], dense.numpy(), atol=1e-5)
        matrix = result.colbert_vecs.vectors[result.colbert_vecs.indptr[index] : result.colbert_vecs.indptr[index + 1]]
        assert len(matrix) == num_tokens + 1
        np.testing.assert_allclose(matrix, vectors.numpy(), atol=1e-4)


def test_a_row_with_one_mark_is_as_without(model: Model, tokenizer: Tokenizer) -> None:
    (plain,), (marked,) = encode(model, tokenizer, mcls=0), encode(model, tokenizer, mcls=4096)
    assert plain.dense_vecs is not None
    assert marked.dense_vecs is not None
    np.testing.assert_allclose(marked.dense_vecs, plain.dense_vecs, atol=1e-6)
    assert plain.lexical_weights is not None
    assert marked.lexical_weights is not None
    assert marked.lexical_weights.indices.tolist() == plain.lexical_weights.indices.tolist()


@given(st.integers(2, 9000), st.integers(1, 600))
def test_a_mark_stands_before_every_so_many_tokens(num_tokens: int, every: int) -> None:
    marks = max(1, -(-(num_tokens - 2) // every))
    assert lengths_with_mcls(np.array([num_tokens]), every=every).tolist() == [num_tokens + marks - 1]


@given(st.integers(8, 9000), st.integers(1, 600))
def test_the_longest_row_that_fits_is_found(limit: int, every: int) -> None:
    length = fit_length(limit, every=every)
    assert lengths_with_mcls(np.array([length]), every=every)[0] <= limit
    assert lengths_with_mcls(np.array([length + 1]), every=every)[0] > limit
