"""A layer norm for CUDA in 16 bits that is measured against torch's: a warp for each row, which stays in registers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

THREADS = 32
WARPS = 8
"rows of a block"
VECTOR = 8
"numbers that a thread reads at once, 16 bytes"

_READ = {
    torch.float16: 'asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"'
    ' : "=f"(low), "=f"(high) : "r"(pair));',
    torch.bfloat16: "low = __uint_as_float(pair << 16); high = __uint_as_float(pair & 0xffff0000u);",
}
_WRITE = {torch.float16: "cvt.rn.f16x2.f32", torch.bfloat16: "cvt.rn.bf16x2.f32"}
SOURCE = """
__device__ void unpack(uint4 packed, float* values) {
    const unsigned int pairs[4] = {packed.x, packed.y, packed.z, packed.w};
    for (int i = 0; i < 4; i++) {
        const unsigned int pair = pairs[i];
        float low, high;
        READ
        values[2 * i] = low;
        values[2 * i + 1] = high;
    }
}

__device__ unsigned int pack(float low, float high) {
    unsigned int pair;
    asm("WRITE %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ float add_up(float value) {
    for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
    return value;
}

extern "C" __global__ void layer_norm(
    const uint4* states, const uint4* scale, const uint4* shift, uint4* out, int rows, double eps
) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, thread = threadIdx.x % 32;
    if (row >= rows) return;
    states += (size_t)row * (VECTORS * 32);
    out += (size_t)row * (VECTORS * 32);
    float values[VECTORS][8], total = 0, squares = 0, factors[8], added[8];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) unpack(states[i * 32 + thread], values[i]);
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        for (int j = 0; j < 8; j++) total += values[i][j];
    const float mean = add_up(total) / (VECTORS * 256);
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        for (int j = 0; j < 8; j++) {
            values[i][j] -= mean;
            squares += values[i][j] * values[i][j];
        }
    const float inverse = rsqrtf(add_up(squares) / (VECTORS * 256) + (float)eps);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        unpack(scale[i * 32 + thread], factors);
        unpack(shift[i * 32 + thread], added);
        for (int j = 0; j < 8; j++) values[i][j] = values[i][j] * inverse * factors[j] + added[j];
        out[i * 32 + thread] = make_uint4(
            pack(values[i][0], values[i][1]), pack(values[i][2], values[i][3]),
            pack(values[i][4], values[i][5]), pack(values[i][6], values[i][7])
        );
    }
}
"""


def write_source(width: int, dtype: torch.dtype) -> str:
    """Return the kernel's CUDA C for rows of `width` numbers, a multiple of 256."""
    vectors, rest = divmod(width, THREADS * VECTOR)
    assert not rest, f"{width} is not a multiple of {THREADS * VECTOR}"
    return SOURCE.replace("READ", _READ[dtype]).replace("WRITE", _WRITE[dtype]).replace("VECTORS", str(vectors))


Norm = tuple[torch.Tensor, torch.Tensor]


@cache
def make_norm(width: int, dtype: torch.dtype) -> Callable[[torch.Tensor, Norm, float], torch.Tensor]:
    """Compile the kernel for the current device, with NVRTC, which torch brings.

    Returns:
        a function of states [N, width], scale and shift [width] each, and epsilon, all contiguous; [N, width]
    """
    kernel = torch.cuda._compile_kernel(write_source(width, dtype), "layer_norm")  # noqa: SLF001

    def normalise(states: torch.Tensor, norm: Norm, eps: float) -> torch.Tensor:
        out = torch.empty_like(states)
        arguments = [states, *norm, out, len(states), eps]
        kernel(grid=(-(-len(states) // WARPS), 1, 1), block=(THREADS * WARPS, 1, 1), args=arguments)
        return out

    return normalise
