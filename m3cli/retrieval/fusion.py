"""Rankings of several outputs made into one: a weighted average of scores, or reciprocal rank fusion.

Reciprocal rank fusion: Cormack, Clarke and Büttcher, SIGIR 2009; a document's score is the sum over the rankings that
have it of weight / (60 + rank), ranks from 1. P pairs of a query and a document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from m3cli.config import ALL_OUTPUTS
from m3cli.errors import UsageError
from m3cli.records import Output
from m3cli.retrieval.modes import Weights, combine_scores

RRF_K = 60

Scores = NDArray[np.float32]


def settle_weights(typed: Weights | None, outputs: Sequence[Output]) -> Weights:
    """Return weights in the order dense, sparse, colbert; 0 for what is not there, 1 for the rest if none were typed.

    Raises:
        UsageError: one was typed for an output that is not there, or there is only one output.
    """
    if len(outputs) < 2:
        raise UsageError(f"--mode hybrid needs two outputs, and there is only {outputs[0]}: use --mode {outputs[0]}")
    there = [output in outputs for output in ALL_OUTPUTS]
    if typed is None:
        return 1.0 * there[0], 1.0 * there[1], 1.0 * there[2]
    for output, has, weight in zip(ALL_OUTPUTS, there, typed, strict=True):
        if weight and not has:
            raise UsageError(
                f"--weights gives {output} {weight:g}, and the folder has no {output}, only {', '.join(outputs)}: "
                f"give it 0, or encode with --outputs {output},..."
            )
    return typed


def average_scores(scores: Mapping[Output, Scores], weights: Weights) -> Scores:
    """Return [P] weighted averages; an output that is not there must weigh 0."""
    length = len(next(iter(scores.values())))
    whole = {output: scores.get(output, np.zeros(length, np.float32)) for output in ALL_OUTPUTS}
    return combine_scores(whole, ["colbert+sparse+dense"], weights=weights)["colbert+sparse+dense"]


def fuse_ranks(ranks: Mapping[Output, NDArray[np.int64]], weights: Weights) -> Scores:
    """Return [P] reciprocal rank fusion of ranks that count from 0; -1 for a pair that a ranking does not have."""
    by_output = dict(zip(ALL_OUTPUTS, weights, strict=True))
    parts = [
        np.where(rank >= 0, by_output[output] / (RRF_K + 1 + np.maximum(rank, 0)), 0.0)
        for output, rank in ranks.items()
    ]
    fused: Scores = np.sum(parts, axis=0).astype(np.float32)
    return fused
