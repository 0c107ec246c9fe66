"""FlagEmbedding and sentence-transformers, by their own `encode`; a hook counts what their models are given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from m3cli.encoder.checkpoint import read_checkpoint
from speed_bench.records import Group, Made, Runner


def load_flagembedding(folder: Path, batch: str, *, device: str) -> Runner:
    """Return a run of `encode` for all three outputs: float16 on a GPU, float32 on a CPU, where it has nothing else."""
    from FlagEmbedding import BGEM3FlagModel  # noqa: PLC0415

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = BGEM3FlagModel(str(folder), use_fp16=device != "cpu", devices=device)
    max_length = read_checkpoint(folder).default_max_length

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

    # sentence-transformers calls `forward` of the model itself, which passes hooks by.
    encoder.embeddings.register_forward_pre_hook(count, with_kwargs=True)

    def run(group: Group) -> Made:
        counted[0] = 0
        encode(group)
        return Made(positions=counted[0])

    return run
