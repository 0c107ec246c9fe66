"""What a device gives: matmul ceilings, each kernel of a layer, fused and not, the forward pass, a launch.

    PYTHONPATH=scripts:. python -m benchmarks.kernels MODEL [--device cuda] [--tokens 65536] [--seconds 1.0]

Each number is the median of rounds over so many seconds, after a warm-up. On CUDA the forward pass also runs with gelu
and addition in kernels of their own, and with the layer norm of norm.py. A kernel that does not run here is named with
its error. One line of JSON is printed last.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention

from benchmarks.norm import make_norm
from m3cli.encoder import model as models
from m3cli.encoder.attention import SequenceLayout, flash_attention
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.encode import BatchEncoder
from m3cli.encoder.heads import OutputOptions
from m3cli.encoder.linear import FusedLinear, Linear
from m3cli.encoder.model import Model, load_model, run_model
from m3cli.records import Batch

MEANS = (30, 128, 256, 1024, 8192)
"tokens of a row, in the mean"
ROUND_SECONDS = 0.05
WARP_NORM = "layer_norm: a warp a row"

Forward = Callable[[Batch], tuple[torch.Tensor, SequenceLayout]]


class Probe:
    """Timings on a device by name."""

    def __init__(self, device: str, *, seconds: float) -> None:
        self.device = torch.device(device)
        self.found: dict[str, dict[str, float | str]] = {}
        self._seconds = seconds

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clock(self, call: Callable[..., object], *arguments: object) -> float:
        """Return the seconds of a call, the median of rounds of several calls."""
        for _ in range(2):
            began = time.perf_counter()
            call(*arguments)
            self.wait()
        calls = max(1, int(ROUND_SECONDS / max(time.perf_counter() - began, 1e-5)))
        rounds: list[float] = []
        end = time.perf_counter() + self._seconds
        while not rounds or time.perf_counter() < end:
            began = time.perf_counter()
            for _ in range(calls):
                call(*arguments)
            self.wait()
            rounds.append((time.perf_counter() - began) / calls)
        return sorted(rounds)[len(rounds) // 2]

    def note(
        self, name: str, call: Callable[..., object], *arguments: object, flops: float = 0.0, num_bytes: float = 0.0
    ) -> None:
        """Time a call and keep its rate."""
        try:
            seconds = self.clock(call, *arguments)
        except Exception as error:  # a probe: what does not run here is named
            self.found[name] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"}
        else:
            self.found[name] = {"ms": 1e3 * seconds}
            if flops:
                self.found[name]["tflops"] = flops / seconds / 1e12
            if num_bytes:
                self.found[name]["gb_per_s"] = num_bytes / seconds / 1e9
        shown = ", ".join(
            f"{value:,.3f} {unit}" if isinstance(value, float) else value for unit, value in self.found[name].items()
        )
        print(f"{name}: {shown}", flush=True)

    def random(self, *shape: int) -> torch.Tensor:
        """Return random numbers in the dtype of the device."""
        return torch.randn(*shape, device=self.device).to(
            torch.float16 if self.device.type == "cuda" else torch.float32
        )


def probe_ceilings(probe: Probe, *, side: int) -> None:
    """Measure a square matmul and a copy."""
    first, second = probe.random(side, side), probe.random(side, side)
    probe.note(f"mm {side}^3", torch.mm, first, second, flops=2 * side**3)
    probe.note(f"copy {side} x {side}", first.copy_, second, num_bytes=2 * first.nbytes)


def probe_layer(probe: Probe, model: Model, *, tokens: int) -> None:
    """Measure each kernel of a layer, fused and not."""
    width, inner = model.checkpoint.hidden_size, model.layers[0].intermediate.weight.shape[0]
    narrow, wide, residual = probe.random(tokens, width), probe.random(tokens, inner), probe.random(tokens, width)

    def add_in_place(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return residual.addmm_(states, weight.t(), beta=0.5, alpha=0.5)

    for name, rows, columns in (
        ("qkv", width, 3 * width),
        ("attention_out", width, width),
        ("up", width, inner),
        ("down", inner, width),
    ):
        source = narrow if rows == width else wide
        weight, bias = probe.random(columns, rows) * rows**-0.5, probe.random(columns)
        plain, fused = Linear(weight=weight, bias=bias, packed=False), FusedLinear(weight=weight, bias=bias)
        flops = 2.0 * tokens * rows * columns
        probe.note(f"{name}: linear", plain.apply, source, flops=flops)
        if columns == inner:
            probe.note(f"{name}: linear, gelu", plain.apply_gelu, source, flops=flops)
            probe.note(f"{name}: gelu in the epilogue", fused.apply_gelu, source, flops=flops)
        if columns == width:
            probe.note(f"{name}: linear, add", plain.apply_add, source, residual, flops=flops)
            probe.note(f"{name}: added in place by addmm_", add_in_place, source, weight, flops=flops)
    scale, shift = probe.random(width), probe.random(width)
    probe.note("layer_norm", F.layer_norm, narrow, (width,), scale, shift, 1e-5, num_bytes=2 * narrow.nbytes)
    if probe.device.type == "cuda":
        probe.note(WARP_NORM, run_warp_norm, narrow, (scale, shift), 1e-5, num_bytes=2 * narrow.nbytes)
    probe.note("gelu", F.gelu, wide, num_bytes=2 * wide.nbytes)
    probe.note("add", narrow.add_, residual, num_bytes=3 * narrow.nbytes)


def run_warp_norm(states: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor], eps: float) -> torch.Tensor:
    """Run the layer norm of norm.py, compiled at the first call."""
    return make_norm(states.shape[-1], states.dtype)(states, norm, eps)


def run_with_warp_norm(model: Model, batch: Batch) -> tuple[torch.Tensor, SequenceLayout]:
    """Run a batch through all layers with the layer norm of norm.py."""
    with patch.object(models, "_normalise", run_warp_norm):
        return run_model(model, batch)


def probe_attention(probe: Probe, model: Model, *, tokens: int) -> None:
    """Measure attention by flash attention and by cuDNN, by its borders and as a batch of equal lengths."""
    heads, width = model.checkpoint.num_heads, model.checkpoint.hidden_size
    q, k, v = probe.random(tokens, 3, heads, width // heads).unbind(1)
    cudnn, equal = torch.ops.aten._cudnn_attention_forward, torch.ops.aten._scaled_dot_product_cudnn_attention
    for length in (32, 128, 256, 512, 2048, 8192):
        borders = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=probe.device)
        sizes = (borders, borders, length, length)
        flops = 4.0 * tokens * length * width
        probe.note(f"attention {length}: flash", flash_attention, q, k, v, *sizes, 0.0, False, False, flops=flops)
        probe.note(f"attention {length}: cuDNN", cudnn, q, k, v, None, *sizes, False, 0.0, False, False, flops=flops)
        whole = tokens // length * length
        batch = [each[:whole].view(-1, length, heads, width // heads).transpose(1, 2) for each in (q, k, v)]
        probe.note(f"attention {length}: cuDNN, a batch", equal, *batch, None, False, flops=flops)


def pack_random(mean: int, *, tokens: int, longest: int) -> Batch:
    """Return a batch of random rows of `tokens` tokens in all, longest first."""
    draw, lengths = np.random.default_rng(0), list[int]()
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(draw.gamma(2.0, mean / 2), 4, min(longest, tokens))))
    lengths[-1] -= sum(lengths) - tokens
    lengths = sorted((length for length in lengths if length > 1), reverse=True)
    borders = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    ids = draw.integers(4, 250_000, borders[-1])
    return Batch(rows=np.arange(len(lengths)), input_ids=ids, cu_seqlens=borders, max_seqlen=lengths[0])


def count_flops(model: Model, batch: Batch) -> float:
    """Count the FLOP of a forward pass, attention included."""
    shape, lengths = model.checkpoint, np.diff(batch.cu_seqlens).astype(float)
    inner = model.layers[0].intermediate.weight.shape[0]
    per_token = 8 * shape.hidden_size**2 + 4 * shape.hidden_size * inner
    squares = float((lengths**2).sum())
    return shape.num_layers * (per_token * len(batch.input_ids) + 4 * shape.hidden_size * squares)


def probe_forward(probe: Probe, model: Model, variants: dict[str, Forward], *, tokens: int) -> None:
    """Measure the forward pass of each variant, their cosine, and what a launch costs the host."""
    for mean in MEANS:
        states = list[torch.Tensor]()
        batch = pack_random(mean, tokens=tokens, longest=model.checkpoint.max_length)
        flops, real = count_flops(model, batch), len(batch.input_ids)
        for name, run in variants.items():
            probe.note(f"forward {mean}{name}", run, batch, flops=flops)
            found = probe.found[f"forward {mean}{name}"]
            if isinstance(spent := found.get("ms"), float):
                found["tokens_per_second"] = 1e3 * real / spent
            states.append(run(batch)[0][:real].float())
            found["least_cosine"] = F.cosine_similarity(states[0], states[-1], dim=-1).min().item()
        probe_launch(probe, model, batch, name=f"launch {mean}")


def probe_launch(probe: Probe, model: Model, batch: Batch, *, name: str) -> None:
    """Measure what a launch costs the host, and how long its batch takes."""
    encoder = BatchEncoder(model, OutputOptions(outputs=("dense", "sparse"), special_ids={0, 1, 2, 3}))
    list(encoder.encode(batch))
    probe.wait()
    began = time.perf_counter()
    launched = encoder._launch(model, batch)
    host = time.perf_counter() - began
    assert launched is not None
    launched.outputs.wait()
    probe.found[name] = {"host_ms": 1e3 * host, "batch_ms": 1e3 * (time.perf_counter() - began)}


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--side", type=int, default=8192, help="of the square matmul")
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    probe = Probe(options.device, seconds=options.seconds)
    dtype: Any = "float16" if probe.device.type == "cuda" else "float32"
    model = load_model(read_checkpoint(options.model), device=options.device, dtype=dtype)
    probe_ceilings(probe, side=options.side)
    probe_layer(probe, model, tokens=options.tokens)
    variants: dict[str, Forward] = {"": partial(run_model, model)}
    if probe.device.type == "cuda":
        probe_attention(probe, model, tokens=options.tokens)
        with patch.object(models, "can_fuse", lambda *_: False):
            plain = load_model(model.checkpoint, device=options.device, dtype=dtype)
        variants[": not fused"] = partial(run_model, plain)
        if "ms" in probe.found[WARP_NORM]:
            variants[": a warp a row"] = partial(run_with_warp_norm, model)
    probe_forward(probe, model, variants, tokens=options.tokens)
    print(json.dumps(probe.found))


if __name__ == "__main__":
    main()
