"""`m3 rerank`: rank the best documents of a run again with a cross-encoder.

    run -> window of queries -> passages by id, tokenised once -> pairs of some queries -> logits -> run

The tokens of a window's candidates are in memory (`HELD_TOKENS`); the corpus is read once per window. Pairs are sorted
by length and packed `GROUP_PAIRS` at a time. A candidate without text is not in the new run and is counted; the exit
code is then 3.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from m3cli.config import DEFAULT_RERANKER, FieldFlags
from m3cli.corpus.fields import kept_schema, resolve_fields
from m3cli.corpus.plan import plan_shards
from m3cli.corpus.reader import read_shards
from m3cli.corpus.sources import find_sources
from m3cli.corpus.streams import PeekableStream
from m3cli.corpus.trec import read_run
from m3cli.encoder import device as machine
from m3cli.encoder.encode import TokenisedTexts, pack_texts, tokenise_texts
from m3cli.encoder.reranker import PAIR_SPECIALS, Reranker, join_pair, load_reranker, score_batches
from m3cli.encoder.tokenizer import Tokenizer, load_tokenizer
from m3cli.errors import EXIT_DONE, EXIT_ROWS_SKIPPED, CorpusError, UsageError, check_reachable, count_noun
from m3cli.jobs.encode.resolve import open_checkpoint
from m3cli.jobs.paths import check_paths
from m3cli.progress import Progress
from m3cli.records import QueryHits, Rankings
from m3cli.requests import RerankRequest
from m3cli.store.commit import check_writable, publish_outside
from m3cli.store.lookup import iter_passages
from m3cli.store.reader import open_folder
from m3cli.store.results import JsonRanking, ranking_format

DEFAULT_LENGTH = 1024
"tokens of a pair"
HELD_TOKENS = 64 << 20
"of the candidates' passages, 4 bytes each"
GROUP_PAIRS = 4096
"pairs that are sorted and scored together"
TAG = "m3-rerank"
_TEXTS = 512
"tokenised together"
_NUM_EXAMPLES = 3

Ids = NDArray[np.int32]


@dataclass(slots=True)
class _Tally:
    """Counts of pairs, tokens, truncations and candidates without a score."""

    pairs: int = 0
    tokens: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    "truncated queries, and pairs with a truncated passage"
    faults: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    "the first few ids of each fault"

    def note(self, fault: str, identifier: str, *, count: int = 1) -> None:
        """Count candidates that have no score."""
        self.faults[fault] += count
        examples = self.named.setdefault(fault, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(identifier)

    def describe_faults(self) -> str:
        """Return how many candidates are not in the new run and why."""
        reasons = ", ".join(
            f"{count:,} {fault} (such as {', '.join(self.named[fault])})" for fault, count in self.faults.most_common()
        )
        return f"{count_noun(self.faults.total(), 'candidate is', 'candidates are')} not in the new run: {reasons}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    """Model, limits and counts of a run."""

    tokenizer: Tokenizer
    reranker: Reranker
    max_length: int
    max_batch_tokens: int
    progress: Progress
    tally: _Tally
    format: str
    "of the output, trec or jsonl"
    texts: dict[str, str] = field(default_factory=dict)
    "of the queries, by id"


def rerank_run(
    request: RerankRequest, *, progress: Progress, stdout: BinaryIO, stdin: PeekableStream | None = None
) -> int:
    """Score the best candidates of each query with a cross-encoder and write a run.

    Returns:
        the exit code: 0, or 3 if candidates have no score.

    Raises:
        UsageError: options conflict, or `out` has an unknown suffix or is also read.
        CorpusError: run, queries or corpus cannot be read, or have no ids in common.
        ModelError: the checkpoint is not a cross-encoder.
        OutputError: `out` cannot be written; raised before anything is read.
    """
    read: dict[str, Sequence[str | None]] = {
        "RUN": [request.run],
        "--queries": [request.queries],
        "--corpus": [request.corpus],
    }
    check_paths({"--out": request.out}, read, model=request.model)
    kind = ranking_format(request.out)
    check_writable(request.out)
    checkpoint = open_checkpoint(request.model or DEFAULT_RERANKER, request.revision, heads=False)
    max_length = request.max_length or min(DEFAULT_LENGTH, checkpoint.max_length)
    if max_length > checkpoint.max_length:
        raise UsageError(f"--max-length {max_length}: {checkpoint.name} holds at most {checkpoint.max_length} tokens")
    rankings = read_run(request.run, stdin=stdin, top_k=request.top_k)
    began = time.perf_counter()
    device = machine.resolve_device(request.device)
    dtype = machine.resolve_dtype(request.dtype, device)
    setup = _Setup(
        tokenizer=load_tokenizer(checkpoint),
        reranker=load_reranker(checkpoint, device=device, dtype=dtype),
        max_length=max_length,
        max_batch_tokens=request.max_batch_tokens or machine.auto_batch_tokens(device),
        progress=progress,
        tally=_Tally(),
        format=kind,
    )
    progress.say(f"{checkpoint.name}, {dtype} on {device}, pairs of up to {max_length:,} tokens")
    with _open_output(request.out, stdout) as output:
        progress.start(shards_todo=None)
        try:
            _rerank(rankings, request, setup, output)
        finally:
            progress.stop()
    tally, seconds = setup.tally, time.perf_counter() - began
    progress.say(
        f"{count_noun(tally.pairs, 'pair')}, {count_noun(tally.tokens, 'token')} in {seconds:.1f} s, loading included; "
        f"truncated: {count_noun(tally.cut['queries'], 'query', 'queries')}, "
        f"the passages of {count_noun(tally.cut['pairs'], 'pair')}"
    )
    if tally.faults:
        progress.say(tally.describe_faults())
    return EXIT_ROWS_SKIPPED if tally.faults else EXIT_DONE


@contextmanager
def _open_output(out: str | None, stdout: BinaryIO) -> Iterator[BinaryIO]:
    if out is None or out == "-":
        yield stdout
    else:
        with publish_outside(Path(out).absolute()) as file:
            yield file


def _rerank(rankings: Rankings, request: RerankRequest, setup: _Setup, output: BinaryIO) -> None:
    queries = _read_queries(rankings, request, setup)
    finish = _sigmoid if request.normalise else float
    for window in _cut_windows({query: rankings[query] for query in queries}, setup.max_length):
        wanted = {document for query in window for document in rankings[query]}
        passages = dict(_tokenise(_corpus_texts(request).find_texts(wanted), setup, max_length=setup.max_length)[0])
        for group in _cut_groups(window, rankings):
            candidates = {query: _keep_known(query, rankings[query], passages, setup.tally) for query in group}
            scored = _score_group(candidates, queries, passages, setup)
            for query, scores in scored.items():
                ranked = [(name, finish(logit)) for name, logit in sorted(scores, key=lambda entry: -entry[1])]
                _write_query(output, query, ranked, setup)
            output.flush()
    if not setup.tally.pairs:
        raise CorpusError(
            f"--corpus {request.corpus} has none of the documents of {request.run} "
            f"(such as {next(iter(next(iter(rankings.values()))))[:60]!r}); give the corpus that was searched"
        )


def _query_texts(request: RerankRequest) -> TextSource:
    return TextSource(
        given=request.queries,
        flag="--queries",
        id_field=request.query_id_field,
        text_field=request.query_field,
        title_field="",
        field_flags=FieldFlags(text="--query-field", id="--query-id-field", format=None),
    )


def _corpus_texts(request: RerankRequest) -> TextSource:
    return TextSource(
        given=request.corpus,
        flag="--corpus",
        id_field=request.id_field,
        text_field=request.text_field,
        title_field=request.title_field,
        title_sep=request.title_sep,
    )


def _read_queries(rankings: Rankings, request: RerankRequest, setup: _Setup) -> dict[str, Ids]:
    """Return the token ids of the run's queries, in the run's order."""
    longest = setup.max_length * 3 // 4 + 2  # without <s> and </s>, as in FlagEmbedding
    longest = min(longest, setup.max_length - PAIR_SPECIALS)
    setup.texts.update(_query_texts(request).find_texts(rankings))
    pairs, truncated = _tokenise(iter(setup.texts.items()), setup, max_length=longest)
    setup.tally.cut["queries"] = truncated
    found = dict(pairs)
    if not found:
        raise CorpusError(
            f"--queries {request.queries} has none of the queries of {request.run} "
            f"(such as {next(iter(rankings))[:60]!r}); give the queries that were searched for"
        )
    for query in rankings:
        if query not in found:
            setup.tally.note("of a query without text", query, count=len(rankings[query]))
    return {query: found[query] for query in rankings if query in found}


def _tokenise(texts: Iterator[tuple[str, str]], setup: _Setup, *, max_length: int) -> tuple[list[tuple[str, Ids]], int]:
    """Tokenise and truncate texts; return ids with tokens, and the number of truncated texts."""
    made: list[tuple[str, Ids]] = []
    truncated = 0
    while some := list(islice(texts, _TEXTS)):
        tokenised = tokenise_texts([text for _, text in some], setup.tokenizer, max_length=max_length)
        truncated += tokenised.truncated
        made += zip((name for name, _ in some), tokenised.input_ids, strict=True)
    return made, truncated


def _cut_windows(rankings: Rankings, max_length: int) -> Iterator[list[str]]:
    """Split queries into windows whose candidates fit into memory."""
    window: list[str] = []
    documents: set[str] = set()
    for query, ranking in rankings.items():
        if window and len(documents | ranking.keys()) * max_length > HELD_TOKENS:
            yield window
            window, documents = [], set()
        window.append(query)
        documents |= ranking.keys()
    if window:
        yield window


def _cut_groups(window: Sequence[str], rankings: Rankings) -> Iterator[list[str]]:
    group: list[str] = []
    num_pairs = 0
    for query in window:
        group.append(query)
        num_pairs += len(rankings[query])
        if num_pairs >= GROUP_PAIRS:
            yield group
            group, num_pairs = [], 0
    if group:
        yield group


def _keep_known(query: str, ranking: Mapping[str, float], passages: Mapping[str, Ids], tally: _Tally) -> list[str]:
    for document in ranking.keys() - passages.keys():
        tally.note("without text", f"{document} of query {query}")
    return [document for document in ranking if document in passages]


def _score_group(
    candidates: Mapping[str, Sequence[str]], queries: Mapping[str, Ids], passages: Mapping[str, Ids], setup: _Setup
) -> dict[str, list[tuple[str, float]]]:
    """Return the scored candidates of each query, in the previous order."""
    names = [(query, document) for query, documents in candidates.items() for document in documents]
    joined = [join_pair(queries[query], passages[name], max_length=setup.max_length) for query, name in names]
    logits = np.full(len(names), np.nan, np.float32)
    pairs = TokenisedTexts(input_ids=tuple(ids for ids, _ in joined), truncated=sum(cut for _, cut in joined))
    num_tokens = pairs.num_tokens
    for made in score_batches(setup.reranker, pack_texts(pairs, max_batch_tokens=setup.max_batch_tokens)):
        logits[made.rows] = made.values
        tokens = int(num_tokens[made.rows].sum())
        setup.progress.advance(documents=len(made.rows), tokens=tokens, shards=0.0)
        setup.tally.tokens += tokens
    setup.tally.pairs += len(names)
    setup.tally.cut["pairs"] += pairs.truncated
    scored: dict[str, list[tuple[str, float]]] = {query: [] for query in candidates}
    for (query, document), logit in zip(names, logits.tolist(), strict=True):
        if np.isfinite(logit):
            scored[query].append((document, logit))
        else:
            setup.tally.note("whose score is not a finite number, try --dtype float32", f"{document} of query {query}")
    return scored


def _write_query(output: BinaryIO, query: str, ranked: list[tuple[str, float]], setup: _Setup) -> None:
    """Write the documents of a query, best first."""
    if setup.format == "jsonl":
        JsonRanking(output).write([_describe_query(query, ranked, text=setup.texts[query])])
        return
    output.writelines(
        f"{query}\tQ0\t{document}\t{rank}\t{score:.9g}\t{TAG}\n".encode()
        for rank, (document, score) in enumerate(ranked, start=1)
    )


def _describe_query(query: str, ranked: list[tuple[str, float]], *, text: str) -> QueryHits:
    return QueryHits(
        query=query,
        text=text,
        ids=tuple(name for name, _ in ranked),
        scores=np.array([score for _, score in ranked], np.float32),
        parts={},
        chunk_index=None,
        char_start=None,
        char_end=None,
        texts=(None,) * len(ranked),
    )


def _sigmoid(logit: float) -> float:
    return float(1 / (1 + np.exp(-np.float64(logit))))


_FLAGS = FieldFlags(format=None)
_SHARD_BYTES = 8 << 20
"of text in memory while ids are looked up"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """File or folder of texts; fields as in `m3 encode`, None: detect."""

    given: str
    flag: str
    "option, for messages"
    id_field: str | None = None
    text_field: str | None = None
    title_field: str | None = None
    title_sep: str = "\n"
    field_flags: FieldFlags = _FLAGS
    "for messages"

    def find_texts(self, wanted: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield id and text of each wanted document that exists; the first one of an id.

        Raises:
            UsageError: standard input, which cannot be read twice, or a folder without texts.
            CorpusError: a file cannot be read.
        """
        if self.given == "-":
            raise UsageError(f"{self.flag} -: texts are looked up by id, more than once; give a file or a folder")
        check_reachable(Path(self.given, "_m3"), CorpusError)
        remaining = set(wanted)
        is_folder = Path(self.given, "_m3").is_dir()
        for name, text in self._iter_folder(remaining) if is_folder else self._iter_files(remaining):
            if name in remaining:
                remaining.remove(name)
                yield name, text
            if not remaining:
                return

    def _iter_folder(self, wanted: Collection[str]) -> Iterator[tuple[str, str]]:
        yield from iter_passages(open_folder(Path(self.given)), wanted)

    def _iter_files(self, wanted: Collection[str]) -> Iterator[tuple[str, str]]:
        sources = find_sources([self.given], format_flag=self.field_flags.format)
        fields = resolve_fields(
            sources,
            id_field=self.id_field,
            text_field=self.text_field,
            title_field=self.title_field,
            flags=self.field_flags,
        )
        if fields.id is None:
            raise UsageError(
                f"{self.flag} {self.given}: its rows have no field with a known name for ids; "
                f"name it with {self.field_flags.id}"
            )
        shards = read_shards(
            sources,
            plan=plan_shards(sources, fields=fields, shard_size=_SHARD_BYTES),
            fields=fields,
            schema=kept_schema(sources, fields),
            title_sep=self.title_sep,
            ask=lambda _: "read",
        )
        for shard in shards:
            for document in shard.documents:
                if document.id in wanted:
                    yield document.id, document.text
