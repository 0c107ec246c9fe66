"""The four steps of Milvus' page on hybrid search, with m3's embedding function, on Milvus Lite."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3cli.milvus import BGEM3EmbeddingFunction
from tests.live.engines import is_installed

pytestmark = [
    pytest.mark.live,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(
        not (is_installed("pymilvus") and is_installed("milvus_lite")),
        reason="pymilvus and milvus-lite are not installed",
    ),
]


def test_hybrid_search_in_four_steps(demo_m3: Path, tmp_path: Path) -> None:
    from pymilvus import AnnSearchRequest, DataType, MilvusClient, RRFRanker

    # 1. prepare a small corpus to search
    docs = [
        "Artificial intelligence was founded as an academic discipline in 1956.",
        "Alan Turing was the first person to conduct substantial research in AI.",
        "Born in Maida Vale, London, Turing was raised in southern England.",
    ]
    query = "Who started AI research?"
    bge_m3_ef = BGEM3EmbeddingFunction(str(demo_m3), use_fp16=False, device="cpu")
    docs_embeddings = bge_m3_ef(docs)
    query_embeddings = bge_m3_ef([query])

    # 2. a collection with a dense and a sparse field
    client = MilvusClient(str(tmp_path / "lite.db"))
    schema = MilvusClient.create_schema(auto_id=True)
    schema.add_field("pk", DataType.INT64, is_primary=True)
    schema.add_field("text", DataType.VARCHAR, max_length=512)
    schema.add_field("dense_vector", DataType.FLOAT_VECTOR, dim=bge_m3_ef.dim["dense"])
    schema.add_field("sparse_vector", DataType.SPARSE_FLOAT_VECTOR)
    indices = client.prepare_index_params()
    indices.add_index("dense_vector", index_type="FLAT", metric_type="IP")
    indices.add_index("sparse_vector", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
    client.create_collection("demo", schema=schema, index_params=indices)

    # 3. insert
    vectors = zip(docs, docs_embeddings["dense"], list(docs_embeddings["sparse"]), strict=True)
    rows = [{"text": text, "dense_vector": dense, "sparse_vector": sparse} for text, dense, sparse in vectors]
    assert client.insert("demo", rows)["insert_count"] == 3

    # 4. search by both at once
    dense = AnnSearchRequest(query_embeddings["dense"], "dense_vector", {"metric_type": "IP"}, limit=3)
    sparse = AnnSearchRequest(query_embeddings["sparse"], "sparse_vector", {"metric_type": "IP"}, limit=3)
    hits = client.hybrid_search("demo", [dense, sparse], RRFRanker(), limit=3, output_fields=["text"])[0]
    client.close()

    def rank(scores: list[float]) -> list[int]:
        return sorted(range(len(scores)), key=lambda number: -scores[number])

    by_dense = rank([float(vector @ query_embeddings["dense"][0]) for vector in docs_embeddings["dense"]])
    products = (docs_embeddings["sparse"] @ query_embeddings["sparse"].T).toarray()[:, 0].tolist()
    by_sparse = [number for number in rank(products) if products[number] > 0]
    fused = {
        text: sum(1 / (61 + order.index(number)) for order in (by_dense, by_sparse) if number in order)
        for number, text in enumerate(docs)
    }
    assert {hit["entity"]["text"]: hit["distance"] for hit in hits} == pytest.approx(fused, abs=1e-6)
