"""Scores of pairs of texts and of ids: rows, order, faults, one encoding per text; --explain."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from m3cli.cli.app import run
from m3cli.corpus.streams import PeekableStream
from m3cli.encoder import encode as encoding
from m3cli.encoder.encode import BatchEncoder, FailedRow
from m3cli.errors import CorpusError, ForeignFolder, ModelError, UsageError
from m3cli.jobs.score import from_folders as score_folders
from m3cli.jobs.score import from_texts as score_texts
from m3cli.jobs.score.command import score_pairs
from m3cli.jobs.score.from_texts import explain_pairs
from m3cli.progress import Progress
from m3cli.requests import ScoreRequest
from m3cli.retrieval.scores import MODES, score_rows
from m3cli.store.reader import open_folder
from tests.conftest import load_once

TEXTS = ["the quick brown fox", "数据 中文", "quick fox", "модель данные", "a fox", "one two three four five six"]


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    with load_once(encoding):
        yield


class Scored:
    def __init__(self, request: ScoreRequest, stdin: bytes | None = None) -> None:
        stdout, said = io.BytesIO(), io.StringIO()
        stream = None if stdin is None else PeekableStream(io.BytesIO(stdin))
        self.code = score_pairs(request, progress=Progress("log", stream=said), stdout=stdout, stdin=stream)
        self.lines = stdout.getvalue().decode().splitlines()
        self.said = said.getvalue()

    def rows(self) -> list[dict[str, str]]:
        names, *rows = (line.split("\t") for line in self.lines)
        return [dict(zip(names, row, strict=True)) for row in rows]

    def column(self, mode: str) -> np.ndarray:
        return np.array([float(row[mode] or "nan") for row in self.rows()])


@pytest.fixture
def score(tiny_m3: Path) -> Callable[..., Scored]:
    def run_score(pairs: Path | str, *, stdin: bytes | None = None, **typed: Any) -> Scored:
        options: dict[str, Any] = {"model": str(tiny_m3), "dtype": "float32", "device": "cpu"} | typed
        return Scored(ScoreRequest(pairs=str(pairs), **options), stdin)

    return run_score


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    rows = [(TEXTS[number % 2], TEXTS[number % 6]) for number in range(12)]
    path.write_text("".join(f"{query}\t{passage}\n" for query, passage in rows), encoding="utf-8")
    return path


def test_rows_are_those_of_the_input_in_order(score: Callable[..., Scored], pairs: Path) -> None:
    made = score(pairs)
    assert made.code == 0
    assert made.lines[0].split("\t") == ["query", "passage", *MODES]
    assert [f"{row['query']}\t{row['passage']}" for row in made.rows()] == pairs.read_text().splitlines()
    assert made.column("dense")[0] == pytest.approx(1.0, abs=1e-5), "a text with itself"


def test_each_distinct_text_is_encoded_once(score: Callable[..., Scored], pairs: Path) -> None:
    assert "6 distinct texts encoded" in score(pairs).said
    apart = score(pairs, max_query_length=100)
    assert "8 distinct texts encoded" in apart.said, "cut at another length a text is another"


def test_windows_give_the_same_scores(
    score: Callable[..., Scored], pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = score(pairs)
    small = replace(score_texts.WINDOW_LIMITS["cpu"], pairs=3)
    monkeypatch.setitem(score_texts.WINDOW_LIMITS, "cpu", small)
    other = score(pairs)
    for mode in MODES:
        assert other.column(mode) == pytest.approx(usual.column(mode), abs=2e-6)
    assert other.lines[0] == usual.lines[0]


def test_only_given_modes_count(score: Callable[..., Scored], pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    made = BatchEncoder

    def watch(model: Any, options: Any, **others: Any) -> Any:
        asked.append(options.outputs)
        return made(model, options, **others)

    monkeypatch.setattr(encoding, "BatchEncoder", watch)
    assert score(pairs, modes=("sparse+dense",)).lines[0].split("\t") == ["query", "passage", "sparse+dense"]
    assert score(pairs, modes=("colbert",)).lines[0].split("\t") == ["query", "passage", "colbert"]
    assert asked == [("dense", "sparse"), ("colbert",)]


def test_truncation_is_counted_and_cuts(score: Callable[..., Scored], tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_text("a b c\tx y z x y z\na b c\tx y z\n", encoding="utf-8")
    made = score(path, max_passage_length=5)
    assert ", 1 truncated" in made.said
    assert made.column("colbert")[0] == made.column("colbert")[1]


def test_bad_rows_have_empty_cells_and_code_3(score: Callable[..., Scored], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = ['{"query":"a","passage":"b","n":1.50}', "broken", '{"query":"a"}', '{"query":"","passage":"b"}', "{}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    made = score(path)
    assert made.code == 3
    assert len(made.rows()) == 5
    assert [row["dense"] != "" for row in made.rows()] == [True, False, False, False, False]
    assert "4 of 5 rows have no scores" in made.said
    assert "1 invalid JSON (row 2)" in made.said

    out = tmp_path / "o.jsonl"
    assert score(path, out=str(out), modes=("dense",)).code == 3
    written = out.read_text(encoding="utf-8").splitlines()
    assert written[0].startswith('{"query":"a","passage":"b","n":1.50,"dense":0.'), "a row keeps its bytes"
    assert [json.loads(line)["dense"] is None for line in written] == [False, True, True, True, True]
    assert json.loads(written[4]) == {"dense": None}


def test_a_score_that_is_not_finite_is_a_counted_fault(
    score: Callable[..., Scored], pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_first(*arguments: Any, **options: Any) -> Any:
        made = real(*arguments, **options)
        made["dense"][0] = np.nan
        return made

    real = score_rows
    monkeypatch.setattr(score_texts, "score_rows", break_first)
    made = score(pairs, modes=("dense",))
    assert made.code == 3
    assert "score is not a finite number" in made.said


def test_texts_that_cannot_be_encoded_are_counted_faults(
    score: Callable[..., Scored], pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(BatchEncoder):
        def encode_all(self, batches: Any) -> Iterator[Any]:
            for row in [row for batch in batches for row in batch.rows.tolist()]:
                yield FailedRow(row=row, reason="out of memory", detail="")

    monkeypatch.setattr(encoding, "BatchEncoder", Failing)
    made = score(pairs)
    assert made.code == 3
    assert "12 of 12 rows have no scores: 12 out of memory" in made.said


def test_the_next_batch_is_launched_before_pairs_are_scored(
    score: Callable[..., Scored], pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Ahead(BatchEncoder):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, ahead=1)

        def _launch(self, *arguments: Any) -> Any:
            events.append("launch")
            return super()._launch(*arguments)

    def watch(*arguments: Any, **options: Any) -> Any:
        events.append("score")
        return score_rows(*arguments, **options)

    usual = score(pairs)
    monkeypatch.setattr(encoding, "BatchEncoder", Ahead)
    monkeypatch.setattr(score_texts, "score_rows", watch)
    made = score(pairs, max_batch_tokens=1)
    assert "".join(event[0] for event in events).endswith("llslslss"), "four texts, each scored after the next launch"
    assert made.column("colbert+sparse+dense") == pytest.approx(usual.column("colbert+sparse+dense"), abs=2e-6)


def test_parquet_keeps_types_and_order(score: Callable[..., Scored], tmp_path: Path) -> None:
    table = pa.table({"n": pa.array([3, 1, 2], pa.int8()), "query": ["a", "b", None], "passage": ["x", "a b", "c"]})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    assert score(tmp_path / "p.parquet", out=str(tmp_path / "o.parquet")).code == 3
    made = pq.read_table(tmp_path / "o.parquet")
    assert made.select(["n", "query", "passage"]).equals(table)
    assert made.column_names == ["n", "query", "passage", *MODES]
    assert made.schema.field("dense").type == pa.float32()
    assert made.column("dense").null_count == 1
    tsv = score(tmp_path / "p.parquet")
    assert tsv.column("colbert")[:2] == pytest.approx(made.column("colbert").to_pylist()[:2], abs=1e-6)


def test_tabs_in_tsv_are_replaced_and_reported(score: Callable[..., Scored], tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('query,passage\n"a\nb","c\td"\n', encoding="utf-8")
    made = score(path)
    assert made.lines[1].startswith("a b\tc d\t")
    assert "2 cells had tabs or line breaks" in made.said


def test_standard_input(score: Callable[..., Scored], pairs: Path) -> None:
    assert score("-", stdin=pairs.read_bytes()).lines == score(pairs).lines


@pytest.mark.parametrize(
    ("typed", "kind", "words"),
    [
        ({"out": "o.csv"}, UsageError, "ending tells the format"),
        ({"queries": "Q.m3"}, UsageError, "--queries without --corpus"),
        ({"corpus": "C.m3"}, UsageError, "--corpus without --queries"),
        ({"weights": (0.0, 0.0, 1.0)}, UsageError, "remove sparse.dense from --modes"),
        ({"max_query_length": 9999}, UsageError, "--max-query-length 9999.*at most 8192"),
        ({"query_field": "nosuch"}, CorpusError, "nosuch"),
        ({"model": "/nowhere"}, ModelError, "no such folder"),
        ({"out": "missing/o.tsv"}, Exception, "missing"),
    ],
)
def test_invalid_options_and_inputs_are_errors(
    score: Callable[..., Scored], pairs: Path, typed: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        score(pairs, **typed)


def test_an_input_column_with_the_name_of_a_score_is_an_error(score: Callable[..., Scored], tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_text("query\tpassage\tdense\na\tb\t1\n", encoding="utf-8")
    with pytest.raises(UsageError, match="'dense'"):
        score(path)
    assert score(path, modes=("sparse",)).code == 0


def test_after_an_error_there_is_no_file(
    score: Callable[..., Scored], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.csv"
    path.write_text('query,passage\na,b\n"c,d\n', encoding="utf-8")
    monkeypatch.setitem(score_texts.WINDOW_LIMITS, "cpu", replace(score_texts.WINDOW_LIMITS["cpu"], pairs=1))
    (tmp_path / "o").mkdir()
    with pytest.raises(CorpusError):
        score(path, out=str(tmp_path / "o" / "scores.tsv"))
    assert list((tmp_path / "o").iterdir()) == []


@pytest.fixture(scope="module", params=["parquet", "npy"])
def folders(tiny_m3: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Encode Q.m3 with one row per id, and C.m3 with documents of several chunks and one id twice."""
    root = tmp_path_factory.mktemp(request.param)
    long = " ".join(TEXTS)
    corpus = [*((f"d{number}", text) for number, text in enumerate(TEXTS)), ("long", long), ("d0", "again, another")]
    for name, rows in (("Q", [(f"q{number}", text) for number, text in enumerate(TEXTS[:2])]), ("C", corpus)):
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in rows), encoding="utf-8")
        options = ("--dtype", "float32", "--max-length", "12", "--shard-size", "120", "--progress", "none")
        out = str(root / f"{name}.m3")
        arguments = ["encode", str(path), "--model", str(tiny_m3), "--out", out, "--format", request.param, *options]
        assert run(arguments) == 0
    return root


@pytest.fixture
def score_ids(folders: Path, tmp_path: Path) -> Callable[..., Scored]:
    def run_score(rows: list[tuple[str, str]], **typed: Any) -> Scored:
        path = tmp_path / "ids.tsv"
        path.write_text("".join(f"{query}\t{passage}\n" for query, passage in rows), encoding="utf-8")
        options: dict[str, Any] = {"queries": str(folders / "Q.m3"), "corpus": str(folders / "C.m3")} | typed
        return Scored(ScoreRequest(pairs=str(path), **options))

    return run_score


def test_folders_give_the_scores_of_the_texts(
    score: Callable[..., Scored], score_ids: Callable[..., Scored], tmp_path: Path
) -> None:
    rows = [(number % 2, number % 6) for number in range(11, -1, -1)]
    path = tmp_path / "texts.tsv"
    path.write_text("".join(f"{TEXTS[q]}\t{TEXTS[p]}\n" for q, p in rows), encoding="utf-8")
    expected = score(path)
    made = score_ids([(f"q{query}", f"d{passage}") for query, passage in rows])
    assert made.code == 0
    assert "no model loaded" in made.said
    assert "1 id names several documents" in made.said, "d0 is there twice, and the first is taken"
    for mode in MODES:
        assert made.column(mode) == pytest.approx(expected.column(mode), abs=2e-3), "float16 on disk"


def test_query_vectors_in_groups_give_the_same_scores(
    score_ids: Callable[..., Scored], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(f"q{number % 2}", f"d{number % 6}") for number in range(12)] + [("q1", "long")]
    usual = score_ids(rows)
    monkeypatch.setattr(score_folders, "HELD_BYTES", 1)
    assert score_ids(rows).lines == usual.lines


def test_unknown_ids_are_counted_faults(score_ids: Callable[..., Scored]) -> None:
    made = score_ids([("q0", "d1"), ("nobody", "d1"), ("q0", "nothing"), ("", "d1"), ("nobody", "nothing")])
    assert made.code == 3
    assert [row["dense"] != "" for row in made.rows()] == [True, False, False, False, False]
    assert "2 unknown query id (rows 2, 5)" in made.said
    assert "1 unknown passage id (row 3)" in made.said
    assert score_ids([("nobody", "nothing")]).rows()[0]["colbert"] == ""


def test_chunks_of_a_document(score_ids: Callable[..., Scored]) -> None:
    pair = [("q1", "long")]
    best, mean, first = (score_ids(pair, chunks=how) for how in ("max", "mean", "first"))
    for mode in ("dense", "sparse", "colbert"):
        assert best.column(mode)[0] >= mean.column(mode)[0]
        assert best.column(mode)[0] >= first.column(mode)[0]
    assert len({made.column("dense")[0] for made in (best, mean, first)}) > 1


@pytest.mark.parametrize(
    ("typed", "flag"),
    [
        ({"model": "x"}, "--model x"),
        ({"dtype": "float32"}, "--dtype float32"),
        ({"device": "cpu"}, "--device cpu"),
        ({"max_query_length": 9}, "--max-query-length 9"),
        ({"max_passage_length": 9}, "--max-passage-length 9"),
    ],
)
def test_options_of_a_model_are_errors_with_folders(
    score_ids: Callable[..., Scored], monkeypatch: pytest.MonkeyPatch, typed: dict[str, Any], flag: str
) -> None:
    monkeypatch.setenv("M3_MODEL", "not an option, so no error")
    with pytest.raises(UsageError, match=rf"{flag} with --queries .*Q.m3: the vectors of folders are there already"):
        score_ids([("q0", "d1")], **typed)


def test_a_trec_run_is_pairs(folders: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    path.write_text("q0 Q0 d1 1 2.5 x\nq1 Q0 d2 1 2.5 x\n", encoding="utf-8")
    made = Scored(ScoreRequest(pairs=str(path), queries=str(folders / "Q.m3"), corpus=str(folders / "C.m3")))
    assert made.lines[0].split("\t")[:6] == ["query_id", "Q0", "doc_id", "rank", "score", "tag"]
    assert made.lines[1].startswith("q0\tQ0\td1\t1\t2.5\tx\t0.")
    with pytest.raises(UsageError, match="holds ids"):
        Scored(ScoreRequest(pairs=str(path)))


def test_folders_of_different_checkpoints_are_an_error(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(path: Path) -> Any:
        opened = open_folder(path)
        if path.name == "Q.m3":
            checkpoint = replace(opened.run.checkpoint, hashes={"config.json": "0"})
            opened = replace(opened, run=replace(opened.run, checkpoint=checkpoint))
        return opened

    monkeypatch.setattr(score_folders, "open_folder", other)
    with pytest.raises(ForeignFolder, match="mean nothing"):
        Scored(
            ScoreRequest(
                pairs=str(folders / "Q.jsonl"),
                query_field="id",
                passage_field="text",
                queries=str(folders / "Q.m3"),
                corpus=str(folders / "C.m3"),
            )
        )


def test_shared_tokens_make_the_sparse_score_and_best_matches_the_colbert_score(tiny_m3: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_text("hello quick world\ta quick quick world, hello\nhello\t \n", encoding="utf-8")
    (tmp_path / "m").mkdir()
    for file in tiny_m3.iterdir():
        if file.name != "sparse_linear.pt":
            (tmp_path / "m" / file.name).symlink_to(file)
    # A head with a bias only: every token has the weight 0.5.
    torch.save({"weight": torch.zeros(1, 64), "bias": torch.tensor([0.5])}, tmp_path / "m" / "sparse_linear.pt")
    request = ScoreRequest(pairs=str(path), model=str(tmp_path / "m"), dtype="float32", device="cpu")
    first, bad = explain_pairs(request, progress=Progress("none"))
    shared = first["shared_tokens"]
    assert {"quick", "world"} <= {each["token"] for each in shared}
    assert all(each["product"] == 0.25 for each in shared)
    assert sum(each["product"] for each in shared) == pytest.approx(first["scores"]["sparse"])
    similar = [match["similarity"] for match in first["best_matches"]]
    assert np.mean(similar) == pytest.approx(first["scores"]["colbert"], abs=1e-5)
    by_token = {match["query_token"]: match["passage_token"] for match in first["best_matches"]}
    assert by_token["</s>"] == "</s>"
    assert bad["fault"] == "empty passage"
    assert "shared_tokens" not in bad


@pytest.mark.parametrize("typed", [{"queries": "Q.m3", "corpus": "C.m3"}, {"out": "o.tsv"}])
def test_explain_needs_texts_and_standard_output(typed: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="--explain"):
        next(explain_pairs(ScoreRequest(pairs="p.tsv", **typed), progress=Progress("none")))  # type: ignore[arg-type]
