"""The code blocks of the documents that the project follows, with only imports and the model's name changed.

Milvus' pages on BGE-M3, the BGE documentation, and the model card: keys, shapes and types are as printed there.
"""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3cli.errors import UsageError
from m3cli.flagembedding import BGEM3FlagModel
from m3cli.milvus import BGEM3EmbeddingFunction

DOCS = [
    "Artificial intelligence was founded as an academic discipline in 1956.",
    "Alan Turing was the first person to conduct substantial research in AI.",
    "Born in Maida Vale, London, Turing was raised in southern England.",
]
SENTENCES_1 = ["What is BGE M3?", "Defination of BM25"]
SENTENCES_2 = [
    "BGE M3 is an embedding model supporting dense retrieval, lexical matching and multi-vector interaction.",
    "BM25 is a bag-of-words retrieval function that ranks a set of documents based on the query terms appearing in "
    "each document",
]
DIM = 384  # of the demo checkpoint, where BGE-M3 has 1024


@pytest.fixture(scope="module")
def ef(demo_m3: Path) -> BGEM3EmbeddingFunction:
    return BGEM3EmbeddingFunction(model_name=str(demo_m3), device="cpu", use_fp16=False)


@pytest.fixture(scope="module")
def model(demo_m3: Path) -> BGEM3FlagModel:
    return BGEM3FlagModel(str(demo_m3), use_fp16=True)


def test_milvus_page_on_bge_m3(ef: BGEM3EmbeddingFunction) -> None:
    bge_m3_ef = ef
    docs_embeddings = bge_m3_ef.encode_documents(DOCS)
    assert list(docs_embeddings) == ["dense", "sparse"]
    assert isinstance(docs_embeddings["dense"], list)
    assert docs_embeddings["dense"][0].dtype == np.float32
    assert (bge_m3_ef.dim["dense"], docs_embeddings["dense"][0].shape) == (DIM, (DIM,))
    assert (bge_m3_ef.dim["sparse"], list(docs_embeddings["sparse"])[0].shape) == (250002, (1, 250002))  # noqa: RUF015  as printed
    assert docs_embeddings["sparse"].shape == (3, 250002)
    assert docs_embeddings["sparse"].dtype == np.float32
    assert docs_embeddings["sparse"].format == "csr"

    queries = ["When was artificial intelligence founded", "Where was Alan Turing born?"]
    query_embeddings = bge_m3_ef.encode_queries(queries)
    assert (bge_m3_ef.dim["dense"], query_embeddings["dense"][0].shape) == (DIM, (DIM,))
    assert list(query_embeddings["sparse"])[0].shape == (1, 250002)  # noqa: RUF015  as printed
    assert query_embeddings["sparse"].shape == (2, 250002)


def test_milvus_page_on_embeddings_second_example(ef: BGEM3EmbeddingFunction) -> None:
    query = "Who started AI research?"
    docs_embeddings = ef(DOCS)
    query_embeddings = ef([query])
    assert list(docs_embeddings) == list(query_embeddings) == ["dense", "sparse"]
    scores = [float(vector @ query_embeddings["dense"][0]) for vector in docs_embeddings["dense"]]
    assert len(scores) == 3
    row = docs_embeddings["sparse"][0]
    assert row.shape == (1, 250002)
    assert (row != list(docs_embeddings["sparse"])[0]).nnz == 0  # noqa: RUF015  as printed
    assert docs_embeddings["sparse"][:2].shape == (2, 250002)
    assert row.nnz == (docs_embeddings["sparse"].indptr[1])


def test_bge_documentation(model: BGEM3FlagModel) -> None:
    output = model.encode(SENTENCES_1, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    dense, sparse, multiv = output["dense_vecs"], output["lexical_weights"], output["colbert_vecs"]
    assert dense.shape == (2, DIM)
    assert dense.dtype == np.float32
    assert [type(weights) for weights in sparse] == [dict, dict]
    assert all(isinstance(token, str) and token.isdecimal() for token in sparse[0])
    assert [matrix.shape for matrix in multiv] == [(8, DIM), (7, DIM)]


def test_constructors_take_their_arguments_in_the_originals_order(demo_m3: Path, model: BGEM3FlagModel) -> None:
    queries = [f"query: {text}" for text in SENTENCES_1]
    made = BGEM3FlagModel(
        str(demo_m3), True, True, False, "query: ", "{}{}", ["cpu"], query_max_length=6, return_sparse=True
    )
    found = made.encode_queries(SENTENCES_1)
    assert np.array_equal(found["dense_vecs"], model.encode(queries, max_length=6)["dense_vecs"])
    assert len(found["lexical_weights"]) == 2
    assert found["colbert_vecs"] is None
    one = made.encode_queries(SENTENCES_1[0], max_length=512, return_sparse=False)
    assert np.array_equal(one["dense_vecs"], model.encode(queries[:1])["dense_vecs"][0])
    assert one["lexical_weights"] is None
    for encode in (made.encode_corpus, made.encode):
        found = encode(SENTENCES_2, return_dense=False, return_colbert_vecs=True)
        assert found["dense_vecs"] is None
        assert len(found["lexical_weights"]) == len(found["colbert_vecs"]) == 2
    cut = model.compute_score([SENTENCES_1[0], SENTENCES_2[0]], max_query_length=6)
    assert made.compute_score([SENTENCES_1[0], SENTENCES_2[0]]) == cut

    ef = BGEM3EmbeddingFunction(str(demo_m3), 16, "cpu", True, False, True, False)
    assert list(ef(DOCS)) == ["dense"]


@pytest.mark.slow
def test_every_argument_of_the_original_is_at_its_place() -> None:
    from FlagEmbedding import BGEM3FlagModel as Original  # noqa: PLC0415  6 s, only where this runs

    for method in ("__init__", "encode", "encode_queries", "encode_corpus", "compute_score"):
        mine, its = (list(signature(getattr(kind, method)).parameters.values()) for kind in (BGEM3FlagModel, Original))
        places = [each.name for each in mine if each.kind is each.POSITIONAL_OR_KEYWORD]
        assert places == [each.name for each in its][: len(places)], method
        named = {each.name: each.default for each in its}
        for each in mine:
            if each.name in named and each.name != "batch_size":
                assert each.default == named[each.name], (method, each.name)


def test_what_the_original_does_and_m3_does_not_is_an_error() -> None:
    with pytest.raises(UsageError, match="this model runs on one device; name one"):
        BGEM3FlagModel("nowhere", devices=["cuda:0", "cuda:1"])
    for make in (BGEM3FlagModel, BGEM3EmbeddingFunction):
        with pytest.raises(UsageError, match="normalize_embeddings=False: "):
            make("nowhere", normalize_embeddings=False)


def test_model_card_dense(model: BGEM3FlagModel) -> None:
    embeddings_1 = model.encode(SENTENCES_1, batch_size=12, max_length=8192)["dense_vecs"]
    embeddings_2 = model.encode(SENTENCES_2)["dense_vecs"]
    similarity = embeddings_1 @ embeddings_2.T
    assert similarity.shape == (2, 2)
    assert similarity[0, 0] > similarity[0, 1]
    assert similarity[1, 1] > similarity[1, 0]


def test_model_card_sparse(model: BGEM3FlagModel) -> None:
    output_1 = model.encode(SENTENCES_1, return_dense=True, return_sparse=True, return_colbert_vecs=False)
    output_2 = model.encode(SENTENCES_2, return_dense=True, return_sparse=True, return_colbert_vecs=False)
    assert output_1["colbert_vecs"] is None
    named = model.convert_id_to_token(output_1["lexical_weights"])
    assert set(named[0]) <= {"What", "is", "B", "GE", "M", "3", "?"}
    assert {"B", "GE", "M"} <= set(named[0])
    assert {"BM", "25"} <= set(named[1]) <= {"De", "fin", "ation", "of", "BM", "25"}
    assert model.convert_id_to_token(output_1["lexical_weights"][0]) == named[0]
    lexical_scores = model.compute_lexical_matching_score(
        output_1["lexical_weights"][0], output_2["lexical_weights"][0]
    )
    assert lexical_scores > 0
    assert model.compute_lexical_matching_score(output_1["lexical_weights"][0], output_1["lexical_weights"][1]) == 0
    matrix = model.compute_lexical_matching_score(output_1["lexical_weights"], output_2["lexical_weights"])
    assert matrix.shape == (2, 2)
    assert matrix[0, 0] == lexical_scores


def test_model_card_colbert(model: BGEM3FlagModel) -> None:
    output_1 = model.encode(SENTENCES_1, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    output_2 = model.encode(SENTENCES_2, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    right = model.colbert_score(output_1["colbert_vecs"][0], output_2["colbert_vecs"][0])
    wrong = model.colbert_score(output_1["colbert_vecs"][0], output_2["colbert_vecs"][1])
    assert 0 < wrong < right < 1


def test_model_card_scores(model: BGEM3FlagModel) -> None:
    sentence_pairs = [[i, j] for i in SENTENCES_1 for j in SENTENCES_2]
    scores = model.compute_score(sentence_pairs, max_passage_length=128, weights_for_different_modes=[0.4, 0.2, 0.4])
    assert list(scores) == ["colbert", "sparse", "dense", "sparse+dense", "colbert+sparse+dense"]
    assert all(isinstance(value, float) for values in scores.values() for value in values)
    assert [len(values) for values in scores.values()] == [4] * 5
    total = [
        0.4 * dense + 0.2 * sparse + 0.4 * colbert
        for dense, sparse, colbert in zip(scores["dense"], scores["sparse"], scores["colbert"], strict=True)
    ]
    assert scores["colbert+sparse+dense"] == pytest.approx(total, abs=1e-6)
    single = model.compute_score(tuple(sentence_pairs[0]), weights_for_different_modes=[0.4, 0.2, 0.4])
    # In bfloat16 the last bits of a vector depend on its batch.
    assert single == pytest.approx({name: values[0] for name, values in scores.items()}, abs=1e-3)


def test_a_pair_alone_scores_as_among_others(demo_m3: Path) -> None:
    model = BGEM3FlagModel(str(demo_m3), use_fp16=False)
    sentence_pairs = [(i, j) for i in SENTENCES_1 for j in SENTENCES_2]
    scores = model.compute_score(sentence_pairs, max_passage_length=128, weights_for_different_modes=[0.4, 0.2, 0.4])
    single = model.compute_score(sentence_pairs[0], weights_for_different_modes=[0.4, 0.2, 0.4])
    assert single == pytest.approx({name: values[0] for name, values in scores.items()}, abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_flagembedding_itself_returns_the_same(demo_m3: Path) -> None:
    from FlagEmbedding import BGEM3FlagModel as Reference  # noqa: PLC0415  6 s, only where this runs

    wanted: dict[str, Any] = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
    # FlagEmbedding does not read the checkpoint's pooling.
    reference = Reference(str(demo_m3), use_fp16=False, devices="cpu", pooling_method="mean")
    mine = BGEM3FlagModel(str(demo_m3), use_fp16=False, devices="cpu")
    theirs, ours = reference.encode(SENTENCES_1, **wanted), mine.encode(SENTENCES_1, **wanted)
    assert list(theirs) == list(ours)
    assert np.abs(theirs["dense_vecs"] - ours["dense_vecs"]).max() < 1e-5
    assert [dict(row) for row in theirs["lexical_weights"]] == [
        pytest.approx(row, abs=1e-4) for row in ours["lexical_weights"]
    ]
    for left, right in zip(theirs["colbert_vecs"], ours["colbert_vecs"], strict=True):
        assert np.abs(left - right).max() < 1e-4
    assert (
        reference.convert_id_to_token(theirs["lexical_weights"])[0].keys()
        == mine.convert_id_to_token(ours["lexical_weights"])[0].keys()
    )
    one, other = reference.encode("a text", **wanted), mine.encode("a text", **wanted)
    assert one["dense_vecs"].shape == other["dense_vecs"].shape
    assert one["colbert_vecs"].shape == other["colbert_vecs"].shape
    assert one["lexical_weights"].keys() == other["lexical_weights"].keys()
