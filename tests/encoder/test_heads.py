from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.heads import OutputOptions, build_embeddings, find_maxima, run_heads, weigh_positions
from m3cli.encoder.model import Model, load_model, run_model
from m3cli.records import Output
from tests.encoder.test_model import SPECIALS, pack

WEIGHTS = st.sampled_from([0.0, 0.25, 0.5, 1.0, math.inf, math.nan]) | st.floats(0, 8, width=32)
TOKENS = st.tuples(st.sampled_from([0, 2, 5, 6, 7, 250_001]), WEIGHTS)


@given(st.lists(st.lists(TOKENS, min_size=1, max_size=30), min_size=1, max_size=8))
def test_the_maximum_of_each_token_is_that_of_a_loop(rows: list[list[tuple[int, float]]]) -> None:
    batch = pack(*[[token for token, _ in row] for row in rows])
    weights = torch.tensor([weight for row in rows for _, weight in row])
    number = torch.tensor([index for index, row in enumerate(rows) for _ in row], dtype=torch.int32)
    keys, values = find_maxima(weights, torch.from_numpy(batch.input_ids).int(), number)
    assert keys.shape == values.shape == weights.shape, "sizes do not depend on numbers"
    result = build_embeddings(batch, {"lexical_keys": keys.numpy(), "lexical_values": values.numpy()}).lexical_weights
    assert result is not None
    assert len(result.indptr) == len(rows) + 1
    assert result.indices.dtype == np.uint32
    for index, row in enumerate(rows):
        expected: dict[int, float] = {}
        for token, weight in row:
            if weight > 0:
                expected[token] = max(expected.get(token, 0.0), weight)
        first, last = result.indptr[index : index + 2]
        assert result.indices[first:last].tolist() == sorted(expected)
        assert result.values[first:last].tolist() == [expected[token] for token in sorted(expected)]


@pytest.fixture(scope="module")
def model(tiny_m3: Path) -> Model:
    """The random checkpoint, whose tokens weigh nothing, with a sparse head by which most weigh something."""
    loaded = load_model(read_checkpoint(tiny_m3), device="cpu", dtype="float32")
    assert loaded.sparse_linear is not None
    return replace(loaded, sparse_linear=replace(loaded.sparse_linear, bias=torch.ones(1)))


def test_a_vector_has_the_weight_of_its_token(model: Model) -> None:
    batch = pack([0, 9, 8, 9, 3, 7, 2], [0], [0, 9, 9, 2], [0, 2])
    states, layout = run_model(model, batch)
    choices: tuple[tuple[Output, ...], ...] = (("colbert",), ("sparse", "colbert"))
    for outputs in choices:
        options = OutputOptions(outputs=outputs, special_ids=SPECIALS, vector_weights=True)
        heads = run_heads(model, batch, states, layout, options)
        result = build_embeddings(batch, {name: tensor.numpy() for name, tensor in heads.items()})
        assert (result.lexical_weights is not None) == ("sparse" in outputs)
        assert result.colbert_vecs is not None
        assert result.colbert_vecs.weights is not None
        assert result.colbert_vecs.indptr.tolist() == [0, 6, 6, 9, 10]
        assert model.sparse_linear is not None
        ids = torch.from_numpy(batch.input_ids)
        by_position = weigh_positions(states, ids, model.sparse_linear, special_ids=SPECIALS)
        expected = [by_position[index].item() for index in (*range(1, 7), *range(9, 12), 13)]
        assert result.colbert_vecs.weights.tolist() == expected
        assert any(expected)


def test_what_the_filling_holds_does_not_matter(model: Model) -> None:
    batch = pack([0, 9, 8, 9, 3, 7, 2], [0, 9, 9, 2])
    states, layout = run_model(model, batch)
    assert len(states) > len(batch.input_ids)
    spoilt = states.clone()
    spoilt[len(batch.input_ids) :] = torch.nan
    options = OutputOptions(outputs=("dense", "sparse", "colbert"), special_ids=SPECIALS, vector_weights=True)
    for pooling in ("cls", "mean", "lasttoken"):
        pooled = replace(model, checkpoint=replace(model.checkpoint, pooling=pooling))
        usual, other = (run_heads(pooled, batch, held, layout, options) for held in (states, spoilt))
        assert usual.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in usual.items())
