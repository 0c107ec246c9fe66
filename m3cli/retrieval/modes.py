"""Which scores there are, what each is made of, and how the weighted ones are averaged.

The names are FlagEmbedding's. A weighted score is a weighted *average*, as its `compute_score` gives it (its
`modeling.py` has another, undivided sum with weights 1, 0.3, 1 for training); weights stand in the order dense,
sparse, colbert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from m3cli.config import ALL_OUTPUTS
from m3cli.errors import UsageError
from m3cli.records import Output

PARTS: dict[str, tuple[Output, ...]] = {
    "dense": ("dense",),
    "sparse": ("sparse",),
    "colbert": ("colbert",),
    "sparse+dense": ("dense", "sparse"),
    "colbert+sparse+dense": ("dense", "sparse", "colbert"),
}
MODES = tuple(PARTS)
"in the order of the output's columns"
Weights = tuple[float, float, float]
DEFAULT_WEIGHTS: Weights = (1.0, 1.0, 1.0)


def parts_of(modes: Sequence[str]) -> tuple[Output, ...]:
    """Return what must be computed for some modes, in the order dense, sparse, colbert."""
    return tuple(output for output in ALL_OUTPUTS if any(output in PARTS[mode] for mode in modes))


def modes_of(outputs: Sequence[Output]) -> tuple[str, ...]:
    """Return the modes that some outputs are enough for."""
    return tuple(mode for mode in MODES if set(PARTS[mode]) <= set(outputs))


def check_weights(modes: Sequence[str], weights: Weights) -> None:
    """Refuse weights that leave nothing to divide by in one of the modes."""
    for mode in modes:
        if len(PARTS[mode]) > 1 and sum(weights[ALL_OUTPUTS.index(output)] for output in PARTS[mode]) == 0:
            raise UsageError(
                f"--weights {','.join(f'{weight:g}' for weight in weights)}: the weights of {mode} sum to 0; "
                f"change them, or leave {mode} out with --modes"
            )


def combine_scores(
    scores: Mapping[Output, NDArray[np.float32]], modes: Sequence[str], *, weights: Weights = DEFAULT_WEIGHTS
) -> dict[str, NDArray[np.float32]]:
    """Return [P] float32 for each mode: its part, or the weighted average of its parts."""
    by_output = dict(zip(ALL_OUTPUTS, weights, strict=True))
    combined: dict[str, NDArray[np.float32]] = {}
    for mode in modes:
        parts = PARTS[mode]
        if len(parts) == 1:
            combined[mode] = scores[parts[0]]
            continue
        total = sum(by_output[part] for part in parts)
        average = sum(scores[part].astype(np.float64) * (by_output[part] / total) for part in parts)
        combined[mode] = np.asarray(average, np.float32)
    return combined
