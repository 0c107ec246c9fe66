"""Targets of `m3 export` and engines of `m3 load`, by name; a module is imported when its target is asked for."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
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
    "vespa": "vespa",
}
"module of each target of m3 export"
ENGINES = ("milvus", "pgvector", "qdrant")
"of m3 load, and their modules"


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
    module: Any = import_module(f"m3cli.exporters.{name}")
    missing = [package for client, package in module.list_clients(address).items() if find_spec(client) is None]
    if missing:
        raise UsageError(f"--to {name}: {missing[0]} is not installed; pip install '{missing[0]}'")
    return name, address, module
