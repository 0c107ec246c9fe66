from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import XLMRobertaModel

from m3cli.config import Dtype
from m3cli.encoder import model as models
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.device import INT8, cpu_has
from m3cli.encoder.heads import pool_rows
from m3cli.encoder.linear import FusedLinear
from m3cli.encoder.model import OCTAVE_STEPS, SMALL_STEP, TOKEN_STEP, load_model, padded_num_tokens, run_model
from m3cli.errors import ModelError
from m3cli.records import Batch
from tests.at_once import compute_embeddings

SPECIALS = frozenset({0, 1, 2, 3})


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def pack(*rows: list[int]) -> Batch:
    lengths = [len(row) for row in rows]
    return Batch(
        rows=np.arange(len(rows)),
        input_ids=np.concatenate([np.array(row, np.int64) for row in rows]),
        cu_seqlens=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        max_seqlen=max(lengths),
    )


def read_head(path: Path) -> tuple[np.ndarray, np.ndarray]:
    head = torch.load(path, weights_only=True)
    return head["weight"].float().numpy(), head["bias"].float().numpy()


def test_packed_rows_equal_transformers_one_by_one(tiny_m3: Path) -> None:
    reference = XLMRobertaModel.from_pretrained(tiny_m3, add_pooling_layer=False).train(mode=False)
    model = load_model(read_checkpoint(tiny_m3), device="cpu", dtype="float32")
    rows = [[0, *range(100, 100 + length), 2] for length in (70, 31, 31, 5, 1)]
    batch = pack(*rows)
    hidden, _ = run_model(model, batch)
    for index, row in enumerate(rows):
        with torch.inference_mode():
            expected = reference(torch.tensor([row])).last_hidden_state[0]
        part = hidden[batch.cu_seqlens[index] : batch.cu_seqlens[index + 1]]
        assert torch.allclose(part, expected, atol=1e-5)


def test_fused_linears_give_the_same_states(tiny_m3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA in 16 bits, here in float32: output biases are moved, residuals overwritten; gelu stays exact."""
    tensors = load_file(tiny_m3 / "model.safetensors")
    steep = {name: tensor * (50 if name.endswith("bias") else 1) for name, tensor in tensors.items()}
    monkeypatch.setattr(models, "_read_weights", lambda _: steep)
    batch = pack(*([0, *range(100, 100 + length), 2] for length in (70, 31, 5, 1)))
    usual = load_model(read_checkpoint(tiny_m3), device="cpu", dtype="float32")
    monkeypatch.setattr(models, "can_fuse", lambda *_: True)
    fused = load_model(read_checkpoint(tiny_m3), device="cpu", dtype="float32")
    assert {type(layer.qkv) for layer in fused.layers} == {FusedLinear}
    assert max(float(layer.attention_out.bias.abs().max()) for layer in usual.layers) > 1  # type: ignore[union-attr]
    torch.testing.assert_close(run_model(fused, batch)[0], run_model(usual, batch)[0], atol=1e-4, rtol=0)


def test_heads_equal_a_naive_loop(tiny_m3: Path) -> None:
    model = load_model(read_checkpoint(tiny_m3), device="cpu", dtype="float32")
    rows = [[0, 9, 8, 9, 3, 7, 2], [0, 9, 9, 2], [0, 2]]
    batch = pack(*rows)
    hidden, layout = run_model(model, batch)
    result = compute_embeddings(
        model,
        batch,
        hidden,
        layout,
        outputs=("dense", "sparse", "colbert"),
        special_ids=SPECIALS,
        dense_dtype="float32",
        colbert_dtype="float32",
    )
    assert result.dense_vecs is not None
    assert result.lexical_weights is not None
    assert result.colbert_vecs is not None
    weight, bias = read_head(tiny_m3 / "sparse_linear.pt")
    project, shift = read_head(tiny_m3 / "colbert_linear.pt")
    for index, row in enumerate(rows):
        states = hidden[batch.cu_seqlens[index] : batch.cu_seqlens[index + 1]].numpy()
        assert np.allclose(result.dense_vecs[index], states[0] / np.linalg.norm(states[0]), atol=1e-6)
        expected: dict[int, float] = {}
        for token, state in zip(row, states, strict=True):
            strength = float(weight[0] @ state + bias[0])
            if strength > 0 and token not in SPECIALS:
                expected[token] = max(expected.get(token, 0.0), strength)
        first, last = result.lexical_weights.indptr[index : index + 2]
        assert result.lexical_weights.indices[first:last].tolist() == sorted(expected)
        wanted = [expected[token] for token in sorted(expected)]
        assert np.allclose(result.lexical_weights.values[first:last], wanted, atol=1e-6)
        vectors = states[1:] @ project.T + shift
        first, last = result.colbert_vecs.indptr[index : index + 2]
        assert np.allclose(
            result.colbert_vecs.vectors[first:last], vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-6
        )


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
def test_pooling_is_the_one_asked_for(tiny_m3: Path, pooling: str) -> None:
    model = load_model(read_checkpoint(tiny_m3), device="cpu", dtype="float32")
    batch = pack([0, 5, 6, 2], [0, 7, 2])
    hidden, layout = run_model(model, batch)
    pooled = pool_rows(hidden, layout, pooling=pooling)  # type: ignore[arg-type]
    for index in range(2):
        states = hidden[batch.cu_seqlens[index] : batch.cu_seqlens[index + 1]]
        state = {"cls": states[0], "mean": states.mean(0), "lasttoken": states[-1]}[pooling]
        assert torch.allclose(pooled[index], state / state.norm(), atol=1e-6)


def test_bin_weights_equal_safetensors(tiny_m3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    shutil.copytree(tiny_m3, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {f"roberta.{name}": tensor for name, tensor in load_file(tiny_m3 / "model.safetensors").items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    batch = pack([0, 5, 6, 2])
    first, second = (
        run_model(load_model(read_checkpoint(path), device="cpu", dtype="float32"), batch)[0]
        for path in (tiny_m3, folder)
    )
    assert torch.equal(first, second)


def test_weights_that_carry_code_are_refused(tiny_m3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(tiny_m3, folder)
    torch.save({"weight": Bomb(), "bias": Bomb()}, folder / "sparse_linear.pt")
    with pytest.raises(ModelError, match=r"sparse_linear\.pt contains code"):
        load_model(read_checkpoint(folder), device="cpu", dtype="float32")


def test_weights_of_another_shape_are_named(tiny_m3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "misshapen"
    shutil.copytree(tiny_m3, folder)
    torch.save({"weight": torch.zeros(1, 32), "bias": torch.zeros(1)}, folder / "sparse_linear.pt")
    with pytest.raises(ModelError, match=r"1x32, config\.json says 1x64"):
        load_model(read_checkpoint(folder), device="cpu", dtype="float32")


def test_cut_off_weights_are_named(tiny_m3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_m3, folder)
    (folder / "model.safetensors").write_bytes((tiny_m3 / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelError, match="download the checkpoint again"):
        load_model(read_checkpoint(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    "dtype",
    ["float32", "bfloat16", pytest.param("int8", marks=pytest.mark.skipif(not cpu_has(INT8), reason="no VNNI"))],
)
def test_a_forward_formats_no_tensor(tiny_m3: Path, monkeypatch: pytest.MonkeyPatch, dtype: Dtype) -> None:
    """torch formats tensors into the error texts of overloads that do not match, at every call."""
    model = load_model(read_checkpoint(tiny_m3), device="cpu", dtype=dtype)
    formatted: list[torch.Tensor] = []

    def format_tensor(tensor: torch.Tensor) -> str:
        formatted.append(tensor)
        return "tensor"

    monkeypatch.setattr(torch.Tensor, "__repr__", format_tensor)
    run_model(model, pack([0, 5, 6, 2]))
    assert len(formatted) == 0


@given(st.integers(1, 300_000))
def test_batches_are_padded_a_little(num_tokens: int) -> None:
    for device in ("cpu", "cuda"):
        padded = padded_num_tokens(num_tokens, device=torch.device(device))
        step = SMALL_STEP if device == "cpu" and num_tokens <= TOKEN_STEP else TOKEN_STEP
        assert padded % step == 0
        added = padded - num_tokens
        assert 0 <= added < (step if device == "cpu" else max(step, num_tokens / OCTAVE_STEPS))


def test_on_cuda_full_batches_have_one_size_and_all_have_few() -> None:
    sizes = [padded_num_tokens(num_tokens, device=torch.device("cuda")) for num_tokens in range(1, 65_537)]
    assert set(sizes[-4096:]) == {65_536}
    assert len(set(sizes)) == 1024 // TOKEN_STEP + 6 * OCTAVE_STEPS, "those to 1,024, and six octaves"
    assert sorted(sizes) == sizes
