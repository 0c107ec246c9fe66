"""Single texts to packed batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.texts import pack_texts, tokenise_texts
from m3cli.encoder.tokenizer import load_tokenizer

TEXTS = ["one two three four five six seven", "", "a", "trailing  ", "狐狸 跳过"]


def test_texts_are_cut_as_transformers_cuts_them(tiny_m3: Path) -> None:
    tokenizer = load_tokenizer(read_checkpoint(tiny_m3))
    whole = tokenise_texts(TEXTS, tokenizer, max_length=512)
    assert whole.truncated == 0
    cut = tokenise_texts(TEXTS, tokenizer, max_length=4)
    assert cut.truncated == sum(len(ids) > 4 for ids in whole.input_ids)
    for long, short in zip(whole.input_ids, cut.input_ids, strict=True):
        expected = long if len(long) <= 4 else np.append(long[:3], tokenizer.eos_id)
        assert short.tolist() == expected.tolist()


def test_batches_hold_each_text_once_longest_first(tiny_m3: Path) -> None:
    tokenised = tokenise_texts(TEXTS, load_tokenizer(read_checkpoint(tiny_m3)), max_length=512)
    batches = list(pack_texts(tokenised, max_batch_tokens=8))
    rows = np.concatenate([batch.rows for batch in batches])
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 4]
    assert (np.diff(tokenised.num_tokens[rows]) <= 0).all()
    for batch in batches:
        assert len(batch.rows) == 1 or len(batch.input_ids) <= 8
        for place, row in enumerate(batch.rows.tolist()):
            first, last = batch.cu_seqlens[place : place + 2]
            assert batch.input_ids[first:last].tolist() == tokenised.input_ids[row].tolist()
