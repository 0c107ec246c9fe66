"""A cross-encoder over the packed forward pass: one logit for each pair of query and passage.

BAAI/bge-reranker-v2-m3 is an XLM-RoBERTa with the head of `XLMRobertaForSequenceClassification` and one label:
out_proj(tanh(dense(state of <s>))). A pair is `<s> query </s></s> passage </s>`, as XLM-R's tokenizer joins two texts.
Queries are cut at three quarters of the length, passages at the rest, as in FlagEmbedding's FlagReranker. The head is
computed in float32.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from m3cli.config import Dtype
from m3cli.encoder.checkpoint import DOWNLOAD_AGAIN, Checkpoint
from m3cli.encoder.device import AHEAD, Fetched, fetch, lacks_memory, open_stream
from m3cli.encoder.encode import split_batch
from m3cli.encoder.model import Model, load_model, read_pickled, run_model
from m3cli.errors import ModelError, first_line
from m3cli.records import Batch

PAIR_SPECIALS = 4
"<s> and the three </s> of a pair"
_HEAD = "classifier."
_PARTS = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reranker:
    """A checkpoint with its classification head on a device. C hidden width."""

    model: Model
    dense: tuple[torch.Tensor, torch.Tensor]
    "weight [C, C] and bias [C], float32"
    out_proj: tuple[torch.Tensor, torch.Tensor]
    "weight [1, C] and bias [1], float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """Logits of a batch's pairs."""

    rows: NDArray[np.int64]
    "[B], as in the batch"
    values: NDArray[np.float32]
    "[B]; NaN or infinite if the forward pass overflowed"


_Launched = tuple[NDArray[np.int64], Fetched]
"rows of a batch, and its logits on their way to the host"


def load_reranker(checkpoint: Checkpoint, *, device: str, dtype: Dtype) -> Reranker:
    """Read a checkpoint's weights and head onto a device.

    Raises:
        ModelError: there is no head, it has more than one label, or a weight has a wrong shape.
    """
    head = _read_head(checkpoint)
    width = checkpoint.hidden_size
    shapes = dict(zip(_PARTS, ((width, width), (width,), (1, width), (1,)), strict=True))
    for name, shape in shapes.items():
        if name not in head:
            raise ModelError(
                f"{checkpoint.name} has no {_HEAD}{name}: it scores no pairs; "
                "give a cross-encoder such as BAAI/bge-reranker-v2-m3"
            )
        if tuple(head[name].shape) != shape:
            raise ModelError(
                f"{checkpoint.name}: {_HEAD}{name} is {list(head[name].shape)}, not {list(shape)}; "
                "give a cross-encoder with one label, such as BAAI/bge-reranker-v2-m3"
            )
    put = {name: tensor.to(device=device, dtype=torch.float32) for name, tensor in head.items()}
    return Reranker(
        model=load_model(checkpoint, device=device, dtype=dtype),
        dense=(put["dense.weight"], put["dense.bias"]),
        out_proj=(put["out_proj.weight"], put["out_proj.bias"]),
    )


def join_pair(
    query: NDArray[np.int32], passage: NDArray[np.int32], *, max_length: int
) -> tuple[NDArray[np.int32], bool]:
    """Join the token ids of two texts, each with its `<s>` and `</s>`, into one pair of at most `max_length` tokens.

    Returns:
        the pair's token ids, and whether the passage lost tokens.
    """
    limit = max_length - (len(query) - 2) - PAIR_SPECIALS
    content = passage[1:-1]
    end = passage[-1:]
    return np.concatenate([query, end, content[:limit], end]), len(content) > limit


def score_batches(reranker: Reranker, batches: Iterable[Batch]) -> Iterator[Logits]:
    """Yield the logits of each batch's pairs in order, of a batch in parts if memory does not hold it.

    On CUDA the next batches are launched before a batch is collected, so that the device is busy meanwhile.

    Raises:
        ModelError: memory does not hold a single pair.
    """
    device = reranker.model.device
    stream, ahead = open_stream(device), AHEAD[device.type]
    waiting = deque[_Launched]()
    for batch in batches:
        parts = [batch]
        while parts:
            part = parts.pop(0)
            launched = _launch(reranker, part, stream)
            if launched is None and waiting:
                yield from _collect(waiting)  # launched batches hold memory too
                launched = _launch(reranker, part, stream)
            if launched is not None:
                waiting.append(launched)
                yield from _collect(waiting, but=ahead)
                continue
            torch.cuda.empty_cache()
            if len(part.rows) == 1:
                raise ModelError(
                    f"one pair of {part.max_seqlen:,} tokens does not fit the memory of {device}; "
                    "lower --max-length, or use --device cpu"
                )
            _log.warning("out of memory with a batch of %d tokens; going on with halves of it", len(part.input_ids))
            parts[:0] = split_batch(part)
    yield from _collect(waiting)


@torch.inference_mode()
def _launch(reranker: Reranker, batch: Batch, stream: torch.cuda.Stream | None) -> _Launched | None:
    """Queue a batch's work on the device; None: memory ran out.

    The caller continues outside the error's handler, whose traceback keeps the failed batch's tensors alive.
    """
    try:
        states, layout = run_model(reranker.model, batch)
        firsts = states.index_select(0, layout.borders[:-1]).float()
        inner = torch.tanh(torch.nn.functional.linear(firsts, *reranker.dense))
        logits = torch.nn.functional.linear(inner, *reranker.out_proj)[:, 0]
        return batch.rows, fetch({"logits": logits}, stream)
    except (RuntimeError, MemoryError) as error:
        if lacks_memory(error):
            return None
        raise


def _collect(waiting: deque[_Launched], *, but: int = 0) -> Iterator[Logits]:
    """Yield the logits of launched batches, first to last, except the last `but` of them."""
    while len(waiting) > but:
        rows, fetched = waiting.popleft()
        yield Logits(rows=rows, values=fetched.wait()["logits"])


def _read_head(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the tensors of the head from the weight files."""
    found: dict[str, torch.Tensor] = {}
    for path in checkpoint.weight_files:
        found |= _read_mapped(path) if path.suffix == ".safetensors" else read_pickled(path)
    return {name.removeprefix(_HEAD): tensor for name, tensor in found.items() if name.startswith(_HEAD)}


def _read_mapped(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(_HEAD)}  # noqa: SIM118  no dict
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}; {DOWNLOAD_AGAIN}") from error
