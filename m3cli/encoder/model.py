"""The XLM-RoBERTa forward pass over packed batches, with one fused qkv matmul a layer.

Weights are safetensors, or `pytorch_model.bin` read with `weights_only=True`; names may have the prefix `roberta.`. The
single token-type row is added to the position embeddings. Positions start at 2 in every sequence.

MCLS, of BGE-M3's paper (Appendix B.2), adds a `<s>` before every 256 tokens, which helps long texts without
fine-tuning; the dense vector is the mean of their states. The first is the row's own. Sparse and ColBERT outputs and
num_tokens ignore those that are added; positions and batches count them. They are identified by position, because a
text may contain '<s>' itself.

Shapes: B sequences, N tokens, C hidden width, I intermediate width, H heads.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from numpy.typing import NDArray

from m3cli.config import Dtype
from m3cli.encoder.attention import SequenceLayout, attend, lay_out, pad_borders
from m3cli.encoder.checkpoint import (
    DOWNLOAD_AGAIN,
    HEAD_FILES,
    POSITION_OFFSET,
    Checkpoint,
    check_content,
)
from m3cli.encoder.chunker import lengths_with_mcls
from m3cli.encoder.device import is_emulated, lacks_memory, resolve_dtype, retry_dtypes, send, state_dtype
from m3cli.encoder.linear import (
    FusedLinear,
    Int8Linear,
    Linear,
    Nf4Linear,
    can_fuse,
    make_int8_linear,
    make_linear,
    make_nf4_linear,
)
from m3cli.errors import ModelError, ModelTooLarge, first_line
from m3cli.records import Batch, concat_ranges

_log = logging.getLogger(__name__)

TOKEN_STEP = 128
"""Batches are padded to a multiple of this many tokens. oneDNN prepares and keeps a kernel for each number of rows, so
without steps memory grows, and a small model spends more time on preparing kernels than on running them."""

SMALL_STEP = 4
"the same on a CPU up to TOKEN_STEP tokens, where padding is most of the time of a query"

OCTAVE_STEPS = 8
"""Padded sizes between one power of two and the next on CUDA, where kernels are chosen by shape. Full batches have the
budget if it is a power of two, as automatic ones are. The last batch of a window grows by an eighth at most."""

INNER_ROWS = 512
"""Tokens that go through a layer's widest tensor at once on a CPU: [512, 4096] in float32 are 8 MiB. glibc maps new
pages for large tensors, and zeroing them is slow (scripts/bench_results/LOG.md)."""

_PREFIXES = ("roberta.", "model.", "encoder_model.", "")
_ZIP = b"PK"
_MAGICS = (_ZIP, b"\x80\x02")
"first bytes of torch's files: the zip format of torch 1.6 and later, which can be mapped, and older pickles"
_FOREIGN_CODE = re.compile("unsupported global|unsupported class|can only (build|create)", re.IGNORECASE)
"in torch's error for a pickle that calls foreign code"

Norm = tuple[torch.Tensor, torch.Tensor]
AnyLinear = Linear | FusedLinear | Int8Linear | Nf4Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Weights of one transformer layer."""

    qkv: AnyLinear
    "C to 3C: query, key, value"
    attention_out: AnyLinear
    attention_norm: Norm
    intermediate: AnyLinear
    "C to I"
    output: AnyLinear
    "I to C"
    output_norm: Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint's weights on a device."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    word_embeddings: torch.Tensor
    "[vocabulary, C]"
    position_embeddings: torch.Tensor
    "[positions, C], the token-type row added"
    embedding_norm: Norm
    layers: tuple[Layer, ...]
    sparse_linear: Linear | None
    "C to 1"
    colbert_linear: Linear | None
    "C to C; M3's vectors are as wide as its states"


def load_model(checkpoint: Checkpoint, *, device: str, dtype: Dtype) -> Model:
    """Read a checkpoint's weights onto a device.

    Raises:
        ModelError: a weight is missing or has another shape than config.json says, or a file contains code.
        ModelTooLarge: the weights do not fit memory.
        UsageError: the device cannot run the dtype.
    """
    try:
        return _load_model(checkpoint, device=device, dtype=dtype)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise ModelTooLarge(
            f"{checkpoint.folder}: the weights do not fit the memory of {device} in {dtype}; "
            "free memory there, or use another --device or --dtype"
        ) from error


def load_retries(checkpoint: Checkpoint, *, device: str, dtype: Dtype) -> list[Callable[[], Model]]:
    """Return what loads a checkpoint in each dtype of `retry_dtypes`."""
    return [partial(load_model, checkpoint, device=device, dtype=kind) for kind in retry_dtypes(dtype, device)]


def _load_model(checkpoint: Checkpoint, *, device: str, dtype: Dtype) -> Model:
    target, kind = torch.device(device), state_dtype(resolve_dtype(dtype, device), device)
    if is_emulated(kind, device):
        _log.warning("%s is not in this CPU's hardware: float32 would be several times faster here", dtype)
    if target.type == "cuda":
        # Partial sums in float16 overflow with large states, and save nothing at thousands of rows.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    tensors = _Tensors(_read_weights(checkpoint), checkpoint)
    width, inner = checkpoint.hidden_size, None

    def put(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=target, dtype=kind).contiguous()

    def linear(names: list[str], *shape: int | None, before_gelu: bool = False, after_gelu: bool = False) -> AnyLinear:
        weight = torch.cat([tensors.take(f"{name}.weight", *shape) for name in names])
        bias = torch.cat([tensors.take(f"{name}.bias", shape[0]) for name in names])
        if dtype == "int8":
            # Gelu and the quantising after it take float32 as it is.
            result = torch.float32 if before_gelu else kind
            return make_int8_linear(weight, bias, dtype=result, after_gelu=after_gelu)
        if dtype == "nf4":
            return make_nf4_linear(put(weight), put(bias))
        if can_fuse(target, kind):
            return FusedLinear(weight=put(weight), bias=put(bias))
        return make_linear(put(weight), put(bias))

    def norm(name: str) -> Norm:
        return put(tensors.take(f"{name}.weight", width)), put(tensors.take(f"{name}.bias", width))

    layers = []
    for number in range(checkpoint.num_layers):
        at = f"encoder.layer.{number}"
        layers.append(
            Layer(
                qkv=linear([f"{at}.attention.self.{part}" for part in ("query", "key", "value")], width, width),
                attention_out=linear([f"{at}.attention.output.dense"], width, width),
                attention_norm=norm(f"{at}.attention.output.LayerNorm"),
                intermediate=linear([f"{at}.intermediate.dense"], inner, width, before_gelu=True),
                output=linear([f"{at}.output.dense"], width, inner, after_gelu=True),
                output_norm=norm(f"{at}.output.LayerNorm"),
            )
        )
    positions = tensors.take("embeddings.position_embeddings.weight", checkpoint.num_positions, width)
    token_type = tensors.take("embeddings.token_type_embeddings.weight", None, width)[0]
    model = Model(
        checkpoint=checkpoint,
        device=target,
        dtype=kind,
        word_embeddings=put(tensors.take("embeddings.word_embeddings.weight", checkpoint.vocab_size, width)),
        position_embeddings=put(positions.float() + token_type.float()),
        embedding_norm=norm("embeddings.LayerNorm"),
        layers=tuple(layers),
        sparse_linear=_read_head(checkpoint, "sparse", put, rows=1),
        colbert_linear=_read_head(checkpoint, "colbert", put, rows=width),
    )
    return move_output_biases(model) if isinstance(model.layers[0].output, FusedLinear) else model


def move_output_biases(model: Model) -> Model:
    """Return the same model without the biases of `attention_out` and `output`: the norms before them add them.

    The norm's result is what the output is added to. The next linear map, which reads the norm too, takes the bias
    away from its own: W (x + b) + (c - W b) = W x + c. All is exact but for rounding.
    """
    layers = []
    for layer, following in zip(model.layers, (*model.layers[1:], None), strict=True):
        output_norm = layer.output_norm if following is None else _raise(layer.output_norm, following.attention_out)
        layers.append(
            replace(
                layer,
                qkv=_lower(layer.qkv, layer.attention_out),
                attention_out=FusedLinear(weight=layer.attention_out.weight, bias=None),
                attention_norm=_raise(layer.attention_norm, layer.output),
                intermediate=_lower(layer.intermediate, layer.output),
                output=FusedLinear(weight=layer.output.weight, bias=None),
                output_norm=output_norm,
            )
        )
    embedding_norm = _raise(model.embedding_norm, model.layers[0].attention_out)
    return replace(model, embedding_norm=embedding_norm, layers=tuple(layers))


def _raise(norm: Norm, output: AnyLinear) -> Norm:
    assert output.bias is not None
    return norm[0], (norm[1].float() + output.bias.float()).to(norm[1].dtype)


def _lower(reader: AnyLinear, output: AnyLinear) -> FusedLinear:
    assert reader.bias is not None
    assert output.bias is not None
    lowered = reader.bias.float() - reader.weight.float() @ output.bias.float()
    return FusedLinear(weight=reader.weight, bias=lowered.to(reader.bias.dtype))


class _Tensors:
    """Tensors of a checkpoint by their names without prefix."""

    def __init__(self, tensors: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
        self._tensors = tensors
        self._folder = checkpoint.folder
        probe = "embeddings.word_embeddings.weight"
        self._prefix = next((prefix for prefix in _PREFIXES if prefix + probe in tensors), "")

    def take(self, name: str, *shape: int | None) -> torch.Tensor:
        """Return a tensor after checking its shape; None is any size."""
        tensor = self._tensors.get(self._prefix + name)
        if tensor is None:
            raise ModelError(f"{self._folder}: the weights hold no {name}, which XLM-RoBERTa has; {DOWNLOAD_AGAIN}")
        sizes = tuple(tensor.shape)
        if len(sizes) != len(shape) or any(want not in (None, have) for have, want in zip(sizes, shape, strict=True)):
            wanted = "x".join("any" if size is None else str(size) for size in shape)
            raise ModelError(f"{self._folder}: {name} is {'x'.join(map(str, sizes))}, config.json says {wanted}")
        return tensor


def _read_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in checkpoint.weight_files:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError  # noqa: PLC0415
            from safetensors.torch import load_file  # noqa: PLC0415

            try:
                tensors.update(load_file(path))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read: {first_line(error)}; {DOWNLOAD_AGAIN}") from error
        else:
            tensors.update(read_pickled(path))
    return tensors


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Read tensors in torch's own format; a file with code is an error, the code never runs."""
    from pickle import UnpicklingError  # noqa: PLC0415, TID251  only the name of what torch raises

    check_content(path)
    with path.open("rb") as file:
        magic = file.read(2)
    if magic not in _MAGICS:
        raise ModelError(f"{path} is not a file of tensors; {DOWNLOAD_AGAIN}")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=magic == _ZIP)
    except Exception as error:  # torch's unpickler raises nearly anything for a corrupt file
        if lacks_memory(error):
            raise
        if _FOREIGN_CODE.search(str(error)):
            raise ModelError(f"{path} contains code, which m3 never runs; get another checkpoint") from error
        # The unpickler's own messages suggest to allow code.
        reason = "it is corrupt" if isinstance(error, UnpicklingError) else first_line(error)
        raise ModelError(f"{path} cannot be read: {reason}; {DOWNLOAD_AGAIN}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ModelError(f"{path} is not a dictionary of tensors; get the checkpoint from its publisher")
    return content


def _read_head(
    checkpoint: Checkpoint, output: str, put: Callable[[torch.Tensor], torch.Tensor], *, rows: int
) -> Linear | None:
    if output not in checkpoint.outputs:
        return None
    head = _Tensors(read_pickled(checkpoint.folder / HEAD_FILES[output]), checkpoint)
    weight = head.take("weight", rows, checkpoint.hidden_size)
    return make_linear(put(weight), put(head.take("bias", weight.shape[0])))


@torch.inference_mode()
def run_model(model: Model, batch: Batch) -> tuple[torch.Tensor, SequenceLayout]:
    """Run a packed batch through all layers.

    Returns:
        last_hidden_state [M, C] in the model's dtype on its device, M >= N (states after the batch's N tokens are
        padding), and the batch's layout.
    """
    checkpoint, device = model.checkpoint, model.device
    num_tokens = len(batch.input_ids)
    num_padded = padded_num_tokens(num_tokens, device=device)
    ids_and_positions = np.zeros((2, num_padded), np.int32)
    ids_and_positions[0, :num_tokens] = batch.input_ids
    _, ids_and_positions[1, :num_tokens] = concat_ranges(POSITION_OFFSET, np.diff(batch.cu_seqlens))
    cu_seqlens = pad_borders(batch.cu_seqlens) if device.type == "cuda" else batch.cu_seqlens
    input_ids, positions, borders = send(device, *ids_and_positions, cu_seqlens)
    layout = lay_out(
        batch.cu_seqlens,
        borders,
        num_heads=checkpoint.num_heads,
        head_width=checkpoint.hidden_size // checkpoint.num_heads,
        max_seqlen=batch.max_seqlen,
        dtype=model.dtype,
    )
    eps = checkpoint.layer_norm_eps
    hidden = F.embedding(input_ids, model.word_embeddings)
    hidden += F.embedding(positions, model.position_embeddings)
    hidden = _normalise(hidden, model.embedding_norm, eps)
    for layer in model.layers:
        hidden = _run_layer(hidden, layer, layout, num_heads=checkpoint.num_heads, eps=eps)
    return hidden, layout


def padded_num_tokens(num_tokens: int, *, device: torch.device) -> int:
    """Return the number of tokens with padding, one of few sizes."""
    if device.type == "cuda":
        step = max(TOKEN_STEP, (1 << (num_tokens - 1).bit_length()) // (2 * OCTAVE_STEPS))
    else:
        step = TOKEN_STEP if num_tokens > TOKEN_STEP else SMALL_STEP
    return -(-num_tokens // step) * step


def _run_layer(
    hidden: torch.Tensor, layer: Layer, layout: SequenceLayout, *, num_heads: int, eps: float
) -> torch.Tensor:
    num_tokens, width = hidden.shape
    qkv = layer.qkv.apply(hidden).view(num_tokens, 3, num_heads, width // num_heads)
    hidden = _normalise(layer.attention_out.apply_add(attend(qkv, layout), hidden), layer.attention_norm, eps)
    parts = torch.split(hidden, INNER_ROWS if hidden.device.type == "cpu" else num_tokens)
    outputs = [layer.output.apply_add(layer.intermediate.apply_gelu(part), part) for part in parts]
    return _normalise(torch.cat(outputs) if len(outputs) > 1 else outputs[0], layer.output_norm, eps)


def _normalise(hidden: torch.Tensor, norm: Norm, eps: float) -> torch.Tensor:
    return F.layer_norm(hidden, (hidden.shape[-1],), norm[0], norm[1], eps)


def pool_as_cls(model: Model) -> Model:
    """Return the model with pooling cls, whatever pooling its checkpoint names."""
    return replace(model, checkpoint=replace(model.checkpoint, pooling="cls"))


@torch.inference_mode()
def run_with_added(model: Model, batch: Batch, *, every: int) -> tuple[torch.Tensor, SequenceLayout]:
    """Run a batch with `<s>` added, and return states and layout without those.

    The state of each row's own `<s>` is the mean over all of its row.
    """
    lengths = np.diff(batch.cu_seqlens).astype(np.int64)
    longer, indices = _insert(batch, lengths, every=every)
    states, attended = run_model(model, longer)
    added = np.ones(len(longer.input_ids), np.bool_)
    added[indices] = False
    added[longer.cu_seqlens[:-1]] = True
    counts = np.add.reduceat(added, longer.cu_seqlens[:-1], dtype=np.int32)
    take = np.zeros(padded_num_tokens(len(indices), device=model.device), np.int32)
    take[: len(indices)] = indices
    marks, num_marks, kept, borders = send(model.device, np.flatnonzero(added), counts, take, batch.cu_seqlens)
    # `unsafe` omits checks of the lengths, which would wait for the device.
    means = torch.segment_reduce(states.index_select(0, marks).float(), "mean", lengths=num_marks, axis=0, unsafe=True)
    without = states.index_select(0, kept)
    without.index_copy_(0, borders[:-1].long(), means.to(without.dtype))
    # For the heads only: no attention follows.
    layout = replace(attended, cu_seqlens=borders, max_seqlen=batch.max_seqlen, num_tokens=len(batch.input_ids))
    return without, layout


def _insert(batch: Batch, lengths: NDArray[np.int64], *, every: int) -> tuple[Batch, NDArray[np.int64]]:
    """Return a batch with `<s>` added, and the indices in it of the batch's own tokens."""
    longer = lengths_with_mcls(lengths, every=every)
    cu_seqlens = np.concatenate(([0], np.cumsum(longer)))
    _, position = concat_ranges(0, lengths)
    # (p - 1) // every of them precede token p of a row, whose own <s> is token 0; none is added before </s>.
    before = np.minimum(np.maximum(position - 1, 0) // every, np.repeat(longer - lengths, lengths))
    indices = np.repeat(cu_seqlens[:-1], lengths) + position + before
    input_ids = np.full(cu_seqlens[-1], batch.input_ids[0])  # a row begins with <s>
    input_ids[indices] = batch.input_ids
    return (
        Batch(
            rows=batch.rows,
            input_ids=input_ids,
            cu_seqlens=cu_seqlens.astype(np.int32),
            max_seqlen=int(longer.max()),
        ),
        indices,
    )
