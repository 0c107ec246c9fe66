"""A folder that `m3 encode` wrote, as arrays and as a search engine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from m3cli.concurrency import take_turn
from m3cli.config import ALL_OUTPUTS, EncodeConfig
from m3cli.errors import UsageError
from m3cli.jobs.encode.resolve import make_form
from m3cli.jobs.search.command import prepare_search, prepare_term_search, resolve_mode
from m3cli.jobs.search.queries import Queries, View, open_corpus_checkpoint
from m3cli.progress import Progress
from m3cli.records import LexicalWeights, Output, QueryHits
from m3cli.requests import Level, Mode, SearchRequest, Weights
from m3cli.store import reader
from m3cli.store.reader import ShardArrays

if TYPE_CHECKING:
    from m3cli.api.model import EmbeddingModel
    from m3cli.encoder.encode import TextEncoder


def open_folder(path: str | Path) -> Folder:
    """Open a folder that `m3 encode` wrote, complete or not; rows that are encoded later need opening it again.

    Raises:
        UsageError: the folder is missing or not one of m3's.
        DamageFound: its documents are damaged.
    """
    return Folder(reader.open_folder(Path(path)))


class Folder:
    """The encoded rows of a folder, in corpus order; a row is a document, or a chunk of a long one."""

    def __init__(self, folder: reader.OutputFolder) -> None:
        self._folder = folder
        self._shards = tuple(folder.entries)
        self._ends = list(accumulate(entry.counts.chunks for entry in folder.entries.values()))
        self._part: ShardArrays | None = None
        self._encoder: tuple[str | None, TextEncoder] | None = None

    def __len__(self) -> int:
        """Return the number of rows, R."""
        return self._ends[-1] if self._ends else 0

    @property
    def path(self) -> Path:
        """Absolute path of the folder."""
        return self._folder.path

    @property
    def complete(self) -> bool:
        """Whether all of the input is encoded."""
        return self._folder.manifest is not None

    @property
    def config(self) -> EncodeConfig:
        """The options that the folder was encoded with."""
        return self._folder.run.config

    @property
    def dim(self) -> int:
        """Width of dense and ColBERT vectors, D."""
        return self._folder.run.checkpoint.dim

    @property
    def vocabulary(self) -> int:
        """Number of token ids, V."""
        return self._folder.run.checkpoint.vocabulary

    @cached_property
    def ids(self) -> list[str]:
        """Id of each row's document."""
        parts = self.parts(outputs=(), columns=("id",))
        return [name for part in parts for name in part.rows.column("id").to_pylist()]

    @cached_property
    def dense(self) -> NDArray[Any]:
        """Dense vectors [R, D], float16 or float32 as stored; all are in memory, unlike those of `parts`."""
        found = [part.embeddings.dense_vecs for part in self._read("dense")]
        parts = [np.asarray(vectors) for vectors in found if vectors is not None]
        return np.concatenate(parts) if parts else np.empty((0, self.dim), self.config.dense_dtype)

    @cached_property
    def sparse(self) -> Any:
        """Lexical weights as scipy.sparse.csr_array [R, V] float32; all are in memory."""
        found = [part.embeddings.lexical_weights for part in self._read("sparse")]
        parts = [weights for weights in found if weights is not None]
        lengths = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.indptr) for part in parts)])
        joined = LexicalWeights(
            indptr=np.cumsum(lengths),
            indices=np.concatenate([np.empty(0, np.uint32), *(part.indices for part in parts)]),
            values=np.concatenate([np.empty(0, np.float32), *(part.values for part in parts)]),
        )
        return to_csr(joined, vocabulary=self.vocabulary)

    def colbert(self, row: int) -> NDArray[np.float32]:
        """Return the ColBERT vectors [n, D] of a row, decoded from whatever form is stored, each of norm 1."""
        from m3cli.retrieval.scores import decode_vectors  # noqa: PLC0415  torch

        part, index = self._find(row, "colbert")
        matrices = part.embeddings.colbert_vecs
        assert matrices is not None
        return decode_vectors(matrices, slice(int(matrices.indptr[index]), int(matrices.indptr[index + 1])))

    def text(self, row: int) -> str:
        """Return the text of a row; raise UsageError if the folder was encoded without `--keep-text`."""
        if not self.config.keep_text:
            raise UsageError(f"{self.path.name} has no texts: encode the corpus again with --keep-text")
        part, index = self._find(row)
        return str(part.rows.column("text")[index].as_py())

    def parts(
        self, *, outputs: Collection[Output] = ALL_OUTPUTS, columns: Sequence[str] | None = None
    ) -> Iterator[ShardArrays]:
        """Read all rows in order, part by part; memory holds one part, of about 64 MiB.

        Args:
            outputs: vectors to read, as they are stored.
            columns: other columns to read, as in `rows/*.parquet`; None: all.

        Returns:
            records with `rows`, a pyarrow.Table without vectors, and `embeddings` of the same rows.
        """
        chosen: tuple[Any, ...] = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        for output in chosen:
            check_choice("outputs", output, Output)
        names = None if columns is None else (columns or ("num_tokens",))  # a table without columns has no rows
        return reader.iter_parts(self._folder, outputs=chosen, columns=names)

    def to_arrow(self) -> Any:
        """Return all rows as a pyarrow.Table, with the columns of the parquet format; all is in memory."""
        return reader.read_table(self._folder, make_form(self._folder.run, kept=False))

    def search(
        self,
        queries: str | Sequence[str],
        mode: Mode | None = None,
        top_k: int = 10,
        *,
        model: EmbeddingModel | str | Path | None = None,
        weights: Weights | None = None,
        level: Level = "document",
    ) -> list[QueryHits]:
        """Search as `m3 search` does: exactly, in one pass over the folder.

        Args:
            queries: texts.
            mode: dense, sparse, colbert, hybrid or bm25; None: hybrid, or the only output there is.
            top_k: hits of a query.
            model: the checkpoint of the folder, best loaded; None: $M3_MODEL, the path that the folder remembers, or
                its hub id. What is loaded here stays in memory for the next search.
            weights: of dense, sparse and colbert in a hybrid score.
            level: a hit is a document, or a chunk.

        Returns:
            the hits of each query, in the order of `queries`: `ids`, `scores` [H], `parts` (scores by output), spans.

        Raises:
            ValueError: a query is empty or has a lone surrogate.
            UsageError: the folder lacks what the mode needs, or an argument is not one of its values.
            ForeignFolder: the model is not the folder's.
            ModelError: a query cannot be encoded.
        """
        if mode is not None:
            check_choice("mode", mode, Mode)
        check_choice("level", level, Level)
        check_least("top_k", top_k, 1)
        if weights is not None:
            check_weights_given(weights)
        texts = (queries,) if isinstance(queries, str) else tuple(queries)
        for index, text in enumerate(texts):
            check_text(text, f"query {index}")
        if not texts or not len(self):
            return [_no_hits(index, text) for index, text in enumerate(texts)]
        request = SearchRequest(
            folder=str(self.path),
            queries="",
            mode=mode,
            top_k=top_k,
            weights=weights,
            level=level,
            model=str(model) if isinstance(model, (str, Path)) else None,
        )
        chosen = resolve_mode(request, self._folder)
        source = Queries(ids=tuple(map(str, range(len(texts)))), texts=texts)
        with take_turn():
            loaded = None if chosen == "bm25" else self._load(model, request)
            view, quiet = View(spans=True), Progress("none")
            if chosen == "bm25":
                search = prepare_term_search(request, self._folder, view=view, progress=quiet, stdin=None)
            else:
                search = prepare_search(
                    request, self._folder, chosen, texts=True, view=view, progress=quiet, loaded=loaded
                )
            asked, hits = search(source)
        found = dict(zip(asked.ids, hits, strict=True))
        return [found.get(str(index)) or _no_hits(index, text) for index, text in enumerate(texts)]

    def _load(self, model: EmbeddingModel | str | Path | None, request: SearchRequest) -> TextEncoder:
        from m3cli.encoder import device as machine  # noqa: PLC0415  torch
        from m3cli.encoder.encode import TextEncoder  # noqa: PLC0415

        if model is not None and not isinstance(model, (str, Path)):
            return model.encoder
        if self._encoder is None or self._encoder[0] != request.model:
            checkpoint, device = open_corpus_checkpoint(self._folder, request), machine.resolve_device(None)
            dtype = machine.resolve_dtype(None, device)
            encoder = TextEncoder(checkpoint, outputs=self.config.outputs, device=device, dtype=dtype)
            self._encoder = request.model, encoder
        return self._encoder[1]

    def _read(self, output: Output) -> Iterator[ShardArrays]:
        if output not in self.config.outputs:
            raise UsageError(f"{self.path.name} has no {output}, only {', '.join(self.config.outputs)}")
        return self.parts(outputs=(output,), columns=())

    def _find(self, row: int, output: Output | None = None) -> tuple[ShardArrays, int]:
        """Return the part that has a row, and the row's index in it; the part is kept for the next call."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row}: {self.path.name} has {len(self):,} rows")
        if output is not None and output not in self.config.outputs:
            raise UsageError(f"{self.path.name} has no {output}, only {', '.join(self.config.outputs)}")
        number = int(np.searchsorted(self._ends, row % len(self), side="right"))
        shard = self._shards[number]
        index = row % len(self) - (self._ends[number - 1] if number else 0)
        part = self._part
        if (
            part is None
            or part.shard != shard
            or not part.embeddings.rows[0] <= index <= part.embeddings.rows[-1]
            or (output is not None and part.embeddings.colbert_vecs is None)
        ):
            wanted, outputs = {shard: np.array([index], np.int64)}, () if output is None else (output,)
            self._part = part = next(
                part
                for part in reader.iter_parts(self._folder, outputs=outputs, wanted=wanted)
                if index <= part.embeddings.rows[-1]
            )
        return part, index - int(part.embeddings.rows[0])


def to_csr(weights: LexicalWeights, *, vocabulary: int) -> Any:
    """Return lexical weights as scipy.sparse.csr_array [N, V] float32."""
    shape = len(weights.indptr) - 1, vocabulary
    return csr_array((weights.values, weights.indices.astype(np.int32), weights.indptr), shape=shape)


def check_choice(name: str, value: object, kind: Any) -> None:
    """Raise UsageError unless an argument is one of a Literal's values."""
    if value not in get_args(kind):
        raise UsageError(f"{name}={value!r}: expected one of {', '.join(get_args(kind))}")


def check_least(name: str, value: object, least: int) -> None:
    """Raise UsageError unless an argument is an integer of at least `least`."""
    if not isinstance(value, Integral) or int(value) < least:
        raise UsageError(f"{name}={value!r}: expected an integer of at least {least}")


def check_weights_given(weights: Sequence[float]) -> None:
    """Raise UsageError unless there are three weights."""
    if len(weights) != 3:
        raise UsageError(f"weights={weights!r}: expected three numbers, of dense, sparse and colbert")


def check_text(text: object, name: str) -> None:
    """Raise TypeError or ValueError unless a text can be encoded."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is of type {type(text).__name__}, expected a string")
    if not text or text.isspace():
        raise ValueError(f"{name} is empty; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has a lone surrogate at character {error.start}; replace it") from error


def _no_hits(index: int, text: str) -> QueryHits:
    return QueryHits(
        query=str(index),
        text=text,
        ids=(),
        scores=np.empty(0, np.float32),
        parts={},
        chunk_index=None,
        char_start=None,
        char_end=None,
        texts=(),
    )
