"""The cross-encoder: pairs are the tokenizer's, logits those of transformers, one by one or packed together."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, XLMRobertaForSequenceClassification

from m3cli.encoder import reranker as module
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.encode import TokenisedTexts, pack_texts, tokenise_texts
from m3cli.encoder.model import Model, run_model
from m3cli.encoder.reranker import PAIR_SPECIALS, Reranker, join_pair, load_reranker, score_batches
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.errors import ModelError
from m3cli.records import Batch

QUERIES = ["what is a panda?", "狐狸", "Ein  Satz mit zwei Leerzeichen ", "q"]
PASSAGES = [
    "The giant panda (Ailuropoda melanoleuca) is a bear species endemic to China. " * 12,
    "hi",
    " Füchse sind klein, дома стоят.",
    "ثعلب بني سريع يقفز فوق الكلب",
]
MAX_LENGTH = 96


@pytest.fixture(scope="module")
def reference(cross_encoder: Path) -> XLMRobertaForSequenceClassification:
    loaded: XLMRobertaForSequenceClassification = XLMRobertaForSequenceClassification.from_pretrained(cross_encoder)
    loaded.train(mode=False)
    return loaded


@pytest.fixture(scope="module")
def reranker(cross_encoder: Path) -> Reranker:
    return load_reranker(read_checkpoint(cross_encoder), device="cpu", dtype="float32")


def join(cross_encoder: Path, *, max_length: int) -> TokenisedTexts:
    tokenizer = load_tokenizer(read_checkpoint(cross_encoder))
    queries = tokenise_texts(QUERIES, tokenizer, max_length=512).input_ids
    passages = tokenise_texts(PASSAGES, tokenizer, max_length=512).input_ids
    joined = [join_pair(query, passage, max_length=max_length) for query in queries for passage in passages]
    return TokenisedTexts(input_ids=tuple(ids for ids, _ in joined), truncated=sum(cut for _, cut in joined))


@pytest.mark.parametrize("max_length", [MAX_LENGTH, 512])
def test_pairs_are_the_tokenizers(cross_encoder: Path, max_length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(cross_encoder)
    texts = [(query, passage) for query in QUERIES for passage in PASSAGES]
    expected = tokenizer(
        [query for query, _ in texts],
        [passage for _, passage in texts],
        truncation="only_second",
        max_length=max_length,
    )["input_ids"]
    result = join(cross_encoder, max_length=max_length)
    assert [ids.tolist() for ids in result.input_ids] == expected
    assert result.truncated == (len(QUERIES) if max_length == MAX_LENGTH else 0)


@pytest.mark.parametrize("max_batch_tokens", [1, 150, 8192])
def test_logits_are_those_of_transformers(
    cross_encoder: Path,
    reference: XLMRobertaForSequenceClassification,
    reranker: Reranker,
    max_batch_tokens: int,
) -> None:
    pairs = join(cross_encoder, max_length=MAX_LENGTH)
    found = np.full(len(pairs.input_ids), np.nan, np.float32)
    for result in score_batches(reranker, pack_texts(pairs, max_batch_tokens=max_batch_tokens)):
        found[result.rows] = result.values
    with torch.inference_mode():
        expected = [float(reference(torch.tensor(ids[None].astype(np.int64))).logits[0, 0]) for ids in pairs.input_ids]
    assert np.ptp(expected) > 0.05, "all pairs alike would prove nothing"
    np.testing.assert_allclose(found, expected, atol=1e-4)


@given(st.integers(0, 20), st.integers(0, 60), st.integers(24, 64))
def test_a_pair_keeps_its_query_and_its_length(query: int, passage: int, max_length: int) -> None:
    ids, cut = join_pair(
        np.array([0, *range(100, 100 + query), 2], np.int32),
        np.array([0, *range(500, 500 + passage), 2], np.int32),
        max_length=max_length,
    )
    kept = min(passage, max_length - query - PAIR_SPECIALS)
    assert ids.tolist() == [0, *range(100, 100 + query), 2, 2, *range(500, 500 + kept), 2]
    assert cut == (kept < passage)


def test_out_of_memory_goes_on_in_halves(
    cross_encoder: Path, reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = join(cross_encoder, max_length=MAX_LENGTH)
    (batch,) = pack_texts(pairs, max_batch_tokens=8192)
    (complete,) = score_batches(reranker, [batch])

    def run_few(model: Model, batch: Batch) -> object:
        if len(batch.rows) > 3:
            raise torch.OutOfMemoryError
        return run_model(model, batch)

    monkeypatch.setattr(module, "run_model", run_few)
    parts = list(score_batches(reranker, [batch]))
    assert len(parts) > 4
    assert np.concatenate([part.rows for part in parts]).tolist() == batch.rows.tolist()
    np.testing.assert_allclose(np.concatenate([part.values for part in parts]), complete.values, atol=1e-5)

    def refuse(model: object, batch: Batch) -> object:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "run_model", refuse)
    with pytest.raises(ModelError, match="does not fit the memory of cpu; lower --max-length"):
        list(score_batches(reranker, [batch]))


def test_weights_as_bin_are_the_same(cross_encoder: Path, reranker: Reranker, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    shutil.copytree(cross_encoder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    again = load_reranker(read_checkpoint(folder), device="cpu", dtype="float32")
    assert torch.equal(again.dense[0], reranker.dense[0])
    assert torch.equal(again.out_proj[1], reranker.out_proj[1])


def test_what_scores_no_pairs_is_refused(cross_encoder: Path, tiny_m3: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no classifier\.dense\.weight: it scores no pairs; give a cross-encoder"):
        load_reranker(read_checkpoint(tiny_m3), device="cpu", dtype="float32")
    folder = tmp_path / "labels"
    shutil.copytree(cross_encoder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.out_proj.weight"] = torch.zeros(3, 64)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"out_proj\.weight is \[3, 64\], not \[1, 64\]"):
        load_reranker(read_checkpoint(folder), device="cpu", dtype="float32")
