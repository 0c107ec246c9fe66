"""`m3 convert`: a checkpoint in another form, written only after it gave m3's own numbers."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from m3cli.encoder.checkpoint import Checkpoint
from m3cli.encoder.encode import TextEncoder
from m3cli.encoder.onnx import MODEL_NAME, OUTPUT_NAMES, TOKENIZER_NAME, OnnxSession, export_onnx
from m3cli.errors import ModelError, OutputError, UsageError
from m3cli.jobs.encode.resolve import open_checkpoint
from m3cli.jobs.paths import check_paths
from m3cli.progress import Progress
from m3cli.records import Embeddings
from m3cli.requests import ConvertRequest
from m3cli.store.commit import output_errors, publish_file

TOLERANCE = 1e-4
BATCH = 8
"texts of a batch of the check, of different lengths"
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_WORDS = (
    *(
        "What",
        "is",
        "BGE",
        "M3?",
        "人工智能正在改变世界",
        "الذكاء",
        "الاصطناعي",
        "Переводчик",
        "の",
        "東京",
        "naïve",
        "café",
    ),
    *("3.14", "<unk>", "e-mail", "한국어", "🙂"),
)
CHECK_TEXTS = tuple(" ".join((*_WORDS[first % len(_WORDS) :], *_WORDS * (first % 7))) for first in range(32))


def convert_checkpoint(request: ConvertRequest, *, progress: Progress) -> None:
    """Convert a checkpoint to ONNX.

    Raises:
        UsageError: another target than onnx, or its packages are not installed.
        OutputError: `out` has files, or cannot be written.
        ModelError: the checkpoint cannot be read, or onnxruntime gives other numbers.
    """
    if request.to != "onnx":
        raise UsageError(f"--to {request.to}: expected onnx")
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise UsageError(f"--to onnx needs the package {missing[0]}: pip install 'm3cli[onnx]'")
    check_paths({"--out": request.out}, {"MODEL": []}, model=request.model)
    out = Path(request.out).absolute()
    with output_errors(out):
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise OutputError(f"--out {request.out} exists and is not an empty folder: choose another name")
        staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        checkpoint = open_checkpoint(request.model, request.revision)
        staging.mkdir()
        try:
            progress.say(f"{checkpoint.name}: exporting {', '.join(checkpoint.outputs)}")
            export_onnx(checkpoint, staging)
            encoder = TextEncoder(checkpoint, outputs=checkpoint.outputs, device="cpu", dtype="float32")
            (staging / TOKENIZER_NAME).write_text(str(encoder.tokenizer.backend.to_str()), encoding="utf-8")
            (staging / "README.md").write_text(describe_export(checkpoint), encoding="utf-8")
            worst = compare_numbers(encoder, staging, CHECK_TEXTS)
            publish_file(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    progress.say(f"{request.out}: onnxruntime gives m3's numbers on {len(CHECK_TEXTS)} texts, within {worst:.1e}")


def compare_numbers(encoder: TextEncoder, folder: Path, texts: Sequence[str]) -> float:
    """Return the largest difference between the outputs of onnxruntime and of m3.

    Raises:
        ModelError: it is more than TOLERANCE.
    """
    expected, _ = encoder.encode_texts(texts, max_length=encoder.checkpoint.max_length)
    session = OnnxSession(folder, encoder.checkpoint)
    worst = {OUTPUT_NAMES[output]: 0.0 for output in encoder.outputs}
    for first in range(0, len(texts), BATCH):
        input_ids, made = session.run(texts[first : first + BATCH])
        for index in range(len(input_ids)):
            found = _compare_row(made, input_ids[index], index, expected, first + index)
            worst = {name: max(worst[name], found[name]) for name in worst}
    for name, difference in worst.items():
        if not difference <= TOLERANCE:
            raise ModelError(
                f"onnxruntime's {name} differ from m3's by {difference:.1e}, more than {TOLERANCE:.0e}: nothing is "
                "written; use another version of onnxruntime or onnxscript"
            )
    return max(worst.values())


def _compare_row(made: dict[str, Any], input_ids: Any, index: int, expected: Embeddings, row: int) -> dict[str, float]:
    """Return the largest difference of each output of a text."""
    found: dict[str, float] = {}
    if expected.dense_vecs is not None:
        found["dense_vecs"] = _largest(made["dense_vecs"][index] - expected.dense_vecs[row])
    if (lexical := expected.lexical_weights) is not None:
        span = slice(lexical.indptr[row], lexical.indptr[row + 1])
        weights = dict(zip(lexical.indices[span].tolist(), lexical.values[span].tolist(), strict=True))
        sparse = to_sparse(input_ids, made["sparse_vecs"][index])
        differences = [weights.get(token, 0.0) - sparse.get(token, 0.0) for token in weights.keys() | sparse.keys()]
        found["sparse_vecs"] = _largest(np.array(differences))
    if (colbert := expected.colbert_vecs) is not None:
        vectors = colbert.vectors[colbert.indptr[row] : colbert.indptr[row + 1]]
        found["colbert_vecs"] = _largest(made["colbert_vecs"][index][: len(vectors)] - vectors)
    return found


def _largest(differences: Any) -> float:
    return float(np.abs(differences).max(initial=0.0))


def to_sparse(input_ids: Any, token_weights: Any, special_ids: Any = (0, 1, 2, 3)) -> dict[int, float]:
    """Return the sparse vector of a text [L] from its weights [L, 1]: the largest weight of each token id."""
    sparse: dict[int, float] = {}
    for token, weight in zip(input_ids.tolist(), token_weights.reshape(-1).tolist(), strict=True):
        if weight > 0 and token not in special_ids:
            sparse[token] = max(weight, sparse.get(token, 0.0))
    return sparse


def describe_export(checkpoint: Checkpoint) -> str:
    """Return the README of an export."""
    longest = checkpoint.default_max_length
    shapes = " ".join(f"--{size}Shapes=input_ids:{axes},attention_mask:{axes}" for size, axes in _axes(longest))
    code = inspect.getsource(to_sparse).replace(": Any = ", "=").replace(": Any", "")
    names = ", ".join(f"`{OUTPUT_NAMES[output]}`" for output in checkpoint.outputs)
    return _README.format(
        name=checkpoint.name,
        names=names,
        model=MODEL_NAME,
        tokenizer=TOKENIZER_NAME,
        longest=longest,
        code=code,
        shapes=shapes,
    )


def _axes(longest: int) -> tuple[tuple[str, str], ...]:
    return ("min", "1x2"), ("opt", f"8x{min(512, longest)}"), ("max", f"8x{longest}")


_README = """# {name} in ONNX, float32

Inputs `input_ids` and `attention_mask` [B, L] int64. Outputs {names}: dense vectors [B, C], a weight
for each token [B, L, 1], and ColBERT vectors [B, L - 1, C] of all tokens but `<s>`, 0 at padding. onnxruntime gave the
numbers of m3 when this folder was written. For queries, next to a corpus that `m3 encode` encoded with the same
checkpoint.

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("{tokenizer}")
tokenizer.enable_truncation({longest})
tokenizer.enable_padding(pad_id=1)
session = onnxruntime.InferenceSession("{model}")

encoded = tokenizer.encode_batch(["a query"])
input_ids = np.array([each.ids for each in encoded], np.int64)
attention_mask = np.array([each.attention_mask for each in encoded], np.int64)
outputs = session.run(None, {{"input_ids": input_ids, "attention_mask": attention_mask}})
```

A sparse vector of the weights of a text's tokens; `to_sparse(input_ids[0], outputs[1][0])`:

```python
{code}```

TensorRT (this line was not run):

    trtexec --onnx={model} --saveEngine=model.plan --fp16 {shapes}
"""
