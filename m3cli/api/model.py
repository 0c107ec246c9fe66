"""A loaded model that encodes and scores texts in memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from m3cli.api.folder import check_choice, check_least, check_text, check_weights_given, to_csr
from m3cli.concurrency import take_turn
from m3cli.config import ALL_OUTPUTS, MAX_LENGTH_CEILING, Dtype, LongDocs
from m3cli.corpus.pairs import Pair, cut_windows
from m3cli.encoder import device as machine
from m3cli.encoder.encode import DEFAULT_LENGTH, TextEncoder
from m3cli.errors import ModelError, UsageError
from m3cli.jobs.encode.resolve import check_outputs, open_checkpoint
from m3cli.jobs.score.command import finish_scores
from m3cli.jobs.score.from_texts import TextScorer
from m3cli.jobs.texts import encode_texts
from m3cli.progress import Progress
from m3cli.records import Chunks, Embeddings, Output
from m3cli.requests import ScoreRequest
from m3cli.retrieval.scores import check_weights, modes_of, parts_of

BLOCK_BYTES = {"cpu": 128 << 10, "cuda": 1 << 20}
"of text from an iterator that are encoded together; on a CPU their ColBERT vectors take about 128 MiB"
SHORTEST = 3
"<s>, a token, </s>"
Texts = Sequence[str]
Pairs = Iterable[tuple[str, str] | Sequence[str]]
Weights = tuple[float, float, float] | Sequence[float]
"of dense, sparse, colbert"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextEmbeddings:
    """The outputs of N rows: one a text, or one a chunk with `long_docs="chunk"`. `e["dense_vecs"]` works too."""

    dense_vecs: NDArray[np.float32] | None
    "[N, D], norm 1; None if it was not requested, like the next two"
    lexical_weights: Any
    "scipy.sparse.csr_array [N, V] float32, a weight for each token id of the row"
    colbert_vecs: list[NDArray[np.float32]] | None
    "N matrices [n, D], a vector of norm 1 for each token but `<s>`"
    text_index: NDArray[np.int64]
    "[N] index of the row's text, counted from the first text of an iterator"
    char_start: NDArray[np.int64]
    "[N] Unicode code points of the text that the row begins with"
    char_end: NDArray[np.int64]
    "[N]"
    truncated: NDArray[np.bool_]
    "[N] whether the text after `char_end` is not encoded"

    def __len__(self) -> int:
        """Return N."""
        return len(self.text_index)

    def __getitem__(self, name: str) -> Any:
        """Return a member by its name."""
        if name not in (field.name for field in fields(self)):
            raise KeyError(name)
        return getattr(self, name)


def load_model(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: Dtype | Literal["auto"] = "auto",
    revision: str | None = None,
    max_batch_tokens: int | None = None,
) -> EmbeddingModel:
    """Load a checkpoint with all its outputs.

    Args:
        model: folder or hub id; None: $M3_MODEL, or BAAI/bge-m3.
        device: auto, cpu, cuda or cuda:N.
        dtype: of the forward pass; auto: float16 on a GPU, bfloat16 on a CPU that has it, else float32.
        revision: branch, tag or commit on the hub.
        max_batch_tokens: tokens that go through the model together; None: by device.

    Raises:
        ModelError: the checkpoint is missing, damaged, or does not fit memory.
        UsageError: the device does not exist, or cannot run the dtype.
    """
    if dtype != "auto":
        check_choice("dtype", dtype, Dtype)
    if max_batch_tokens is not None:
        check_least("max_batch_tokens", max_batch_tokens, 1)
    with take_turn(), _unchanged_environment():
        checkpoint = open_checkpoint(None if model is None else str(model), revision)
        resolved = machine.resolve_device(device)
        return EmbeddingModel(
            TextEncoder(
                checkpoint,
                outputs=checkpoint.outputs,
                device=resolved,
                dtype=machine.resolve_dtype(None if dtype == "auto" else dtype, resolved),
                max_batch_tokens=max_batch_tokens,
            )
        )


@contextmanager
def _unchanged_environment() -> Iterator[None]:
    """Restore the variables that libraries set while they are imported."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


class EmbeddingModel:
    """A loaded checkpoint. Several threads may call it at once: their calls take turns."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder

    @property
    def dim(self) -> int:
        """Width of dense and ColBERT vectors."""
        return self.encoder.checkpoint.hidden_size

    @property
    def vocabulary(self) -> int:
        """Width of lexical weights: the number of token ids."""
        return self.encoder.checkpoint.vocab_size

    @property
    def max_length(self) -> int:
        """Most tokens of a row, `<s>` and `</s>` included."""
        return self.encoder.checkpoint.default_max_length

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Outputs that the checkpoint has heads for."""
        return self.encoder.checkpoint.outputs

    @property
    def device(self) -> str:
        """`cpu`, `cuda` or `cuda:N`."""
        return self.encoder.device

    @property
    def dtype(self) -> Dtype:
        """Of the forward pass; results are float32."""
        return self.encoder.dtype

    @overload
    def encode(
        self,
        texts: Iterator[str],
        outputs: Collection[str] | None = None,
        max_length: int = MAX_LENGTH_CEILING,
        *,
        long_docs: LongDocs = "truncate",
    ) -> Iterator[TextEmbeddings]: ...

    @overload
    def encode(
        self,
        texts: Texts,
        outputs: Collection[str] | None = None,
        max_length: int = MAX_LENGTH_CEILING,
        *,
        long_docs: LongDocs = "truncate",
    ) -> TextEmbeddings: ...

    def encode(
        self,
        texts: Texts | Iterator[str],
        outputs: Collection[str] | None = None,
        max_length: int = MAX_LENGTH_CEILING,
        *,
        long_docs: LongDocs = "truncate",
    ) -> TextEmbeddings | Iterator[TextEmbeddings]:
        """Encode texts; the rows are in their order.

        Args:
            texts: a sequence, whose rows are returned together; or an iterator, which is read as far as its rows are
                consumed and gives them block by block, so that memory does not grow with it.
            outputs: one or some of dense, sparse and colbert; None: all that the checkpoint has.
            max_length: most tokens of a row, `<s>` and `</s>` included; the checkpoint's own limit holds too.
            long_docs: a longer text is cut (truncate: `truncated` tells), becomes several rows (chunk), one row made
                of its chunks (merge), or both.

        Raises:
            ValueError: a text is empty or has a lone surrogate; the message has its index.
            TypeError: a text is not a string.
            UsageError: an argument is not one of its values.
            ModelError: the checkpoint has no head for an output, or a text cannot be encoded.
        """
        if isinstance(texts, str):
            raise TypeError("texts is one string: give a list of strings")
        check_least("max_length", max_length, SHORTEST)
        check_choice("long_docs", long_docs, LongDocs)
        encoder = self.encoder.select(self._choose_outputs(outputs))
        length = min(max_length, self.max_length)
        if isinstance(texts, Iterator):
            return self._encode_blocks(encoder, texts, length, long_docs)
        return self._encode(encoder, list(_check_texts(texts)), length, long_docs)

    def _choose_outputs(self, outputs: Collection[str] | None) -> tuple[Output, ...]:
        asked = self.outputs if outputs is None else [outputs] if isinstance(outputs, str) else outputs
        chosen = tuple(each for each in ALL_OUTPUTS if each in asked)
        if not chosen or any(each not in ALL_OUTPUTS for each in asked):
            raise UsageError(f"outputs {outputs!r}: expected some of {', '.join(ALL_OUTPUTS)}")
        check_outputs(chosen, self.encoder.checkpoint)
        return chosen

    def _encode_blocks(
        self, encoder: TextEncoder, texts: Iterator[str], max_length: int, long_docs: LongDocs
    ) -> Iterator[TextEmbeddings]:
        most, first = BLOCK_BYTES["cuda" if self.device.startswith("cuda") else "cpu"], 0
        block: list[str] = []
        size = 0
        for text in _check_texts(texts):
            block.append(text)
            size += len(text)
            if size >= most:
                yield self._encode(encoder, block, max_length, long_docs, first=first)
                block, size, first = [], 0, first + len(block)
        if block:
            yield self._encode(encoder, block, max_length, long_docs, first=first)

    def _encode(
        self, encoder: TextEncoder, texts: list[str], max_length: int, long_docs: LongDocs, *, first: int = 0
    ) -> TextEmbeddings:
        embeddings, rows = encode_texts(encoder, texts, max_length=max_length, long_docs=long_docs)
        return self._to_public(embeddings, rows, first=first)

    def _to_public(self, embeddings: Embeddings, rows: Chunks, *, first: int) -> TextEmbeddings:
        weights, matrices = embeddings.lexical_weights, embeddings.colbert_vecs
        return TextEmbeddings(
            dense_vecs=embeddings.dense_vecs,
            lexical_weights=None if weights is None else to_csr(weights, vocabulary=self.vocabulary),
            colbert_vecs=None
            if matrices is None
            else [matrices.vectors[start:stop] for start, stop in pairwise(matrices.indptr.tolist())],
            text_index=rows.document + first,
            char_start=rows.char_start,
            char_end=rows.char_end,
            truncated=rows.truncated,
        )

    def compute_score(
        self,
        pairs: Pairs,
        weights: Weights = (1.0, 1.0, 1.0),
        *,
        max_query_length: int = DEFAULT_LENGTH,
        max_passage_length: int = DEFAULT_LENGTH,
    ) -> dict[str, NDArray[np.float32]]:
        """Score pairs of query and passage as `m3 score` does; a text that occurs often is encoded once.

        Args:
            pairs: of texts.
            weights: of dense, sparse and colbert in the weighted averages.
            max_query_length: most tokens of a query; it is truncated.
            max_passage_length: most tokens of a passage.

        Returns:
            [P] float32 for each of dense, sparse, colbert, sparse+dense, colbert+sparse+dense, as far as the checkpoint
            has the heads.

        Raises:
            ValueError: a text is empty or has a lone surrogate.
            TypeError: a pair is not two strings.
            UsageError: there are not three weights, or a length is less than 3.
            ModelError: a text cannot be encoded.
        """
        check_weights_given(weights)
        check_least("max_query_length", max_query_length, SHORTEST)
        check_least("max_passage_length", max_passage_length, SHORTEST)
        dense, sparse, colbert = weights
        modes, longest = modes_of(self.outputs), self.encoder.checkpoint.max_length
        check_weights(modes, (dense, sparse, colbert))
        request = ScoreRequest(
            pairs="",
            max_query_length=min(max_query_length, longest),
            max_passage_length=min(max_passage_length, longest),
        )
        scorer = TextScorer(request, Progress("none"), loaded=self.encoder)
        scorer.load(parts_of(modes))
        scores: dict[str, list[NDArray[np.float32]]] = {mode: [np.empty(0, np.float32)] for mode in modes}
        for window in cut_windows(_make_pairs(pairs), scorer.limits):
            with take_turn():
                found, faults = finish_scores(scorer.score_window(window), modes, weights=(dense, sparse, colbert))
            if failed := [(pair.number - 1, fault) for pair, fault in zip(window, faults, strict=True) if fault]:
                raise ModelError(f"pair {failed[0][0]} cannot be scored: {failed[0][1]}")
            for mode, values in found.items():
                scores[mode].append(values)
        return {mode: np.concatenate(values) for mode, values in scores.items()}

    def convert_id_to_token(self, weights: Any) -> list[dict[str, float]]:
        """Return the rows of lexical weights (CSR [N, V], as of `encode`) as dictionaries of token and weight."""
        rows = csr_array(weights)
        ends = rows.indptr.tolist()
        return [
            {
                self.format_token(token_id): weight
                for token_id, weight in zip(
                    rows.indices[start:stop].tolist(), rows.data[start:stop].tolist(), strict=True
                )
            }
            for start, stop in pairwise(ends)
        ]

    def format_token(self, token_id: int) -> str:
        """Return a token as the model card prints it, without the mark for the start of a word."""
        return self.encoder.format_token(token_id)


def _check_texts(texts: Iterable[str]) -> Iterator[str]:
    for index, text in enumerate(texts):
        check_text(text, f"text {index}")
        yield text


def _make_pairs(pairs: Pairs) -> Iterator[Pair]:
    for number, pair in enumerate(pairs, 1):
        if isinstance(pair, str) or len(pair) != 2:
            raise TypeError(f"pair {number - 1} is {pair!r:.80}, expected a query and a passage")
        query, passage = pair
        check_text(query, f"the query of pair {number - 1}")
        check_text(passage, f"the passage of pair {number - 1}")
        yield Pair(number=number, query=query, passage=passage, fault="", row={}, raw=b"", batch=None)
