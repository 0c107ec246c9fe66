"""`m3 doctor`: measure this machine and examine the checkpoint; no value is assumed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import orjson

from m3cli.config import Dtype
from m3cli.encoder import device as machine
from m3cli.encoder.checkpoint import HEAD_FILES, Checkpoint
from m3cli.encoder.device import count_flops, expect_tokens_per_second, list_devices, measure_matmul, name_attention
from m3cli.encoder.encode import DEFAULT_LENGTH, TextEncoder, TokenisedTexts
from m3cli.errors import ModelError
from m3cli.jobs.encode.resolve import open_checkpoint
from m3cli.records import Embeddings, LexicalWeights, Output
from m3cli.retrieval.scores import combine_scores, modes_of, score_rows, score_sparse
from m3cli.store.commit import remove, sync_file

_MEASURED = ("float32", "bfloat16", "float16")
_PASSAGE_TOKENS = 256
"length for which tokens/s are estimated"


def examine(*, model: str | None = None, revision: str | None = None, device: str | None = None) -> dict[str, Any]:
    """Examine machine and checkpoint.

    Returns:
        JSON values: machine, checkpoint and recommendation (None without a checkpoint), card, problem.

    Raises:
        ModelError: the given model is missing or cannot be loaded.
        UsageError: the given device is missing.
    """
    chosen = machine.resolve_device(device)
    report: dict[str, Any] = {"machine": examine_machine(chosen), "checkpoint": None, "recommendation": None}
    report |= {"card": [], "problem": ""}
    given = model or os.environ.get("M3_MODEL") or None
    try:
        # The default model is not downloaded (2 GB).
        checkpoint = open_checkpoint(model, revision, download=given is not None)
    except ModelError as error:
        if given:
            raise
        report["problem"] = str(error)
        return report
    report["checkpoint"] = examine_checkpoint(checkpoint)
    report["recommendation"] = recommend(checkpoint, report["machine"], device=chosen)
    report["card"] = [asdict(figure) for figure in recompute_card(checkpoint, device=chosen)]
    return report


def examine_machine(device: str) -> dict[str, Any]:
    """Describe devices; measure the matmul rate of each dtype and the write rate of the current folder."""
    dtypes = [dtype for dtype in get_args(Dtype) if dtype in _MEASURED]
    machine.set_threads(machine.auto_threads())  # as m3 encode
    return {
        "devices": list_devices(),
        "device": device,
        "attention": name_attention(device, machine.auto_dtype(device)),
        "matmul_flops_per_second": {dtype: measure_matmul(device, dtype) for dtype in dtypes},
        "disk_folder": str(Path.cwd()),
        "disk_bytes_per_second": measure_write_rate(Path.cwd()),
    }


def examine_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint from its small files."""
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
    """Recommend dtype and batch size, and estimate the speed from the matmul rate."""
    dtype = machine.auto_dtype(device)
    length = min(_PASSAGE_TOKENS, checkpoint.max_length)
    flops = count_flops(checkpoint, intermediate_size=_intermediate_size(checkpoint), length=length)
    expected = expect_tokens_per_second(found["matmul_flops_per_second"][dtype], flops, device=device)
    return {
        "device": device,
        "dtype": dtype,
        "max_batch_tokens": machine.auto_batch_tokens(device),
        "tokens_per_second": round(expected),
        "passage_tokens": length,
        "flops_per_token": flops,
    }


TOLERANCE = 2e-3
WEIGHTS = (0.4, 0.2, 0.4)
SENTENCES_1 = ("What is BGE M3?", "Defination of BM25")
SENTENCES_2 = (
    "BGE M3 is an embedding model supporting dense retrieval, lexical matching and multi-vector interaction.",
    "BM25 is a bag-of-words retrieval function that ranks a set of documents based on the query terms appearing in "
    "each document",
)
INPUT_IDS = (0, 4865, 83, 335, 11679, 276, 363, 32, 2)
"of the first sentence, by XLM-RoBERTa's tokenizer"
LEXICAL_WEIGHTS: tuple[dict[str, float], ...] = (
    {"What": 0.08356, "is": 0.0814, "B": 0.1296, "GE": 0.252, "M": 0.1702, "3": 0.2695, "?": 0.04092},
    {"De": 0.05005, "fin": 0.1368, "ation": 0.04498, "of": 0.0633, "BM": 0.2515, "25": 0.3335},
)
SIMILARITY = (0.6265, 0.3477, 0.3499, 0.678)
LEXICAL_SCORES = (0.1955, 0.0)
"of the first pair, and between the two first sentences"
COLBERT_SCORES = (0.7797, 0.4620)
SCORES: dict[str, tuple[float, ...]] = {
    "dense": (0.6260, 0.3474, 0.3499, 0.6782),
    "sparse": (0.1956, 0.0088, 0.0, 0.1803),
    "colbert": (0.7796, 0.4621, 0.4524, 0.7899),
    "sparse+dense": (0.4825, 0.2345, 0.2332, 0.5122),
    "colbert+sparse+dense": (0.6014, 0.3256, 0.3209, 0.6233),
}

Status = Literal["pass", "fail", "not this model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A published figure and the value computed here."""

    name: str
    published: float | str
    found: float | str | None
    "None: the checkpoint has no head for it"
    status: Status


def is_bge_m3(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has the name and the shape of BAAI/bge-m3."""
    shape = (checkpoint.num_layers, checkpoint.hidden_size, checkpoint.num_heads, checkpoint.vocab_size)
    named = any("bge-m3" in name.lower() for name in (checkpoint.name, *checkpoint.folder.absolute().parts))
    return named and shape == (24, 1024, 16, 250002) and checkpoint.num_positions == 8194


def recompute_card(checkpoint: Checkpoint, *, device: str | None = None) -> list[Figure]:
    """Compute the model card's figures in float32; only BAAI/bge-m3 can pass or fail."""
    encoder = TextEncoder(
        checkpoint, outputs=checkpoint.outputs, device=machine.resolve_device(device), dtype="float32"
    )
    length = min(DEFAULT_LENGTH, checkpoint.max_length)
    embeddings, tokenised = encoder.encode_texts([*SENTENCES_1, *SENTENCES_2], max_length=length)
    judged = is_bge_m3(checkpoint)
    return [
        *_check_tokens(encoder, tokenised),
        *_check_numbers(encoder, embeddings, checkpoint.outputs, judged=judged),
    ]


def _check_tokens(encoder: TextEncoder, tokenised: TokenisedTexts) -> Iterator[Figure]:
    ids = tuple(tokenised.input_ids[0].tolist())
    yield _text_figure(f"token ids of {SENTENCES_1[0]!r}", " ".join(map(str, INPUT_IDS)), " ".join(map(str, ids)))
    for sentence, weights, found in zip(SENTENCES_1, LEXICAL_WEIGHTS, tokenised.input_ids[:2], strict=True):
        strings = [encoder.format_token(token) for token in found[1:-1].tolist()]
        yield _text_figure(f"tokens of {sentence!r}", " ".join(weights), " ".join(strings))


def _check_numbers(
    encoder: TextEncoder, embeddings: Embeddings, outputs: tuple[Output, ...], *, judged: bool
) -> Iterator[Figure]:
    parts = score_rows(embeddings, embeddings, np.array([0, 0, 1, 1]), np.array([2, 3, 2, 3]), outputs=outputs)
    scores = combine_scores(parts, modes_of(outputs), weights=WEIGHTS)
    for number, published in enumerate(SIMILARITY):
        yield _figure(f"dense similarity [{number // 2}][{number % 2}]", published, scores["dense"][number], judged)
    yield from _check_lexical(encoder, embeddings.lexical_weights, judged=judged)
    for number, published in enumerate(COLBERT_SCORES):
        found = scores["colbert"][number] if "colbert" in scores else None
        yield _figure(f"ColBERT score [0][{number}]", published, found, judged)
    for mode, values in SCORES.items():
        for number, published in enumerate(values):
            found = scores[mode][number] if mode in scores else None
            yield _figure(f"{mode} of pair {number + 1}", published, found, judged)


def _check_lexical(encoder: TextEncoder, lexical: LexicalWeights | None, *, judged: bool) -> Iterator[Figure]:
    for row, weights in enumerate(LEXICAL_WEIGHTS):
        found: dict[str, float] = {}
        if lexical is not None:
            span = slice(lexical.indptr[row], lexical.indptr[row + 1])
            strings = [encoder.format_token(token) for token in lexical.indices[span].tolist()]
            found = dict(zip(strings, lexical.values[span].tolist(), strict=True))
        for token, published in weights.items():
            value = None if lexical is None else found.get(token, 0.0)
            yield _figure(f"lexical weight of {token!r} in {SENTENCES_1[row]!r}", published, value, judged)
    matches = [None, None]
    if lexical is not None:
        first, others = np.zeros(2, np.int64), np.array([2, 1])
        matches = score_sparse(lexical, lexical, first, others).tolist()
    for name, published, value in zip(("[0][0]", "between the first two"), LEXICAL_SCORES, matches, strict=True):
        yield _figure(f"lexical score {name}", published, value, judged)


def _figure(name: str, published: float, found: float | None, judged: bool) -> Figure:
    value = None if found is None else round(float(found), 5)
    good = value is not None and abs(value - published) <= TOLERANCE
    status: Status = ("pass" if good else "fail") if judged else "not this model"
    return Figure(name=name, published=published, found=value, status=status)


def _text_figure(name: str, published: str, found: str) -> Figure:
    return Figure(name=name, published=published, found=found, status="pass" if found == published else "fail")


_BYTES = 64 << 20
_PIECE = os.urandom(1 << 20)


def measure_write_rate(folder: Path) -> float | None:
    """Return the bytes/s of writing 64 MiB durably; None: it cannot be written."""
    path = folder / f".m3-doctor-{os.getpid()}.tmp"
    try:
        with path.open("wb") as file:
            began = time.perf_counter()
            for _ in range(_BYTES // len(_PIECE)):
                file.write(_PIECE)
            file.flush()
            sync_file(file.fileno())
            return _BYTES / (time.perf_counter() - began)
    except OSError:
        return None
    finally:
        remove(path)
