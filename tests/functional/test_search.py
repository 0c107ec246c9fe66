"""`m3 search` as a command: kinds of queries, what is written where, BM25, and what it says of bad input."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from m3cli.records import QueryHits
from m3cli.tables import hits_table, open_console
from tests.conftest import ROOT, Completed
from tests.functional.conftest import EncodeWith

TEXTS = {
    "fox": "the quick brown fox jumps over the lazy dog",
    "data": "数据 中文 数据",
    "модель": "модель данные модель",
    "with blank": "one two three four five six",
    "long": " ".join(f"word{number} and other words" for number in range(20)),
}
MODES = ("dense", "sparse", "colbert", "hybrid", "bm25")


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, encode_with: EncodeWith) -> Path:
    """c.m3 with its text and bare.m3 without, of c.jsonl; q.m3 of q.jsonl."""
    root = tmp_path_factory.mktemp("search")
    corpus = write_jsonl(root / "c.jsonl", [{"id": name, "text": text} for name, text in TEXTS.items()])
    queries = [{"_id": "q1", "text": "a quick fox"}, {"_id": "q2", "text": "数据 中文"}]
    assert encode_with(corpus, out=root / "c.m3", keep_text=True, shard_size=100) == 0
    assert encode_with(corpus, out=root / "bare.m3", outputs=("dense",), format="npy") == 0
    assert encode_with(write_jsonl(root / "q.jsonl", queries), out=root / "q.m3") == 0
    return root


@pytest.fixture
def search(place: Path, tiny_m3: Path, m3_here: Callable[..., Completed]) -> Callable[..., Completed]:
    def search(*arguments: object, folder: str = "c.m3", model: Path | None = tiny_m3) -> Completed:
        named: tuple[object, ...] = () if model is None else ("--model", model, "--dtype", "float32", "--device", "cpu")
        if "bm25" in arguments:
            named = named[:2]
        elif place / "q.m3" in arguments:
            named = named[-2:]
        return m3_here("search", place / folder, *arguments, *named)

    return search


def columns(done: Completed, number: int) -> list[str]:
    return [line.split("\t" if "\t" in line else " ")[number] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("mode", MODES)
def test_words_as_a_query_give_a_run(search: Callable[..., Completed], mode: str) -> None:
    done = search("--queries", "the quick brown fox jumps over the lazy dog", "--mode", mode)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("query Q0 fox 1 ")
    assert {line.split()[-1] for line in lines} == {f"m3-{mode}"}
    scores = [float(line.split()[-2]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert len(set(columns(done, 2))) == len(lines) <= len(TEXTS)
    assert f"{mode}: 1 query, " in done.stderr


def test_words_are_text_and_the_checkpoint_is_remembered(
    search: Callable[..., Completed],
    place: Path,
    tiny_m3: Path,
    tmp_path: Path,
    m3_here: Callable[..., Completed],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = "the quick brown fox jumps over the lazy dog"
    named = search("--queries", words, "--mode", "dense")
    options = ("--mode", "dense", "--dtype", "float32")
    assert m3_here("search", place / "c.m3", words, *options).stdout == named.stdout
    assert m3_here("search", place / "c.m3", words, "--model", tiny_m3, *options).stdout == named.stdout
    other = tmp_path / "other"
    shutil.copytree(tiny_m3, other)
    (other / "config.json").write_text((other / "config.json").read_text().replace("1e-05", "1e-06"))
    monkeypatch.setenv("M3_MODEL", str(other))  # of another corpus
    assert m3_here("search", place / "c.m3", words, *options).stdout == named.stdout
    done = m3_here("search", place / "c.m3", words, "--model", other)
    assert done.returncode == 10
    assert "config.json differ" in done.stderr
    monkeypatch.delenv("M3_MODEL")
    (tmp_path / words).write_text('{"_id": "q1", "text": "no"}\n', encoding="utf-8")
    done = m3_here("search", place / "c.m3", words, *options)
    assert done.stdout == named.stdout
    assert f"for the queries of that file: -q {words}" in done.stderr
    done = m3_here("search", place / "c.m3", words, "-q", words)
    assert done.returncode == 2
    assert "give the words of a query, or queries" in done.stderr
    assert m3_here("search", place / "c.m3", "").returncode == 2
    assert m3_here("search", place / "c.m3", "-q", " ").returncode == 2


def test_a_checkpoint_that_has_moved_is_named(m3_here: Callable[..., Completed], tiny_m3: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_m3, tmp_path / "model")
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"id": "a", "text": "a fox"}])
    assert m3_here("encode", corpus, "--model", "model", "--outputs", "dense").returncode == 0
    (tmp_path / "model").rename(tmp_path / "moved")
    done = m3_here("search", "c.m3", "fox")
    assert done.returncode == 2
    assert f"c.m3 was encoded with {tmp_path}/model, which is not there now" in done.stderr
    assert m3_here("search", "c.m3", "fox", "--model", "moved").returncode == 0


def test_ids_with_blanks_stand_between_tabs(search: Callable[..., Completed]) -> None:
    done = search("--queries", "one two three four five six", "--mode", "dense", "-k", "1")
    assert done.stdout.split("\t")[:4] == ["query", "Q0", "with blank", "1"]
    assert "1 line has an id with blanks" in done.stderr


def test_a_run_that_an_id_would_break_is_not_begun(
    m3_here: Callable[..., Completed], encode_with: EncodeWith, tmp_path: Path
) -> None:
    rows = [{"id": "a", "text": "a quick fox"}, {"id": "b\tc", "text": "a quick dog"}, {"id": "d", "text": "a dog"}]
    assert encode_with(write_jsonl(tmp_path / "t.jsonl", rows), out=tmp_path / "t.m3") == 0
    done = m3_here("search", "t.m3", "--queries", "t.m3", "--mode", "dense")
    assert (done.returncode, done.stdout) == (2, "")
    assert r"the document 'b\tc': a TREC run cannot hold ids with tabs" in done.stderr.splitlines()[-1]


def test_files_and_folders_of_queries_find_the_same(
    search: Callable[..., Completed], place: Path, tmp_path: Path
) -> None:
    tsv = tmp_path / "q.tsv"
    tsv.write_text("q1\ta quick fox\nq2\t数据 中文\n", encoding="utf-8")
    made = [search("--queries", each, "-k", "2") for each in (place / "q.jsonl", tsv, place / "q.m3")]
    assert columns(made[0], 0) == ["q1", "q1", "q2", "q2"]
    assert "hybrid: 2 queries" in made[0].stderr
    for other in made[1:]:
        assert (columns(other, 0), columns(other, 2)) == (columns(made[0], 0), columns(made[0], 2))
    assert made[1].stdout == made[0].stdout


def test_json_lines_tell_of_chunks(search: Callable[..., Completed], tmp_path: Path) -> None:
    done = search("--queries", "word19 and other words", "--mode", "colbert", "--out", tmp_path / "x.jsonl", "-k", "1")
    assert done.stdout == ""
    (found,) = map(json.loads, (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines())
    (hit,) = found["hits"]
    assert (found["query"], hit["id"]) == ("word19 and other words", "long")
    assert hit["chunk_index"] > 0
    assert hit["snippet"] == TEXTS["long"][hit["char_start"] : hit["char_end"]]
    assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl"}, "no temporary file stays"


def test_json_lines_on_standard_output(search: Callable[..., Completed]) -> None:
    done = search("--queries", "a quick fox", "--mode", "dense", "--format", "jsonl", "-k", "2")
    (found,) = map(json.loads, done.stdout.splitlines())
    assert [hit["rank"] for hit in found["hits"]] == [1, 2]
    assert "snippet" in found["hits"][0]


def test_what_is_not_known_of_a_hit_is_not_told(search: Callable[..., Completed], place: Path) -> None:
    arguments = ("--queries", "fox", "--mode", "bm25", "--tokenizer", "plain", "--input", place / "c.jsonl")
    done = search(*arguments, "--format", "jsonl", folder="bare.m3", model=None)
    (found,) = map(json.loads, done.stdout.splitlines())
    assert set(found["hits"][0]) == {"id", "rank", "score", "scores"}


def test_rows_that_are_no_queries_are_counted(search: Callable[..., Completed], tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": "a", "query": "fox"}\n{"id": "b", "query": ""}\nnothing\n')
    done = search("--queries", path, "--mode", "dense", "-k", "1")
    assert done.returncode == 3
    assert columns(done, 0) == ["a"]
    assert "2 rows skipped; the first, q.jsonl:28: empty text" in done.stderr


def test_long_queries_are_cut_and_counted(search: Callable[..., Completed]) -> None:
    done = search("--queries", TEXTS["long"], "--mode", "dense", "--max-query-length", "8")
    assert "1 of 1 query cut at 8 tokens" in done.stderr


def test_bm25_by_words_of_the_corpus_itself(search: Callable[..., Completed], place: Path) -> None:
    arguments = ("--queries", "QUICK fox?", "--mode", "bm25", "--tokenizer", "plain")
    done = search(*arguments, "--input", place / "c.jsonl", folder="bare.m3", model=None)
    assert done.returncode == 0
    assert columns(done, 2) == ["fox"]
    assert columns(search(*arguments, model=None), 2) == ["fox"]
    assert all(line.startswith("m3: ") for line in done.stderr.splitlines())


def test_bm25_finds_only_what_the_folder_has(search: Callable[..., Completed], place: Path, tmp_path: Path) -> None:
    arguments = ("--queries", "QUICK fox?", "--mode", "bm25", "--tokenizer", "plain", "--input")
    row = {"id": "fox", "text": TEXTS["fox"]}
    more = write_jsonl(tmp_path / "more.jsonl", [{"id": "den", "text": "a fox, a quick fox"}, row])
    done = search(*arguments, more, folder="bare.m3", model=None)
    assert (done.returncode, columns(done, 2)) == (0, ["fox"])
    assert "1 document of --input" in done.stderr
    strange = write_jsonl(tmp_path / "strange.jsonl", [{"id": "den", "text": "a fox, a quick fox"}])
    done = search(*arguments, strange, folder="bare.m3", model=None)
    assert (done.returncode, done.stdout) == (10, "")
    assert "has none of the documents of bare.m3" in done.stderr


def test_bm25_over_the_corpus_of_a_folder_with_kept_fields(
    m3_here: Callable[..., Completed], encode_with: EncodeWith, tmp_path: Path
) -> None:
    rows = [{"id": "a", "text": "red fox", "k": "x"}, {"id": "b", "text": "brown dog", "k": "y"}]
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    assert encode_with(corpus, out=tmp_path / "kept.m3", outputs=("dense",), keep_fields=("k",)) == 0
    done = m3_here("search", "kept.m3", "-q", "fox", "--mode", "bm25", "--tokenizer", "plain", "--input", corpus)
    assert (done.returncode, columns(done, 2)) == (0, ["a"])


def test_bm25_counts_what_the_input_lacks_and_takes_several(
    m3_here: Callable[..., Completed], encode_with: EncodeWith, tmp_path: Path
) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [{"id": "a", "text": "red fox"}])
    two = write_jsonl(tmp_path / "two.jsonl", [{"id": "b", "text": "brown fox"}, {"id": "c", "text": "grey dog"}])
    assert encode_with(one, two, out=tmp_path / "both.m3", outputs=("dense",)) == 0
    arguments = ("search", "both.m3", "-q", "fox", "--mode", "bm25", "--tokenizer", "plain", "--input")
    done = m3_here(*arguments, one)
    assert (done.returncode, columns(done, 2)) == (0, ["a"])
    assert "2 documents of both.m3 not in --input" in done.stderr
    assert "--input once for each" in done.stderr
    done = m3_here(*arguments, one, "--input", two)
    assert (done.returncode, sorted(columns(done, 2))) == (0, ["a", "b"])
    assert "not searched" not in done.stderr


def test_bm25_reads_the_corpus_from_standard_input(place: Path) -> None:
    arguments = [str(place / "bare.m3"), "-q", "fox", "--mode", "bm25", "--tokenizer", "plain", "--input", "-"]
    command = [sys.executable, "-m", "m3cli", "search", *arguments]
    text = (place / "c.jsonl").read_text(encoding="utf-8")
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[2]) == (0, "fox"), done.stderr


def test_a_query_file_without_text_names_the_flags_of_search(search: Callable[..., Completed], tmp_path: Path) -> None:
    done = search("--queries", write_jsonl(tmp_path / "q.jsonl", [{"id": "a", "words": "x"}]))
    assert done.returncode == 4
    assert "name it with --query-field" in done.stderr
    path = write_jsonl(tmp_path / "i.jsonl", [{"id": "a", "text": "x"}])
    done = search("--queries", path, "--query-id-field", "key")
    assert done.returncode == 4
    assert "correct --query-id-field" in done.stderr


@pytest.mark.parametrize(
    ("folder", "arguments", "code", "words"),
    [
        ("nosuch.m3", ["--queries", "x"], 2, "no such folder"),
        ("c.jsonl", ["--queries", "x"], 2, "no such folder"),
        ("c.m3", ["--queries", "nosuch.jsonl"], 2, "--queries nosuch.jsonl: no such file or folder"),
        ("c.m3", ["--queries", "./nosuch"], 2, "no such file or folder"),
        ("c.m3", ["--queries", " "], 2, "--queries is empty"),
        ("c.m3", ["--queries", ""], 2, "--queries is empty"),
        ("c.m3", ["--queries", "x", "--top-k", "0"], 2, "--top-k '0'"),
        ("c.m3", ["--queries", "x", "--mode", "best"], 2, "--mode 'best': expected dense, sparse, colbert"),
        ("c.m3", ["--queries", "x", "--weights", "1,2"], 2, "--weights '1,2'"),
        ("c.m3", ["--queries", "x", "--mode", "dense", "--weights", "1,1,1"], 2, "--weights is for --mode hybrid"),
        (
            "c.m3",
            ["--queries", "x", "--candidates-by", "colbert"],
            2,
            "--candidates-by 'colbert': expected some of dense, sparse",
        ),
        ("c.m3", ["--queries", "x", "--out", "x.csv"], 2, "--out x.csv: its ending tells the format"),
        ("c.m3", ["--queries", "x", "--out", "no/such/x.trec", "--model", "nowhere"], 6, "there is no folder"),
        ("nosuch.m3", ["--queries", "x", "--out", "no/such/x.trec"], 6, "cannot write no/such/x.trec"),
        ("c.m3", ["--queries", "{c}", "--query-field", "nosuch"], 4, "nosuch"),
        ("bare.m3", ["--queries", "x", "--mode", "sparse"], 2, "encode the corpus again with --outputs dense,sparse"),
        ("bare.m3", ["--queries", "x", "--mode", "hybrid"], 2, "only dense: use --mode dense"),
        ("bare.m3", ["--queries", "x", "--mode", "bm25"], 2, "encode it with --keep-text, or name the corpus"),
        ("c.m3", ["--queries", "-", "--mode", "bm25", "--input", "-"], 2, "standard input can be read once"),
        ("c.m3", ["--queries", "x", "--model", "nowhere"], 5, "nowhere"),
    ],
)
def test_what_is_refused_ends_in_one_line(
    search: Callable[..., Completed], place: Path, folder: str, arguments: list[str], code: int, words: str
) -> None:
    given = [each.replace("{c}", str(place / "c.jsonl")) for each in arguments]
    done = search(*given, folder=folder, model=None) if "--model" in given else search(*given, folder=folder)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_another_model_than_the_folders_is_refused(
    search: Callable[..., Completed], tiny_m3: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_m3.rglob("*"):
        if file.is_file():
            (other / file.relative_to(tiny_m3)).parent.mkdir(exist_ok=True)
            (other / file.relative_to(tiny_m3)).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    done = search("--queries", "x", model=other)
    assert (done.returncode, done.stdout) == (10, "")
    assert "their config.json differ: scores between them mean nothing" in done.stderr


def test_two_queries_of_one_id_are_refused(search: Callable[..., Completed], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}])
    done = search("--queries", path)
    assert done.returncode == 4
    assert "two queries have the id 'a'" in done.stderr


def test_a_search_is_measured_in_one_pipe(place: Path, tiny_m3: Path, tmp_path: Path) -> None:
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tfox\t1\nq2\tdata\t1\n")
    m3 = f"{shlex.quote(sys.executable)} -m m3cli"
    folder, queries = shlex.quote(str(place / "c.m3")), shlex.quote(str(place / "q.jsonl"))
    qrels = shlex.quote(str(tmp_path / "qrels.tsv"))
    line = f"{m3} search {folder} --queries {queries} | {m3} eval - {qrels}"
    environment = {**os.environ, "M3_MODEL": str(tiny_m3)}
    command = ["bash", "-o", "pipefail", "-c", line]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    header, row = [printed.split("\t") for printed in done.stdout.splitlines()]
    assert (header[0], row[0]) == ("run", "-")
    assert row[header.index("Recall@100")] == "1.0000", "five documents are all found"
    assert "hybrid: 2 queries" in done.stderr
    assert "2 judged queries" in done.stderr


def test_a_closed_pipe_ends_quietly(place: Path) -> None:
    arguments = [str(place / "c.m3"), "--queries", str(place / "q.m3"), "--progress", "none"]
    command = [sys.executable, "-m", "m3cli", "search", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 0


def test_the_table_of_hits_without_spans(tmp_path: Path) -> None:
    ones = np.ones(1, np.float32)
    found = QueryHits(
        query="q", text="fox", ids=("a",), scores=ones, parts={}, chunk_index=None, char_start=None, char_end=None,
        texts=(None,),
    )  # fmt: skip
    with (tmp_path / "shown").open("w+") as stream:
        open_console(stream).print(hits_table(found))
        stream.seek(0)
        assert [line.split() for line in stream.read().splitlines()][1:] == [["#", "score", "id"], ["1", "1.0000", "a"]]


def test_the_table_of_a_terminal(tmp_path: Path) -> None:
    numbers = np.arange(12)
    found = QueryHits(
        query="q",
        text="words [bold]typed[/bold]",
        ids=tuple(f"d{number}\x1b" for number in numbers),
        scores=(1 - numbers / 100).astype(np.float32),
        parts={},
        chunk_index=numbers,
        char_start=numbers,
        char_end=numbers + 10,
        texts=("a text\nof two lines" * 20, *(None,) * 11),
    )
    with (tmp_path / "shown").open("w+") as stream:
        open_console(stream).print(hits_table(found))
        stream.seek(0)
        lines = stream.read().splitlines()
    assert lines[0].strip() == "words [bold]typed[/bold]"
    assert "a text of two lines" in lines[2]
    assert "0.9900" in lines[3]
    assert not any("\x1b" in line for line in lines)
    assert all(len(line) <= 100 for line in lines)
    assert "and 2 more" in lines[-1]
