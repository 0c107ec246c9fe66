"""`m3 doctor`: what this machine and this checkpoint can do together. Everything it says is read or measured here."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import orjson

from m3cli.config import Dtype, EncodeRequest
from m3cli.encoder import device as machine
from m3cli.encoder.checkpoint import HEAD_FILES, Checkpoint
from m3cli.encoder.measure import (
    count_flops,
    expect_tokens_per_second,
    list_devices,
    measure_matmul,
    name_attention,
)
from m3cli.errors import ModelError
from m3cli.jobs.model_card import is_bge_m3, recompute_card
from m3cli.jobs.run import open_checkpoint
from m3cli.store.disk import measure_write_rate

_MEASURED = ("float32", "bfloat16", "float16")
_PASSAGE_TOKENS = 256
"length that tokens/s are told for"


def examine(*, model: str | None = None, revision: str | None = None, device: str | None = None) -> dict[str, Any]:
    """Examine machine and checkpoint.

    Returns:
        plain JSON values: machine, checkpoint and recommendation (None if no checkpoint is found), card, problem.

    Raises:
        ModelError: the model that was asked for is not there or cannot be loaded.
        UsageError: a device is asked for that is not there.
    """
    chosen = machine.resolve_device(device)
    report: dict[str, Any] = {"machine": examine_machine(chosen), "checkpoint": None, "recommendation": None}
    report |= {"card": [], "problem": ""}
    asked = model or os.environ.get("M3_MODEL") or None
    try:
        # Looking for the default model is no reason to download 2 GB.
        checkpoint = open_checkpoint(
            EncodeRequest(inputs=(), model=model, revision=revision), download=asked is not None
        )
    except ModelError as error:
        if asked:
            raise
        report["problem"] = str(error)
        return report
    report["checkpoint"] = examine_checkpoint(checkpoint)
    report["recommendation"] = recommend(checkpoint, report["machine"], device=chosen)
    report["card"] = [asdict(figure) for figure in recompute_card(checkpoint, device=chosen)]
    return report


def examine_machine(device: str) -> dict[str, Any]:
    """Describe devices, measure the matmul rate of each dtype on the chosen one and the disk of this folder."""
    dtypes = [dtype for dtype in get_args(Dtype) if dtype in _MEASURED]
    return {
        "devices": list_devices(),
        "device": device,
        "attention": name_attention(device, machine.auto_dtype(device)),
        "matmul_flops_per_second": {dtype: measure_matmul(device, dtype) for dtype in dtypes},
        "disk_folder": str(Path.cwd()),
        "disk_bytes_per_second": measure_write_rate(Path.cwd()),
    }


def examine_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint by its small files."""
    folder = checkpoint.folder
    files = [*checkpoint.weight_files, *(folder / name for name in HEAD_FILES.values() if (folder / name).exists())]
    parent = folder.absolute().parent
    return {
        "name": checkpoint.name,
        "folder": str(folder),
        "revision": folder.name if parent.name == "snapshots" else None,
        "is_bge_m3": is_bge_m3(checkpoint),
        "layers": checkpoint.num_layers,
        "width": checkpoint.hidden_size,
        "intermediate_size": _intermediate_size(checkpoint),
        "attention_heads": checkpoint.num_heads,
        "vocabulary": checkpoint.vocab_size,
        "outputs": list(checkpoint.outputs),
        "pooling": checkpoint.pooling,
        "max_length": checkpoint.default_max_length,
        "positions": checkpoint.num_positions,
        "files": {path.name: _judge_kind(path) for path in files},
    }


def _judge_kind(path: Path) -> str:
    return "safetensors" if path.suffix == ".safetensors" else "pickled: read with weights_only, code in it is refused"


def _intermediate_size(checkpoint: Checkpoint) -> int:
    config = orjson.loads((checkpoint.folder / "config.json").read_bytes())
    return int(config.get("intermediate_size", 4 * checkpoint.hidden_size))


def recommend(checkpoint: Checkpoint, found: dict[str, Any], *, device: str) -> dict[str, Any]:
    """Recommend dtype and batch, and say what speed the matmul rate promises."""
    dtype = machine.auto_dtype(device)
    length = min(_PASSAGE_TOKENS, checkpoint.max_length)
    flops = count_flops(checkpoint, intermediate_size=_intermediate_size(checkpoint), length=length)
    expected = expect_tokens_per_second(found["matmul_flops_per_second"][dtype], flops)
    return {
        "device": device,
        "dtype": dtype,
        "max_batch_tokens": machine.auto_batch_tokens(device),
        "tokens_per_second": round(expected),
        "passage_tokens": length,
        "flops_per_token": flops,
    }
