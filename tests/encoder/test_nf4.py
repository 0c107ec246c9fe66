from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import m3cli
from m3cli.encoder import device as machine
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.linear import Nf4Linear, make_nf4_linear
from m3cli.encoder.model import load_model
from m3cli.errors import UsageError
from tests.api.test_seeds import DOCS, SENTENCES_2

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="not installed: bitsandbytes (pip install 'm3cli[nf4]')"
)
COSINE = 0.999


def test_without_bitsandbytes_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "can_run_nf4", lambda: False)
    with pytest.raises(UsageError, match=r"pip install 'm3cli\[nf4\]'"):
        machine.resolve_dtype("nf4", "cpu")


@needs_bitsandbytes
def test_fused_forms_are_the_plain_one() -> None:
    linear = make_nf4_linear(torch.randn(96, 64), torch.randn(96))
    states, addend = torch.randn(5, 64), torch.randn(5, 96)
    plain = linear.apply(states)
    assert torch.equal(linear.apply_gelu(states), torch.nn.functional.gelu(plain))
    assert torch.equal(linear.apply_add(states, addend), plain + addend)


@needs_bitsandbytes
def test_the_linears_take_a_quarter_of_bfloat16s_bytes(demo_m3: Path) -> None:
    model = load_model(read_checkpoint(demo_m3), device="cpu", dtype="nf4")
    stored = numbers = 0
    for layer in model.layers:
        for linear in (layer.qkv, layer.attention_out, layer.intermediate, layer.output):
            assert isinstance(linear, Nf4Linear)
            scales = linear.state.absmax.nbytes + linear.state.state2.absmax.nbytes
            stored += linear.weight.nbytes + scales
            numbers += int(np.prod(linear.state.shape))
    assert numbers == 12 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert stored <= 0.3 * 2 * numbers


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_vectors_are_those_of_transformers_with_bitsandbytes(demo_m3: Path) -> None:
    from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig  # noqa: PLC0415

    kind = machine.state_dtype("nf4", "cpu")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=kind,
    )  # type: ignore[no-untyped-call]
    reference = AutoModel.from_pretrained(demo_m3, quantization_config=config, device_map="cpu", dtype=kind)
    tokenizer = AutoTokenizer.from_pretrained(demo_m3)
    model = m3cli.load_model(demo_m3, device="cpu", dtype="nf4")
    encoded = model.encode([*DOCS, *SENTENCES_2], outputs=("dense",))
    assert encoded.dense_vecs is not None
    for text, vector in zip([*DOCS, *SENTENCES_2], encoded.dense_vecs, strict=True):
        with torch.no_grad():
            states = reference(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].float()
        mean = torch.nn.functional.normalize(states.mean(0), dim=0).numpy()  # the demo checkpoint's pooling
        assert float(mean @ vector) >= COSINE
