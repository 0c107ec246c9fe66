from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest
import torch

from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.chunker import Cutting, chunk_documents
from m3cli.encoder.device import INT8, cpu_has, resolve_dtype
from m3cli.encoder.embeddings import restore_order
from m3cli.encoder.encode import BatchEncoder, FailedRow, batch_rows, pack_rows
from m3cli.encoder.heads import OutputOptions
from m3cli.encoder.linear import can_run_int8, make_int8_linear
from m3cli.encoder.model import load_model
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.errors import UsageError
from m3cli.records import Document, Embeddings
from tests.conftest import build_sample

pytestmark = pytest.mark.skipif(
    not (can_run_int8() and cpu_has(INT8)), reason="this torch comes without oneDNN, or this CPU without VNNI"
)


@pytest.mark.parametrize("after_gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_is_within_a_few_steps_of_float32(*, dtype: torch.dtype, after_gelu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(96, 64, generator=generator), torch.randn(96, generator=generator)
    states = torch.randn(40, 64, generator=generator) * torch.linspace(0.01, 50, 40)[:, None]
    if after_gelu:
        states = torch.nn.functional.gelu(states)
    exact = states @ weight.T + bias
    result = make_int8_linear(weight, bias, dtype=dtype, after_gelu=after_gelu).apply(states.to(dtype)).float()
    # Each of 64 products is off by half a step of a row's largest state and of a channel's largest weight, at random.
    step = (states.abs().amax(1, keepdim=True) + 0.17 * after_gelu) / 127 * weight.abs().amax(1) * 8
    assert ((result - exact).abs() < step + exact.abs() / 64).all()


def test_a_row_does_not_depend_on_other_rows() -> None:
    linear = make_int8_linear(torch.randn(32, 16), torch.randn(32), dtype=torch.float32, after_gelu=False)
    states = torch.randn(8, 16)
    alone = torch.cat([linear.apply(row[None]) for row in states])
    batched = linear.apply(torch.cat((states, 1000 * torch.randn(8, 16))))[:8]
    assert torch.equal(alone, batched)


def test_a_row_of_zeros_and_one_that_is_no_number() -> None:
    linear = make_int8_linear(torch.randn(32, 16), torch.ones(32), dtype=torch.float32, after_gelu=False)
    result = linear.apply(torch.stack((torch.zeros(16), torch.full((16,), torch.nan), torch.full((16,), torch.inf))))
    assert torch.equal(result[0], torch.ones(32))
    assert not result[1].isfinite().any()
    assert not result[2].isfinite().any()


def encode(folder: Path, texts: list[str], dtype: str) -> Embeddings:
    checkpoint = read_checkpoint(folder)
    tokenizer = load_tokenizer(checkpoint)
    documents = [
        Document(id=str(index), position=index, text=text, text_hash=(0, index), has_own_id=True)
        for index, text in enumerate(texts)
    ]
    chunks = chunk_documents(documents, tokenizer, Cutting(max_length=checkpoint.default_max_length))
    encoder = BatchEncoder(
        load_model(checkpoint, device="cpu", dtype=dtype),  # type: ignore[arg-type]
        OutputOptions(
            outputs=("dense", "sparse", "colbert"),
            special_ids=tokenizer.special_ids,
            dense_dtype="float32",
            colbert_dtype="float32",
        ),
    )
    batches = [pack_rows(chunks, rows) for rows in batch_rows(chunks.num_tokens, max_batch_tokens=4096)]
    parts = [part for batch in batches for part in encoder.encode(batch)]
    complete = [part for part in parts if not isinstance(part, FailedRow)]
    assert len(complete) == len(parts)
    return restore_order(complete, start=0, stop=chunks.num_rows)


@pytest.mark.slow
def test_demo_vectors_in_int8_are_those_of_float32(demo_m3: Path) -> None:
    rows = map(orjson.loads, build_sample().read_bytes().splitlines())
    texts = [row["text"] for row in rows if len(row["text"]) >= 40][::50]
    exact, rough = encode(demo_m3, texts, "float32"), encode(demo_m3, texts, "int8")
    assert exact.dense_vecs is not None
    assert rough.dense_vecs is not None
    assert exact.colbert_vecs is not None
    assert rough.colbert_vecs is not None
    assert (exact.dense_vecs * rough.dense_vecs).sum(1).min() > 0.99
    cosines = (exact.colbert_vecs.vectors * rough.colbert_vecs.vectors).sum(1)
    assert (np.add.reduceat(cosines, exact.colbert_vecs.indptr[:-1]) / np.diff(exact.colbert_vecs.indptr)).min() > 0.99


def test_int8_on_a_gpu_is_refused() -> None:
    with pytest.raises(UsageError, match="--dtype int8 runs on a CPU only, not on cuda:1"):
        resolve_dtype("int8", "cuda:1")


def test_no_way_to_a_model_leads_to_int8_on_a_gpu(tiny_m3: Path) -> None:
    with pytest.raises(UsageError, match="--dtype int8 runs on a CPU only, not on cuda"):
        load_model(read_checkpoint(tiny_m3), device="cuda", dtype="int8")
