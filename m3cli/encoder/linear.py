"""Affine maps in the form that a device runs fastest, what follows them fused in where it can be.

On a CPU in bfloat16 and float32 weights are laid out once for oneDNN, and gelu is done while a tile is still in cache:
torch's plain `linear` lays bfloat16 out anew at every call, leaves float32 to MKL, which is slower on AMD's processors,
and its gelu reads and writes the widest tensor of the layer once more. Everywhere else it is torch's own `linear`.

The operator's overloads are called by name: without one torch tries them in turn, and formats the tensors into the
error text of each that does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention

ROWS_HINT = 8192
"rows that the layout is chosen for; others run in the same layout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """x -> x W^T + b."""

    weight: torch.Tensor
    "[out, in], or the same laid out by oneDNN"
    bias: torch.Tensor
    "[out]"
    packed: bool

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out]."""
        if self.packed:
            made: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
                states, self.weight, self.bias, "none", [], ""
            )
            return made
        return F.linear(states, self.weight, self.bias)

    def apply_gelu(self, states: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out], then gelu (the exact one, with erf)."""
        if self.packed:
            made: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
                states, self.weight, self.bias, "gelu", [], "none"
            )
            return made
        return F.gelu(F.linear(states, self.weight, self.bias))

    def apply_add(self, states: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        """Map [N, in] to [N, out], then add [N, out]."""
        if self.packed:
            made: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
                states, addend, self.weight, self.bias, "add"
            )
            return made
        return F.linear(states, self.weight, self.bias).add_(addend)


def make_linear(weight: torch.Tensor, bias: torch.Tensor) -> Linear:
    """Prepare an affine map where its weights lie."""
    if _can_pack(weight):
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
        return Linear(weight=laid_out, bias=bias, packed=True)
    return Linear(weight=weight, bias=bias, packed=False)


def _can_pack(weight: torch.Tensor) -> bool:
    # The operators are those that torch.compile freezes CPU models into; a torch built without oneDNN has none.
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (
            weight.dtype == torch.float32
            or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )
