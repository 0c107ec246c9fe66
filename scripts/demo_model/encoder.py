"""The checkpoint seen through ``transformers``: its tokenizer and its last hidden states, float32."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, XLMRobertaModel
from transformers.utils import logging

MAX_BATCH_TOKENS = 4096
PAD_TOKEN_ID = 1


def load_model(folder: Path) -> XLMRobertaModel:
    """Load the encoder from ``folder`` as float32."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: XLMRobertaModel = XLMRobertaModel.from_pretrained(folder, dtype=torch.float32)
    return model  # from_pretrained leaves it in evaluation mode


def tokenize(folder: Path, texts: Sequence[str], *, max_length: int = 512) -> list[list[int]]:
    """Return each text's token ids, specials included, cut to ``max_length``."""
    encoded = AutoTokenizer.from_pretrained(folder)(list(texts), truncation=True, max_length=max_length)
    return [list(ids) for ids in encoded["input_ids"]]


@torch.inference_mode()
def hidden_states(model: XLMRobertaModel, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return each row's last hidden states, [tokens, H], in the order of the rows."""
    states: dict[int, torch.Tensor] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    while order:
        longest = len(rows[order[-1]])
        order, batch = order[: -max(1, MAX_BATCH_TOKENS // longest)], order[-max(1, MAX_BATCH_TOKENS // longest) :]
        input_ids = torch.full((len(batch), longest), PAD_TOKEN_ID)
        attention_mask = torch.zeros_like(input_ids)
        for place, index in enumerate(batch):
            input_ids[place, : len(rows[index])] = torch.tensor(rows[index])
            attention_mask[place, : len(rows[index])] = 1
        output = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        states |= {index: output[place, : len(rows[index])] for place, index in enumerate(batch)}
    return [states[index] for index in range(len(rows))]
