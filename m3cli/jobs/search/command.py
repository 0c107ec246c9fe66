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
from m3cli.jobs.reread import InputTexts
from m3cli.jobs.search.queries import Queries, QueryEncoder, View, one_query, open_queries, read_vectors
from m3cli.progress import Progress
from m3cli.records import Output, QueryHits
from m3cli.requests import Mode, SearchRequest
from m3cli.store.commit import check_writable
from m3cli.store.reader import OutputFolder, open_folder
from m3cli.store.results import open_ranking, ranking_format

if TYPE_CHECKING:
    from m3cli.encoder.encode import TextEncoder

CANDIDATES = 200
CANDIDATE_OUTPUTS: tuple[Output, ...] = ("dense", "sparse")
MOST_SHOWN = 20
"queries up to which hits are shown as a table on a terminal"


Show = Callable[[Sequence[QueryHits]], None]
Ask = Callable[[], str | None]
Search = Callable[[Queries | OutputFolder], tuple[Queries, list[QueryHits]]]


def search_corpus(
    request: SearchRequest,
    *,
    progress: Progress,
    stdout: BinaryIO,
    stdin: PeekableStream | None = None,
    show: Show | None = None,
    ask: Ask | None = None,
) -> int:
    """Search a folder for queries, or for each line that is typed.

    Args:
        request: the options.
        progress: messages and progress bar.
        stdout: output of the ranking without `out`.
        stdin: standard input, if queries or corpus are read from it.
        show: shows the hits of few queries as a table, on a terminal.
        ask: returns a line that is typed on a terminal, None at the end.

    Returns:
        the exit code: 0, or 3 if rows were skipped.

    Raises:
        UsageError: options conflict, or the folder lacks what they need.
        CorpusError: there are no queries.
        ForeignFolder: queries and corpus are of different models.
        OutputError: `out` cannot be written; raised before anything is read.
    """
    typed = request.words is None and request.queries is None
    _check_queries(request, on_terminal=ask is not None)
    kind = ranking_format(request.out, typed=request.format)
    named = request.queries or ""
    files = [named] if os.path.exists(named) else []  # noqa: PTH110  False for texts longer than a path
    read: dict[str, Sequence[str | None]] = {
        "DIR": [request.folder],
        "--queries": files,
        "--input": request.corpus_inputs,
    }
    check_paths({"--out": request.out}, read, model=request.model)
    check_writable(request.out)
    folder = open_corpus(request, progress)
    mode = resolve_mode(request, folder)
    source = None if typed else open_queries(request, progress=progress, stdin=stdin)
    if isinstance(source, OutputFolder):
        _check_text_options(request)
        if mode == "bm25":
            raise UsageError("--mode bm25 searches words: give --queries a file of texts or the words of a query")
    began = time.perf_counter()
    drawn = show is not None and request.out is None and request.format is None and _count(source) <= MOST_SHOWN
    view = View(spans=kind == "jsonl" or drawn, input_texts=InputTexts(folder) if drawn else None)
    if mode == "bm25":
        search = prepare_term_search(request, folder, view=view, progress=progress, stdin=stdin)
    else:
        texts = not isinstance(source, OutputFolder)
        search = prepare_search(request, folder, mode, texts=texts, view=view, progress=progress)
    if source is None:
        assert ask is not None
        assert show is not None
        progress.say(f"{folder.path.name} by {mode}: type a query; Ctrl-D ends")
        answer_lines(search, ask, show)
        return EXIT_DONE
    queries, hits = search(source)
    seconds = time.perf_counter() - began
    without_hits = sum(not found.ids for found in hits)
    remark = f"; {without_hits:,} without a hit" if without_hits else ""
    counted = f"{count_noun(len(hits), 'query', 'queries')}, {count_noun(folder.counts.chunks, 'row')}"
    progress.say(f"{mode}: {counted}, {seconds:.1f} s in all{remark}")
    if show is not None and drawn:
        show(hits)
    else:
        with open_ranking(request.out, stdout, kind=kind, tag=f"m3-{mode}") as ranking:
            ranking.write(hits)
        if ranking.blanks:
            progress.say(
                f"{count_noun(ranking.blanks, 'line has', 'lines have')} an id with blanks: tabs between the columns"
            )
    return EXIT_ROWS_SKIPPED if queries.skipped else EXIT_DONE


def _count(source: Queries | OutputFolder | None) -> int:
    """Return the number of queries; 1 if they are typed one by one."""
    if isinstance(source, OutputFolder):
        return source.counts.documents
    return 1 if source is None else len(source.ids)


def answer_lines(search: Search, ask: Ask, show: Show) -> None:
    """Search for each line that is typed, until there are no more."""
    while (line := ask()) is not None:
        if line.strip():
            show(search(one_query(line))[1])


def _check_queries(request: SearchRequest, *, on_terminal: bool) -> None:
    """Raise UsageError unless the queries come from one place."""
    if request.words is not None and request.queries is not None:
        raise UsageError(f"{request.words!r} and --queries {request.queries}: give the words of a query, or queries")
    if request.queries == "-" and "-" in request.corpus_inputs:
        raise UsageError("--queries - with --input -: standard input can be read once; give one of them a file")
    if request.words is None and request.queries is None:
        if not on_terminal:
            raise UsageError("no query: give its words after DIR, or a file of queries with --queries")
        if request.out is not None or request.format is not None:
            flag = f"--out {request.out}" if request.out is not None else f"--format {request.format}"
            raise UsageError(f"{flag} without queries: give them with --queries")


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


def prepare_search(
    request: SearchRequest,
    folder: OutputFolder,
    mode: Mode,
    *,
    texts: bool,
    view: View,
    progress: Progress,
    loaded: TextEncoder | None = None,
) -> Search:
    """Load what a search by vectors needs; return a function that searches.

    Args:
        request: the options.
        folder: the folder.
        mode: what scores a row, not bm25.
        texts: whether queries are texts; else they are vectors of a folder.
        view: what is shown of hits.
        progress: messages.
        loaded: the checkpoint, if it is loaded.
    """
    # torch, which is slow to import: only after options and folder have been checked
    from m3cli.encoder.device import resolve_device  # noqa: PLC0415
    from m3cli.jobs.search.vectors import Blend, Target, describe_hits, search_hybrid, search_single  # noqa: PLC0415
    from m3cli.retrieval.scores import resolve_weights  # noqa: PLC0415

    target = Target(
        folder=folder,
        vocabulary=folder.run.checkpoint.vocabulary,
        device=resolve_device(request.device),
        top_k=request.top_k,
        chunks=request.level == "chunk",
    )
    blend: Blend | None = None
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
    else:
        assert mode != "bm25"
        outputs = (mode,)
    encoder = QueryEncoder(folder, outputs, request, progress, loaded=loaded) if texts else None

    def search(source: Queries | OutputFolder) -> tuple[Queries, list[QueryHits]]:
        if isinstance(source, OutputFolder):
            queries = read_vectors(source, folder, outputs, progress)
        else:
            assert encoder is not None
            queries = encoder.encode(source)
        assert queries.embeddings is not None
        if blend is not None:
            found = search_hybrid(target, queries.embeddings, blend)
        else:
            found = search_single(target, queries.embeddings, outputs[0])
        return queries, describe_hits(found, folder, queries, chunks=target.chunks, view=view)

    return search


def _resolve_sources(request: SearchRequest, outputs: tuple[Output, ...]) -> tuple[Output, ...]:
    """Return the outputs that find candidates; raise UsageError if the folder lacks one."""
    for output in request.candidates_by or ():
        if output not in outputs:
            raise UsageError(f"--candidates-by {output}: the folder has no {output}, only {', '.join(outputs)}")
    return request.candidates_by or tuple(output for output in CANDIDATE_OUTPUTS if output in outputs)


def prepare_term_search(
    request: SearchRequest, folder: OutputFolder, *, view: View, progress: Progress, stdin: PeekableStream | None
) -> Search:
    """Index the texts of a folder, or of its corpus; return a function that searches them by BM25."""
    from m3cli.jobs.search.bm25 import (  # noqa: PLC0415
        describe_input_hits,
        index_input,
        index_texts,
        open_terms,
        search_terms,
    )
    from m3cli.jobs.search.vectors import describe_hits  # noqa: PLC0415

    terms = open_terms(folder, request)
    if request.corpus_inputs:
        indexed = index_input(folder, terms, request, progress, stdin=stdin)
    else:
        indexed = index_texts(folder, terms, request)

    def search(queries: Queries | OutputFolder) -> tuple[Queries, list[QueryHits]]:
        assert isinstance(queries, Queries)
        found = search_terms(indexed, queries, request)
        if indexed.ids is not None:
            return queries, describe_input_hits(found.ranked, indexed.ids, queries)
        return queries, describe_hits(found, folder, queries, chunks=request.level == "chunk", view=view)

    return search
