"""The CUDA path against the CPU's float32, and that it never waits; skips itself where there is no CUDA device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch

from m3cli.encoder import attention
from m3cli.encoder import encode as encoding
from m3cli.encoder.attention import SequenceLayout, pad_borders
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.device import fetch, open_stream, send
from m3cli.encoder.encode import BatchEncoder, FailedRow, batch_rows, pack_rows
from m3cli.encoder.heads import OutputOptions, find_maxima
from m3cli.encoder.model import Model, load_model, padded_num_tokens
from m3cli.encoder.model import run_model as real_run_model
from m3cli.records import Batch, Chunks, Embeddings
from tests.conftest import Completed, build_sample
from tests.encoder.test_model import SPECIALS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

ALL = ("dense", "sparse", "colbert")
CUDA = torch.device("cuda")


@pytest.fixture
def corpus() -> Path:
    return build_sample()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cuda_gives_the_vectors_of_the_cpu(
    dtype: str, corpus: Path, tiny_m3: Path, tmp_path: Path, m3: Callable[..., Completed]
) -> None:
    common = [corpus, "--model", tiny_m3, "--limit", 300, "--dense-dtype", "float32"]
    assert m3("encode", *common, "--out", "cpu.m3", "--device", "cpu", "--dtype", "float32").returncode == 0
    assert m3("encode", *common, "--out", "cuda.m3", "--device", "cuda", "--dtype", dtype).returncode == 0
    cpu, cuda = (ds.dataset(tmp_path / f"{name}.m3" / "rows").to_table() for name in ("cpu", "cuda"))
    assert cpu["id"] == cuda["id"]
    dense = [np.array(table["dense_vecs"].to_pylist()) for table in (cpu, cuda)]
    assert (dense[0] * dense[1]).sum(1).min() > 0.999
    width = dense[0].shape[1]
    for one, other in zip(cpu["colbert_vecs"].to_pylist(), cuda["colbert_vecs"].to_pylist(), strict=True):
        vectors = [np.frombuffer(raw, np.float16).reshape(-1, width).astype(np.float32) for raw in (one, other)]
        assert (vectors[0] * vectors[1]).sum(1).mean() > 0.999


def test_auto_takes_the_gpu_in_float16(corpus: Path, tiny_m3: Path, m3: Callable[..., Completed]) -> None:
    shown = m3("plan", corpus, "--model", tiny_m3)
    assert "float16 on cuda" in shown.stdout


def test_two_runs_on_cuda_write_the_same_bytes(
    corpus: Path, tiny_m3: Path, tmp_path: Path, m3: Callable[..., Completed]
) -> None:
    for name in ("a", "b"):
        flags = ("--model", tiny_m3, "--limit", 300, "--device", "cuda", "--max-batch-tokens", 2000)
        assert m3("encode", corpus, *flags, "--out", f"{name}.m3").returncode == 0
    for file in (tmp_path / "a.m3" / "rows").iterdir():
        assert file.read_bytes() == (tmp_path / "b.m3" / "rows" / file.name).read_bytes()


def load(tiny_m3: Path, device: str, dtype: Any) -> Model:
    """The random checkpoint with a sparse head by which most tokens weigh something."""
    model = load_model(read_checkpoint(tiny_m3), device=device, dtype=dtype)
    assert model.sparse_linear is not None
    return replace(model, sparse_linear=replace(model.sparse_linear, bias=torch.ones_like(model.sparse_linear.bias)))


def make_chunks(num_rows: int, *, longest: int) -> Chunks:
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, longest + 1, num_rows)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    ids = draw.integers(4, 250_000, cu_seqlens[-1]).astype(np.int32)
    ids[cu_seqlens[:-1]], ids[cu_seqlens[1:] - 1] = 0, 2
    zeros = np.zeros(num_rows, np.int32)
    return Chunks(
        input_ids=ids,
        cu_seqlens=cu_seqlens,
        document=np.arange(num_rows),
        chunk_index=zeros,
        num_chunks=zeros + 1,
        char_start=zeros.astype(np.int64),
        char_end=zeros.astype(np.int64),
        truncated=zeros.astype(np.bool_),
        num_repeated=zeros,
    )


def pack_all(chunks: Chunks, *, max_batch_tokens: int) -> list[Batch]:
    return [pack_rows(chunks, rows) for rows in batch_rows(chunks.num_tokens, max_batch_tokens=max_batch_tokens)]


def make_encoder(
    model: Model,
    *,
    ahead: int | None = None,
    mcls: int = 0,
    retries: Sequence[Callable[[], Model]] = (),
    **settings: Any,
) -> BatchEncoder:
    usual = {"outputs": ALL, "special_ids": SPECIALS, "dense_dtype": "float32", "colbert_dtype": "float32"}
    options = OutputOptions(**{**usual, **settings})
    encoder = BatchEncoder(model, options, mcls=mcls, retries=retries, ahead=ahead)
    assert ahead is not None or encoder._ahead == (0 if model.device.type == "cpu" else 3)
    return encoder


def encode(encoder: BatchEncoder, batches: list[Batch]) -> list[Embeddings]:
    """Encode all, and look at it only then: what came back first must still be there."""
    made = list(encoder.encode_all(batches))
    return [each for each in made if not isinstance(each, FailedRow)]


def list_weights(made: list[Embeddings]) -> dict[tuple[int, int], float]:
    weights: dict[tuple[int, int], float] = {}
    for each in made:
        lexical = each.lexical_weights
        assert lexical is not None
        rows = np.repeat(each.rows, np.diff(lexical.indptr))
        assert len(rows) == len(lexical.indices) == len(lexical.values)
        weights.update(zip(zip(rows.tolist(), lexical.indices.tolist(), strict=True), lexical.values, strict=True))
    return weights


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("mcls", [0, 64])
@pytest.mark.parametrize(("dtype", "close"), [("float16", 0.01), ("bfloat16", 0.08), ("float32", 1e-4)])
def test_all_outputs_are_those_of_the_cpu(tiny_m3: Path, dtype: str, close: float, mcls: int, pooling: str) -> None:
    made = []
    batches = pack_all(make_chunks(200, longest=300), max_batch_tokens=4096)
    assert len(batches) > 3
    for device, kind in (("cpu", "float32"), ("cuda", dtype)):
        model = load(tiny_m3, device, kind)
        model = replace(model, checkpoint=replace(model.checkpoint, pooling=pooling))  # type: ignore[arg-type]
        made.append(encode(make_encoder(model, mcls=mcls, vector_weights=True), batches))
    cpu, cuda = made
    assert [each.rows.tolist() for each in cuda] == [batch.rows.tolist() for batch in batches]
    for one, other in zip(cpu, cuda, strict=True):
        assert one.dense_vecs is not None
        assert other.dense_vecs is not None
        np.testing.assert_allclose((one.dense_vecs * other.dense_vecs).sum(1), 1, atol=close)
        assert one.colbert_vecs is not None
        assert other.colbert_vecs is not None
        assert one.colbert_vecs.indptr.tolist() == other.colbert_vecs.indptr.tolist()
        np.testing.assert_allclose((one.colbert_vecs.vectors * other.colbert_vecs.vectors).sum(1), 1, atol=close)
        assert one.colbert_vecs.weights is not None
        assert other.colbert_vecs.weights is not None
        np.testing.assert_allclose(one.colbert_vecs.weights, other.colbert_vecs.weights, atol=2 * close)
    weights = [list_weights(each) for each in made]
    assert len(weights[0]) > 1000
    for place in weights[0].keys() | weights[1].keys():
        assert weights[0].get(place, 0.0) == pytest.approx(weights[1].get(place, 0.0), abs=2 * close)


def test_batches_ahead_give_the_same_bytes_as_one_after_the_other(tiny_m3: Path) -> None:
    model = load(tiny_m3, "cuda", "float16")
    batches = pack_all(make_chunks(3000, longest=300), max_batch_tokens=16384)
    assert len(batches) > 20
    settings: dict[str, Any] = {"dense_dtype": "float16", "colbert_dtype": "float16"}
    alone, ahead = (encode(make_encoder(model, ahead=count, **settings), batches) for count in (0, 3))
    for one, other in zip(alone, ahead, strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        assert one.dense_vecs is not None
        assert other.dense_vecs is not None
        assert one.dense_vecs.tobytes() == other.dense_vecs.tobytes()
        assert one.colbert_vecs is not None
        assert other.colbert_vecs is not None
        assert one.colbert_vecs.vectors.tobytes() == other.colbert_vecs.vectors.tobytes()
    assert list_weights(alone) == list_weights(ahead)


@contextmanager
def forbid_waiting() -> Iterator[None]:
    """Make torch raise wherever the host would wait for the device."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns once that this mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("mcls", [0, 64])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_nothing_waits_while_a_batch_is_launched(
    tiny_m3: Path, dtype: str, mcls: int, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_m3, "cuda", dtype)
    model = replace(model, checkpoint=replace(model.checkpoint, pooling=pooling))  # type: ignore[arg-type]
    encoder = make_encoder(model, mcls=mcls, vector_weights=True, colbert_dtype="float16")
    batches = pack_all(make_chunks(60, longest=300), max_batch_tokens=4096)
    encode(encoder, batches)  # what is set up once may wait
    real = BatchEncoder._launch

    def launch(encoder: BatchEncoder, model: Model, batch: Batch) -> Any:
        with forbid_waiting():
            return real(encoder, model, batch)

    monkeypatch.setattr(BatchEncoder, "_launch", launch)
    assert len(encode(encoder, batches)) == len(batches)


def test_the_forbidding_forbids() -> None:
    tensor = torch.ones(3, device=CUDA)
    with forbid_waiting(), pytest.raises(RuntimeError):
        tensor.sum().item()


def test_a_launch_comes_back_before_the_device_is_through(tiny_m3: Path) -> None:
    encoder = make_encoder(load(tiny_m3, "cuda", "float16"))
    (batch,) = pack_all(make_chunks(20, longest=100), max_batch_tokens=4096)
    encode(encoder, [batch])
    torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call]  # cycles: half a second or so
    launched = encoder._launch(encoder.model, batch)
    assert launched is not None
    assert launched.outputs.ready is not None
    assert not launched.outputs.ready.query()  # type: ignore[no-untyped-call]
    assert all(tensor.is_pinned() for tensor in launched.outputs.tensors.values())
    launched.outputs.wait()
    assert launched.outputs.ready.query()  # type: ignore[no-untyped-call]


def test_the_matmuls_see_few_shapes(tiny_m3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_m3, "cuda", "float16")
    shapes, borders = [], []

    def run_model(model: Model, batch: Batch) -> Any:
        states, layout = real_run_model(model, batch)
        shapes.append(len(states))
        borders.append(len(layout.cu_seqlens))
        assert layout.kernel == "varlen"
        return states, layout

    monkeypatch.setattr(encoding, "run_model", run_model)
    batches = pack_all(make_chunks(2000, longest=300), max_batch_tokens=8192)
    assert len(encode(make_encoder(model), batches)) == len(batches) > 20
    assert shapes == [padded_num_tokens(len(batch.input_ids), device=CUDA) for batch in batches]
    assert set(shapes[:-1]) == {8192}, "all but the last are padded to the budget"
    assert borders == [len(pad_borders(batch.cu_seqlens)) for batch in batches]
    assert len(set(borders)) < 10


def test_a_row_does_not_depend_on_padding(tiny_m3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_m3, "cuda", "float16")
    (batch,) = pack_all(make_chunks(9, longest=150), max_batch_tokens=4096)
    usual, layout = real_run_model(model, batch)
    assert len(usual) > len(batch.input_ids)
    del usual
    first = encode(make_encoder(model), [batch])[0]
    real = attention._attend_varlen

    def attend(qkv: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        out = real(qkv, layout)
        out[layout.num_tokens :] = torch.nan  # the kernel does not write them
        return out

    monkeypatch.setattr(attention, "_attend_varlen", attend)
    second = encode(make_encoder(model), [batch])[0]
    assert first.dense_vecs is not None
    assert second.dense_vecs is not None
    assert np.isfinite(first.dense_vecs).all()
    assert first.dense_vecs.tobytes() == second.dense_vecs.tobytes()
    assert layout.num_tokens == len(batch.input_ids)


def test_memory_that_runs_out_halves_batches_and_keeps_order(tiny_m3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_model(model: Model, batch: Batch) -> Any:
        if len(batch.input_ids) > 5000:
            torch.empty(1 << 50, dtype=torch.uint8, device=CUDA)  # a petabyte: a real error of the allocator
        return real_run_model(model, batch)

    model = load(tiny_m3, "cuda", "float16")
    chunks = make_chunks(300, longest=300)
    batches = pack_all(chunks, max_batch_tokens=8192)
    whole = encode(make_encoder(model), batches)
    monkeypatch.setattr(encoding, "run_model", run_model)
    encoder = make_encoder(model)
    parts = encode(encoder, batches)
    assert len(parts) > len(whole)
    assert encoder.max_tokens is not None
    rows = [np.concatenate([each.rows for each in made]) for made in (whole, parts)]
    assert rows[0].tolist() == rows[1].tolist()
    dense = [
        np.concatenate([each.dense_vecs for each in made if each.dense_vecs is not None]) for made in (whole, parts)
    ]
    assert (dense[0] * dense[1]).sum(1).min() > 0.999


def test_a_row_that_overflows_is_encoded_in_bfloat16_between_others(tiny_m3: Path) -> None:
    poison = 77

    def load_steep(dtype: str) -> Model:
        """Too large for float16, not for float32."""
        model = load(tiny_m3, "cuda", dtype)
        model.word_embeddings[poison] = torch.tensor([1e5, -1e5], device=CUDA).repeat(32).to(model.dtype)
        return model

    chunks = make_chunks(200, longest=100)
    bad = [3, 50, 120]
    chunks.input_ids[chunks.cu_seqlens[bad] + 1] = poison
    batches = pack_all(chunks, max_batch_tokens=2048)
    exact = encode(make_encoder(load_steep("float32")), batches)
    encoder = make_encoder(load_steep("float16"), retries=[lambda: load_steep("bfloat16")])
    made = encode(encoder, batches)
    assert encoder.repeated == {"bfloat16": len(bad)}
    dense = []
    for each in (exact, made):
        rows = np.concatenate([part.rows for part in each])
        assert sorted(rows.tolist()) == list(range(200))
        dense.append(
            np.concatenate([part.dense_vecs for part in each if part.dense_vecs is not None])[np.argsort(rows)]
        )
    assert (dense[0] * dense[1]).sum(1).min() > 0.999


def test_maxima_are_found_as_on_the_cpu() -> None:
    draw = np.random.default_rng(1)
    ids, rows = draw.integers(0, 3000, 60_000), np.repeat(np.arange(60), 1000)
    weights = torch.relu(torch.randn(60_000, generator=torch.Generator().manual_seed(1)))
    weights[::1000] = torch.nan
    found = []
    for device in (torch.device("cpu"), CUDA):
        keys, values = find_maxima(weights.to(device), *send(device, ids, rows))
        found.append((keys.cpu(), values.cpu()))
    count = int((found[0][0] < found[0][0].max()).sum())
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1][:count], found[1][1][:count])


def test_what_came_back_is_not_written_over() -> None:
    stream = open_stream(CUDA)
    held = [fetch({"n": torch.full((1 << 20,), n, device=CUDA)}, stream).wait()["n"] for n in range(40)]
    assert all((array == n).all() for n, array in enumerate(held))
    # What is let go of is used again, and only that.
    address = held[7].ctypes.data
    del held[7]
    more = [fetch({"n": torch.full((1 << 20,), 99, device=CUDA)}, stream).wait()["n"] for _ in range(3)]
    assert address in {array.ctypes.data for array in more}
    assert sorted(int(array[0]) for array in held) == [n for n in range(40) if n != 7]
    assert all(array.min() == array.max() for array in held)
