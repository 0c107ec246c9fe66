"""Drop-in for FlagEmbedding's `BGEM3FlagModel`: the same names and return types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.api.model import load_model
from m3cli.encoder.encode import DEFAULT_LENGTH

LexicalDict = Mapping[str, float]
"weights by token id, which is a string"
_KEYS = ("colbert", "sparse", "dense", "sparse+dense", "colbert+sparse+dense")
"of `compute_score`, in FlagEmbedding's order"


class BGEM3FlagModel:
    """BGE-M3 with FlagEmbedding's methods.

    Args:
        model_name_or_path: folder or hub id.
        use_fp16: 16-bit floating point where the device is fast with it; False: float32.
        devices: cpu, cuda or cuda:N; None: a GPU if there is one.
    """

    def __init__(self, model_name_or_path: str, use_fp16: bool = True, devices: str | None = None) -> None:
        self._model = load_model(model_name_or_path, device=devices or "auto", dtype="auto" if use_fp16 else "float32")

    def encode(
        self,
        sentences: str | list[str],
        batch_size: int | None = None,  # noqa: ARG002
        max_length: int = DEFAULT_LENGTH,
        return_dense: bool = True,
        return_sparse: bool = False,
        return_colbert_vecs: bool = False,
    ) -> dict[str, Any]:
        """Encode texts, truncated to `max_length` tokens; `batch_size` is ignored, texts are batched by their tokens.

        Returns:
            `dense_vecs` [N, D] float32, `lexical_weights`, a list of dictionaries of weights by token id (a string),
            `colbert_vecs`, a list of [n, D]; None for what is not wanted. For one string, its item alone.
        """
        wanted = {"dense": return_dense, "sparse": return_sparse, "colbert": return_colbert_vecs}
        texts = [sentences] if isinstance(sentences, str) else sentences
        encoded = self._model.encode(texts, [output for output, wants in wanted.items() if wants], max_length)
        found = {
            "dense_vecs": encoded.dense_vecs,
            "lexical_weights": None if encoded.lexical_weights is None else _to_dicts(encoded.lexical_weights),
            "colbert_vecs": encoded.colbert_vecs,
        }
        if isinstance(sentences, str):
            return {name: None if values is None else values[0] for name, values in found.items()}
        return found

    def compute_score(
        self,
        sentence_pairs: Sequence[Any],
        batch_size: int | None = None,  # noqa: ARG002
        max_query_length: int = DEFAULT_LENGTH,
        max_passage_length: int = DEFAULT_LENGTH,
        weights_for_different_modes: Sequence[float] | None = None,
    ) -> dict[str, Any]:
        """Score pairs of query and passage, or one pair; weights are of dense, sparse and colbert.

        Returns:
            a list of floats for each of colbert, sparse, dense, sparse+dense, colbert+sparse+dense; one float of one
            pair.
        """
        single = len(sentence_pairs) > 0 and isinstance(sentence_pairs[0], str)
        scores = self._model.compute_score(
            [sentence_pairs] if single else sentence_pairs,
            weights_for_different_modes or (1.0, 1.0, 1.0),
            max_query_length=max_query_length,
            max_passage_length=max_passage_length,
        )
        lists = {name: scores[name].tolist() for name in _KEYS if name in scores}
        return {name: values[0] for name, values in lists.items()} if single else lists

    def compute_lexical_matching_score(
        self, lexical_weights_1: LexicalDict | list[LexicalDict], lexical_weights_2: LexicalDict | list[LexicalDict]
    ) -> Any:
        """Return the sum of products of the weights of common tokens; of two lists, a matrix of them."""
        if isinstance(lexical_weights_1, Mapping) and isinstance(lexical_weights_2, Mapping):
            other = lexical_weights_2
            return sum(weight * other[token] for token, weight in lexical_weights_1.items() if token in other)
        if isinstance(lexical_weights_1, Mapping) or isinstance(lexical_weights_2, Mapping):
            raise TypeError("one of the lexical weights is a dictionary, the other a list: give two of one kind")
        return np.array(
            [
                [self.compute_lexical_matching_score(left, right) for right in lexical_weights_2]
                for left in lexical_weights_1
            ]
        )

    def colbert_score(self, q_reps: NDArray[Any], p_reps: NDArray[Any]) -> np.float32:
        """Return the mean over the query's vectors of the greatest inner product with a vector of the passage."""
        products = np.asarray(q_reps, np.float32) @ np.asarray(p_reps, np.float32).T
        return np.float32(products.max(axis=1).mean())

    def convert_id_to_token(self, lexical_weights: LexicalDict | list[LexicalDict]) -> Any:
        """Return the weights by token, not by id; for one dictionary, or a list of one, a dictionary."""
        rows = [lexical_weights] if isinstance(lexical_weights, Mapping) else lexical_weights
        named = [{self._model.format_token(int(token)): weight for token, weight in row.items()} for row in rows]
        return named[0] if len(named) == 1 else named


def _to_dicts(weights: Any) -> list[dict[str, np.float32]]:
    """Return the rows of CSR weights as FlagEmbedding's dictionaries."""
    return [
        dict(zip(map(str, weights.indices[start:stop].tolist()), weights.data[start:stop], strict=True))
        for start, stop in pairwise(weights.indptr.tolist())
    ]
