"""The frozen encoder's last hidden states of many texts, by m3's own encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from m3cli.encoder.batcher import batch_rows
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.model import load_model, run_model
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.records import Batch

MAX_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStates:
    """What the encoder makes of one text of n tokens."""

    token_ids: list[int]
    "[n], with <s> and </s>"
    states: torch.Tensor
    "[n, H] float32"
    is_word: list[bool]
    "[n], whether the token has a letter or a digit"


def compute_states(checkpoint_folder: Path, texts: Sequence[str]) -> list[TextStates]:
    """Run the texts through the encoder on the CPU and return their states in order.

    In bfloat16, which is what `m3 encode` takes on a CPU that has it: a direction of 384 numbers does not feel it.
    """
    checkpoint = read_checkpoint(checkpoint_folder)
    model = load_model(checkpoint, device="cpu", dtype="bfloat16")
    tokenizer = load_tokenizer(checkpoint)
    rows = [ids[: checkpoint.max_length].tolist() for ids in tokenizer.encode(list(texts))]
    found: dict[int, torch.Tensor] = {}
    for batch in batch_rows(np.array([len(row) for row in rows]), max_batch_tokens=MAX_BATCH_TOKENS):
        lengths = [len(rows[index]) for index in batch]
        packed = Batch(
            rows=batch,
            input_ids=np.array([token_id for index in batch for token_id in rows[index]], np.int64),
            cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
            max_seqlen=max(lengths),
        )
        with torch.inference_mode():
            hidden, _ = run_model(model, packed)
        found |= dict(zip(batch.tolist(), torch.split(hidden[: sum(lengths)].float(), lengths), strict=True))
    is_word = {token_id: any(map(str.isalnum, tokenizer.token(token_id))) for row in rows for token_id in row}
    return [
        TextStates(token_ids=row, states=found[index].clone(), is_word=[is_word[token_id] for token_id in row])
        for index, row in enumerate(rows)
    ]
