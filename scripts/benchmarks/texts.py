"""The texts that are measured: a JSONL corpus unchanged, cut to a length, or mixed into any number of rows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import orjson
from tokenizers import Tokenizer as Backend

from benchmarks.contest import Group

SHORTEST = 40
"characters; corpora hold many headings of a word or two"


def read_texts(path: Path, count: int | None = None, *, paragraphs: bool = False) -> list[str]:
    """Read the longer texts of a JSONL corpus, or their paragraphs: all, or `count` at even distances."""
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    if paragraphs:
        pieces = (piece.strip() for row in rows for piece in row["text"].split("\n\n"))
        texts = [piece for piece in pieces if len(piece) >= SHORTEST]
    else:
        texts = [f"{row.get('title') or ''}\n{row['text']}".strip() for row in rows if len(row["text"]) >= SHORTEST]
    if count is None:
        return texts
    step = max(1, len(texts) // count)
    return texts[::step][:count]


def make_group(
    texts: list[str], backend: Backend, *, max_length: int, batch: int | None = None, seconds: float = 0.0
) -> Group:
    """Count the tokens of texts."""
    lengths = [min(len(encoding.ids), max_length) for encoding in backend.encode_batch_fast(texts)]
    return Group(texts=texts, lengths=lengths, batch=batch, seconds=seconds)


def cut_texts(texts: list[str], backend: Backend, *, length: int, count: int) -> list[str]:
    """Return `count` pieces of the texts put one after the other, of about `length` tokens with <s> and </s>."""
    step = length - 2
    pieces: list[str] = []
    held, starts = "", list[int]()
    source = 0
    while len(pieces) < count:
        while len(starts) <= step:
            held = f"{held} {texts[source % len(texts)]}"
            source += 1
            starts = [span[0] for span in backend.encode(held, add_special_tokens=False).offsets]
        pieces.append(held[: starts[step]].strip())
        held = held[starts[step] :]
        starts = [span[0] for span in backend.encode(held, add_special_tokens=False).offsets]
    return pieces


def split_sentences(texts: list[str]) -> list[str]:
    """Return the texts' sentences, as full stops tell them."""
    return [f"{sentence}." for text in texts for sentence in text.rstrip(".").split(". ") if sentence.strip()]


def mix_rows(sentences: list[str], *, count: int, most: int = 7, seed: int = 0) -> Iterator[bytes]:
    """Yield `count` JSON lines, each of one to `most` sentences drawn at random: the same ones for the same seed."""
    draw = random.Random(seed)
    for number in range(count):
        text = " ".join(draw.choices(sentences, k=draw.randint(1, most)))
        yield orjson.dumps({"id": str(number), "text": text}) + b"\n"


def write_rows(path: Path, sentences: list[str], *, count: int, most: int = 7) -> Path:
    """Write mixed rows to a file, row by row."""
    with path.open("wb") as file:
        file.writelines(mix_rows(sentences, count=count, most=most))
    return path
