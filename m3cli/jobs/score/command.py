"""`m3 score`: a table of scores of pairs, from texts by the model or from ids by encoded folders.

    pairs -> window -> scorer -> table            window by window, in the input's order

`TextScorer` scores texts, `FolderScorer` ids. Every row of the input is a row of the output. A row that cannot be
scored has empty scores and is counted; the exit code is then 3.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from m3cli.corpus.pairs import (
    Pair,
    PairColumns,
    PairSource,
    ReadRow,
    WindowLimits,
    cut_windows,
    find_pairs,
    make_pair,
    read_pairs,
    resolve_columns,
)
from m3cli.corpus.streams import PeekableStream
from m3cli.errors import EXIT_DONE, EXIT_ROWS_SKIPPED, UsageError, count_noun
from m3cli.jobs.paths import check_ignored_options, check_paths
from m3cli.progress import Progress
from m3cli.records import Output
from m3cli.requests import ScoreRequest
from m3cli.retrieval.scores import PARTS, Weights, check_weights, combine_scores, modes_of, parts_of
from m3cli.store.commit import check_writable
from m3cli.store.results import TableWriter, open_table, table_format

NOT_FINITE = "score is not a finite number"
_ROWS_NAMED = 5
_MESSAGE_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowScores:
    """Scores of a window of W pairs."""

    scores: dict[Output, NDArray[np.float32]]
    "[W] each; NaN for a pair with a fault"
    faults: list[str]
    "[W], empty for a pair with scores"


class Scorer(Protocol):
    """Source of the scores of a window's pairs."""

    outputs: tuple[Output, ...]
    "available outputs"
    limits: WindowLimits
    ids: bool
    "whether pairs are ids instead of texts"

    def load(self, wanted: Sequence[Output]) -> None:
        """Load the model or vectors for these outputs."""

    def score_window(self, window: Sequence[Pair]) -> WindowScores:
        """Score the pairs of a window."""

    def describe(self) -> str:
        """Return what was read or encoded, for the last message."""


@dataclass(slots=True)
class ScoreTally:
    """Number of pairs, and the faults of those without scores."""

    pairs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    rows: dict[str, list[int]] = field(default_factory=dict)
    "the first few rows of each fault"

    def add(self, window: Sequence[Pair], faults: Sequence[str]) -> None:
        """Count a window."""
        self.pairs += len(window)
        for pair, fault in zip(window, faults, strict=True):
            if fault:
                self.faults[fault] += 1
                rows = self.rows.setdefault(fault, [])
                if len(rows) < _ROWS_NAMED:
                    rows.append(pair.number)

    def describe(self) -> str:
        """Return how many rows have no scores and why."""
        reasons = ", ".join(
            f"{count:,} {fault} ({self._name_rows(fault)})" for fault, count in self.faults.most_common()
        )
        return f"{self.faults.total():,} of {count_noun(self.pairs, 'row has', 'rows have')} no scores: {reasons}"

    def _name_rows(self, fault: str) -> str:
        rows = self.rows[fault]
        more = ", ..." if self.faults[fault] > len(rows) else ""
        return f"row{'s' if len(rows) > 1 else ''} {', '.join(f'{row:,}' for row in rows)}{more}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPairs:
    """A pairs file and its columns, or one pair of texts."""

    source: PairSource | None
    "None: the pair was typed"
    columns: PairColumns
    typed: dict[str, str]
    "the pair by column"

    def read(self, *, ids: bool, stdin: PeekableStream | None) -> Iterator[Pair]:
        """Yield the pairs."""
        if self.source is None:
            return iter((make_pair(1, ReadRow(row=self.typed), self.columns, ids=ids),))
        return read_pairs(self.source, self.columns, ids=ids, stdin=stdin)


Show = Callable[[PairColumns, Sequence[str]], TableWriter]
"takes the columns and the names of the scores"


def score_pairs(
    request: ScoreRequest,
    *,
    progress: Progress,
    stdout: BinaryIO,
    stdin: PeekableStream | None = None,
    show: Show | None = None,
) -> int:
    """Score every pair of a file, or the two texts that were typed.

    Args:
        request: the options.
        progress: messages and progress bar.
        stdout: output of the table without `out`.
        stdin: standard input, if pairs are read from it.
        show: opens the table that is shown without `out`, on a terminal.

    Returns:
        the exit code: 0, or 3 if some rows have no scores.

    Raises:
        UsageError: options conflict, or the weights sum to 0.
        CorpusError: the pairs cannot be read.
        ModelError: the checkpoint has no head for a mode.
        OutputError: `out` cannot be written; raised before anything is scored.
    """
    read: dict[str, Sequence[str | None]] = {
        "PAIRS": [request.pairs] if request.passage is None else [],
        "--queries": [request.queries],
        "--corpus": [request.corpus],
    }
    check_paths({"--out": request.out}, read, model=request.model)
    pairs = open_pairs(request, progress, ids=request.queries is not None, stdin=stdin)
    table_format(request.out)
    check_writable(request.out)
    if request.modes is not None:
        check_weights(request.modes, request.weights)
    scorer = open_scorer(request, progress)
    modes = resolve_modes(request, scorer.outputs)
    check_weights(modes, request.weights)
    columns, began = pairs.columns, time.perf_counter()
    with (
        nullcontext(show(columns, modes))
        if show is not None and request.out is None
        else open_table(request.out, stdout, columns=columns.names, schema=columns.schema, score_names=modes)
    ) as table:
        scorer.load(parts_of(modes))
        if not scorer.ids:
            progress.start(shards_todo=None)  # the bar counts tokens
        try:
            rows = pairs.read(ids=scorer.ids, stdin=stdin)
            tally = write_scores(rows, scorer, table, modes, weights=request.weights, progress=progress)
        finally:
            progress.stop()
    seconds = time.perf_counter() - began
    rate = tally.pairs / max(seconds, 1e-9)
    progress.say(
        f"{count_noun(tally.pairs, 'pair')} in {seconds:.1f} s ({rate:,.0f}/s, loading included): {scorer.describe()}"
    )
    if table.cleaned:
        progress.say(f"{count_noun(table.cleaned, 'cell')} had tabs or line breaks, which TSV cannot hold: now blanks")
    if tally.faults:
        progress.say(tally.describe())
    return EXIT_ROWS_SKIPPED if tally.faults else EXIT_DONE


def write_scores(
    rows: Iterator[Pair],
    scorer: Scorer,
    table: TableWriter,
    modes: Sequence[str],
    *,
    weights: Weights,
    progress: Progress,
) -> ScoreTally:
    """Score window after window and append each to the table."""
    tally = ScoreTally()
    began = reported = time.perf_counter()
    for window in cut_windows(rows, scorer.limits):
        scores, faults = finish_scores(scorer.score_window(window), modes, weights=weights)
        table.append(
            [pair.row for pair in window],
            scores,
            raws=[pair.raw for pair in window],
            batches=[pair.batch for pair in window],
        )
        tally.add(window, faults)
        if scorer.ids and time.perf_counter() - reported > _MESSAGE_SECONDS:
            reported = time.perf_counter()
            progress.say(f"{count_noun(tally.pairs, 'pair')} so far, {tally.pairs / (reported - began):,.0f}/s")
    return tally


def open_pairs(request: ScoreRequest, progress: Progress, *, ids: bool, stdin: PeekableStream | None) -> OpenPairs:
    """Find the pairs file and its columns."""
    if (request.queries is None) != (request.corpus is None):
        option, missing = ("--queries", "--corpus") if request.queries is not None else ("--corpus", "--queries")
        raise UsageError(f"{option} without {missing}: pairs of ids need both folders (they may be the same)")
    _check_options(request)
    if request.passage is not None:
        return _open_typed(request, progress)
    source = find_pairs(request.pairs, input_format=request.input_format, stdin=stdin)
    if source.format == "trec" and not ids:
        raise UsageError(f"{request.pairs} is a TREC run, which holds ids: give --queries DIR and --corpus DIR")
    columns = resolve_columns(
        source, query_field=request.query_field, passage_field=request.passage_field, ids=ids, stdin=stdin
    )
    return OpenPairs(source=source, columns=columns, typed={})


def _open_typed(request: ScoreRequest, progress: Progress) -> OpenPairs:
    """Return the pair of a query and a passage that were typed."""
    typed = {
        "--query-field": request.query_field,
        "--passage-field": request.passage_field,
        "--input-format": None if request.input_format == "auto" else request.input_format,
    }
    check_ignored_options(typed, other="PASSAGE", reason="no file of pairs is read")
    if os.path.exists(request.pairs):  # noqa: PTH110  False for texts longer than a path
        progress.say(f"scoring the words {request.pairs!r}; for the pairs of that file: m3 score {request.pairs}")
    columns = PairColumns(names=("query", "passage"), query="query", passage="passage", header=False, schema=None)
    return OpenPairs(source=None, columns=columns, typed={"query": request.pairs, "passage": request.passage or ""})


def _check_options(request: ScoreRequest) -> None:
    if request.queries is None:
        check_ignored_options(
            {"--chunks": request.chunks}, other="pairs of texts", reason="only documents of folders have chunks"
        )
        return
    typed = {
        "--model": request.model,
        "--revision": request.revision,
        "--dtype": request.dtype,
        "--device": request.device,
        "--max-batch-tokens": request.max_batch_tokens,
        "--max-query-length": request.max_query_length,
        "--max-passage-length": request.max_passage_length,
    }
    check_ignored_options(
        typed, other=f"--queries {request.queries}", reason="the vectors of folders are there already"
    )


def open_scorer(request: ScoreRequest, progress: Progress) -> Scorer:
    """Return a scorer of folders if they are given, else of the model."""
    if request.queries is not None:
        from m3cli.jobs.score.from_folders import FolderScorer  # noqa: PLC0415  without torch

        return FolderScorer(request, progress)
    from m3cli.jobs.score.from_texts import TextScorer  # noqa: PLC0415

    return TextScorer(request, progress)


def resolve_modes(request: ScoreRequest, outputs: Sequence[Output]) -> tuple[str, ...]:
    """Return --modes, or all modes of the outputs; raise UsageError for a mode without its outputs."""
    if request.modes is None:
        return modes_of(outputs)
    for mode in request.modes:
        missing = [part for part in PARTS[mode] if part not in outputs]
        if missing:
            raise UsageError(f"--modes {mode}: {missing[0]} is missing here, only {', '.join(outputs)}")
    return request.modes


def finish_scores(
    window: WindowScores, modes: Sequence[str], *, weights: Weights
) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Add the weighted scores; a pair with a score that is not finite has none."""
    scores = combine_scores(window.scores, modes, weights=weights)
    finite = np.ones(len(window.faults), np.bool_)
    for values in scores.values():
        finite &= np.isfinite(values)
    faults = [fault or ("" if good else NOT_FINITE) for fault, good in zip(window.faults, finite, strict=True)]
    bad = np.array([bool(fault) for fault in faults], np.bool_)
    return {mode: np.where(bad, np.float32(np.nan), values) for mode, values in scores.items()}, faults


def number_distinct(values: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the distinct values in order of first occurrence, and the index of each value among them."""
    numbers: dict[str, int] = {}
    indices = np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)
    return list(numbers), indices
