"""Encode whole corpora with BGE-M3: dense vectors, lexical weights and ColBERT matrices, sharded on disk.

    model = m3cli.load_model("BAAI/bge-m3")        texts in memory
    folder = m3cli.open_folder("corpus.m3")        what `m3 encode` wrote

torch is imported by `load_model`, not by `import m3cli`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3cli.api.folder import Folder, open_folder
    from m3cli.api.model import EmbeddingModel, TextEmbeddings, load_model

__version__ = "0.1.0"
__all__ = ["EmbeddingModel", "Folder", "TextEmbeddings", "__version__", "load_model", "open_folder"]

_MODULES = {
    "EmbeddingModel": "m3cli.api.model",
    "Folder": "m3cli.api.folder",
    "TextEmbeddings": "m3cli.api.model",
    "load_model": "m3cli.api.model",
    "open_folder": "m3cli.api.folder",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used first."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    return getattr(import_module(_MODULES[name]), name)
