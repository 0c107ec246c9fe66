"""Several inputs: a limit that is reached before the last one, files of a folder that are not read."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from m3cli.jobs.reread import InputTexts, Passage
from m3cli.records import DoneEntry
from m3cli.store.folder import RunFolder
from m3cli.store.reader import open_folder
from tests.conftest import Completed
from tests.functional.test_bad_rows import read_ids

M3 = Callable[..., Completed]
ROWS = 8


def _write_input(path: Path) -> None:
    texts = [f"{path.name} row {number}" for number in range(ROWS)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
        return
    lines = texts if path.suffix == ".txt" else [json.dumps({"text": text}) for text in texts]
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("first", ["jsonl", "txt", "parquet", "jsonl.gz"])
@pytest.mark.parametrize("second", ["jsonl", "txt", "parquet", "jsonl.gz"])
def test_a_limit_inside_the_first_file(m3_here: M3, tmp_path: Path, tiny_m3: Path, first: str, second: str) -> None:
    for name in (f"a.{first}", f"b.{second}"):
        _write_input(tmp_path / name)
    flags = (f"a.{first}", f"b.{second}", "--limit", 5, "--model", tiny_m3, "--outputs", "dense", "--out", "o.m3")
    planned = m3_here("plan", *flags, "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["documents"] == 5
    done = m3_here("encode", *flags)
    assert done.returncode == 0, done.stderr
    ids = read_ids(tmp_path / "o.m3")
    assert len(ids) == 5
    assert {name.partition(":")[0] for name in ids} == {f"a.{first}"}


def test_csv_is_encoded_in_two_runs_and_its_text_shown(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    rows = [("docno", "headline", "body"), *((f"d{n}", "", f'the "{n}th" row,\nin two lines') for n in range(60))]
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*rows, ("short",)])
    flags = ("c.csv", "--model", tiny_m3, "--outputs", "dense", "--shard-size", 200, "--out")
    done = [m3_here("encode", *flags, "o.m3", *share).returncode for share in (("--worker", "1/2"), ())]
    assert sorted(done) == [0, 3]
    assert read_ids(tmp_path / "o.m3") == [f"d{n}" for n in range(60)]
    assert "1 wrong number of columns" in m3_here("encode", *flags, "whole.m3").stderr
    names = [path.name for path in sorted((tmp_path / "o.m3" / "rows").iterdir())]
    assert len(names) > 5
    assert all(
        (tmp_path / "o.m3/rows" / n).read_bytes() == (tmp_path / "whole.m3/rows" / n).read_bytes() for n in names
    )
    hits = [Passage(shard=shard, id=f"d{n}", start=4, stop=99) for shard, n in ((0, 0), (len(names) - 1, 59))]
    texts = InputTexts(open_folder(tmp_path / "o.m3")).read(hits, length=9)
    assert texts == ['"0th" row', '"59th" ro']
    shown = m3_here("info", "o.m3", "--id", "d7", "--text")
    assert 'the "7th" row,\nin two lines' in shown.stdout, shown.stderr


def test_a_folder_of_save_to_disk_and_feather_are_read(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    import datasets  # noqa: PLC0415  two seconds

    rows = [{"docno": f"d{n}", "doc": {"text": f"row {n}"}} for n in range(40)]
    split = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path / "set", num_shards={"train": 2})
    datasets.load_from_disk(tmp_path / "set")["train"].map(lambda row: row | {"more": 1})  # leaves cache files there
    assert len(list((tmp_path / "set" / "train").glob("*.arrow"))) > 2
    flags = ("--text-field", "doc.text", "--model", tiny_m3, "--outputs", "dense", "--keep-text")
    done = m3_here("encode", "set", *flags)
    assert done.returncode == 0, done.stderr
    assert read_ids(tmp_path / "set.m3") == [row["docno"] for row in rows]
    feather.write_feather(pa.Table.from_pylist(rows), tmp_path / "f.feather")
    done = m3_here("encode", "f.feather", *flags, "--since-run", "set.m3")
    assert done.returncode == 0, done.stderr
    assert "taken over  40 documents" in done.stderr, done.stderr
    assert read_ids(tmp_path / "f.m3") == [row["docno"] for row in rows]


def test_a_folder_per_file_grows(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.txt").write_text(f"# Note {number}\nwith some words", encoding="utf-8")
    flags = ("--model", tiny_m3, "--outputs", "dense", "--shard-size", 200)
    done = m3_here("encode", "docs", "--per-file", *flags)
    assert done.returncode == 0, done.stderr
    assert read_ids(tmp_path / "docs.m3") == [f"{number:02}.txt" for number in range(20)]
    assert "nothing to do" in m3_here("encode", "docs", "--per-file", *flags).stderr
    shown = m3_here("info", "docs.m3", "--id", "07.txt", "--text")
    assert "07.txt\n# Note 7\nwith some words\n" in shown.stdout, shown.stderr
    forgotten = m3_here("encode", "docs", *flags)
    assert (forgotten.returncode, "made with --per-file: give it again" in forgotten.stderr) == (10, True)
    (folder / "20.txt").write_text("the last", encoding="utf-8")
    (folder / "05.txt").unlink()
    grown = m3_here("encode", "docs", "--per-file", *flags)
    assert grown.returncode == 10
    command = grown.stderr.rpartition("take over the rest: m3 ")[2].split()
    assert "--per-file" in command
    done = m3_here(*command, "--gone", "gone.jsonl")
    assert done.returncode == 0, done.stderr
    assert "taken over  19 documents" in done.stderr
    assert json.loads((tmp_path / "gone.jsonl").read_text(encoding="utf-8")) == {"id": "05.txt"}


def test_files_that_are_not_read_are_told(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    names = ("a.jsonl", "b.md", "c.md", "d.xml.gz", ".e.md", "f.m3/rows/g.md")
    for name in names:
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_text('{"text": "one"}\n', encoding="utf-8")
    flags = ("corpus", "--model", tiny_m3, "--outputs", "dense")
    planned = m3_here("plan", *flags)
    assert "3 files: 2 .md, 1 .xml.gz" in planned.stdout
    assert json.loads(m3_here("plan", *flags, "--json").stdout)["unread"] == {".md": 2, ".xml.gz": 1}
    done = m3_here("encode", *flags, "--out", "o.m3")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("3 files: 2 .md, 1 .xml.gz") == 2
    events = m3_here("encode", *flags, "--out", "p.m3", "--progress", "json").stderr.splitlines()
    told = [event["unread"] for event in map(json.loads, events) if event["event"] in ("plan", "summary")]
    assert told == [{".md": 2, ".xml.gz": 1}] * 2
    alone = m3_here("encode", "corpus/a.jsonl", "--out", "q.m3", *flags[1:])
    assert "not read" not in alone.stderr


def test_a_file_written_to_before_the_run_ends_is_exit_4(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt"):
        _write_input(tmp_path / name)
    first = tmp_path / "a.txt"
    commit = RunFolder.commit

    def write_to_the_first(folder: RunFolder, entry: DoneEntry) -> None:
        commit(folder, entry)
        if entry.source == "b.txt":
            first.write_bytes(first.read_bytes().upper())

    monkeypatch.setattr(RunFolder, "commit", write_to_the_first)
    flags = ("a.txt", "b.txt", "--out", "o.m3", "--model", tiny_m3, "--outputs", "dense")
    done = m3_here("encode", *flags)
    assert done.returncode == 4, done.stderr
    assert "a.txt changed while it was read: it was written to or replaced" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "o.m3/_m3/manifest.json").exists()
    assert len(read_ids(tmp_path / "o.m3")) == 2 * ROWS
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert m3_here("encode", *flags).returncode == 10
