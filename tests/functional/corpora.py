"""Small corpora for functional tests: a few shards of short multilingual rows, some of them bad."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from m3cli.config import Format

Encode = Callable[[Path], int]
FORMATS: tuple[Format, ...] = ("parquet", "npy")
SHARD_BYTES = 900
SETTINGS = ("--shard-size", SHARD_BYTES, "--max-length", 24, "--dtype", "float32", "--device", "cpu")
"""What `encoders` runs with, as options of a command."""

WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "été", "garçon"),
    *("中文", "数据", "モデル", "модель", "данные", "حاسوب"),
)


def write_corpus(path: Path, *, rows: int = 24, longest: int = 24, seed: int = 0, bad_every: int = 10) -> Path:
    """Write a JSONL corpus; every `bad_every`-th row is no JSON."""
    draw = random.Random(seed)
    lines = []
    for row in range(rows):
        text = " ".join(draw.choices(WORDS, k=draw.randint(2, longest)))
        lines.append(json.dumps({"id": f"doc-{row}", "text": text}, ensure_ascii=False))
        if row % bad_every == bad_every - 1:
            lines[-1] = lines[-1][:-2]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
