"""Encode whole corpora with BGE-M3: dense vectors, lexical weights and ColBERT matrices, sharded on disk."""

from __future__ import annotations

__version__ = "0.1.0"
