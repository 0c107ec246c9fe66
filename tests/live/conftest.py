"""The sample corpus and 50 queries, encoded by the demo checkpoint, and the engines that are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CACHE, ROOT, Completed, build_model, build_sample
from tests.live import engines

QUERIES = 50


@cache
def encode(name: str) -> Path:
    """Encode the sample corpus, or the queries made of it, once a checkout."""
    corpus, out = build_sample(), CACHE / "live" / f"{name}.m3"
    out.parent.mkdir(exist_ok=True)
    if name == "queries":
        rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
        chosen = rows[:: len(rows) // QUERIES][:QUERIES]
        lines = [json.dumps({"id": f"q{n}", "text": " ".join(row["text"].split()[:8])}) for n, row in enumerate(chosen)]
        corpus = CACHE / "live" / "queries.jsonl"
        corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
    m3("encode", corpus, "--model", build_model("demo"), "--out", out, "--keep-text")
    return out


def m3(*arguments: object, codes: tuple[int, ...] = (0,)) -> Completed:
    """Run the real command."""
    command = [sys.executable, "-m", "m3cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in codes, done.stderr
    return done


@pytest.fixture(scope="session")
def sample() -> Path:
    return encode("sample")


@pytest.fixture(scope="session")
def queries() -> Path:
    return encode("queries")


@pytest.fixture(scope="session")
def ranking(sample: Path, queries: Path) -> Callable[..., list[dict[str, float]]]:
    """What `m3 search` finds for each query: scores by key, best first."""
    keys = set(engines.read_rows(sample))

    @cache
    def search(mode: str, *options: object) -> list[dict[str, float]]:
        done = m3(
            *("search", sample, "--queries", queries, "--mode", mode, "--level", "chunk", "--top-k", 2520),
            *("--format", "trec", "--progress", "none", *options),
        )
        found: dict[str, dict[str, float]] = {f"q{n}": {} for n in range(QUERIES)}
        for line in done.stdout.splitlines():
            query, _, name, _, score, _ = line.split()
            found[query][name if name in keys else name.rpartition("#")[0]] = float(score)
        return list(found.values())

    return search


@pytest.fixture(params=engines.ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Each engine that is installed, empty."""
    opened = engines.ENGINES[request.param]
    missing = [name for name in opened.packages if not engines.is_installed(name)]
    if missing:
        pytest.skip(f"{request.param} is not tested live: {', '.join(missing)} not installed")
    with opened(tmp_path) as running:
        yield running
