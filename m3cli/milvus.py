"""Drop-in for Milvus's `BGEM3EmbeddingFunction` (pymilvus.model.hybrid): the same names and return types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scipy.sparse import csr_array

from m3cli.api.model import load_model
from m3cli.config import DEFAULT_MODEL
from m3cli.errors import UsageError


class SparseRows(csr_array):  # type: ignore[misc]  # scipy has no types
    """CSR array [N, V] whose rows, when it is iterated or indexed by one number, have the shape (1, V).

    It has a length too, so that pymilvus takes it as the data of a search.
    """

    def __len__(self) -> int:
        """Return N."""
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows."""
        return (self[row] for row in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        """Return a part; SciPy itself returns a row of one dimension, which Milvus does not take."""
        return csr_array(self)[[key]] if isinstance(key, int) else super().__getitem__(key)


class BGEM3EmbeddingFunction:
    """Dense and sparse vectors of texts, as `pymilvus.model.hybrid.BGEM3EmbeddingFunction` returns them.

    Args:
        model_name: folder or hub id.
        batch_size: ignored; texts are batched by their tokens.
        device: cpu, cuda or cuda:N; None: a GPU if there is one.
        normalize_embeddings: True; m3's dense vectors have norm 1.
        use_fp16: 16-bit floating point where the device is fast with it; False: float32.
        return_dense: whether dense vectors are returned.
        return_sparse: whether sparse vectors are returned.
        return_colbert_vecs: whether ColBERT matrices are returned.

    Raises:
        UsageError: the device does not exist, or vectors would not be normalised.
    """

    def __init__(
        self,
        model_name: str = DEFAULT_MODEL,
        batch_size: int = 16,  # noqa: ARG002
        device: str | None = None,
        normalize_embeddings: bool = True,
        use_fp16: bool = True,
        return_dense: bool = True,
        return_sparse: bool = True,
        return_colbert_vecs: bool = False,
    ) -> None:
        if not normalize_embeddings:
            raise UsageError("normalize_embeddings=False: m3's dense and ColBERT vectors have norm 1; leave it out")
        self._model = load_model(model_name, device=device or "auto", dtype="auto" if use_fp16 else "float32")
        wanted = {"dense": return_dense, "sparse": return_sparse, "colbert": return_colbert_vecs}
        self._outputs = [output for output, returned in wanted.items() if returned]

    @property
    def dim(self) -> dict[str, int]:
        """Width of each output: of dense, sparse and colbert_vecs."""
        return {"dense": self._model.dim, "sparse": self._model.vocabulary, "colbert_vecs": self._model.dim}

    def __call__(self, texts: list[str]) -> dict[str, Any]:
        """Return `dense`, a list of float32 arrays [D]; `sparse`, CSR [N, V] float32; `colbert_vecs`, if wanted."""
        encoded = self._model.encode(texts, self._outputs)
        found: dict[str, Any] = {}
        if encoded.dense_vecs is not None:
            found["dense"] = list(encoded.dense_vecs)
        if encoded.lexical_weights is not None:
            found["sparse"] = SparseRows(encoded.lexical_weights)
        if encoded.colbert_vecs is not None:
            found["colbert_vecs"] = encoded.colbert_vecs
        return found

    def encode_documents(self, documents: list[str]) -> dict[str, Any]:
        """Return the vectors of documents, as `__call__` does."""
        return self(documents)

    def encode_queries(self, queries: list[str]) -> dict[str, Any]:
        """Return the vectors of queries, as `__call__` does; BGE-M3 has no instruction for queries."""
        return self(queries)
