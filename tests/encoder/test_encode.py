"""Rows to batches, and batches through the model: launched ahead on a CPU, in the order of events on CUDA."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from m3cli.concurrency import parallel_map
from m3cli.encoder import encode as encoding
from m3cli.encoder import tokenizer as tokenizers
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.encode import (
    BALANCE_STEP,
    NOT_A_NUMBER,
    OUT_OF_MEMORY,
    BatchEncoder,
    FailedRow,
    batch_rows,
    pack_rows,
    pack_texts,
    plan_windows,
    split_batch,
    take_batch,
    tokenise_texts,
)
from m3cli.encoder.heads import OutputOptions
from m3cli.encoder.model import Model, load_model
from m3cli.encoder.model import run_model as real_run_model
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.errors import ModelTooLarge
from m3cli.records import Batch, Chunks, Embeddings
from tests.encoder.test_model import SPECIALS, pack

LENGTHS = st.lists(st.integers(2, 50), max_size=60).map(lambda lengths: np.array(lengths, np.int64))

POISON = 77
"a token whose embedding is NaN in the model of these tests"
STEEP = 78
"a token whose embedding is too large for float16"


def as_chunks(lengths: NDArray[np.int64]) -> Chunks:
    rows = len(lengths)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    numbers = np.zeros(rows, np.int32)
    return Chunks(
        input_ids=np.arange(cu_seqlens[-1], dtype=np.int32),
        cu_seqlens=cu_seqlens,
        document=np.arange(rows),
        chunk_index=numbers,
        num_chunks=numbers + 1,
        char_start=np.zeros(rows, np.int64),
        char_end=np.zeros(rows, np.int64),
        truncated=np.zeros(rows, np.bool_),
        num_repeated=np.zeros(rows, np.int32),
    )


@given(LENGTHS, st.integers(1, 120))
def test_windows_are_ranges_within_the_budget(lengths: NDArray[np.int64], budget: int) -> None:
    windows = plan_windows(lengths, max_window_tokens=budget)
    assert [row for start, stop in windows for row in range(start, stop)] == list(range(len(lengths)))
    assert all(lengths[start:stop].sum() <= budget or stop - start == 1 for start, stop in windows)


def test_a_shard_without_budget_is_one_window() -> None:
    assert plan_windows(np.array([3, 4, 5]), max_window_tokens=None) == [(0, 3)]


@given(LENGTHS, st.integers(1, 1000), st.integers(1, 4))
def test_batches_hold_every_row_once_longest_first_within_the_budget(
    lengths: NDArray[np.int64], budget: int, threads: int
) -> None:
    batches = batch_rows(lengths, max_batch_tokens=budget, threads=threads)
    rows = [int(row) for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(np.diff(lengths[rows]) <= 0)
    assert all(lengths[batch].sum() <= budget or len(batch) == 1 for batch in batches)


@given(st.lists(st.integers(2, 300), min_size=200, max_size=400), st.integers(2, 4))
def test_threads_have_equal_batches_and_the_same_number_of_them(lengths: list[int], threads: int) -> None:
    tokens = np.array(lengths, np.int64)
    batches = [int(tokens[batch].sum()) for batch in batch_rows(tokens, max_batch_tokens=4096, threads=threads)]
    fewest = len(batch_rows(tokens, max_batch_tokens=4096))
    assert len(batches) <= -(-fewest // threads) * threads
    assert max(batches) <= sum(batches) / len(batches) + 300 + BALANCE_STEP + 300


def test_equal_lengths_keep_their_order() -> None:
    assert [batch.tolist() for batch in batch_rows(np.array([5, 9, 5, 9]), max_batch_tokens=14)] == [[1], [3, 0], [2]]


@given(LENGTHS.filter(len), st.integers(20, 120))
def test_packed_ids_are_the_rows_own(lengths: NDArray[np.int64], budget: int) -> None:
    chunks = as_chunks(lengths)
    for rows in batch_rows(lengths, max_batch_tokens=budget):
        batch = pack_rows(chunks, rows)
        for index, row in enumerate(batch.rows):
            ids = batch.input_ids[batch.cu_seqlens[index] : batch.cu_seqlens[index + 1]]
            assert ids.tolist() == list(range(chunks.cu_seqlens[row], chunks.cu_seqlens[row + 1]))
        assert batch.max_seqlen == np.diff(batch.cu_seqlens).max()


@given(LENGTHS.filter(lambda lengths: len(lengths) >= 2))
def test_split_keeps_order_and_content(lengths: NDArray[np.int64]) -> None:
    chunks = as_chunks(lengths)
    batch = pack_rows(chunks, np.arange(len(lengths)))
    first, second = split_batch(batch)
    assert [*first.rows, *second.rows] == batch.rows.tolist()
    assert [*first.input_ids, *second.input_ids] == batch.input_ids.tolist()
    assert first.cu_seqlens[0] == second.cu_seqlens[0] == 0
    assert len(first.rows) >= 1
    assert len(second.rows) >= 1


def test_slices_of_texts_have_the_same_tokens(tiny_m3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(read_checkpoint(tiny_m3))
    usual = tokenizer.encode(TEXTS)
    monkeypatch.setattr(tokenizers, "SLICE_TEXTS", 2)
    assert [ids.tolist() for ids in tokenizer.encode(TEXTS)] == [ids.tolist() for ids in usual]
    assert tokenizer.encode([]) == []


@pytest.mark.parametrize(("limit", "tried", "learned"), [(9000, [5000], None), (1500, [5000, 2560, 1280], 1280)])
def test_warming_up_finds_the_largest_batch(
    model: Model, limit: int, tried: list[int], learned: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder(model)
    launched: list[int] = []

    def launch(_: Model, batch: Batch) -> Any:
        launched.append(len(batch.input_ids))
        return None if launched[-1] > limit else SimpleNamespace(outputs=SimpleNamespace(wait=lambda: None))

    monkeypatch.setattr(encoder, "_launch", launch)
    encoder.warm_up(5000)
    assert launched == [], "a CPU needs none"
    encoder.model = replace(model, device=torch.device("cuda"))
    encoder.warm_up(5000)
    assert launched == [4864 if size == 5000 else size for size in tried]
    assert encoder.max_tokens == learned


TEXTS = ["one two three four five six seven", "", "a", "trailing  ", "狐狸 跳过"]


def test_texts_are_cut_as_transformers_cuts_them(tiny_m3: Path) -> None:
    tokenizer = load_tokenizer(read_checkpoint(tiny_m3))
    complete = tokenise_texts(TEXTS, tokenizer, max_length=512)
    assert complete.truncated == 0
    cut = tokenise_texts(TEXTS, tokenizer, max_length=4)
    assert cut.truncated == sum(len(ids) > 4 for ids in complete.input_ids)
    for long, short in zip(complete.input_ids, cut.input_ids, strict=True):
        expected = long if len(long) <= 4 else np.append(long[:3], tokenizer.eos_id)
        assert short.tolist() == expected.tolist()


def test_batches_hold_each_text_once_longest_first(tiny_m3: Path) -> None:
    tokenised = tokenise_texts(TEXTS, load_tokenizer(read_checkpoint(tiny_m3)), max_length=512)
    batches = list(pack_texts(tokenised, max_batch_tokens=8))
    rows = np.concatenate([batch.rows for batch in batches])
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 4]
    assert (np.diff(tokenised.num_tokens[rows]) <= 0).all()
    for batch in batches:
        assert len(batch.rows) == 1 or len(batch.input_ids) <= 8
        for place, row in enumerate(batch.rows.tolist()):
            first, last = batch.cu_seqlens[place : place + 2]
            assert batch.input_ids[first:last].tolist() == tokenised.input_ids[row].tolist()


@pytest.fixture(scope="module")
def model(tiny_m3: Path) -> Model:
    return load_model(read_checkpoint(tiny_m3), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def broken(model: Model) -> Model:
    words = model.word_embeddings.clone()
    words[POISON] = torch.nan
    return replace(model, word_embeddings=words)


def make_encoder(model: Model, **arguments: Any) -> BatchEncoder:
    options = OutputOptions(outputs=("dense", "sparse", "colbert"), special_ids=SPECIALS, vector_weights=True)
    return BatchEncoder(model, options, parallel_map=parallel_map, **arguments)


def make_batches(*lengths: list[int], poisoned: frozenset[int] = frozenset()) -> list[Batch]:
    """Return batches of numbered rows of these lengths; a poisoned row contains the token."""
    batches, number = [], 0
    for group in lengths:
        numbers = np.arange(number, number + len(group))
        rows = [[0, *range(100 + row, 98 + row + length), 2] for row, length in zip(numbers, group, strict=True)]
        for index in np.flatnonzero(np.isin(numbers, list(poisoned))):
            rows[index][1] = POISON
        batches.append(replace(pack(*rows), rows=numbers))
        number += len(group)
    return batches


def list_rows(result: list[Embeddings | FailedRow]) -> list[int]:
    return [row for each in result for row in ([each.row] if isinstance(each, FailedRow) else each.rows.tolist())]


def assert_same(one: Embeddings | FailedRow, other: Embeddings | FailedRow) -> None:
    if isinstance(one, FailedRow):
        assert one == other
        return
    assert isinstance(other, Embeddings)
    assert one.rows.tolist() == other.rows.tolist()
    for name in ("dense_vecs", "lexical_weights", "colbert_vecs"):
        for first, second in zip(list_arrays(getattr(one, name)), list_arrays(getattr(other, name)), strict=True):
            assert first.dtype == second.dtype
            assert first.tobytes() == second.tobytes()


def list_arrays(held: Any) -> list[np.ndarray]:
    if isinstance(held, np.ndarray):
        return [held]
    return [value for name in held.__slots__ if (value := getattr(held, name)) is not None]


@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_ahead_give_the_same_rows_in_the_same_order(broken: Model, ahead: int) -> None:
    batches = make_batches([30, 20], [9], [8, 7, 7, 3], [3], [3, 3], poisoned=frozenset({2, 4, 9}))
    usual = [result for batch in batches for result in make_encoder(broken).encode(batch)]
    assert list_rows(usual) == [0, 1, 2, 3, 5, 6, 4, 7, 8, 9]
    assert [result.reason for result in usual if isinstance(result, FailedRow)] == [NOT_A_NUMBER] * 3
    other = list(make_encoder(broken, ahead=ahead).encode_all(iter(batches)))
    assert len(usual) == len(other)
    for one, two in zip(usual, other, strict=True):
        assert_same(one, two)


def test_batches_in_threads_give_the_same_rows_in_the_same_order(broken: Model) -> None:
    batches = make_batches([30, 20], [9], [8, 7, 7, 3], [3], [3, 3], poisoned=frozenset({2, 4, 9}))
    usual = list(make_encoder(broken).encode_all(batches))
    encoder = make_encoder(broken, num_threads=3)
    for one, two in zip(usual, encoder.encode_all(iter(batches)), strict=True):
        assert_same(one, two)


def test_a_batch_that_memory_does_not_hold_goes_in_halves_when_its_turn_comes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_model(model: Any, batch: Batch) -> Any:
        if len(batch.input_ids) > 25:
            raise torch.OutOfMemoryError("injected")
        return real_run_model(model, batch)

    monkeypatch.setattr(encoding, "run_model", run_model)
    encoder = make_encoder(model, num_threads=2)
    result = list(encoder.encode_all(make_batches([20], [10, 10, 10, 10], [26], [9, 9, 9], [5, 5])))
    assert list_rows(result) == list(range(11))
    assert [each.row for each in result if isinstance(each, FailedRow)] == [5]


def test_a_row_that_fits_alone_waits_until_the_other_threads_have_ended(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = []

    def run_model(model: Any, batch: Batch) -> Any:
        running.append(int(batch.rows[0]))
        time.sleep(0.05)
        try:
            if len(batch.input_ids) == 30 and len(running) > 1:
                raise torch.OutOfMemoryError("injected")
            return real_run_model(model, batch)
        finally:
            running.remove(int(batch.rows[0]))

    monkeypatch.setattr(encoding, "run_model", run_model)
    encoder = make_encoder(model, num_threads=2)
    result = list(encoder.encode_all(make_batches([9], [30], [30], [8], [7])))
    assert list_rows(result) == [0, 1, 2, 3, 4]
    assert all(isinstance(each, Embeddings) for each in result)


def allocate_too_much() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def multiply_what_does_not_fit() -> None:
    torch.zeros(2, 3) @ torch.zeros(2, 3)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_memory_of_the_host_runs_out_as_that_of_a_gpu_does(
    model: Model, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_model(model: Any, batch: Batch) -> Any:
        if len(batch.input_ids) > 25:
            allocate_too_much()
        return real_run_model(model, batch)

    monkeypatch.setattr(encoding, "run_model", run_model)
    encoder = make_encoder(model, num_threads=num_threads)
    result = list(encoder.encode_all(make_batches([20], [10, 10, 10, 10], [26])))
    assert list_rows(result) == list(range(6))
    assert [(each.row, each.reason) for each in result if isinstance(each, FailedRow)] == [(5, OUT_OF_MEMORY)]


def test_a_row_fails_if_memory_does_not_hold_the_model_in_float32(model: Model, broken: Model) -> None:
    def load_float32() -> Model:
        raise ModelTooLarge("no memory for it")

    encoder = make_encoder(broken, ahead=0, retries=[load_float32])
    result = list(encoder.encode_all(make_batches([9, 8], [7], poisoned=frozenset({1}))))
    assert list_rows(result) == [0, 1, 2]
    assert [(each.row, each.reason) for each in result if isinstance(each, FailedRow)] == [(1, OUT_OF_MEMORY)]


def test_another_error_of_torch_is_no_lack_of_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "run_model", lambda *_: multiply_what_does_not_fit())
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(make_encoder(model).encode_all(make_batches([9])))


@pytest.mark.parametrize(
    ("ahead", "events"),
    [
        (0, ["pack 0", "launch 0", "0", "pack 1", "launch 1", "1", "pack 2", "launch 2", "2"]),
        (1, ["pack 0", "launch 0", "pack 1", "launch 1", "0", "pack 2", "launch 2", "1", "2"]),
    ],
)
def test_the_next_batch_is_launched_before_one_is_collected(
    model: Model, ahead: int, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run_model(model: Any, batch: Batch) -> Any:
        seen.append(f"launch {batch.rows[0]}")
        return real_run_model(model, batch)

    def watch(batches: list[Batch]) -> Iterator[Batch]:
        for batch in batches:
            seen.append(f"pack {batch.rows[0]}")
            yield batch

    monkeypatch.setattr(encoding, "run_model", run_model)
    for result in make_encoder(model, ahead=ahead).encode_all(watch(make_batches([9], [8], [7]))):
        assert isinstance(result, Embeddings)
        seen.append(f"{result.rows[0]}")
    assert seen == events


@pytest.mark.parametrize("ahead", [0, 1])
def test_halves_replace_a_batch_that_memory_does_not_hold(
    model: Model, ahead: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def run_model(model: Any, batch: Batch) -> Any:
        tried.append(len(batch.input_ids))
        if len(batch.input_ids) > 25:
            raise torch.OutOfMemoryError("injected")
        return real_run_model(model, batch)

    monkeypatch.setattr(encoding, "run_model", run_model)
    encoder = make_encoder(model, ahead=ahead)
    with caplog.at_level(logging.WARNING):
        result = list(encoder.encode_all(make_batches([20], [10, 10, 10, 10], [26], [9, 9, 9], [5, 5])))
    assert list_rows(result) == list(range(11))
    assert encoder.max_tokens == 20
    assert tried == [20, *[40] * (1 + ahead), 20, 20, *[26] * (1 + ahead), 18, 9, 10]
    assert [record.message for record in caplog.records] == [
        "out of memory with a batch of 40 tokens; from here on batches have at most 20"
    ]
    (failed,) = (each for each in result if isinstance(each, FailedRow))
    assert (failed.row, failed.reason) == (5, OUT_OF_MEMORY)


def test_a_half_is_split_again_only_if_it_fails(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, limits = list[int](), [0]

    def run_model(model: Any, batch: Batch) -> Any:
        tried.append(len(batch.input_ids))
        if len(batch.input_ids) > limits[0]:
            raise torch.OutOfMemoryError("injected")
        return real_run_model(model, batch)

    monkeypatch.setattr(encoding, "run_model", run_model)
    for limits[0], sizes in ((50, [69, 45, 24]), (40, [69, 45, 33, 12, 24])):
        tried.clear()
        result = list(make_encoder(model, ahead=0).encode_all(make_batches([33, 12, 12, 12])))
        assert list_rows(result) == [0, 1, 2, 3]
        assert tried == sizes


def test_a_row_that_fits_alone_is_tried_again_when_nothing_waits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []

    def run_model(model: Any, batch: Batch) -> Any:
        if len(batch.input_ids) == 30 and waiting:
            raise torch.OutOfMemoryError("injected")
        waiting.append(int(batch.rows[0]))
        return real_run_model(model, batch)

    monkeypatch.setattr(encoding, "run_model", run_model)
    result = []
    for each in make_encoder(model, ahead=1).encode_all(make_batches([9], [30], [8])):
        result.append(each)
        assert isinstance(each, Embeddings)
        waiting.remove(int(each.rows[0]))
    assert list_rows(result) == [0, 1, 2]


def test_rows_that_are_not_finite_are_encoded_in_float32_while_others_wait(model: Model, broken: Model) -> None:
    batches = make_batches([9, 8], [7, 6], [5], poisoned=frozenset({1, 2, 4}))
    encoder = make_encoder(broken, ahead=1, retries=[lambda: model])
    result = list(encoder.encode_all(batches))
    assert list_rows(result) == [0, 1, 3, 2, 4]
    exact = make_encoder(model, ahead=0)
    expected = [
        each
        for batch in make_batches([9], [8], [7], [6], [5], poisoned=frozenset({1, 2, 4}))
        for each in exact.encode(batch)
    ]
    for each in result:
        assert isinstance(each, Embeddings)
        (row,) = each.rows
        same = expected[row]
        assert isinstance(same, Embeddings)
        assert each.dense_vecs is not None
        assert same.dense_vecs is not None
        np.testing.assert_allclose(each.dense_vecs.astype(np.float32), same.dense_vecs.astype(np.float32), atol=1e-3)


def test_rows_that_overflow_are_encoded_together_in_the_next_dtype(
    tiny_m3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(dtype: Any) -> Model:
        loaded = load_model(read_checkpoint(tiny_m3), device="cpu", dtype=dtype)
        loaded.word_embeddings[POISON] = torch.nan
        loaded.word_embeddings[STEEP] = torch.tensor([1e5, -1e5]).repeat(32).to(loaded.dtype)
        return loaded

    launched = []

    def run_model(model: Model, batch: Batch) -> Any:
        launched.append((str(model.dtype).removeprefix("torch."), batch.rows.tolist()))
        return real_run_model(model, batch)

    monkeypatch.setattr(encoding, "run_model", run_model)
    (batch,) = make_batches([9, 8, 8, 7, 6], poisoned=frozenset({2}))
    batch.input_ids[batch.cu_seqlens[[1, 4]] + 1] = STEEP
    encoder = make_encoder(load("float16"), retries=[partial(load, "bfloat16"), partial(load, "float32")])
    encoder._retry_alone = False  # as on CUDA
    first, second, failed = encoder.encode(batch)
    assert launched == [("float16", [0, 1, 2, 3, 4]), ("bfloat16", [1, 2, 4]), ("float32", [2])]
    assert (list_rows([first]), list_rows([second]), list_rows([failed])) == ([0, 3], [1, 4], [2])
    assert encoder.repeated == {"bfloat16": 2, "float32": 0}
    assert isinstance(failed, FailedRow)
    assert failed.detail == "NaN or infinity in float16 and in bfloat16 and in float32"
    (exact,) = make_encoder(load("float32")).encode(take_batch(batch, np.array([1, 4])))
    assert isinstance(exact, Embeddings)
    assert isinstance(second, Embeddings)
    assert exact.dense_vecs is not None
    assert second.dense_vecs is not None
    assert (exact.dense_vecs.astype(np.float32) * second.dense_vecs.astype(np.float32)).sum(1).min() > 0.99


def test_rows_are_encoded_again_in_halves_if_memory_runs_out(
    model: Model, broken: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def run_model(running: Model, batch: Batch) -> Any:
        if running is model:
            tried.append(batch.rows.tolist())
            if len(batch.rows) > 1:
                raise torch.OutOfMemoryError("injected")
        return real_run_model(running, batch)

    monkeypatch.setattr(encoding, "run_model", run_model)
    encoder = make_encoder(broken, retries=[lambda: model])
    encoder._retry_alone = False
    result = list(encoder.encode_all(make_batches([9, 8, 7], poisoned=frozenset({0, 2}))))
    assert tried == [[0, 2], [0], [2]]
    assert list_rows(result) == [1, 0, 2]
    assert all(isinstance(each, Embeddings) for each in result)


def test_a_cpu_keeps_nothing_waiting(model: Model) -> None:
    taken = []

    def watch() -> Iterator[Batch]:
        for batch in make_batches([9], [8]):
            taken.append(int(batch.rows[0]))
            yield batch

    rows = make_encoder(model).encode_all(watch())
    next(rows)
    assert taken == [0]
