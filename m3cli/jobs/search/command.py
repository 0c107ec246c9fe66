"""`m3 search`: rank an encoded folder's documents for queries, exactly.

queries (texts encoded here, or vectors) -> one pass over the folder -> hits -> TREC run, JSON lines or a table
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, get_args

from m3cli.config import ALL_OUTPUTS
from m3cli.corpus.streams import PeekableStream
from m3cli.errors import EXIT_DONE, EXIT_ROWS_SKIPPED, UsageError, count_noun
from m3cli.jobs.paths import check_ignored_options, check_paths
from m3cli.jobs.search.queries import Queries, encode_queries, open_queries, read_vectors
from m3cli.progress import Progress
from m3cli.records import Output, QueryHits
from m3cli.requests import Mode, SearchRequest
from m3cli.store.commit import check_writable
from m3cli.store.reader import OutputFolder, open_folder
from m3cli.store.results import open_ranking, ranking_format

if TYPE_CHECKING:
    from m3cli.encoder.text_encoder import TextEncoder

CANDIDATES = 200
CANDIDATE_OUTPUTS: tuple[Output, ...] = ("dense", "sparse")
MOST_SHOWN = 20
"queries up to which hits are shown as a table on a terminal"


Show = Callable[[Sequence[QueryHits]], None]


def search_corpus(
    request: SearchRequest,
    *,
    progress: Progress,
    stdout: BinaryIO,
    stdin: PeekableStream | None = None,
    show: Show | None = None,
) -> int:
    """Search a folder.

    Args:
        request: the options.
        progress: messages and progress bar.
        stdout: output of the ranking without `out`.
        stdin: standard input, if queries or corpus are read from it.
        show: shows the hits of few queries as a table, on a terminal.

    Returns:
        the exit code: 0, or 3 if rows were skipped.

    Raises:
        UsageError: options conflict, or the folder lacks what they need.
        CorpusError: there are no queries.
        ForeignFolder: queries and corpus are of different models.
        OutputError: `out` cannot be written; raised before anything is read.
    """
    if request.queries == "-" and "-" in request.corpus_inputs:
        raise UsageError("--queries - with --input -: standard input can be read once; give one of them a file")
    kind = ranking_format(request.out, typed=request.format)
    files = [request.queries] if os.path.exists(request.queries) else []  # noqa: PTH110  False for texts longer than a path
    read: dict[str, Sequence[str | None]] = {
        "DIR": [request.folder],
        "--queries": files,
        "--input": request.corpus_inputs,
    }
    check_paths({"--out": request.out}, read, model=request.model)
    check_writable(request.out)
    folder = open_corpus(request, progress)
    mode = resolve_mode(request, folder)
    source = open_queries(request, progress=progress, stdin=stdin)
    if isinstance(source, OutputFolder):
        _check_text_options(request)
    began = time.perf_counter()
    drawn = show is not None and request.out is None and request.format is None
    shown = kind == "jsonl" or drawn
    queries, hits = rank_queries(request, folder, mode, source, shown=shown, progress=progress, stdin=stdin)
    seconds = time.perf_counter() - began
    without_hits = sum(not found.ids for found in hits)
    remark = f"; {without_hits:,} without a hit" if without_hits else ""
    counted = f"{count_noun(len(hits), 'query', 'queries')}, {count_noun(folder.counts.chunks, 'row')}"
    progress.say(f"{mode}: {counted}, {seconds:.1f} s in all{remark}")
    if show is not None and drawn and len(hits) <= MOST_SHOWN:
        show(hits)
    else:
        with open_ranking(request.out, stdout, kind=kind, tag=f"m3-{mode}") as ranking:
            ranking.write(hits)
        if ranking.blanks:
            progress.say(
                f"{count_noun(ranking.blanks, 'line has', 'lines have')} an id with blanks: tabs between the columns"
            )
    return EXIT_ROWS_SKIPPED if queries.skipped else EXIT_DONE


def open_corpus(request: SearchRequest, progress: Progress) -> OutputFolder:
    """Open the folder; raise UsageError if it has no rows."""
    folder = open_folder(Path(request.folder))
    if not folder.counts.chunks:
        raise UsageError(f"{request.folder}: nothing has been encoded there yet; run m3 encode")
    if folder.manifest is None:
        progress.say(f"{folder.path.name} is not complete: only what is encoded so far is searched")
    return folder


def resolve_mode(request: SearchRequest, folder: OutputFolder) -> Mode:
    """Return the mode: --mode, or hybrid if the folder has several outputs.

    Raises:
        UsageError: the folder lacks the output, or options are for another mode.
    """
    outputs = outputs_of(folder)
    mode: Mode = request.mode or ("hybrid" if len(outputs) > 1 else outputs[0])
    if mode in get_args(Output) and mode not in outputs:
        wanted = ",".join(output for output in ALL_OUTPUTS if output in {*outputs, mode})
        raise UsageError(
            f"--mode {mode}: {folder.path.name} has no {mode}, only {', '.join(outputs)}; encode the corpus again with "
            f"--outputs {wanted}"
        )
    for flag, value, owner in (
        ("--weights", request.weights, "hybrid"),
        ("--fusion", request.fusion, "hybrid"),
        ("--candidates", request.candidates, "hybrid"),
        ("--candidates-by", request.candidates_by, "hybrid"),
        ("--tokenizer", request.tokenizer, "bm25"),
        ("--input", request.corpus_inputs or None, "bm25"),
    ):
        if value is not None and mode != owner:
            raise UsageError(f"{flag} is for --mode {owner}, and this is {mode}")
    if request.corpus_inputs and request.level == "chunk":
        raise UsageError(
            f"--level chunk with --input {request.corpus_inputs[0]}: a corpus is searched by whole documents; "
            "leave --level out, or encode with --keep-text"
        )
    if mode == "bm25":
        _check_vector_options(request)
    return mode


def _check_text_options(request: SearchRequest) -> None:
    """Raise UsageError for options of reading and encoding texts, if the queries are vectors."""
    typed = {
        "--query-prefix": request.query_prefix,
        "--max-query-length": request.max_query_length,
        "--query-field": request.query_field,
        "--query-id-field": request.query_id_field,
        "--input-format": None if request.input_format == "auto" else request.input_format,
        "--model": request.model,
        "--revision": request.revision,
        "--dtype": request.dtype,
        "--max-batch-tokens": request.max_batch_tokens,
    }
    check_ignored_options(
        typed, other=f"--queries {request.queries}", reason="the queries of a folder are encoded already"
    )


def _check_vector_options(request: SearchRequest) -> None:
    """Raise UsageError for options of encoding queries in bm25 mode."""
    typed = {
        "--query-prefix": request.query_prefix,
        "--max-query-length": request.max_query_length,
        "--dtype": request.dtype,
        "--device": request.device,
        "--max-batch-tokens": request.max_batch_tokens,
    }
    check_ignored_options(typed, other="--mode bm25", reason="no model runs")
    if request.tokenizer == "plain":
        typed = {"--model": request.model, "--revision": request.revision}
        check_ignored_options(typed, other="--tokenizer plain", reason="no checkpoint is read")


def outputs_of(folder: OutputFolder) -> tuple[Output, ...]:
    """Return the outputs of a folder in the order dense, sparse, colbert."""
    return folder.run.config.outputs


def rank_queries(
    request: SearchRequest,
    folder: OutputFolder,
    mode: Mode,
    source: Queries | OutputFolder,
    *,
    shown: bool,
    progress: Progress,
    stdin: PeekableStream | None = None,
    loaded: TextEncoder | None = None,
) -> tuple[Queries, list[QueryHits]]:
    """Return the queries that could be encoded, and the hits of each; `shown` reads spans and texts of the hits too.

    Texts are encoded by `loaded`, or by the checkpoint that the request names.
    """
    if mode == "bm25":
        return _search_terms(request, folder, source, shown=shown, progress=progress, stdin=stdin)
    # torch, which is slow to import: only after options and folder have been checked
    from m3cli.encoder.device import resolve_device  # noqa: PLC0415
    from m3cli.jobs.search.vectors import Blend, Target, describe_hits, search_hybrid, search_single  # noqa: PLC0415
    from m3cli.retrieval.scores import resolve_weights  # noqa: PLC0415

    chunks = request.level == "chunk"
    target = Target(
        folder=folder,
        vocabulary=folder.run.checkpoint.vocabulary,
        device=resolve_device(request.device),
        top_k=request.top_k,
        chunks=chunks,
    )
    if mode == "hybrid":
        weights = resolve_weights(request.weights, outputs_of(folder))
        # Dense and sparse find candidates whatever their weights; ColBERT, the largest to read, only ranks them.
        outputs = tuple(output for output in outputs_of(folder) if output != "colbert" or weights[2])
        blend = Blend(
            outputs=outputs,
            sources=_resolve_sources(request, outputs),
            candidates=request.candidates or max(CANDIDATES, request.top_k),
            fusion="rrf" if request.fusion == "rrf" else "weighted",
            weights=weights,
        )
        most = blend.candidates * len(blend.sources)
        if most < request.top_k:
            progress.say(
                f"--candidates {blend.candidates}: at most {most:,} hits of a query are ranked, not --top-k "
                f"{request.top_k}"
            )
        queries = _embed(request, folder, source, outputs, progress, loaded)
        assert queries.embeddings is not None
        found = search_hybrid(target, queries.embeddings, blend)
    else:
        queries = _embed(request, folder, source, (mode,), progress, loaded)
        assert queries.embeddings is not None
        found = search_single(target, queries.embeddings, mode)
    return queries, describe_hits(found, folder, ids=queries.ids, texts=queries.texts, chunks=chunks, shown=shown)


def _resolve_sources(request: SearchRequest, outputs: tuple[Output, ...]) -> tuple[Output, ...]:
    """Return the outputs that find candidates; raise UsageError if the folder lacks one."""
    for output in request.candidates_by or ():
        if output not in outputs:
            raise UsageError(f"--candidates-by {output}: the folder has no {output}, only {', '.join(outputs)}")
    return request.candidates_by or tuple(output for output in CANDIDATE_OUTPUTS if output in outputs)


def _embed(
    request: SearchRequest,
    folder: OutputFolder,
    source: Queries | OutputFolder,
    outputs: tuple[Output, ...],
    progress: Progress,
    loaded: TextEncoder | None,
) -> Queries:
    if isinstance(source, OutputFolder):
        return read_vectors(source, folder, outputs, progress)
    return encode_queries(source, folder, outputs, request, progress, loaded=loaded)


def _search_terms(
    request: SearchRequest,
    folder: OutputFolder,
    source: Queries | OutputFolder,
    *,
    shown: bool,
    progress: Progress,
    stdin: PeekableStream | None,
) -> tuple[Queries, list[QueryHits]]:
    from m3cli.jobs.search.bm25 import open_terms, search_input, search_texts  # noqa: PLC0415
    from m3cli.jobs.search.vectors import describe_hits  # noqa: PLC0415

    if isinstance(source, OutputFolder):
        raise UsageError("--mode bm25 searches words: give --queries a file of texts or the words of a query")
    terms = open_terms(folder, request)
    if request.corpus_inputs:
        return source, search_input(folder, source, terms, request, progress, stdin=stdin)
    found = search_texts(folder, source, terms, request)
    chunks = request.level == "chunk"
    return source, describe_hits(found, folder, ids=source.ids, texts=source.texts, chunks=chunks, shown=shown)
