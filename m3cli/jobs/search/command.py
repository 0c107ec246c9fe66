"""`m3 search`: queries against an encoded folder, exactly, to a ranking of its documents.

queries (texts, encoded here; or vectors) -> one pass over the folder -> hits -> TREC run, JSON lines or a table
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, get_args

from m3cli.config import ALL_OUTPUTS
from m3cli.corpus.streams import PeekableStream
from m3cli.errors import EXIT_DONE, EXIT_ROWS_SKIPPED, UsageError, count_noun
from m3cli.jobs.idle_flags import check_ignored_options
from m3cli.jobs.paths import check_paths
from m3cli.jobs.search.queries import Queries, encode_queries, open_queries, read_vectors
from m3cli.progress import Progress
from m3cli.records import Output, QueryHits
from m3cli.requests import Mode, SearchRequest
from m3cli.store.commit import check_writable
from m3cli.store.reader import OutputFolder, open_folder
from m3cli.store.results import open_ranking, ranking_format

CANDIDATES = 200
CANDIDATE_OUTPUTS: tuple[Output, ...] = ("dense", "sparse")
MOST_SHOWN = 20
"queries whose hits are a table on a terminal; of more it is a run"


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
        request: what was typed.
        progress: where words go.
        stdout: where the ranking goes without `out`.
        stdin: standard input, if the queries or the corpus come from there.
        show: what draws a table of a few queries in place of a run, on a terminal.

    Returns:
        the exit code: 0, or 3 if some rows are no queries.

    Raises:
        UsageError: flags that cannot be meant together, or a folder without what they need.
        CorpusError: no queries.
        ForeignFolder: the queries' model is another than the corpus'.
        OutputError: `out` cannot be written, found out before anything is read.
    """
    if request.queries == "-" and "-" in request.corpus_inputs:
        raise UsageError("--queries - with --input -: standard input can be read once; give one of them a file")
    kind = ranking_format(request.out, typed=request.format)
    files = [request.queries] if os.path.exists(request.queries) else []  # noqa: PTH110  False of words too long
    read: dict[str, Sequence[str | None]] = {
        "DIR": [request.folder],
        "--queries": files,
        "--input": request.corpus_inputs,
    }
    check_paths({"--out": request.out}, read, model=request.model)
    check_writable(request.out)
    folder = open_corpus(request, progress)
    mode = resolve_mode(request, folder)
    given = open_queries(request, progress=progress, stdin=stdin)
    if isinstance(given, OutputFolder):
        _check_text_options(request)
    began = time.perf_counter()
    drawn = show is not None and request.out is None and request.format is None
    shown = kind == "jsonl" or drawn
    queries, hits = _search(request, folder, mode, given, shown=shown, progress=progress, stdin=stdin)
    seconds = time.perf_counter() - began
    unfound = sum(not found.ids for found in hits)
    words = f"; {unfound:,} without a hit" if unfound else ""
    counted = f"{count_noun(len(hits), 'query', 'queries')}, {count_noun(folder.counts.chunks, 'row')}"
    progress.say(f"{mode}: {counted}, {seconds:.1f} s in all{words}")
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
    """Open the folder; one that holds no rows is refused."""
    folder = open_folder(Path(request.folder))
    if not folder.counts.chunks:
        raise UsageError(f"{request.folder}: nothing has been encoded there yet; run m3 encode")
    if folder.manifest is None:
        progress.say(f"{folder.path.name} is not complete: only what is encoded so far is searched")
    return folder


def resolve_mode(request: SearchRequest, folder: OutputFolder) -> Mode:
    """Return the mode: what was asked for, or hybrid where the folder has several outputs.

    Raises:
        UsageError: the folder lacks the output, or flags are for another mode.
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
    """Refuse flags that say how texts are read and encoded, where the queries are vectors."""
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
        typed, beside=f"--queries {request.queries}", reason="the queries of a folder are encoded already"
    )


def _check_vector_options(request: SearchRequest) -> None:
    """Refuse flags that say how queries are encoded, where their words are what counts."""
    typed = {
        "--query-prefix": request.query_prefix,
        "--max-query-length": request.max_query_length,
        "--dtype": request.dtype,
        "--device": request.device,
        "--max-batch-tokens": request.max_batch_tokens,
    }
    check_ignored_options(typed, beside="--mode bm25", reason="no model runs")
    if request.tokenizer == "plain":
        typed = {"--model": request.model, "--revision": request.revision}
        check_ignored_options(typed, beside="--tokenizer plain", reason="no checkpoint is read")


def outputs_of(folder: OutputFolder) -> tuple[Output, ...]:
    """Return what a folder has, in the order dense, sparse, colbert."""
    return folder.run.config.outputs


def _search(
    request: SearchRequest,
    folder: OutputFolder,
    mode: Mode,
    given: Queries | OutputFolder,
    *,
    shown: bool,
    progress: Progress,
    stdin: PeekableStream | None,
) -> tuple[Queries, list[QueryHits]]:
    if mode == "bm25":
        return _search_terms(request, folder, given, shown=shown, progress=progress, stdin=stdin)
    # torch: not before all that can be wrong with flags and folder has been said
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
        # Dense and sparse find candidates whatever they weigh; ColBERT, the dearest to read, only ranks them.
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
        queries = _embed(request, folder, given, outputs, progress)
        assert queries.embeddings is not None
        found = search_hybrid(target, queries.embeddings, blend)
    else:
        queries = _embed(request, folder, given, (mode,), progress)
        assert queries.embeddings is not None
        found = search_single(target, queries.embeddings, mode)
    return queries, describe_hits(found, folder, ids=queries.ids, texts=queries.texts, chunks=chunks, shown=shown)


def _resolve_sources(request: SearchRequest, outputs: tuple[Output, ...]) -> tuple[Output, ...]:
    """Return what candidates are found by.

    Raises:
        UsageError: the folder does not have it.
    """
    for output in request.candidates_by or ():
        if output not in outputs:
            raise UsageError(f"--candidates-by {output}: the folder has no {output}, only {', '.join(outputs)}")
    return request.candidates_by or tuple(output for output in CANDIDATE_OUTPUTS if output in outputs)


def _embed(
    request: SearchRequest,
    folder: OutputFolder,
    given: Queries | OutputFolder,
    outputs: tuple[Output, ...],
    progress: Progress,
) -> Queries:
    if isinstance(given, OutputFolder):
        return read_vectors(given, folder, outputs, progress)
    return encode_queries(given, folder, outputs, request, progress)


def _search_terms(
    request: SearchRequest,
    folder: OutputFolder,
    given: Queries | OutputFolder,
    *,
    shown: bool,
    progress: Progress,
    stdin: PeekableStream | None,
) -> tuple[Queries, list[QueryHits]]:
    from m3cli.jobs.search.bm25 import open_terms, search_input, search_texts  # noqa: PLC0415
    from m3cli.jobs.search.vectors import describe_hits  # noqa: PLC0415

    if isinstance(given, OutputFolder):
        raise UsageError("--mode bm25 searches words: give --queries a file of texts or the words of a query")
    terms = open_terms(folder, request)
    if request.corpus_inputs:
        return given, search_input(folder, given, terms, request, progress, stdin=stdin)
    found = search_texts(folder, given, terms, request)
    chunks = request.level == "chunk"
    return given, describe_hits(found, folder, ids=given.ids, texts=given.texts, chunks=chunks, shown=shown)
