"""Targets of `m3 export` and engines of `m3 load`, by name; a module is imported when its target is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from m3cli.errors import UsageError
from m3cli.exporters.rows import Target

TARGETS = {
    "parquet": "parquet",
    "npy": "npy",
    "faiss": "faiss",
    "milvus": "milvus",
    "pgvector": "pgvector",
    "lance": "lance",
    "elasticsearch": "elasticsearch",
    "opensearch": "elasticsearch",
}
"module of each target of m3 export"
ENGINES = {
    "milvus": ("milvus", "pymilvus"),
    "pgvector": ("pgvector", "psycopg[binary]"),
    "qdrant": ("qdrant", "qdrant-client"),
}
"of each engine of m3 load its module, and the package of its client; Milvus Lite is a package of its own"


def find_target(name: str) -> Target:
    """Return a target.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in TARGETS:
        raise UsageError(f"--to {name!r}: expected one of {', '.join(TARGETS)}")
    module: Any = import_module(f"m3cli.exporters.{TARGETS[name]}")
    targets: dict[str, Target] = getattr(module, "TARGETS", {})
    found: Target = targets[name] if targets else module.TARGET
    return found


def find_engine(to: str) -> tuple[str, str, Any]:
    """Return name and address of an engine, from NAME:ADDRESS, and its module.

    Raises:
        UsageError: there is none of that name, or its client is not installed.
    """
    name, colon, address = to.partition(":")
    if name not in ENGINES or not address:
        known = ", ".join(f"{engine}:ADDRESS" for engine in ENGINES)
        raise UsageError(f"--to {name}{colon}...: expected {known}")
    module_name, client = ENGINES[name]
    module = import_module(f"m3cli.exporters.{module_name}")
    try:
        import_module(module.CLIENT)
    except ImportError as error:
        raise UsageError(f"--to {name}: its client is not installed; pip install '{client}'") from error
    return name, address, module
