"""A loaded checkpoint, and single texts encoded with it in float32: queries, passages of pairs; no chunking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3cli.config import Dtype
from m3cli.encoder import device as machine
from m3cli.encoder.checkpoint import Checkpoint
from m3cli.encoder.embeddings import concat_embeddings, select_rows
from m3cli.encoder.encode import BatchEncoder, FailedRow, ParallelMap, batch_rows
from m3cli.encoder.heads import OutputOptions
from m3cli.encoder.model import load_model, load_retries
from m3cli.encoder.tokenizer import Tokenizer, load_tokenizer
from m3cli.errors import ModelError, UsageError
from m3cli.records import Batch, Embeddings, Output

DEFAULT_LENGTH = 512
"tokens of a text, as in FlagEmbedding"


def resolve_length(value: int | None, checkpoint: Checkpoint, *, option: str) -> int:
    """Return `value`, or the default length; raise UsageError if it is more than the checkpoint's maximum."""
    if value is not None and value > checkpoint.max_length:
        raise UsageError(f"{option} {value}: {checkpoint.name} holds at most {checkpoint.max_length} tokens")
    return value or min(DEFAULT_LENGTH, checkpoint.max_length)


class TextEncoder:
    """A loaded checkpoint that encodes texts into some of its outputs, float32 after a forward pass in `dtype`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        outputs: Sequence[Output],
        device: str,
        dtype: Dtype,
        max_batch_tokens: int | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.outputs = tuple(outputs)
        self.device = device
        self.dtype = dtype
        self.max_batch_tokens = max_batch_tokens or machine.auto_batch_tokens(device)
        self.tokenizer = load_tokenizer(checkpoint)
        self.model = load_model(checkpoint, device=device, dtype=dtype)
        self.batch_encoder = self.make_encoder()

    def select(self, outputs: Sequence[Output]) -> TextEncoder:
        """Return an encoder with the same weights for some of the checkpoint's outputs."""
        selected = copy(self)
        selected.outputs = tuple(outputs)
        selected.batch_encoder = selected.make_encoder()
        return selected

    def make_encoder(self, *, num_threads: int = 1, parallel_map: ParallelMap | None = None) -> BatchEncoder:
        """Return an encoder of batches, `num_threads` of them at once."""
        options = OutputOptions(
            outputs=self.outputs,
            special_ids=self.tokenizer.special_ids,
            dense_dtype="float32",
            colbert_dtype="float32",
        )
        return BatchEncoder(
            self.model,
            options,
            retries=load_retries(self.checkpoint, device=self.device, dtype=self.dtype),
            num_threads=num_threads,
            parallel_map=parallel_map,
        )

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer, as in run.json."""
        return self.tokenizer.serialisation_hash

    def format_token(self, token_id: int) -> str:
        """Return a token as the model card prints it: decoded alone, without the mark for the start of a word.

        The mark alone is a token too and is returned unchanged.
        """
        decoded = self.tokenizer.backend.decode([token_id], skip_special_tokens=False)
        return str(decoded).strip() or self.tokenizer.token(token_id)

    def tokenise(self, texts: Sequence[str], *, max_length: int) -> TokenisedTexts:
        """Tokenise texts and truncate them to `max_length` tokens."""
        return tokenise_texts(texts, self.tokenizer, max_length=max_length)

    def encode_tokens(self, texts: TokenisedTexts) -> Iterator[Embeddings | FailedRow]:
        """Yield the embeddings of texts in packed batches, longest texts first; rows are indices of the texts."""
        return self.batch_encoder.encode_all(pack_texts(texts, max_batch_tokens=self.max_batch_tokens))

    def try_texts(
        self, texts: Sequence[str], *, max_length: int
    ) -> tuple[Embeddings | None, list[FailedRow], TokenisedTexts]:
        """Return the embeddings of texts in their order, the texts that cannot be encoded, and all tokens.

        The rows of the embeddings are indices of the texts; the embeddings are None if no text can be encoded.
        """
        tokenised = self.tokenise(texts, max_length=max_length)
        results = list(self.encode_tokens(tokenised))
        failed = [result for result in results if isinstance(result, FailedRow)]
        parts = [result for result in results if isinstance(result, Embeddings)]
        if not parts:
            return None, failed, tokenised
        joined = concat_embeddings(parts)
        order = np.argsort(joined.rows)
        return select_rows(joined, order, rows=joined.rows[order]), failed, tokenised

    def encode_texts(self, texts: Sequence[str], *, max_length: int) -> tuple[Embeddings, TokenisedTexts]:
        """Return the embeddings of texts in their order, and their tokens; raise ModelError if one fails."""
        embeddings, failed, tokenised = self.try_texts(texts, max_length=max_length)
        if failed or embeddings is None:
            raise ModelError(f"a text cannot be encoded: {failed[0].reason} ({failed[0].detail})")
        return embeddings, tokenised


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
