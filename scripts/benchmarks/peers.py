"""The peers: FlagEmbedding and sentence-transformers by their own `encode`, and the encoder exported to ONNX.

A hook counts the positions that the first two give to their models. The exports, dense vectors only, run in onnxruntime
(dynamic int8) and OpenVINO (int8 by NNCF). They get what a careful user gives them: rows sorted by length, batches
within a budget of padded tokens, all cores. Export and quantisation are done once per checkpoint and kept in the cache
folder.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from benchmarks.contest import Group, Made, Runner

Encode = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
EXACT, QUANTISED, STATIC = "float32.onnx", "int8.onnx", "int8.xml"
CALIBRATION_TEXTS = 64


def read_max_length(model: Path) -> int:
    """Return the longest input in tokens: 8,192, or the positions without XLM-R's two reserved ones."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return min(8192, int(config["max_position_embeddings"]) - 2)


def load_flagembedding(folder: Path, batch: str, *, device: str) -> Runner:
    """Return a run of `encode` for all three outputs: float16 on a GPU, float32 on a CPU, its only choice there."""
    from FlagEmbedding import BGEM3FlagModel  # noqa: PLC0415

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = BGEM3FlagModel(str(folder), use_fp16=device != "cpu", devices=device)
    max_length = read_max_length(folder)

    def encode(group: Group) -> None:
        model.encode(
            group.texts,
            batch_size=group.batch or int(batch),
            max_length=max_length,
            return_dense=True,
            return_sparse=True,
            return_colbert_vecs=True,
        )

    return count_positions(encode, model.model.model)


def load_sentence_transformers(folder: Path, dtype: str, batch: str, *, device: str) -> Runner:
    """Return a run of `encode`, dense vectors only."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415

    model = SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": getattr(torch, dtype)})

    def encode(group: Group) -> None:
        size = group.batch or int(batch)
        model.encode(group.texts, batch_size=size, convert_to_numpy=False, show_progress_bar=False)

    return count_positions(encode, model[0].auto_model)


def count_positions(encode: Callable[[Group], None], encoder: Any) -> Runner:
    """Return a run that counts the positions, padding included, that an encoder is called with."""
    counted = [0]

    def count(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        counted[0] += (named["input_ids"] if "input_ids" in named else arguments[0]).numel()

    # sentence-transformers calls the model's `forward` directly, which bypasses hooks of the model.
    encoder.embeddings.register_forward_pre_hook(count, with_kwargs=True)

    def run(group: Group) -> Made:
        counted[0] = 0
        encode(group)
        return Made(positions=counted[0])

    return run


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
    """Return the folder of a checkpoint's export, named by the weights' sizes and times."""
    weights = [path.stat() for path in sorted([*model.glob("*.safetensors"), *model.glob("pytorch_model*.bin")])]
    marks = "-".join(f"{stat.st_size:x}-{int(stat.st_mtime):x}" for stat in weights)
    return cache / f"{model.resolve().name}-{marks}"


def export(model: Path, cache: Path) -> Path:
    """Export a checkpoint to ONNX and quantise its matmuls to int8, unless that is done."""
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

    hints: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if dtype == "int8":
        path = _quantise_static(find_export(folder, cache))
    else:
        path = find_export(folder, cache) / EXACT
        hints["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    compiled = openvino.Core().compile_model(path, "CPU", hints)
    request = compiled.create_infer_request()

    def encode(input_ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        request.infer({0: input_ids, 1: mask}, share_inputs=True)
        states: NDArray[np.float32] = request.get_output_tensor(0).data
        return states

    return run_padded(folder, encode, int(budget))


def _quantise_static(folder: Path) -> Path:
    """Return the model in int8 by NNCF's post-training quantisation, made once.

    It is calibrated on random tokens: its speed is measured, not its quality.
    """
    path = folder / STATIC
    if not path.exists():
        import nncf  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: PLC0415
        import openvino  # noqa: PLC0415

        draw = np.random.default_rng(0)
        samples = [
            draw.integers(5, 1000, (1, length), np.int64) for length in draw.integers(16, 257, CALIBRATION_TEXTS)
        ]
        dataset = nncf.Dataset(samples, lambda ids: {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        model = openvino.Core().read_model(folder / EXACT)
        quantised = nncf.quantize(
            model,
            dataset,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=CALIBRATION_TEXTS,
            ignored_scope=nncf.IgnoredScope(types=["Gather"]),  # OpenVINO 2026.4 cannot load int8 embeddings
        )
        making = folder / f"{os.getpid()}-{STATIC}"
        openvino.save_model(quantised, making, compress_to_fp16=False)
        making.with_suffix(".bin").rename(path.with_suffix(".bin"))
        making.rename(path)
    return path


def run_padded(folder: Path, encode: Encode, budget: int) -> Runner:
    """Return a run that tokenises, pads and pools by the checkpoint's first token or mean."""
    tokenizer, max_length = AutoTokenizer.from_pretrained(folder), read_max_length(folder)
    backend, pad = tokenizer.backend_tokenizer, tokenizer.pad_token_id
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    by_mean = pooling.get("pooling_mode_mean_tokens") or pooling.get("pooling_mode") == "mean"

    def run(group: Group) -> Made:
        ids = [encoding.ids[:max_length] for encoding in backend.encode_batch_fast(group.texts)]
        dense: list[tuple[int, NDArray[np.float32]]] = []
        positions = 0
        for places in group_padded([len(row) for row in ids], budget=budget):
            rows = [ids[place] for place in places]
            width = len(rows[0])
            input_ids = np.array([row + [pad] * (width - len(row)) for row in rows], np.int64)
            mask = (np.arange(width) < np.array([[len(row)] for row in rows])).astype(np.int64)
            pooled = pool(encode(input_ids, mask), mask, by_mean=bool(by_mean))
            dense.extend(zip(places, pooled, strict=True))
            positions += input_ids.size
        np.stack([vector for _, vector in sorted(dense, key=lambda pair: pair[0])])
        return Made(positions=positions)

    return run


def pool(states: NDArray[np.float32], mask: NDArray[np.int64], *, by_mean: bool) -> NDArray[np.float32]:
    """Return dense vectors [B, C] of length 1."""
    vectors = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True) if by_mean else states[:, 0].copy()
    made: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return made


def group_padded(lengths: Sequence[int], *, budget: int) -> list[list[int]]:
    """Group rows, longest first, so that count x longest stays within a budget of padded tokens.

    Returns:
        positions in `lengths`, each exactly once; a row longer than the budget is a group of its own.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    groups: list[list[int]] = []
    for place in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
