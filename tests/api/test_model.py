"""`m3cli.load_model`: the numbers of the command line and of FlagEmbedding, errors, iterators, threads."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import m3cli
from m3cli.api import model as api
from m3cli.errors import ModelError, UsageError
from tests.conftest import ROOT, Completed, build_sample

Encode = Callable[..., m3cli.TextEmbeddings]
SHORT = ["What is BGE M3?", "Defination of BM25", "人工智能正在改变世界", "a", "Alan Turing was born in Maida Vale."]


@pytest.fixture(scope="module")
def tiny(tiny_m3: Path) -> m3cli.EmbeddingModel:
    return m3cli.load_model(tiny_m3, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def sample() -> list[str]:
    with build_sample().open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(150), strict=False)]


def test_importing_the_package_loads_no_library() -> None:
    code = "import sys, m3cli; m3cli.__all__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "scipy", "pyarrow", "transformers"}.isdisjoint(done.stdout.split())
    assert (ROOT / "m3cli" / "py.typed").exists()


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_folder'"):
        _ = m3cli.load_folder


@pytest.mark.parametrize(
    ("long_docs", "limit"),
    [
        ("truncate", 150),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("truncate", 1), ("both", 150)]),
    ],
)
def test_encode_gives_the_bytes_of_the_command_line(
    tiny: m3cli.EmbeddingModel,
    sample: list[str],
    m3: Callable[..., Completed],
    tmp_path: Path,
    long_docs: Any,
    limit: int,
) -> None:
    options = ("--max-length", 48, "--long-docs", long_docs, "--limit", limit, "--title-field", "")
    model = ("--model", tiny.encoder.checkpoint.folder, "--dtype", "float32", "--shard-size", "64M")
    made = m3("encode", build_sample(), "--out", "corpus.m3", *options, *model)
    assert made.returncode == 0, made.stderr
    folder = m3cli.open_folder(tmp_path / "corpus.m3")
    encoded = tiny.encode(sample[:limit], max_length=48, long_docs=long_docs)
    assert len(folder) == len(encoded) >= limit
    assert encoded.dense_vecs is not None
    assert encoded.colbert_vecs is not None
    assert np.array_equal(folder.dense, encoded.dense_vecs.astype(np.float16))
    assert np.array_equal(folder.sparse.indptr, encoded.lexical_weights.indptr)
    assert np.array_equal(folder.sparse.indices, encoded.lexical_weights.indices)
    assert np.array_equal(folder.sparse.data, encoded.lexical_weights.data)
    for row, matrix in enumerate(encoded.colbert_vecs):
        assert np.array_equal(folder.colbert(row), matrix.astype(np.float16))
    rows = folder.to_arrow()
    assert rows.column("char_end").to_pylist() == encoded.char_end.tolist()
    assert rows.column("truncated").to_pylist() == encoded.truncated.tolist()


def test_shapes_types_and_members(tiny: m3cli.EmbeddingModel) -> None:
    encoded = tiny.encode(SHORT)
    assert (tiny.dim, tiny.vocabulary, tiny.max_length) == (64, 250002, 8192)
    assert encoded["dense_vecs"].shape == (len(SHORT), 64)
    assert (
        encoded["dense_vecs"].dtype
        == encoded["lexical_weights"].dtype
        == encoded["colbert_vecs"][0].dtype
        == np.float32
    )
    assert encoded["lexical_weights"].shape == (len(SHORT), 250002)
    assert [len(matrix) for matrix in encoded["colbert_vecs"]] == [8, 7, 6, 2, 11]
    assert encoded.text_index.tolist() == [0, 1, 2, 3, 4]
    assert encoded.char_end.tolist() == [len(text) for text in SHORT]
    with pytest.raises(KeyError):
        _ = encoded["dense"]
    some = tiny.encode(SHORT, outputs=["sparse"])
    assert some.dense_vecs is None
    assert some.colbert_vecs is None
    assert (some.lexical_weights != encoded.lexical_weights).nnz == 0


def test_one_output_may_be_its_name(tiny: m3cli.EmbeddingModel) -> None:
    encoded = tiny.encode(["a"], outputs="sparse")
    assert encoded.dense_vecs is None
    assert encoded.lexical_weights.shape == (1, tiny.vocabulary)


def test_no_texts_give_empty_arrays(tiny: m3cli.EmbeddingModel) -> None:
    encoded = tiny.encode([])
    assert encoded["dense_vecs"].shape == (0, 64)
    assert encoded["lexical_weights"].shape == (0, 250002)
    assert encoded["colbert_vecs"] == []
    assert list(tiny.encode(iter(()))) == []
    assert {name: len(values) for name, values in tiny.compute_score([]).items()} == dict.fromkeys(
        ("dense", "sparse", "colbert", "sparse+dense", "colbert+sparse+dense"), 0
    )


def test_long_texts_are_truncated_or_chunked_and_say_so(tiny: m3cli.EmbeddingModel) -> None:
    texts = ["short", "word " * 100, "other"]
    truncated = tiny.encode(texts, max_length=16)
    assert truncated.truncated.tolist() == [False, True, False]
    chunked = tiny.encode(texts, max_length=16, long_docs="chunk")
    assert chunked.text_index.tolist() == [0, *[1] * (len(chunked) - 2), 2]
    assert chunked.char_start[2] == chunked.char_end[1]
    assert not chunked.truncated.any()
    assert len(tiny.encode(texts, max_length=100_000)) == 3  # the checkpoint's own limit holds


@pytest.mark.parametrize(
    ("texts", "kind", "words"),
    [
        (["a", ""], ValueError, "text 1 is empty"),
        (["a", "b", " \n"], ValueError, "text 2 is empty"),
        (["a", "b\ud800"], ValueError, "text 1 has a lone surrogate at character 1"),
        (["a", 3], TypeError, "text 1 is of type int"),
        ("a", TypeError, "one string"),
    ],
)
def test_bad_texts_are_errors_with_their_index(
    tiny: m3cli.EmbeddingModel, texts: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        tiny.encode(texts)
    if isinstance(texts, list):
        with pytest.raises(kind, match=words):
            list(tiny.encode(iter(texts)))


def test_bad_options_are_errors(tiny: m3cli.EmbeddingModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected some of dense, sparse, colbert"):
        tiny.encode(["a"], outputs=["dense", "vectors"])
    lengths: list[Any] = [2, 3.5, "9"]
    for length in lengths:
        with pytest.raises(UsageError, match=f"max_length={length!r}: expected an integer of at least 3"):
            tiny.encode(["a"], max_length=length)
        with pytest.raises(UsageError, match=f"max_query_length={length!r}: "):
            tiny.compute_score([("a", "b")], max_query_length=length)
    wrong: Any = "cut"
    with pytest.raises(UsageError, match="long_docs='cut': expected one of chunk, merge, both, truncate"):
        tiny.encode(["a"], long_docs=wrong)
    with pytest.raises(UsageError, match="dtype='cut': expected one of float32"):
        m3cli.load_model(tmp_path, dtype=wrong)
    with pytest.raises(UsageError, match="max_batch_tokens=0: "):
        m3cli.load_model(tmp_path, max_batch_tokens=0)
    with pytest.raises(UsageError, match=r"weights=\(1, 2\): expected three numbers"):
        tiny.compute_score([("a", "b")], weights=(1, 2))
    for pair in ("ab", ("a", "b", "c")):
        with pytest.raises(TypeError, match=r"pair 1 is .*, expected a query and a passage"):
            tiny.compute_score([("a", "b"), pair])
    with pytest.raises(UsageError, match="sum to 0"):
        tiny.compute_score([("a", "b")], weights=(0, 0, 0))
    with pytest.raises(ValueError, match="the passage of pair 0 is empty"):
        tiny.compute_score([("a", "")])
    with pytest.raises(ModelError):
        m3cli.load_model(tmp_path / "missing")


def test_an_iterator_is_read_no_further_than_its_blocks(
    tiny: m3cli.EmbeddingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(api.BLOCK_BYTES, "cpu", 100)
    read: list[str] = []

    def texts() -> Iterator[str]:
        for number in range(40):
            read.append(f"text number {number}")
            yield read[-1]

    blocks = tiny.encode(texts(), outputs=("dense",))
    assert read == []
    first = next(blocks)
    assert len(first) == len(read) == 8
    rest = list(blocks)
    found = np.concatenate([first["dense_vecs"], *(block["dense_vecs"] for block in rest)])
    assert np.allclose(found, tiny.encode(read, outputs=("dense",))["dense_vecs"], atol=1e-6)
    assert np.concatenate([first.text_index, *(block.text_index for block in rest)]).tolist() == list(range(40))


def test_a_bad_text_of_an_iterator_has_its_own_index(
    tiny: m3cli.EmbeddingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(api.BLOCK_BYTES, "cpu", 10)
    with pytest.raises(ValueError, match="text 21 is empty"):
        list(tiny.encode(iter(["word"] * 21 + [""]), outputs=("dense",)))


def test_two_threads_get_the_results_of_one(tiny: m3cli.EmbeddingModel, sample: list[str]) -> None:
    lists = [sample[:60], sample[60:100], sample[100:101], SHORT]

    def encode(texts: list[str]) -> Any:
        return tiny.encode(texts).dense_vecs

    alone = list(map(encode, lists))
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(encode, lists * 3))
    assert all(np.array_equal(found, alone[number % 4]) for number, found in enumerate(together))
    assert torch.get_num_threads() == threads


def test_settings_of_the_process_are_restored(tiny_m3: Path) -> None:
    def settings() -> tuple[Any, ...]:
        return torch.get_num_threads(), dict(os.environ), gc.get_threshold(), gc.get_freeze_count(), gc.isenabled()

    before = settings()
    model = m3cli.load_model(tiny_m3)
    assert settings() == before
    model.encode(SHORT)
    model.compute_score([("a", "b")])
    assert settings() == before
    with pytest.raises(ValueError, match="text 1"):
        model.encode(["a", ""])
    assert settings() == before


@pytest.mark.slow
def test_scores_are_those_of_the_command_line(
    tiny: m3cli.EmbeddingModel, m3: Callable[..., Completed], tmp_path: Path
) -> None:
    pairs = [(query, passage) for query in SHORT[:2] for passage in SHORT]
    lines = "".join(f"{query}\t{passage}\n" for query, passage in pairs)
    (tmp_path / "pairs.tsv").write_text(lines, encoding="utf-8")
    options = ("--weights", "0.4,0.2,0.4", "--dtype", "float32", "--out", "scores.jsonl")
    made = m3("score", "pairs.tsv", "--model", tiny.encoder.checkpoint.folder, *options)
    assert made.returncode == 0, made.stderr
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    scores = tiny.compute_score(pairs, weights=(0.4, 0.2, 0.4))
    for mode, values in scores.items():
        assert values.dtype == np.float32
        assert np.allclose(values, [row[mode] for row in rows], atol=1e-6), mode


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_encode_equals_flagembedding(tiny: m3cli.EmbeddingModel, tiny_m3: Path, sample: list[str]) -> None:
    from FlagEmbedding import BGEM3FlagModel  # noqa: PLC0415  6 s, only where this runs

    texts = [*sample[:40], "word " * 2000]
    reference = BGEM3FlagModel(str(tiny_m3), use_fp16=False, devices="cpu").encode(
        texts, batch_size=8, max_length=1024, return_dense=True, return_sparse=True, return_colbert_vecs=True
    )
    encoded = tiny.encode(texts, max_length=1024)
    assert encoded.truncated[-1]
    assert np.abs(encoded["dense_vecs"] - reference["dense_vecs"]).max() < 1e-5
    for row, weights in enumerate(reference["lexical_weights"]):
        mine = encoded.lexical_weights[[row]].tocoo()
        assert dict(zip(map(str, mine.col.tolist()), mine.data, strict=True)) == pytest.approx(dict(weights), abs=1e-4)
        assert np.abs(encoded["colbert_vecs"][row] - reference["colbert_vecs"][row]).max() < 1e-4


@pytest.mark.slow
def test_a_program_passes_mypy_strict(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import numpy as np\n"
        "import m3cli\n"
        "from m3cli.flagembedding import BGEM3FlagModel\n"
        "from m3cli.milvus import BGEM3EmbeddingFunction\n"
        "\n"
        "def main(path: str) -> list[str]:\n"
        "    model = m3cli.load_model(path, device='cpu', dtype='float32')\n"
        "    encoded = model.encode(['a', 'b'], outputs=('dense', 'colbert'), max_length=512)\n"
        "    dense: np.ndarray | None = encoded.dense_vecs\n"
        "    for block in model.encode(iter(['a']), long_docs='chunk'):\n"
        "        print(len(block), block.truncated.any(), dense)\n"
        "    scores: dict[str, np.ndarray] = model.compute_score([('a', 'b')], weights=(1, 1, 1))\n"
        "    folder = m3cli.open_folder('corpus.m3')\n"
        "    hits = folder.search(['a'], mode='dense', top_k=3, model=model)\n"
        "    print(scores, folder.colbert(0).shape, folder.text(0))\n"
        "    print(BGEM3FlagModel(path), BGEM3EmbeddingFunction(path))\n"
        "    return [name for found in hits for name in found.ids]\n"
    )
    # The project's own options and cache: the same files have been checked with them.
    command = ["-m", "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache"), "--config-file", "pyproject.toml"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, str(program)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
