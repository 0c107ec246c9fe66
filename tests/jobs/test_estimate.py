"""What is said before a run against what the run writes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from m3cli.config import EncodeRequest
from m3cli.corpus.sources import find_sources
from m3cli.encoder.chunker import Cutting, chunk_documents
from m3cli.encoder.tokenizer import Tokenizer
from m3cli.jobs.encode.estimate import SAMPLE_CHARS, Estimate, estimate_corpus
from m3cli.jobs.encode.resolve import resolve_new_run
from m3cli.records import Chunks, Document

Estimating = Callable[..., Estimate]
SENTENCE = "The keeper of the lighthouse wrote down when each ship went by. "
BOOK = SENTENCE * 6000


@pytest.fixture
def estimate(tiny_m3: Path, tmp_path: Path) -> Estimating:
    """Write texts as rows, and estimate what they come to."""

    def estimate(texts: Sequence[str], *, compressed: bool = False, **flags: object) -> Estimate:
        rows = [{"id": str(n), "text": text, "url": f"https://example.org/{n}"} for n, text in enumerate(texts)]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path = tmp_path / ("corpus.jsonl.gz" if compressed else "corpus.jsonl")
        path.write_bytes(gzip.compress(content) if compressed else content)
        request = EncodeRequest(
            inputs=(str(path),),
            out=str(tmp_path / "out.m3"),
            model=str(tiny_m3),
            device="cpu",
            text_field="text",
            **flags,  # type: ignore[arg-type]
        )
        resolved = resolve_new_run(request, find_sources(request.inputs), None)
        found = estimate_corpus(resolved.run, resolved.form, resolved.tokenizer)
        assert found is not None
        return found

    return estimate


@pytest.mark.parametrize("compressed", [False, True])
def test_rows_longer_than_the_samples_count_once(estimate: Estimating, compressed: bool) -> None:
    tokens = estimate([SENTENCE * 100], max_length=512).tokens / 100
    for books in (1, 5):
        found = estimate([BOOK] * books, compressed=compressed)
        assert found.documents == books
        assert found.tokens == pytest.approx(6000 * books * tokens, rel=0.1)


def test_books_among_short_rows_weigh_what_they_hold(estimate: Estimating) -> None:
    found = estimate([SENTENCE] * 3000 + [BOOK] * 4 + [SENTENCE] * 3000)
    assert found.documents == pytest.approx(6004, rel=0.2)
    assert found.tokens == pytest.approx((6000 + 4 * 6000) * estimate([SENTENCE] * 500).tokens / 500, rel=0.2)


def test_the_work_of_a_book_is_that_of_its_beginning(estimate: Estimating, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def chunk(documents: Sequence[Document], tokenizer: Tokenizer, cutting: Cutting) -> Chunks:
        lengths.extend(len(document.text) for document in documents)
        return chunk_documents(documents, tokenizer, cutting)

    monkeypatch.setattr("m3cli.jobs.encode.estimate.chunk_documents", chunk)
    estimate([BOOK] * 4)
    assert sum(lengths) <= 4 * SAMPLE_CHARS


def test_what_becomes_of_long_documents_is_what_is_priced(estimate: Estimating) -> None:
    texts, length = [SENTENCE * 100] * 40, {"max_length": 100, "outputs": ("dense", "sparse", "colbert")}
    chunk, both, merge = (
        estimate(texts, long_docs=long_docs, **length).bytes_on_disk for long_docs in ("chunk", "both", "merge")
    )
    row = 64 * 2
    assert merge["dense"] == 40 * row
    assert both["dense"] == chunk["dense"] + 40 * row
    assert both["colbert"] < 1.1 * chunk["colbert"]
    assert both["sparse"] > 1.5 * chunk["sparse"]
    few = estimate(texts, long_docs="merge", colbert_top_k=50, **length).bytes_on_disk["colbert"]
    assert few == 40 * (50 * row + 8)
    assert estimate(texts, long_docs="truncate", **length).bytes_on_disk["dense"] == 40 * row


@pytest.mark.parametrize("long_docs", ["chunk", "merge", "both"])
def test_kept_text_kept_fields_and_hashes_are_in_it(
    estimate: Estimating, m3_written: Callable[..., Path], long_docs: str
) -> None:
    flags = {"outputs": ("dense",), "max_length": 100, "keep_text": True, "keep_fields": ("url",)}
    texts = [f"{n * 7919 % 1000:x} {SENTENCE}" * 20 for n in range(300)]
    found = estimate(texts, long_docs=long_docs, **flags).bytes_on_disk
    assert found["_m3"] == 300 * 16
    out = m3_written(long_docs=long_docs, **flags)
    written = sum(pq.ParquetFile(path).metadata.serialized_size + path.stat().st_size for path in out.glob("rows/*"))
    assert 0.8 * written < found["rows"] + found["dense"]


@pytest.fixture
def m3_written(tiny_m3: Path, tmp_path: Path) -> Callable[..., Path]:
    """Encode what `estimate` wrote."""
    from m3cli.jobs.encode.command import encode_corpus  # noqa: PLC0415
    from m3cli.progress import Progress  # noqa: PLC0415

    def encode(**flags: object) -> Path:
        out = tmp_path / "out.m3"
        request = EncodeRequest(
            inputs=(str(tmp_path / "corpus.jsonl"),),
            out=str(out),
            model=str(tiny_m3),
            device="cpu",
            text_field="text",
            **flags,  # type: ignore[arg-type]
        )
        assert encode_corpus(request, progress=Progress("none")) == 0
        return out

    return encode
