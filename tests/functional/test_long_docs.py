"""Long documents through the real command, on real pages in three scripts; vectors against plain numpy and torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.store.reader import iter_parts, open_folder
from tests.conftest import Completed, build_sample

Run = Callable[..., Completed]
pytestmark = pytest.mark.slow
SCRIPTS = {"fr": "Latin", "ru": "Cyrillic", "zh": "CJK"}
EXACT = ("--dtype", "float32", "--dense-dtype", "float32")


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long pages of each script, joined from the sample's, among short rows."""
    rows = [json.loads(line) for line in build_sample().read_text(encoding="utf-8").splitlines()]
    out = tmp_path_factory.mktemp("pages") / "pages.jsonl"
    with out.open("w", encoding="utf-8") as lines:
        for lang in SCRIPTS:
            texts = [row["text"] for row in rows if row["lang"] == lang]
            for number in range(4):
                page = "\n\n".join(texts[number::4])
                lines.write(json.dumps({"id": f"{lang}{number}", "text": page}, ensure_ascii=False) + "\n")
                lines.write(
                    json.dumps({"id": f"{lang}{number}-short", "text": texts[number]}, ensure_ascii=False) + "\n"
                )
    return out


def texts_of(path: Path) -> dict[str, str]:
    return {row["id"]: row["text"] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return rows with their vectors as float32."""
    rows = []
    for part in iter_parts(open_folder(folder)):
        made = part.embeddings
        assert made.dense_vecs is not None
        assert made.lexical_weights is not None
        assert made.colbert_vecs is not None
        for place, row in enumerate(part.rows.to_pylist()):
            weights, matrices = made.lexical_weights, made.colbert_vecs
            span = slice(weights.indptr[place], weights.indptr[place + 1])
            row["dense"] = made.dense_vecs[place].astype(np.float32)
            row["lexical"] = dict(zip(weights.indices[span].tolist(), weights.values[span].tolist(), strict=True))
            row["colbert"] = matrices.vectors[matrices.indptr[place] : matrices.indptr[place + 1]].astype(np.float32)
            rows.append(row)
    return rows


def encode(m3: Run, source: Path, out: str, *flags: object, model: Path) -> Completed:
    done = m3(
        "encode", source, "--model", model, "--out", out, "--progress", "none", "--max-length", 96, *EXACT, *flags
    )
    assert done.returncode == 0, done.stderr
    return done


def vector_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "rows").iterdir())}


def test_chunks_lose_no_character_and_equal_their_texts_alone(
    m3: Run, pages: Path, tiny_m3: Path, tmp_path: Path
) -> None:
    encode(m3, pages, "o", model=tiny_m3)
    rows, texts = read_rows(tmp_path / "o"), texts_of(pages)
    assert len(rows) > 3 * len(texts)
    for document, group in groupby(rows, key=lambda row: row["id"]):
        chunks = list(group)
        assert "".join(texts[document][row["char_start"] : row["char_end"]] for row in chunks) == texts[document]
        assert all(row["num_tokens"] <= 96 for row in chunks)
    alone = tmp_path / "alone.jsonl"
    spans = [texts[row["id"]][row["char_start"] : row["char_end"]] for row in rows]
    alone.write_text(
        "".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(spans)), encoding="utf-8"
    )
    encode(m3, alone, "a", model=tiny_m3)
    tokenizer = load_tokenizer(read_checkpoint(tiny_m3))
    compared = 0
    for row, text, own in zip(rows, spans, read_rows(tmp_path / "a"), strict=True):
        before = texts[row["id"]][: row["char_start"]][-1:]
        if before and not before.isspace():
            continue
        compared += 1
        assert own["num_tokens"] == row["num_tokens"] == len(tokenizer.encode([text])[0])
        np.testing.assert_allclose(row["dense"], own["dense"], atol=1e-5)
        np.testing.assert_allclose(row["colbert"], own["colbert"], atol=2e-3)
        assert row["lexical"].keys() == own["lexical"].keys()
    assert compared > len(rows) / 2


@pytest.mark.parametrize("overlap", [0, 12])
def test_merged_rows_are_the_reference_of_the_chunks(
    m3: Run, pages: Path, tiny_m3: Path, tmp_path: Path, overlap: int
) -> None:
    for long_docs in ("chunk", "merge", "both"):
        encode(m3, pages, long_docs, "--long-docs", long_docs, "--overlap", overlap, model=tiny_m3)
        assert m3("check", long_docs).returncode == 0
    chunks, merged, both = (read_rows(tmp_path / name) for name in ("chunk", "merge", "both"))
    by_id = {name: list(rows) for name, rows in groupby(chunks, key=lambda row: row["id"])}
    assert [row["id"] for row in merged] == list(by_id)
    for row in merged:
        parts = by_id[row["id"]]
        dense = sum(part["num_tokens"] * part["dense"].astype(np.float64) for part in parts)
        np.testing.assert_allclose(row["dense"], dense / np.linalg.norm(dense), atol=1e-6)
        lexical: dict[int, float] = {}
        for part in parts:
            for token, weight in part["lexical"].items():
                lexical[token] = max(weight, lexical.get(token, 0.0))
        assert row["lexical"] == lexical
        assert len(row["colbert"]) == row["num_tokens"] - 1
        assert (row["char_start"], row["char_end"], row["num_chunks"]) == (0, parts[-1]["char_end"], 1)
        if not overlap:
            vectors = np.concatenate([part["colbert"][:-1] for part in parts] + [parts[-1]["colbert"][-1:]])
            np.testing.assert_array_equal(row["colbert"], vectors)
    own = {row["id"]: row for row in both if row["chunk_index"] == -1}
    assert set(own) == {name for name, parts in by_id.items() if len(parts) > 1}
    for row in merged:
        if row["id"] in own:
            np.testing.assert_array_equal(own[row["id"]]["dense"], row["dense"])
            assert own[row["id"]]["lexical"] == row["lexical"]
            assert not len(own[row["id"]]["colbert"])


def test_merging_resumes_to_the_same_bytes_and_is_taken_over(
    m3: Run, pages: Path, tiny_m3: Path, tmp_path: Path
) -> None:
    for long_docs in ("merge", "both"):
        flags = ("--long-docs", long_docs, "--overlap", 5, "--shard-size", "8K", "--dedupe")
        encode(m3, pages, f"{long_docs}-a", *flags, model=tiny_m3)
        encode(m3, pages, f"{long_docs}-b", *flags, model=tiny_m3)
        whole, half = tmp_path / f"{long_docs}-a", tmp_path / f"{long_docs}-b"
        (half / "_m3" / "manifest.json").unlink()
        for path in sorted((half / "_m3" / "done").iterdir())[1:]:
            path.unlink()
        encode(m3, pages, f"{long_docs}-b", *flags, model=tiny_m3)
        assert vector_bytes(half) == vector_bytes(whole)
        since = ("--long-docs", long_docs, "--overlap", 5, "--since-run", f"{long_docs}-a")
        longer = tmp_path / "longer.jsonl"
        row = json.dumps({"id": "new", "text": "One more sentence. " * 100}) + "\n"
        longer.write_text(row + pages.read_text(encoding="utf-8") + row.replace("new", "newer"), encoding="utf-8")
        encode(m3, longer, f"{long_docs}-c", *since, model=tiny_m3)
        old, new = read_rows(whole), read_rows(tmp_path / f"{long_docs}-c")
        taken = [row for row in new if not row["id"].startswith("new")]
        assert [row["id"] for row in taken] == [row["id"] for row in old]
        for before, after in zip(old, taken, strict=True):
            np.testing.assert_array_equal(before["dense"], after["dense"])
            np.testing.assert_array_equal(before["colbert"], after["colbert"])
        assert m3("check", f"{long_docs}-c", "--sample", 20, "--model", tiny_m3).returncode == 0
        shutil.rmtree(tmp_path / f"{long_docs}-c")


def test_an_overlap_of_truncated_documents_is_refused(m3: Run, pages: Path, tiny_m3: Path, tmp_path: Path) -> None:
    for command in (("encode",), ("plan",)):
        done = m3(*command, pages, "--model", tiny_m3, "--out", "o.m3", "--long-docs", "truncate", "--overlap", 5)
        assert done.returncode == 2
        assert "--overlap 5 with --long-docs truncate: a document has its first chunk only" in done.stderr
    assert not (tmp_path / "o.m3").exists()


@pytest.mark.parametrize("command", ["encode", "plan"])
def test_a_prefix_without_space_is_refused_before_anything_is_written(
    m3: Run, tiny_m3: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "1", "text": "short"}\n')
    words = (command, "c.jsonl", "--model", tiny_m3, "--out", "o.m3", "--max-length", 16, "--overlap", 5)
    assert m3(*words, "--prefix", "query: ").returncode == 0
    shutil.rmtree(tmp_path / "o.m3", ignore_errors=True)
    done = m3(*words, "--prefix", "a long instruction of so many words for every one of the texts: ")
    assert done.returncode == 2
    assert "and --overlap 5: a chunk of 16 tokens holds 14 of them, and none remains for text" in done.stderr
    assert not (tmp_path / "o.m3").exists()


def test_truncation_is_counted_and_listed(m3: Run, pages: Path, tiny_m3: Path, tmp_path: Path) -> None:
    encode(m3, pages, "o", "--long-docs", "truncate", model=tiny_m3)
    rows = read_rows(tmp_path / "o")
    cut = [row["id"] for row in rows if row["truncated"]]
    assert cut == [row["id"] for row in rows if not row["id"].endswith("short")]
    assert json.loads((tmp_path / "o/_m3/metrics.json").read_text())["truncated"] == len(cut)
    listed = m3("info", "o", "--truncated").stdout.splitlines()
    assert [line.split("\t")[0] for line in listed] == cut


def test_info_shows_a_documents_chunks_and_their_text(m3: Run, pages: Path, tiny_m3: Path, tmp_path: Path) -> None:
    encode(m3, pages, "o", model=tiny_m3)
    text = texts_of(pages)["ru1"]
    shown = json.loads(m3("info", "o", "--id", "ru1", "--text", "--json").stdout)
    assert "".join(chunk["text"] for chunk in shown) == text
    assert [chunk["chunk_index"] for chunk in shown] == list(range(len(shown)))
    plain = m3("info", "o", "--id", "ru1").stdout.splitlines()
    assert plain[1].split("\t")[:2] == ["0", f"0-{shown[0]['char_end']}"]
    moved = tmp_path / "elsewhere" / pages.name
    moved.parent.mkdir()
    shutil.copy(pages, moved)
    again = m3("info", "o", "--id", "ru1", "--text", "--json", "--input", moved)
    assert json.loads(again.stdout) == shown
    assert again.stderr == ""
    missing = m3("info", "o", "--id", "nobody")
    assert missing.returncode == 2
    assert "nobody" in missing.stderr


def test_info_says_when_an_id_is_not_one_documents(m3: Run, tiny_m3: Path, tmp_path: Path) -> None:
    rows = [{"id": "twice", "text": "the first"}, {"id": "twice", "text": "the second"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode(m3, tmp_path / "c.jsonl", "o", model=tiny_m3)
    done = m3("info", "o", "--id", "twice", "--text", "--json")
    assert [chunk["text"] for chunk in json.loads(done.stdout)] == ["the first"]
    assert done.stderr == "m3: several documents have the id 'twice': this is the first of them\n"


def test_mcls_counts_its_marks_in_positions_only(m3: Run, pages: Path, tiny_m3: Path, tmp_path: Path) -> None:
    encode(m3, pages, "plain", model=tiny_m3)
    encode(m3, pages, "mcls", "--mcls", 16, model=tiny_m3)
    plain, marked = read_rows(tmp_path / "plain"), read_rows(tmp_path / "mcls")
    assert [row["num_tokens"] for row in plain] == [row["num_tokens"] for row in marked]
    assert all(len(row["colbert"]) == row["num_tokens"] - 1 for row in marked)
    assert any(np.abs(a["dense"] - b["dense"]).max() > 1e-4 for a, b in zip(plain, marked, strict=True))
    assert m3("check", "mcls", "--sample", 10, "--model", tiny_m3).returncode == 0
    refused = m3("encode", pages, "--model", tiny_m3, "--out", "x", "--mcls", 256, "--max-length", 8192)
    assert refused.returncode == 2
    assert "--mcls 256" in refused.stderr
