from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus.files import TextFile, cut_files, list_text_files, read_page
from m3cli.corpus.sources import count_unread, find_sources
from m3cli.errors import CorpusError, UsageError
from tests.corpus.test_corpus_reader import list_texts, read_all

PAGE = """<!doctype html><html><head><title>A  title</title><style>p { color: red }</style>
<script>if (a < b) { alert("<p>no</p>") }</script></head><body><h1>Fish &amp; chips</h1>
<p>A <b>bo</b>ld\n word<br>next<p>open</body></html><!-- not this -->"""


def fill(folder: Path, **files: str | bytes) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def read_folder(folder: Path, **how: Any) -> Any:
    return read_all([folder], input_format="files", **how)


def test_each_file_is_a_document_in_the_order_of_paths(tmp_path: Path) -> None:
    fill(tmp_path, b_md="# Two", a__z_rst="one\n\nmore", A_TXT="\ufeffzero", c_html=PAGE, d_csv="id,text\n1,x")
    (shard,) = read_folder(tmp_path, keep_fields=["title"])
    assert [(d.id, d.text, d.has_own_id) for d in shard.documents] == [
        ("A.TXT", "A.TXT\nzero", True),
        ("a/z.rst", "z.rst\none\n\nmore", True),
        ("b.md", "b.md\n# Two", True),
        ("c.html", "c.html\nA title\nFish & chips\nA bold word\nnext\nopen", True),
    ]
    assert shard.kept.column("title").to_pylist() == ["A.TXT", "z.rst", "b.md", "c.html"]
    assert list_texts(read_folder(tmp_path, title_field=""))[0] == "zero"
    assert count_unread([str(tmp_path)], "files") == {".csv": 1}


def test_a_file_that_is_no_text_is_skipped_by_name(tmp_path: Path) -> None:
    fill(tmp_path, a_txt=b"caf\xe9", b_md=" \n", c_html="<p> </p>", d_txt="x" * 99, e_txt="good")
    (shard,) = read_folder(tmp_path, max_row_bytes=50)
    assert [(row.position, row.reason, row.detail.partition(":")[0]) for row in shard.skipped] == [
        (0, "invalid UTF-8", "a.txt"),
        (1, "empty text", "b.md"),
        (2, "empty text", "c.html"),
        (3, "row longer than --max-row-bytes", "d.txt"),
    ]
    assert {row.byte_offset for row in shard.skipped} == {None}
    assert [document.id for document in shard.documents] == ["e.txt"]


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 90), min_size=1, max_size=12), size=st.integers(1, 100), data=st.data())
def test_shards_partition_the_files(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], size: int, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("files")
    for number, length in enumerate([*sizes, 3]):
        (folder / f"{number:02}.txt").write_text("x" * length, encoding="utf-8")
    whole, cut = read_folder(folder), read_folder(folder, shard_size=size)
    assert list_texts(cut) == list_texts(whole)
    assert all(shard.shard.stop > shard.shard.start for shard in cut)
    total = sum(sizes) + 3
    assert len(cut) <= -(-total // size)
    picked = data.draw(st.sets(st.sampled_from(range(len(cut)))))
    some = read_folder(folder, shard_size=size, ask=lambda s: "read" if s.index in picked else "skip")
    assert some == [shard for shard in cut if shard.shard.index in picked]
    hashed = read_folder(folder, shard_size=size, ask=lambda _: "hash")
    assert [shard.input_hash for shard in hashed] == [shard.input_hash for shard in cut]
    limit = data.draw(st.integers(1, len(sizes) + 1))
    few = read_folder(folder, shard_size=size, limit=limit)
    assert sum(len(shard.documents) + len(shard.skipped) for shard in few) == limit


def test_three_hundred_small_files_are_one_shard() -> None:
    files = [TextFile(path=f"{number}.txt", size=1000, mtime_ns=0) for number in range(300)]
    assert cut_files(files, shard_size=512 << 10) == [(0, 300)]
    assert cut_files(files, shard_size=100_000) == [(0, 100), (100, 200), (200, 300)]
    assert cut_files([], shard_size=1) == []


@pytest.mark.parametrize("change", ["a file more", "a file less", "another date", "another name"])
def test_the_folder_is_known_by_paths_sizes_and_dates(tmp_path: Path, change: str) -> None:
    fill(tmp_path, a_txt="one", b_txt="two")
    (before,) = find_sources([str(tmp_path)], input_format="files")
    if change == "a file more":
        fill(tmp_path, c_txt="")
    elif change == "a file less":
        (tmp_path / "a.txt").unlink()
    elif change == "another date":
        os.utime(tmp_path / "a.txt", ns=(1, 1))
    else:
        (tmp_path / "a.txt").rename(tmp_path / "0.txt")
    (after,) = find_sources([str(tmp_path)], input_format="files")
    assert before.mtime_ns != after.mtime_ns
    assert (before.size == after.size) == (change != "a file less")


def test_a_file_written_to_while_it_is_read_is_named(tmp_path: Path) -> None:
    fill(tmp_path, a_txt="one", b_txt="two")

    def write(_: object) -> Any:
        (tmp_path / "b.txt").write_text("three", encoding="utf-8")
        return "read"

    with pytest.raises(CorpusError, match=r"changed while .* was read"):
        read_folder(tmp_path, ask=write)


@pytest.mark.parametrize("inputs", [["a.txt"], [".", "."], ["-"], ["s3://bucket/docs"], ["*"], ["nowhere"]])
def test_anything_but_one_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str]) -> None:
    fill(tmp_path, a_txt="one")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--per-file takes one folder of this machine"):
        find_sources(inputs, input_format="files")


def test_files_that_the_run_writes_and_folders_without_text_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, a_txt="one", log_txt="", sub__x_csv="a\n", none__y_xml="")
    with pytest.raises(UsageError, match=r"this run writes .*log\.txt, which --per-file would read"):
        find_sources([str(tmp_path)], input_format="files", own={str(tmp_path / "log.txt")})
    with pytest.raises(CorpusError, match=r"none: nothing to read in this folder; --per-file reads \.txt \.text \.md"):
        find_sources([str(tmp_path / "none")], input_format="files")


def test_a_link_to_nothing_and_a_pipe_are_named(tmp_path: Path) -> None:
    fill(tmp_path, a_txt="one")
    (tmp_path / "b.md").symlink_to("nowhere")
    with pytest.raises(CorpusError, match=r"b\.md cannot be read: No such file"):
        find_sources([str(tmp_path)], input_format="files")
    (tmp_path / "b.md").unlink()
    os.mkfifo(tmp_path / "c.rst")
    with pytest.raises(CorpusError, match=r"c\.rst is not a regular file"):
        find_sources([str(tmp_path)], input_format="files")


@settings(max_examples=300, deadline=None)
@given(page=st.text(st.sampled_from("<>/!-&;='\" \nabp"), max_size=60))
def test_any_page_has_a_text_of_trimmed_lines(page: str) -> None:
    text = read_page(page)
    assert text == "\n".join(" ".join(line.split()) for line in text.split("\n") if line.strip())


def test_hidden_files_and_output_folders_are_not_listed(tmp_path: Path) -> None:
    fill(tmp_path, a_txt="one", _hidden_txt="no", out_m3__rows__x_txt="no", _git__x_md="no")
    assert [file.path for file in list_text_files(str(tmp_path))] == ["a.txt"]
