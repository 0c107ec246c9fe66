"""Queries of a search: one text, a file of texts or an encoded folder; encode them like the corpus."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from m3cli.config import FieldFlags
from m3cli.corpus.fields import resolve_fields
from m3cli.corpus.plan import plan_shards
from m3cli.corpus.reader import read_shards
from m3cli.corpus.sources import find_sources, has_known_ending
from m3cli.corpus.streams import PeekableStream
from m3cli.encoder.embeddings import concat_embeddings, select_rows
from m3cli.errors import CorpusError, ForeignFolder, ModelError, UsageError, count_noun
from m3cli.jobs.reread import InputTexts
from m3cli.jobs.score.from_folders import check_same_model
from m3cli.progress import Progress
from m3cli.records import Embeddings, Output, SkippedRow
from m3cli.requests import SearchRequest
from m3cli.store.reader import OutputFolder, iter_parts, open_folder

if TYPE_CHECKING:
    from m3cli.encoder.checkpoint import Checkpoint
    from m3cli.encoder.encode import TextEncoder


LITERAL_ID = "query"
"id of a query given on the command line"
_FLAGS = FieldFlags(text="--query-field", id="--query-id-field")
_SHARD_BYTES = 8 << 20
_PATH_LIKE = re.compile(r"(\.{0,2}|~)/\S*|\S+\.m3/?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """Q queries."""

    ids: tuple[str, ...]
    "[Q] distinct"
    texts: tuple[str | None, ...]
    "[Q]; None: read as vectors"
    embeddings: Embeddings | None = None
    "[Q] rows; None until they are encoded"
    skipped: int = 0
    "rows of the file that were skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What is shown of hits; a TREC run has ids and scores only."""

    spans: bool
    "with the spans of chunks, and the start of kept texts"
    input_texts: InputTexts | None = None
    "of the input, for the first hits of a query if texts are not kept; None: they are not shown"


def open_queries(request: SearchRequest, *, progress: Progress, stdin: PeekableStream | None) -> Queries | OutputFolder:
    """Return the words of a query, or read a file of texts, or open an encoded folder.

    Raises:
        UsageError: the value looks like a path that does not exist.
        CorpusError: a file has no queries, or two with one id.
    """
    if request.words is not None:
        if _exists(Path(request.words)):
            progress.say(f"searching for the words {request.words!r}; for the queries of that file: -q {request.words}")
        return one_query(request.words)
    value = request.queries
    if value is None or not value.strip():
        raise UsageError("--queries is empty: give a file, an encoded folder, or the words of a query")
    path = Path(value)
    if value != "-" and not _exists(path):
        if _PATH_LIKE.fullmatch(value) or (has_known_ending(value) and not re.search(r"\s", value)):
            raise UsageError(f"--queries {value}: no such file or folder; give one, or the words of a query")
        return one_query(value)
    if path.is_dir() and value != "-":
        return open_folder(path)
    return _read_texts(value, request, progress=progress, stdin=stdin)


def one_query(words: str) -> Queries:
    """Return the words of a query as queries.

    Raises:
        UsageError: there are none.
    """
    if not words.strip():
        raise UsageError("the query is empty: give its words")
    return Queries(ids=(LITERAL_ID,), texts=(words,))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text longer than a file name
        return False


def _read_texts(path: str, request: SearchRequest, *, progress: Progress, stdin: PeekableStream | None) -> Queries:
    sources = find_sources((path,), input_format=request.input_format, stdin=stdin)
    fields = resolve_fields(
        sources,
        id_field=request.query_id_field,
        text_field=request.query_field,
        title_field="",
        flags=_FLAGS,
        stdin=stdin,
    )
    plan = plan_shards(sources, fields=fields, shard_size=_SHARD_BYTES)
    texts: dict[str, str] = {}
    skipped: list[SkippedRow] = []
    for shard in read_shards(sources, plan=plan, fields=fields, schema=None, ask=lambda _: "read", stdin=stdin):
        skipped += shard.skipped
        for document in shard.documents:
            if texts.setdefault(document.id, document.text) != document.text:
                raise CorpusError(f"{path}: two queries have the id {document.id[:80]!r}; give each its own")
    if not texts:
        reason = f": {skipped[0].reason}" if skipped else ""
        raise CorpusError(f"{path}: there is no query in it{reason}")
    if skipped:
        first = skipped[0]
        progress.say(
            f"{count_noun(len(skipped), 'row')} skipped; the first, {first.source}:{first.position}: {first.reason}"
        )
    return Queries(ids=tuple(texts), texts=tuple(texts.values()), skipped=len(skipped))


def read_vectors(
    queries: OutputFolder, corpus: OutputFolder, outputs: tuple[Output, ...], progress: Progress
) -> Queries:
    """Read the queries of an encoded folder: the first chunk of each document.

    Raises:
        ForeignFolder: the checkpoints differ.
        UsageError: the folder lacks an output or has no rows.
        CorpusError: two documents have one id.
    """
    check_same_model(queries, corpus)
    stored = queries.run.config.outputs
    for output in outputs:
        if output not in stored:
            raise UsageError(f"{queries.path.name} has no {output}, only {', '.join(stored)}: encode it with --outputs")
    ids: dict[str, None] = {}
    parts: list[Embeddings] = []
    more = 0
    for part in iter_parts(queries, outputs=outputs, columns=("id", "chunk_index", "num_chunks")):
        names = part.rows.column("id").to_pylist()
        index = part.rows.column("chunk_index").to_numpy()
        rows = np.flatnonzero(index == 0)
        for row in rows.tolist():
            if names[row] in ids:
                raise CorpusError(
                    f"{queries.path.name}: two queries have the id {names[row][:80]!r}; give each its own"
                )
            ids[names[row]] = None
        more += int(np.count_nonzero(part.rows.column("num_chunks").to_numpy()[rows] > 1))
        parts.append(select_rows(part.embeddings, rows, rows=rows))
    if not ids:
        raise UsageError(f"{queries.path.name}: there are no queries in it")
    if more:
        several = count_noun(more, f"query of {queries.path.name} has", f"queries of {queries.path.name} have")
        progress.say(f"{several} several chunks: only the first is searched with")
    if queries.manifest is None:
        progress.say(f"{queries.path.name} is not complete: only the queries that are encoded so far are searched for")
    skipped = queries.counts.skipped
    if skipped:
        progress.say(f"{queries.path.name} was made without {count_noun(skipped, 'row')}, see its _m3/skipped")
    return Queries(ids=tuple(ids), texts=(None,) * len(ids), embeddings=concat_embeddings(parts), skipped=skipped)


class QueryEncoder:
    """The checkpoint of a corpus, loaded to encode queries."""

    def __init__(
        self,
        corpus: OutputFolder,
        outputs: tuple[Output, ...],
        request: SearchRequest,
        progress: Progress,
        *,
        loaded: TextEncoder | None = None,
    ) -> None:
        """Load the checkpoint, or take one that is loaded.

        Raises:
            ForeignFolder: the checkpoint or its tokenizer differs from the corpus'.
            ModelError: the checkpoint cannot be loaded.
        """
        from m3cli.encoder import device as machine  # noqa: PLC0415  torch
        from m3cli.encoder.encode import TextEncoder, resolve_length  # noqa: PLC0415

        self._prefix, self._progress = request.query_prefix, progress
        _log_prefix(corpus.run.config.prefix, request, progress)
        if loaded is None:
            checkpoint = open_corpus_checkpoint(corpus, request)
        else:
            checkpoint = loaded.checkpoint
            check_corpus_checkpoint(corpus, checkpoint)
        self._length = resolve_length(request.max_query_length, checkpoint, option="--max-query-length")
        if loaded is None:
            device = machine.resolve_device(request.device)
            dtype = machine.resolve_dtype(request.dtype, device)
            progress.say(f"{checkpoint.name}, {dtype} on {device}")
            self._encoder = TextEncoder(
                checkpoint, outputs=outputs, device=device, dtype=dtype, max_batch_tokens=request.max_batch_tokens
            )
        else:
            self._encoder = loaded.select(outputs)
        made = corpus.run.checkpoint.tokenizer_hash
        if self._encoder.tokenizer_hash != made:
            raise ForeignFolder(
                f"{corpus.path.name} was made with tokenizer {made[:7]}, this version of transformers builds "
                f"{self._encoder.tokenizer_hash[:7]} from the same files: install the version it was made with"
            )

    def encode(self, queries: Queries) -> Queries:
        """Encode texts; those that cannot be encoded are skipped.

        Raises:
            ModelError: no text can be encoded.
        """
        from m3cli.encoder.encode import DEFAULT_LENGTH  # noqa: PLC0415  torch

        texts = [f"{self._prefix}{text}" for text in queries.texts]
        embeddings, failed, tokenised = self._encoder.try_texts(texts, max_length=self._length)
        if tokenised.truncated:
            remedy = "" if self._length > DEFAULT_LENGTH else "; --max-query-length sets another length"
            total = count_noun(len(texts), "query", "queries")
            self._progress.say(f"{tokenised.truncated:,} of {total} cut at {self._length} tokens{remedy}")
        if failed:
            first = min(failed, key=lambda each: each.row)
            message = (
                f"{len(failed):,} of {count_noun(len(texts), 'query', 'queries')} cannot be encoded; the first, "
                f"{queries.ids[first.row][:80]!r}: {first.reason} ({first.detail})"
            )
            if embeddings is None:
                raise ModelError(message)
            self._progress.say(message)
        assert embeddings is not None
        kept = embeddings.rows.tolist()
        return Queries(
            ids=tuple(queries.ids[row] for row in kept),
            texts=tuple(queries.texts[row] for row in kept),
            embeddings=embeddings,
            skipped=queries.skipped + len(failed),
        )


def open_corpus_checkpoint(corpus: OutputFolder, request: SearchRequest) -> Checkpoint:
    """Open the checkpoint for queries: --model, or else M3_MODEL, the remembered path or hub id, whichever fits.

    Scores have no meaning unless it is the checkpoint of the corpus.

    Raises:
        ForeignFolder: the checkpoint differs from the corpus'.
        UsageError: none is named, and that of the corpus is not where it was.
    """
    from m3cli.jobs.encode.resolve import find_other_file, list_models, open_checkpoint  # noqa: PLC0415

    made, differing = corpus.run.checkpoint, []
    for model, revision in list_models(made, request):
        checkpoint = open_checkpoint(model, revision)
        if (other := find_other_file(made, checkpoint)) is None:
            return replace(checkpoint, name=made.name) if model == made.path else checkpoint
        differing.append((checkpoint.name, other))
    if not differing:
        raise UsageError(
            f"{corpus.path.name} was encoded with {made.path}, which is not there now: give the path of that "
            "checkpoint with --model or M3_MODEL, or give --queries an encoded folder"
        )
    raise _other_checkpoint(corpus, *differing[0])


def check_corpus_checkpoint(corpus: OutputFolder, checkpoint: Checkpoint) -> None:
    """Check that a loaded checkpoint is that of the corpus.

    Raises:
        ForeignFolder: they differ.
    """
    from m3cli.jobs.encode.resolve import find_other_file  # noqa: PLC0415

    if (other := find_other_file(corpus.run.checkpoint, checkpoint)) is not None:
        raise _other_checkpoint(corpus, checkpoint.name, other)


def _other_checkpoint(corpus: OutputFolder, name: str, other: str) -> ForeignFolder:
    return ForeignFolder(
        f"{corpus.path.name} was encoded with {corpus.run.checkpoint.name}, the queries would be with {name}, and "
        f"their {other} differ: scores between them mean nothing; give --model the corpus' checkpoint"
    )


def _log_prefix(prefix: str, request: SearchRequest, progress: Progress) -> None:
    if prefix and not request.query_prefix:
        progress.say(f"the corpus has {prefix!r} before every chunk; queries have nothing: --query-prefix gives words")
