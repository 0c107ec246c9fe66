"""ColBERT vectors in fewer bytes: written, resumed, checked, scored and refused by the real command."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from m3cli.store.reader import open_folder, read_shard
from tests.conftest import Completed
from tests.crash import folder_bytes

M3 = Callable[..., Completed]
FLAGS = ("--dtype", "float32", "--max-length", "24", "--shard-size", "2K", "--progress", "none")
SETTINGS = [
    ("--colbert-dtype", "int8"),
    ("--colbert-dtype", "binary"),
    ("--colbert-pool", "2"),
    ("--colbert-top-k", "5", "--colbert-dtype", "int8"),
    ("--colbert-top-k", "9", "--colbert-pool", "2", "--colbert-dtype", "binary"),
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    words = random.Random(1)
    path = tmp_path / "corpus.jsonl"
    rows = (
        {"id": f"d{n}", "text": " ".join(f"word{words.randrange(500)}" for _ in range(1 + 5 * (n % 8)))}
        for n in range(60)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("setting", SETTINGS, ids=" ".join)
@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_every_setting_resumes_to_the_same_bytes_and_passes_the_check(
    m3_here: M3,
    tiny_m3: Path,
    corpus: Path,
    format: str,  # noqa: A002
    setting: tuple[str, ...],
) -> None:
    common = (corpus, "--model", tiny_m3, *FLAGS, "--format", format, *setting)
    assert m3_here("encode", *common, "--out", "whole").returncode == 0
    whole = folder_bytes(Path("whole"))
    for worker in ("1/2", "0/2"):
        assert m3_here("encode", *common, "--out", "shared", "--worker", worker).returncode == 0
    assert folder_bytes(Path("shared")) == whole
    for name in ("_m3/manifest.json", "_m3/done/shard-0000001.json"):
        Path("shared", name).unlink()
    again = m3_here("encode", corpus, "--out", "shared", "--progress", "none", "--model", tiny_m3)
    assert again.returncode == 0, again.stderr
    assert folder_bytes(Path("shared")) == whole
    checked = m3_here("check", "whole", "--sample", "20", "--model", tiny_m3)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("setting", SETTINGS, ids=" ".join)
def test_both_formats_hold_the_same_vectors(m3_here: M3, tiny_m3: Path, corpus: Path, setting: tuple[str, ...]) -> None:
    for format in ("parquet", "npy"):  # noqa: A001
        assert (
            m3_here(
                "encode", corpus, "--model", tiny_m3, *FLAGS, "--format", format, *setting, "--out", format
            ).returncode
            == 0
        )
    folders = open_folder(Path("parquet")), open_folder(Path("npy"))
    for index in folders[0].entries:
        left, right = (read_shard(folder, index).embeddings.colbert_vecs for folder in folders)
        assert left is not None
        assert right is not None
        assert np.array_equal(left.indptr, right.indptr)
        assert np.array_equal(left.vectors, right.vectors)
        for one, other in ((left.scales, right.scales), (right.scales, left.scales)):
            assert one is None or (other is not None and np.array_equal(one, other))


def test_a_value_opens_with_two_lines_of_numpy(m3_here: M3, tiny_m3: Path, corpus: Path) -> None:
    read = {}
    for dtype in ("float16", "int8", "binary"):
        m3_here("encode", corpus, "--model", tiny_m3, *FLAGS, "--colbert-dtype", dtype, "--out", dtype)
        table = pq.read_table(Path(dtype, "rows", "shard-0000000.parquet"))
        described = table.schema.field("colbert_vecs").metadata
        width = int(described.get(b"width", described[b"dim"]))
        matrix = np.frombuffer(table["colbert_vecs"][3].as_py(), described[b"dtype"].decode()).reshape(-1, width)
        if dtype == "int8":
            matrix = matrix * np.frombuffer(table["colbert_scales"][3].as_py(), np.float32)[:, None]
        read[dtype] = matrix
    tokens = table["num_tokens"][3].as_py()
    assert read["float16"].shape == (tokens - 1, 64)
    assert read["int8"] == pytest.approx(read["float16"].astype(np.float32), abs=5e-3)
    assert np.array_equal(np.unpackbits(read["binary"], axis=1), read["float16"] > 0)


def test_scores_of_folders_are_near_those_of_float16(m3_here: M3, tiny_m3: Path, corpus: Path, tmp_path: Path) -> None:
    Path("pairs.tsv").write_text("query\tpassage\n" + "".join(f"d{n}\td{(n * 7) % 60}\n" for n in range(40)))
    found = {}
    for name, setting in (("float16", ()), ("int8", SETTINGS[0]), ("binary", SETTINGS[1])):
        m3_here("encode", corpus, "--model", tiny_m3, *FLAGS, *setting, "--out", name)
        scored = m3_here(
            "score", "pairs.tsv", "--queries", "float16", "--corpus", name, "--modes", "colbert", "--progress", "none"
        )
        assert scored.returncode == 0, scored.stderr
        found[name] = np.array([float(line.split("\t")[-1]) for line in scored.stdout.splitlines()[1:]])
    assert found["int8"] == pytest.approx(found["float16"], abs=3e-3)
    assert np.corrcoef(found["binary"], found["float16"])[0, 1] > 0.9
    assert np.abs(found["binary"] - found["float16"]).max() > 0.01


def test_a_flag_that_the_folder_was_made_without_is_named(m3_here: M3, tiny_m3: Path, corpus: Path) -> None:
    assert m3_here("encode", corpus, "--model", tiny_m3, "--out", "whole.m3").returncode == 0
    refused = m3_here("encode", corpus, "--model", tiny_m3, "--out", "whole.m3", "--colbert-top-k", 3)
    assert refused.returncode == 10
    assert "whole.m3 was made without --colbert-top-k, this run asks for 3" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--outputs", "dense", "--colbert-pool", "2"), "--colbert-pool 2 needs colbert"),
        (("--outputs", "dense,sparse", "--colbert-dtype", "int8"), "--colbert-dtype int8 needs colbert"),
        (("--colbert-pool", "0"), "--colbert-pool"),
        (("--colbert-pool", "99999999999999999999"), "--colbert-pool 99999999999999999999: expected a number up to"),
        (
            ("--colbert-top-k", "99999999999999999999"),
            "--colbert-top-k 99999999999999999999: expected a number up to",
        ),
        (("--outputs", "dense", "--colbert-top-k", "3"), "--colbert-top-k 3 needs colbert"),
        (("--mcls", "99999999999999999999"), "--mcls 99999999999999999999: expected a number up to"),
        (("--colbert-dtype", "int4"), "expected float16, int8, binary"),
        (("--colbert-top-k", "0"), "--colbert"),
    ],
)
def test_bad_combinations_are_usage_errors(
    m3_here: M3, tiny_m3: Path, corpus: Path, flags: tuple[str, ...], message: str
) -> None:
    refused = m3_here("encode", corpus, "--model", tiny_m3, *flags, "--out", "out.m3")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not Path("out.m3").exists()


def test_a_folder_of_another_form_is_not_gone_on_with(m3_here: M3, tiny_m3: Path, corpus: Path) -> None:
    m3_here("encode", corpus, "--model", tiny_m3, *FLAGS, "--colbert-pool", "2", "--out", "out.m3")
    refused = m3_here("encode", corpus, "--model", tiny_m3, *FLAGS, "--colbert-pool", "3", "--out", "out.m3")
    assert refused.returncode == 10
    assert "--colbert-pool 2" in refused.stderr


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_plan_names_the_price_of_each_choice(m3_here: M3, tiny_m3: Path, corpus: Path, name: str) -> None:
    corpus.with_name("corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    asked = m3_here("plan", name, "--model", tiny_m3, "--max-length", "24", "--json")
    plan = json.loads(asked.stdout)
    assert plan["documents"] == 60
    choices = plan["colbert_choices"]
    assert plan["bytes_on_disk"]["colbert"] == choices["float16"]
    assert 0.4 < choices["--colbert-dtype int8"] / choices["float16"] < 0.65
    for flags in ("--colbert-dtype int8", "--colbert-pool 2"):
        m3_here(
            "encode", name, "--model", tiny_m3, "--max-length", "24", "--format", "npy", *flags.split(), "--out", flags
        )
        written = sum(path.stat().st_size for path in Path(flags, "colbert_vecs").iterdir())
        assert written / 1.3 < choices[flags] < written * 1.3


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that holds int8 vectors but not float16."""
    monkeypatch.setattr("m3cli.jobs.encode.estimate.find_free_bytes", lambda folder: 300_000)
    monkeypatch.setattr("m3cli.jobs.plan.find_free_bytes", lambda folder: 300_000)


@pytest.mark.usefixtures("full_disk")
def test_a_refusal_leaves_nothing_and_its_remedy_works(m3_here: M3, tiny_m3: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"id": str(n), "text": f"a short text of {n} words"}) + "\n" for n in range(400)]
    Path("full.jsonl").write_text("".join(rows))
    words = ("full.jsonl", "--model", tiny_m3)
    planned = m3_here("plan", *words)
    assert planned.returncode == 0
    assert "too little, about" in planned.stdout
    assert "--colbert-dtype binary" in planned.stdout
    refused = m3_here("encode", *words)
    assert refused.returncode == 6
    assert "try --colbert-dtype int8, or" in refused.stderr
    assert not Path("full.m3").exists()
    done = m3_here("encode", *words, "--colbert-dtype", "int8", "--progress", "log")
    assert done.returncode == 0, done.stderr
    assert "too little" not in done.stderr


@pytest.mark.parametrize("worker", ["0/2", "1/2"])
def test_workers_count_what_all_of_them_will_write(
    m3_here: M3, tiny_m3: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, worker: str
) -> None:
    words = ("encode", corpus, "--model", tiny_m3, *FLAGS, "--out", "out.m3", "--worker", worker)
    needed = json.loads(m3_here("plan", *words[1:6], "--shard-size", "2K", "--json").stdout)["bytes_needed"]
    monkeypatch.setattr("m3cli.jobs.encode.estimate.find_free_bytes", lambda folder: int(0.7 * needed))
    assert m3_here(*words).returncode == 6


@pytest.mark.parametrize(
    ("flags", "skipped"),
    [
        ((), 1),
        (("--colbert-top-k", "1000000"), 1),
        (("--colbert-dtype", "int8"), 0),
        (("--colbert-dtype", "binary"), 0),
        (("--colbert-pool", "2"), 0),
        (("--colbert-top-k", "50"), 0),
        (("--format", "npy"), 0),
    ],
    ids=lambda value: " ".join(value) or "float16" if isinstance(value, tuple) else "",
)
def test_a_merged_matrix_is_skipped_only_where_the_folder_cannot_hold_it(
    m3_here: M3, tiny_m3: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], skipped: int
) -> None:
    for module in ("jobs.encode.pipeline", "store.parquet"):
        monkeypatch.setattr(f"m3cli.{module}.MAX_MATRIX_BYTES", 100 * 64 * 2)
    with corpus.open("a") as rows:
        rows.write(json.dumps({"id": "long", "text": "word " * 150}) + "\n")
    words = ("--model", tiny_m3, *FLAGS, "--long-docs", "merge", *flags)
    done = m3_here("encode", corpus, *words, "--out", "out.m3")
    assert done.returncode == (3 if skipped else 0), done.stderr
    lines = [line for path in Path("out.m3/_m3").glob("skipped/*") for line in path.read_text().splitlines()]
    listed = [json.loads(line) for line in lines]
    assert [row["id"] for row in listed] == ["long"] * skipped
    assert all("Parquet holds 12,800; use --format npy" in row["detail"] for row in listed)
    assert m3_here("check", "out.m3").returncode == done.returncode


def test_a_corpus_of_nothing_but_such_matrices_is_told_what_helps(
    m3_here: M3, tiny_m3: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m3cli.jobs.encode.pipeline.MAX_MATRIX_BYTES", 100 * 64 * 2)
    corpus.write_text(json.dumps({"id": "long", "text": "word " * 150}) + "\n")
    refused = m3_here("encode", corpus, "--model", tiny_m3, *FLAGS, "--long-docs", "merge", "--out", "out.m3")
    assert refused.returncode == 4
    assert "use --format npy, --long-docs chunk" in refused.stderr
    assert "--text-field" not in refused.stderr


def test_vectors_may_be_compressed_in_parquet_only(m3_here: M3, tiny_m3: Path, corpus: Path) -> None:
    for chosen in ("none", "zstd"):
        assert (
            m3_here("encode", corpus, "--model", tiny_m3, *FLAGS, "--compression", chosen, "--out", chosen).returncode
            == 0
        )
    tables = [pq.read_table(Path(chosen, "rows")) for chosen in ("none", "zstd")]
    assert tables[0].equals(tables[1])
    metadata = pq.ParquetFile(Path("zstd", "rows", "shard-0000000.parquet")).metadata.row_group(0)
    assert {metadata.column(place).compression for place in range(metadata.num_columns)} == {"ZSTD"}
    assert m3_here("check", "zstd", "--sample", "5", "--model", tiny_m3).returncode == 0
    refused = m3_here("encode", corpus, "--model", tiny_m3, "--format", "npy", "--compression", "zstd", "--out", "npy")
    assert refused.returncode == 2
    assert "--compression zstd is for --format parquet" in refused.stderr
