"""Searches over folders of both formats against a naive ranking in float64, and which rows they read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3cli.config import ALL_OUTPUTS
from m3cli.errors import CorpusError, ForeignFolder, UsageError
from m3cli.jobs.search.command import search_corpus
from m3cli.progress import Progress
from m3cli.records import Embeddings, Output
from m3cli.requests import SearchRequest
from m3cli.retrieval import scan as kernels
from m3cli.retrieval.scores import score_rows as score_pairs
from m3cli.store import parquet
from m3cli.store.folder import open_run_folder
from m3cli.store.lookup import iter_blocks
from m3cli.store.reader import iter_parts, open_folder
from tests.store import samples

Parts = dict[str, np.ndarray]


@dataclass(frozen=True)
class Written:
    """Rows of a folder: ids, and outputs as float64."""

    ids: list[str]
    chunk_index: list[int]
    dense: np.ndarray
    sparse: np.ndarray
    colbert: list[np.ndarray]


def write_folder(
    root: Path,
    shards: list[list[tuple[str, int]]],
    *,
    seed: int,
    format: Any = "parquet",  # noqa: A002
    outputs: tuple[Output, ...] = ALL_OUTPUTS,
    finish: bool = True,
    model: str = "1",
) -> Written:
    """Write shards of documents; a document is an id and its number of chunks."""
    ids: list[str] = []
    index: list[int] = []
    made: list[Embeddings] = []
    random = np.random.default_rng(seed)
    run = samples.make_run(outputs=outputs, keep_text=True)
    with open_run_folder(root) as folder:
        folder.write_run(replace(run, checkpoint=replace(run.checkpoint, hashes={"config.json": model})))
        for number, documents in enumerate(shards):
            text = samples.make_text(number, documents=len(documents))
            named = tuple(replace(each, id=name) for each, (name, _) in zip(text.documents, documents, strict=True))
            text = replace(text, documents=named)
            chunks = samples.make_chunks(
                text, lengths=[random.integers(2, 6, count).tolist() for _, count in documents]
            )
            made.append(samples.make_embeddings(chunks, seed=seed + number, outputs=outputs))
            form = samples.make_form(format, outputs=outputs, keep_text=True)
            with folder.open_shard(form=form, text=text, chunks=chunks, source="s") as writer:
                writer.append(made[-1])
                folder.commit(writer.finish())
            ids += [name for name, count in documents for _ in range(count)]
            index += [chunk for _, count in documents for chunk in range(count)]
        if finish:
            folder.write_manifest(len(shards))
    return Written(ids=ids, chunk_index=index, **_as_float64(made))


def _as_float64(made: list[Embeddings]) -> dict[str, Any]:
    dense, sparse, colbert = [np.empty((0, samples.DIM))], [np.empty((0, samples.VOCABULARY))], []
    for part in made:
        if part.dense_vecs is not None:
            dense.append(part.dense_vecs.astype(float))
        if (weights := part.lexical_weights) is not None:
            for first, last in zip(weights.indptr, weights.indptr[1:], strict=False):
                row = np.zeros((1, samples.VOCABULARY))
                row[0, weights.indices[first:last]] = weights.values[first:last]
                sparse.append(row)
        if (matrices := part.colbert_vecs) is not None:
            pairs = zip(matrices.indptr, matrices.indptr[1:], strict=False)
            colbert += [matrices.vectors[first:last].astype(float) for first, last in pairs]
    return {"dense": np.concatenate(dense), "sparse": np.concatenate(sparse), "colbert": colbert}


def score_rows(queries: Written, corpus: Written, query: int) -> Parts:
    """Return the scores of one query and all rows, by output."""
    return {
        "dense": corpus.dense @ queries.dense[query],
        "sparse": corpus.sparse @ queries.sparse[query],
        "colbert": np.array([(queries.colbert[query] @ each.T).max(axis=1).mean() for each in corpus.colbert]),
    }


def roll_up(scores: np.ndarray, ids: list[str]) -> dict[str, float]:
    """Return the best score of each id, best first, equal scores in corpus order."""
    best: dict[str, float] = {}
    for row in sorted(range(len(ids)), key=lambda row: (-scores[row], row)):
        best.setdefault(ids[row], float(scores[row]))
    return best


def rank_naively(
    parts: Parts,
    ids: list[str],
    mode: str,
    *,
    candidates: int = 200,
    fusion: str = "weighted",
    weights: tuple[float, float, float] = (1, 1, 1),
) -> Any:
    documents = {output: roll_up(values, ids) for output, values in parts.items()}
    documents["sparse"] = {name: score for name, score in documents["sparse"].items() if score > 0}
    if mode != "hybrid":
        return documents[mode]
    lists = {output: list(documents[output])[:candidates] for output in ("dense", "sparse")}
    chosen = {name for found in lists.values() for name in found}
    colbert = [name for name in documents["colbert"] if name in chosen]
    lists["colbert"] = colbert[:candidates]
    if fusion == "rrf":
        fused = {n: sum(1 / (61 + each.index(n)) for each in lists.values() if n in each) for n in chosen}
    else:
        by_output = dict(zip(ALL_OUTPUTS, weights, strict=True))
        fused = {
            name: sum(weight * documents[output].get(name, 0.0) for output, weight in by_output.items()) / sum(weights)
            for name in chosen
        }
    return dict(sorted(fused.items(), key=lambda item: -item[1]))


def run_search(folder: Path, queries: Path | str, **typed: Any) -> tuple[int, list[dict[str, Any]], str]:
    """Run a search; return its exit code, hits and messages."""
    said, out = io.StringIO(), folder.parent / "found.jsonl"
    device = None if typed.get("mode") == "bm25" else "cpu"
    request = SearchRequest(folder=str(folder), queries=str(queries), out=str(out), device=device, **typed)
    code = search_corpus(request, progress=Progress("log", stream=said), stdout=io.BytesIO())
    return code, [json.loads(line) for line in out.read_text().splitlines()], said.getvalue()


def check_hits(found: dict[str, Any], expected: dict[str, float], *, top_k: int) -> None:
    """Check ids and scores, and their order except for scores that are equal in float32."""
    ranked = list(expected.items())[:top_k]
    hits = found["hits"]
    assert [hit["score"] for hit in hits] == pytest.approx([score for _, score in ranked], abs=1e-4)
    assert [hit["rank"] for hit in hits] == list(range(1, len(ranked) + 1))
    edge = ranked[-1][1] if ranked else 0.0
    clear = {name for name, score in ranked if score > edge + 1e-4}
    assert clear <= {hit["id"] for hit in hits}
    assert all(expected[hit["id"]] == pytest.approx(hit["score"], abs=1e-4) for hit in hits)
    assert len({hit["id"] for hit in hits}) == len(hits)


DOCUMENTS = st.lists(
    st.lists(st.tuples(st.sampled_from("abcdefghijklmnop"), st.integers(1, 4)), max_size=8), min_size=1, max_size=3
).filter(any)


@pytest.mark.parametrize("mode", ["dense", "sparse", "colbert", "hybrid", "rrf"])
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=DOCUMENTS,
    seed=st.integers(0, 2**20),
    format=st.sampled_from(["parquet", "npy"]),
    group=st.sampled_from([200, 64 << 20]),
    top_k=st.integers(1, 12),
    candidates=st.sampled_from([2, 200]),
)
def test_search_is_the_naive_ranking(
    tmp_path_factory: pytest.TempPathFactory,
    mode: str,
    shards: list[list[tuple[str, int]]],
    seed: int,
    format: str,  # noqa: A002
    group: int,
    top_k: int,
    candidates: int,
) -> None:
    root = tmp_path_factory.mktemp("search")
    with (
        mock.patch.object(parquet, "ROW_GROUP_BYTES", group),
        mock.patch.object(kernels, "MIN_ROWS", 2),
        mock.patch("os.fsync"),  # nothing here needs to last
    ):
        corpus = write_folder(root / "c.m3", shards, seed=seed, format=format)
        queries = write_folder(root / "q.m3", [[("q0", 1), ("q1", 1)], [("q2", 1)]], seed=seed + 100)
        typed: dict[str, Any] = {} if mode not in ("hybrid", "rrf") else {"candidates": candidates}
        if mode == "rrf":
            typed["fusion"] = "rrf"
        asked = "hybrid" if mode == "rrf" else mode
        code, found, _ = run_search(root / "c.m3", root / "q.m3", mode=asked, top_k=top_k, **typed)
    assert code == 0
    assert [each["id"] for each in found] == ["q0", "q1", "q2"]
    for number, each in enumerate(found):
        parts = score_rows(queries, corpus, number)
        expected = rank_naively(
            parts, corpus.ids, asked, candidates=candidates, fusion="rrf" if mode == "rrf" else "weighted"
        )
        check_hits(each, expected, top_k=top_k)


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., Path]:
    """Write a corpus of 3 shards, with documents of 1 to 3 chunks and one id twice, and 3 queries."""

    def write(format: str = "parquet", **options: Any) -> Path:  # noqa: A002
        shards = [[(f"d{shard}{number}", 1 + number % 3) for number in range(5)] for shard in range(3)]
        shards[2][0] = ("d00", 2)
        write_folder(tmp_path / "c.m3", shards, seed=3, format=format, **options)
        write_folder(tmp_path / "q.m3", [[("q0", 1), ("q1", 1), ("long", 3)]], seed=9, **options)
        return tmp_path

    return write


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_hits_have_spans(folders: Callable[..., Path], format: str) -> None:  # noqa: A002
    root = folders(format)
    _, found, said = run_search(root / "c.m3", root / "q.m3", mode="hybrid", top_k=5)
    hit = found[0]["hits"][0]
    assert set(hit) == {"id", "rank", "score", "scores", "chunk_index", "char_start", "char_end", "snippet"}
    assert hit["score"] == pytest.approx(np.mean([hit["scores"][output] for output in ALL_OUTPUTS]), abs=1e-5)
    shard, place = int(hit["id"][1]), int(hit["id"][2])
    whole = samples.make_text(shard, documents=5).documents[place].text
    assert hit["snippet"] == whole[hit["char_start"] : hit["char_end"]]
    assert found[0]["query"] is None
    assert "1 query of q.m3 has several chunks: only the first is searched with" in said


def test_a_run_reads_no_texts_and_no_spans(folders: Callable[..., Path]) -> None:
    root = folders()
    read: list[list[str]] = []
    real = iter_parts

    def watched(*given: Any, **named: Any) -> Iterator[Any]:
        read.append(list(named["columns"]))
        return real(*given, **named)

    request = SearchRequest(folder=str(root / "c.m3"), queries=str(root / "q.m3"), device="cpu")
    stdout = io.BytesIO()
    with mock.patch("m3cli.store.lookup.iter_parts", watched):
        assert search_corpus(request, progress=Progress("none"), stdout=stdout) == 0
    assert stdout.getvalue().startswith(b"q0 Q0 d")
    assert {name for names in read for name in names} == {"id", "chunk_index"}


def test_only_the_start_of_texts_is_in_memory(folders: Callable[..., Path]) -> None:
    root = folders()
    with mock.patch("m3cli.jobs.search.vectors.SNIPPET_LENGTH", 3):
        _, found, _ = run_search(root / "c.m3", root / "q.m3", mode="dense", top_k=1)
    assert len(found[0]["hits"][0]["snippet"]) == 3


def test_fewer_candidates_than_hits_are_reported(folders: Callable[..., Path]) -> None:
    root = folders()
    _, found, said = run_search(root / "c.m3", root / "q.m3", candidates=2, top_k=5)
    assert "--candidates 2: at most 4 hits of a query are ranked, not --top-k 5" in said
    assert all(len(each["hits"]) <= 4 for each in found)
    assert "at most" not in run_search(root / "c.m3", root / "q.m3", candidates=3, top_k=5)[2]


def test_chunks_as_hits(folders: Callable[..., Path]) -> None:
    root = folders()
    _, documents, _ = run_search(root / "c.m3", root / "q.m3", mode="dense")
    _, chunks, _ = run_search(root / "c.m3", root / "q.m3", mode="dense", level="chunk")
    rows = sum(each.rows.num_rows for each in iter_parts(open_folder(root / "c.m3"), outputs=()))
    for whole, parts in zip(documents, chunks, strict=True):
        assert len(whole["hits"]) == 14
        assert len(parts["hits"]) == rows - 1, "d00 is there twice, and so is its first chunk"
        assert len({hit["id"] for hit in parts["hits"]}) == rows - 1, "a run has each name once"
        assert parts["hits"][0]["id"] == f"{whole['hits'][0]['id']}#{whole['hits'][0]['chunk_index']}"


def test_equal_scores_come_in_corpus_order(folders: Callable[..., Path], tmp_path: Path) -> None:
    root = folders()
    real = iter_parts

    def all_alike(*given: Any, **named: Any) -> Iterator[Any]:
        for part in real(*given, **named):
            dense = part.embeddings.dense_vecs
            yield replace(part, embeddings=replace(part.embeddings, dense_vecs=None if dense is None else dense * 0))

    with mock.patch("m3cli.store.lookup.iter_parts", all_alike):
        _, found, _ = run_search(root / "c.m3", root / "q.m3", mode="dense", top_k=7)
    assert [hit["id"] for hit in found[0]["hits"]] == ["d00", "d01", "d02", "d03", "d04", "d10", "d11"]


def test_at_most_three_row_groups_are_in_memory(folders: Callable[..., Path]) -> None:
    with mock.patch.object(parquet, "ROW_GROUP_BYTES", 200):
        root = folders()
    events: list[tuple[str, int]] = []
    real_parts, real_scan = iter_blocks, kernels.scan_part

    def watched(*given: Any, **named: Any) -> Iterator[Any]:
        for number, part in enumerate(real_parts(*given, **named)):
            events.append(("read", number))
            yield part

    def scanned(scan: Any, *given: Any, **named: Any) -> None:
        real_scan(scan, *given, **named)
        events.append(("scored", sum(kind == "scored" for kind, _ in events)))

    with (
        mock.patch("m3cli.jobs.search.vectors.iter_blocks", watched),
        mock.patch("m3cli.jobs.search.vectors.scan_part", scanned),
    ):
        run_search(root / "c.m3", root / "q.m3", mode="dense")
    parts = max(number for kind, number in events if kind == "read") + 1
    assert parts > 6
    for place, (kind, number) in enumerate(events):
        if kind == "read":
            assert sum(each == "scored" for each, _ in events[:place]) >= number - 3


def test_re_ranking_reads_only_row_groups_with_candidates(folders: Callable[..., Path]) -> None:
    with mock.patch.object(parquet, "ROW_GROUP_BYTES", 200):
        root = folders()
    read: list[int] = []
    real = iter_blocks

    def watched(*given: Any, **named: Any) -> Iterator[Any]:
        for part in real(*given, **named):
            if named.get("wanted") is not None:
                read.append(len(np.intersect1d(part.positions, named["wanted"])))
            yield part

    with mock.patch("m3cli.jobs.search.vectors.iter_blocks", watched):
        run_search(root / "c.m3", root / "q.m3", mode="hybrid", candidates=1)
    assert read
    assert all(read)


def test_candidates_of_dense_alone_are_re_ranked_by_all(folders: Callable[..., Path]) -> None:
    root = folders()
    _, dense, _ = run_search(root / "c.m3", root / "q.m3", mode="dense", top_k=3)
    _, found, _ = run_search(root / "c.m3", root / "q.m3", candidates=3, candidates_by=("dense",), top_k=3)
    for best, ranked in zip(dense, found, strict=True):
        assert {hit["id"] for hit in ranked["hits"]} == {hit["id"] for hit in best["hits"]}
        scores = [np.mean([hit["scores"][output] for output in ALL_OUTPUTS]) for hit in ranked["hits"]]
        assert [hit["score"] for hit in ranked["hits"]] == pytest.approx(scores, abs=1e-5)
        assert scores == sorted(scores, reverse=True)


def test_candidates_are_scored_in_blocks(folders: Callable[..., Path]) -> None:
    root = folders()
    whole = run_search(root / "c.m3", root / "q.m3", mode="hybrid")
    sizes: list[int] = []

    def watched(queries: Any, passages: Any, query_rows: Any, *given: Any, **named: Any) -> Any:
        sizes.append(len(query_rows))
        return score_pairs(queries, passages, query_rows, *given, **named)

    with (
        mock.patch("m3cli.jobs.search.vectors.BLOCK_PAIRS", 4),
        mock.patch("m3cli.jobs.search.vectors.score_rows", watched),
    ):
        in_blocks = run_search(root / "c.m3", root / "q.m3", mode="hybrid")
    assert max(sizes) <= 4
    assert in_blocks[1] == whole[1]


def test_an_incomplete_folder_is_searched_and_reported(tmp_path: Path) -> None:
    write_folder(tmp_path / "c.m3", [[("a", 1), ("b", 2)]], seed=1, finish=False)
    code, found, said = run_search(tmp_path / "c.m3", tmp_path / "c.m3", mode="colbert")
    assert code == 0
    assert "c.m3 is not complete: only what is encoded so far is searched" in said
    assert [each["id"] for each in found] == ["a", "b"]


def test_a_folder_without_colbert_is_searched_by_its_outputs(folders: Callable[..., Path]) -> None:
    root = folders(outputs=("dense", "sparse"))
    _, found, said = run_search(root / "c.m3", root / "q.m3")
    assert "hybrid: 3 queries" in said
    assert set(found[0]["hits"][0]["scores"]) == {"dense", "sparse"}
    for typed, words in (
        ({"mode": "colbert"}, "c.m3 has no colbert, only dense, sparse; .* --outputs dense,sparse,colbert"),
        ({"weights": (1.0, 1.0, 1.0)}, "has no colbert"),
    ):
        with pytest.raises(UsageError, match=words):
            run_search(root / "c.m3", root / "q.m3", **typed)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"mode": "dense", "weights": (1.0, 1.0, 1.0)}, "--weights is for --mode hybrid, and this is dense"),
        ({"mode": "sparse", "fusion": "rrf"}, "--fusion is for --mode hybrid"),
        ({"mode": "dense", "candidates_by": ("dense",)}, "--candidates-by is for --mode hybrid"),
        ({"mode": "dense", "tokenizer": "plain"}, "--tokenizer is for --mode bm25"),
        ({"mode": "bm25"}, "searches words"),
        ({"mode": "bm25", "dtype": "float32"}, "--dtype float32 with --mode bm25: no model runs; leave --dtype out"),
        ({"mode": "bm25", "query_prefix": "q: "}, "--query-prefix q:  with --mode bm25"),
        ({"mode": "bm25", "tokenizer": "plain", "model": "x"}, "--model x with --tokenizer plain"),
        ({"model": "x"}, "--model x with --queries .*q.m3: the queries of a folder are encoded already"),
        ({"dtype": "float32"}, "--dtype float32 with --queries"),
        ({"max_batch_tokens": 100}, "--max-batch-tokens 100 with --queries"),
        ({"query_prefix": "query: "}, "--query-prefix query:  with --queries"),
        ({"max_query_length": 9}, "--max-query-length 9 with --queries"),
        ({"query_field": "q"}, "--query-field q with --queries"),
        ({"query_id_field": "q"}, "--query-id-field q with --queries"),
        ({"input_format": "tsv"}, "--input-format tsv with --queries"),
    ],
)
def test_options_without_effect_are_errors(
    folders: Callable[..., Path], typed: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M3_MODEL", "not typed, so not refused")
    root = folders()
    with pytest.raises(UsageError, match=words):
        run_search(root / "c.m3", root / "q.m3", **typed)


def test_queries_of_another_checkpoint_are_an_error(folders: Callable[..., Path]) -> None:
    root = folders()
    write_folder(root / "other.m3", [[("q", 1)]], seed=1, model="2")
    with pytest.raises(ForeignFolder, match="mean nothing"):
        run_search(root / "c.m3", root / "other.m3", mode="dense")


def test_folder_queries_of_one_id_are_an_error(folders: Callable[..., Path]) -> None:
    root = folders()
    write_folder(root / "twice.m3", [[("q", 1)], [("q", 2)]], seed=1)
    with pytest.raises(CorpusError, match=r"twice.m3: two queries have the id 'q'"):
        run_search(root / "c.m3", root / "twice.m3", mode="dense")
