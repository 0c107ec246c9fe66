"""What a run amounts to: floating-point operations, padding, shares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of an encoder that its matmuls follow from."""

    layers: int
    width: int
    inner: int
    "of the feed-forward part"


def read_shape(model: Path) -> Shape:
    """Read the sizes from a checkpoint's config.json."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return Shape(layers=config["num_hidden_layers"], width=config["hidden_size"], inner=config["intermediate_size"])


def count_flops(shape: Shape, lengths: Sequence[int]) -> float:
    """Count a forward pass's FLOPs over rows of these many tokens, attention included, embeddings and heads not.

    A token and layer takes 8 C^2 for query, key, value and output, 4 C I for the feed-forward part, and 4 C L for
    attention at length L (scores, and the sum over values).
    """
    per_token = 8 * shape.width**2 + 4 * shape.width * shape.inner
    squares = sum(length**2 for length in lengths)
    return float(shape.layers * (per_token * sum(lengths) + 4 * shape.width * squares))


def padding_share(*, run: int, real: int) -> float:
    """Return what share of the positions that a model ran were no token of a text, or one that it ran before."""
    return 1 - real / run if run else 0.0


def group_padded(lengths: Sequence[int], *, budget: int) -> list[list[int]]:
    """Group rows, longest first, so that count x longest stays within a budget of padded tokens.

    Returns:
        places in `lengths`, each exactly once; a row longer than the budget is a group of its own.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    groups: list[list[int]] = []
    for place in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def idle_share(stages: Mapping[str, float]) -> float:
    """Return the share of a run's seconds in which the encoder did nothing."""
    return 1 - stages["encoding"] / sum(stages.values())
