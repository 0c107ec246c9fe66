"""Memory of long runs: nothing may be left behind with each shard."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from m3cli.config import Format
from tests.functional.conftest import EncodeWith
from tests.functional.corpora import FORMATS


def write_rows(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"id": str(number), "text": text}) for number, text in enumerate(texts)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def count_arrow_objects() -> int:
    return sum(str(type(each)).startswith("<class 'pyarrow") for each in gc.get_objects())


@pytest.mark.parametrize("chosen", FORMATS)
def test_a_shard_leaves_no_cycle_with_memory_of_arrow(tmp_path: Path, encode_with: EncodeWith, chosen: Format) -> None:
    """The garbage collector hardly runs during a run: an object of pyarrow is small for it, and large in memory."""

    def encode(name: str, texts: list[str], *, since: str | None = None) -> tuple[str, int]:
        corpus, out = write_rows(tmp_path / f"{name}.jsonl", texts), tmp_path / f"{name}.m3"
        gc.collect()
        gc.disable()
        try:
            before = count_arrow_objects()
            assert encode_with(corpus, out=out, format=chosen, shard_size=64, since_run=since) == 0
            return str(out), count_arrow_objects() - before
        finally:
            gc.enable()

    texts = [f"text number {number}" for number in range(30)]
    few, left_of_few = encode("few", texts[:6])
    many, left_of_many = encode("many", texts)
    assert left_of_many - left_of_few < 6
    _, left_of_few = encode("few_again", [*texts[1:6], "another text"], since=few)
    _, left_of_many = encode("many_again", [*texts[1:], "another text"], since=many)
    assert left_of_many - left_of_few < 6
