"""Affine maps in the form that a device runs fastest, with gelu or an addition fused in.

On a CPU, bfloat16 and float32 weights are packed once for oneDNN, and gelu runs while a tile is in cache. torch's own
`linear` packs bfloat16 weights at every call, uses MKL for float32, which is slower on AMD processors, and has no fused
gelu. On CUDA in 16 bits, gelu and the addition are part of the matmul. Elsewhere torch's `linear` is used.

The operator's overloads are called by name. Otherwise torch tries each one, and formats all tensors into an error text.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention

ROWS_HINT = 8192
"rows for which the layout is optimised"


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """x -> x W^T + b."""

    weight: torch.Tensor
    "[out, in], or packed by oneDNN"
    bias: torch.Tensor
    "[out]"
    packed: bool

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out]."""
        if self.packed:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
                states, self.weight, self.bias, "none", [], ""
            )
            return out
        return F.linear(states, self.weight, self.bias)

    def apply_gelu(self, states: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out], then gelu (the exact one, with erf)."""
        if self.packed:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
                states, self.weight, self.bias, "gelu", [], "none"
            )
            return out
        return F.gelu(F.linear(states, self.weight, self.bias))

    def apply_add(self, states: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out], then add [N, out]."""
        if self.packed:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(states, addend, self.weight, self.bias, "add")
            return out
        return F.linear(states, self.weight, self.bias).add_(addend)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLinear:
    """x -> x W^T + b in 16 bits on CUDA: a kernel reads and writes its states once, not two or three times."""

    weight: torch.Tensor
    "[out, in]"
    bias: torch.Tensor | None
    "[out]; None: the norm before it adds it to the addend (`move_output_biases` in model.py)"

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out]."""
        return F.linear(states, self.weight, self.bias)

    def apply_gelu(self, states: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out], then gelu by its approximation with tanh, which differs by less than 5e-4."""
        assert self.bias is not None
        return torch._addmm_activation(self.bias, states, self.weight.t(), use_gelu=True)

    def apply_add(self, states: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out], and add it to `addend` [N, out], which is overwritten."""
        assert self.bias is None
        return addend.addmm_(states, self.weight.t())


def make_linear(weight: torch.Tensor, bias: torch.Tensor) -> Linear:
    """Return an affine map on the device of its weights."""
    if _can_pack(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
        return Linear(weight=packed, bias=bias, packed=True)
    return Linear(weight=weight, bias=bias, packed=False)


def can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `FusedLinear` is used; in float32 its gelu would not be exact enough."""
    return device.type == "cuda" and dtype.itemsize == 2 and hasattr(torch, "_addmm_activation")


def _can_pack(weight: torch.Tensor) -> bool:
    # torch.compile freezes CPU models into these operators; a torch built without oneDNN lacks them.
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (
            weight.dtype == torch.float32
            or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


LEVELS = 127
"steps on each side of zero"
ZERO_POINT = 128
"of states; oneDNN is fast with unsigned states only"
GELU_MINIMUM = -0.17
"minimum of gelu: states after it are shifted up by this, so that all 255 steps are used"
QUANTISED_NUMBERS = 1 << 18
"at once: in float32 they are 1 MiB, which fits the second level cache (scripts/bench_results/LOG.md)"
ROUNDING = 1.5 * 2**23
"added to a float32 below 2^22 it rounds it, and leaves the integer in the lowest bits: faster than a conversion"
INT8_ROWS_HINT = 2048
"rows for which the layout is optimised"
_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Linear:
    """x -> x W^T + b, with W and, on the way, x in 8-bit integers."""

    weight: torch.Tensor
    "[out, in] int8, packed by oneDNN"
    scale: torch.Tensor
    "[out] float32, of the weight's rows"
    zero: torch.Tensor
    "[out] int32, the zero points of the weight's rows: all 0"
    bias: torch.Tensor
    "[out] in the dtype of the result, bfloat16 or float32"
    shift: float
    "added to x before it is quantised, and subtracted by the bias; 0 unless x comes from gelu"

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out], both bfloat16 or float32."""
        quantised, scale, zero_point = self.quantise(states)
        out = self.multiply(quantised, zero_point)
        return torch.addcmul(self.bias, out, scale.to(out.dtype), out=out)

    def apply_gelu(self, states: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out], then gelu (the exact one, with erf)."""
        mapped: torch.Tensor = torch.ops.aten.gelu_(self.apply(states))
        return mapped

    def apply_add(self, states: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out], then add [N, out]."""
        return self.apply(states).add_(addend)

    def multiply(self, quantised: torch.Tensor, zero_point: int) -> torch.Tensor:
        """Map states [N, in] uint8 to [N, out], without their scales and the bias."""
        dtype = self.bias.dtype
        out: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            quantised, 1.0, zero_point, self.weight, self.scale, self.zero, None, 1.0, 0, dtype, "none", [], ""
        )
        return out

    def quantise(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return states [N, in] as uint8, the scale [N, 1] float32 of each row, and the zero point of all."""
        zero_point = 0 if self.shift else ZERO_POINT
        quantised, scale = torch.empty(states.shape, dtype=torch.uint8), torch.empty((len(states), 1))
        step = max(1, QUANTISED_NUMBERS // states.shape[1])
        buffer = torch.empty((min(step, len(states)), states.shape[1]))
        for start in range(0, len(states), step):
            rows = slice(start, start + step)
            levels = buffer[: len(states) - start]
            if self.shift:
                torch.add(states[rows].float(), self.shift, out=levels)
                largest = levels.amax(-1, keepdim=True).div_(2 * LEVELS + 1)
            else:
                levels.copy_(states[rows])
                largest = torch.maximum(levels.amax(-1, keepdim=True), -levels.amin(-1, keepdim=True)).div_(LEVELS)
            scale[rows] = largest.clamp_(min=_SMALLEST)
            levels.mul_(largest.reciprocal_()).add_(ROUNDING + zero_point)
            quantised[rows] = levels.view(torch.int32)
        return quantised, scale, zero_point


def make_int8_linear(weight: torch.Tensor, bias: torch.Tensor, *, dtype: torch.dtype, after_gelu: bool) -> Int8Linear:
    """Return a quantised affine map [out, in] to `dtype`."""
    exact = weight.float()
    scale = (exact.abs().amax(1) / LEVELS).clamp(min=_SMALLEST)
    quantised = (exact / scale[:, None]).round().to(torch.int8)
    shift = -GELU_MINIMUM if after_gelu else 0.0
    unshifted = bias.float() - shift * scale * quantised.sum(1, dtype=torch.float32)
    return Int8Linear(
        weight=torch.ops.onednn.qlinear_prepack(quantised, [INT8_ROWS_HINT, weight.shape[1]]),
        scale=scale,
        zero=torch.zeros(len(scale), dtype=torch.int32),
        bias=unshifted.to(dtype),
        shift=shift,
    )


def can_run_int8() -> bool:
    """Return whether this torch has oneDNN's 8-bit matmul; its result needs a CPU with VNNI."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Linear:
    """x -> x W^T + b, with W in NF4, 4 bits a number, which is dequantised at each call."""

    weight: torch.Tensor
    "[in * out / 2, 1] uint8, two numbers a byte"
    state: Any
    "bitsandbytes' QuantState: a scale for each 64 numbers, 8 bits each (double quantisation)"
    bias: torch.Tensor
    "[out] in the states' dtype"

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out]."""
        from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415  an extra

        return F.linear(states, dequantize_4bit(self.weight, self.state), self.bias)

    def apply_gelu(self, states: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out], then gelu (the exact one, with erf)."""
        return F.gelu(self.apply(states))

    def apply_add(self, states: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out], then add [N, out]."""
        return self.apply(states).add_(addend)


def make_nf4_linear(weight: torch.Tensor, bias: torch.Tensor) -> Nf4Linear:
    """Return an affine map [out, in] in NF4, on the device and for states of the dtype of its weights."""
    from bitsandbytes.functional import quantize_4bit  # noqa: PLC0415  an extra

    quantised, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return Nf4Linear(weight=quantised, state=state, bias=bias)


def can_run_nf4() -> bool:
    """Return whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None
