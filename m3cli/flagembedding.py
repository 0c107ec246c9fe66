"""Drop-in for FlagEmbedding's `BGEM3FlagModel`: the same names and return types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from m3cli.api.model import load_model
from m3cli.config import ALL_OUTPUTS, Dtype
from m3cli.encoder.encode import DEFAULT_LENGTH
from m3cli.errors import UsageError

LexicalDict = Mapping[str, float]
"weights by token id, which is a string"
_KEYS = ("colbert", "sparse", "dense", "sparse+dense", "colbert+sparse+dense")
"of `compute_score`, in FlagEmbedding's order"


class BGEM3FlagModel:
    """BGE-M3 with FlagEmbedding's methods.

    Args:
        model_name_or_path: folder or hub id.
        normalize_embeddings: True; m3's dense vectors have norm 1.
        use_fp16: 16-bit floating point where the device is fast with it; False: float32.
        use_bf16: bfloat16, on any device.
        query_instruction_for_retrieval: words that `encode_queries` puts before a query.
        query_instruction_format: how, with a place for the words and one for the query.
        devices: cpu, cuda, cuda:N, the number of a GPU, or a list of one of them; None: a GPU if there is one.
        batch_size: ignored, here and in the methods; texts are batched by their tokens.
        query_max_length: most tokens of a query, where a method is not told.
        passage_max_length: most tokens of any other text, where a method is not told.
        return_dense: whether dense vectors are returned, where a method is not told.
        return_sparse: whether lexical weights are.
        return_colbert_vecs: whether ColBERT vectors are.

    Raises:
        UsageError: there are several devices, or vectors would not be normalised.
    """

    def __init__(  # noqa: PLR0913  the original's arguments
        self,
        model_name_or_path: str,
        normalize_embeddings: bool = True,
        use_fp16: bool = True,
        use_bf16: bool = False,
        query_instruction_for_retrieval: str | None = None,
        query_instruction_format: str = "{}{}",
        devices: str | int | Sequence[str | int] | None = None,
        *,
        batch_size: int | None = None,  # noqa: ARG002
        query_max_length: int = DEFAULT_LENGTH,
        passage_max_length: int = DEFAULT_LENGTH,
        return_dense: bool = True,
        return_sparse: bool = False,
        return_colbert_vecs: bool = False,
    ) -> None:
        if not normalize_embeddings:
            raise UsageError("normalize_embeddings=False: m3's dense and ColBERT vectors have norm 1; leave it out")
        dtype: Dtype | Literal["auto"] = "bfloat16" if use_bf16 else "auto" if use_fp16 else "float32"
        self._model = load_model(model_name_or_path, device=_choose_device(devices), dtype=dtype)
        self._instruction = query_instruction_for_retrieval
        self._instruction_format = query_instruction_format
        self._lengths = (query_max_length, passage_max_length)
        self._returned = (return_dense, return_sparse, return_colbert_vecs)

    def encode(
        self,
        sentences: str | list[str],
        batch_size: int | None = None,  # noqa: ARG002
        max_length: int | None = None,
        return_dense: bool | None = None,
        return_sparse: bool | None = None,
        return_colbert_vecs: bool | None = None,
    ) -> dict[str, Any]:
        """Encode texts, truncated to `max_length` tokens.

        Returns:
            `dense_vecs` [N, D] float32, `lexical_weights`, a list of dictionaries of weights by token id (a string),
            `colbert_vecs`, a list of [n, D]; None for what is not wanted. For one string, its item alone.
        """
        told = (return_dense, return_sparse, return_colbert_vecs)
        wanted = [default if each is None else each for each, default in zip(told, self._returned, strict=True)]
        outputs = [output for output, wants in zip(ALL_OUTPUTS, wanted, strict=True) if wants]
        texts = [sentences] if isinstance(sentences, str) else sentences
        encoded = self._model.encode(texts, outputs, max_length or self._lengths[1])
        found = {
            "dense_vecs": encoded.dense_vecs,
            "lexical_weights": None if encoded.lexical_weights is None else _to_dicts(encoded.lexical_weights),
            "colbert_vecs": encoded.colbert_vecs,
        }
        if isinstance(sentences, str):
            return {name: None if values is None else values[0] for name, values in found.items()}
        return found

    def encode_queries(
        self, queries: str | list[str], batch_size: int | None = None, max_length: int | None = None, **returned: bool
    ) -> dict[str, Any]:
        """Encode queries, with the instruction before them if there is one; the rest is as of `encode`."""
        if self._instruction is not None:
            asked = [queries] if isinstance(queries, str) else queries
            texts = [self._instruction_format.format(self._instruction, query) for query in asked]
            queries = texts[0] if isinstance(queries, str) else texts
        return self.encode(queries, batch_size, max_length or self._lengths[0], **returned)

    def encode_corpus(
        self, corpus: str | list[str], batch_size: int | None = None, max_length: int | None = None, **returned: bool
    ) -> dict[str, Any]:
        """Encode passages, as `encode` does."""
        return self.encode(corpus, batch_size, max_length, **returned)

    def compute_score(
        self,
        sentence_pairs: Sequence[Any],
        batch_size: int | None = None,  # noqa: ARG002
        max_query_length: int | None = None,
        max_passage_length: int | None = None,
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
            max_query_length=max_query_length or self._lengths[0],
            max_passage_length=max_passage_length or self._lengths[1],
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


def _choose_device(devices: str | int | Sequence[str | int] | None) -> str:
    several = [devices] if isinstance(devices, str | int) else list(devices or ["auto"])
    if len(several) > 1:
        raise UsageError(
            f"devices={devices!r}: this model runs on one device; name one, or encode with m3 encode --worker I/N"
        )
    return f"cuda:{several[0]}" if isinstance(several[0], int) else several[0]


def _to_dicts(weights: Any) -> list[dict[str, np.float32]]:
    """Return the rows of CSR weights as FlagEmbedding's dictionaries."""
    return [
        dict(zip(map(str, weights.indices[start:stop].tolist()), weights.data[start:stop], strict=True))
        for start, stop in pairwise(weights.indptr.tolist())
    ]
