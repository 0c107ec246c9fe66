"""The encoder exported to ONNX, in onnxruntime (dynamic int8) and OpenVINO: padded batches by length, dense only.

They are given what a user with some care would give them: rows sorted by length, batches within a budget of padded
tokens, all cores. Export and quantisation are done once for a checkpoint and kept in the cache folder.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.tokenizer import load_tokenizer
from speed_bench.counting import group_padded
from speed_bench.records import Group, Made, Runner

Encode = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
EXACT, QUANTISED = "float32.onnx", "int8.onnx"


class StatesOnly(torch.nn.Module):
    """An encoder that takes ids and mask [B, L] and gives its last hidden state [B, L, C]."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the last hidden state."""
        states: torch.Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states


def find_export(model: Path, cache: Path) -> Path:
    """Return where a checkpoint's export lies, by its path, sizes and times."""
    weights = [path.stat() for path in read_checkpoint(model).weight_files]
    marks = "-".join(f"{stat.st_size:x}-{int(stat.st_mtime):x}" for stat in weights)
    return cache / f"{model.resolve().name}-{marks}"


def export(model: Path, cache: Path) -> Path:
    """Export a checkpoint to ONNX and quantise its matmuls to int8, unless that has been done."""
    folder = find_export(model, cache)
    if folder.exists():
        return folder
    making = folder.with_name(f".{folder.name}.{os.getpid()}")
    making.mkdir(parents=True)
    try:
        _export_exact(model, making / EXACT)
        _quantise(making / EXACT, making / QUANTISED)
        shutil.move(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


def _export_exact(model: Path, path: Path) -> None:
    from transformers import XLMRobertaModel  # noqa: PLC0415

    encoder = XLMRobertaModel.from_pretrained(model, add_pooling_layer=False, dtype=torch.float32)
    encoder.train(mode=False)
    input_ids = torch.randint(5, 1000, (3, 17))
    dims = {0: torch.export.Dim("rows", min=1, max=4096), 1: torch.export.Dim("length", min=2, max=8192)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names of axes
        torch.onnx.export(
            StatesOnly(encoder),
            (input_ids, torch.ones_like(input_ids)),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["states"],
            dynamic_shapes=(dims, dims),
            dynamo=True,
            external_data=True,
            verbose=False,
        )


def _quantise(path: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415

    quantize_dynamic(
        path,
        out,
        per_channel=True,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
        use_external_data_format=True,
    )


def load_onnxruntime(folder: Path, dtype: str, budget: str, *, cache: Path) -> Runner:
    """Return a run in onnxruntime."""
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    name = QUANTISED if dtype == "int8" else EXACT
    path = str(find_export(folder, cache) / name)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def encode(input_ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        states: NDArray[np.float32] = session.run(None, {"input_ids": input_ids, "attention_mask": mask})[0]
        return states

    return run_padded(folder, encode, int(budget))


def load_openvino(folder: Path, dtype: str, budget: str, *, cache: Path) -> Runner:
    """Return a run in OpenVINO."""
    import openvino  # noqa: PLC0415

    hints: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(find_export(folder, cache) / EXACT, "CPU", hints)
    request = compiled.create_infer_request()

    def encode(input_ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        request.infer({0: input_ids, 1: mask}, share_inputs=True)
        states: NDArray[np.float32] = request.get_output_tensor(0).data
        return states

    return run_padded(folder, encode, int(budget))


def run_padded(folder: Path, encode: Encode, budget: int) -> Runner:
    """Return a run that tokenises, pads and pools by the checkpoint's first token or mean."""
    checkpoint = read_checkpoint(folder)
    backend, pad = load_tokenizer(checkpoint).backend, checkpoint.pad_token_id

    def run(group: Group) -> Made:
        ids = [encoding.ids[: checkpoint.default_max_length] for encoding in backend.encode_batch_fast(group.texts)]
        dense: list[tuple[int, NDArray[np.float32]]] = []
        positions = 0
        for places in group_padded([len(row) for row in ids], budget=budget):
            rows = [ids[place] for place in places]
            width = len(rows[0])
            input_ids = np.array([row + [pad] * (width - len(row)) for row in rows], np.int64)
            mask = (np.arange(width) < np.array([[len(row)] for row in rows])).astype(np.int64)
            pooled = pool(encode(input_ids, mask), mask, checkpoint.pooling)
            dense.extend(zip(places, pooled, strict=True))
            positions += input_ids.size
        np.stack([vector for _, vector in sorted(dense, key=lambda pair: pair[0])])
        return Made(positions=positions)

    return run


def pool(states: NDArray[np.float32], mask: NDArray[np.int64], pooling: str) -> NDArray[np.float32]:
    """Return dense vectors [B, C] of length 1."""
    if pooling == "cls":
        vectors = states[:, 0].copy()
    else:
        vectors = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    made: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return made
