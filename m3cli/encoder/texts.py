"""Packed batches of single texts, which are truncated as in FlagEmbedding, never chunked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3cli.encoder.encode import batch_rows
from m3cli.encoder.tokenizer import Tokenizer
from m3cli.records import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedTexts:
    """Some texts as tokens."""

    input_ids: tuple[NDArray[np.int32], ...]
    "of each text, with <s> and </s>"
    truncated: int
    "texts that lost tokens"

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """[R] tokens of each text."""
        return np.array([len(ids) for ids in self.input_ids], np.int64)


def tokenise_texts(texts: Sequence[str], tokenizer: Tokenizer, *, max_length: int) -> TokenisedTexts:
    """Tokenise texts and truncate those longer than `max_length` tokens, whose last token stays `</s>`."""
    encoded = tokenizer.encode(list(texts))
    cut = [np.append(ids[: max_length - 1], ids[-1]) if len(ids) > max_length else ids for ids in encoded]
    return TokenisedTexts(input_ids=tuple(cut), truncated=sum(len(ids) > max_length for ids in encoded))


def pack_texts(texts: TokenisedTexts, *, max_batch_tokens: int) -> Iterator[Batch]:
    """Yield texts as packed batches, longest first; a batch's rows are indices of `texts`."""
    num_tokens = texts.num_tokens
    for rows in batch_rows(num_tokens, max_batch_tokens=max_batch_tokens):
        lengths = num_tokens[rows]
        yield Batch(
            rows=rows,
            input_ids=np.concatenate([texts.input_ids[row] for row in rows]).astype(np.int64),
            cu_seqlens=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
            max_seqlen=int(lengths.max()),
        )
