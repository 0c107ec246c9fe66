#!/usr/bin/env python3
"""Tokens a second by text length, m3 and its peers, in one run; as a table and as a picture.

    scripts/bench lengths --model DIR --corpus FILE.jsonl [--tokens 12288] [--svg scripts/pictures/throughput.svg]

For each length pieces of the corpus of about so many tokens are cut, --tokens tokens in all; FlagEmbedding and
sentence-transformers get them in batches of --peer-batch-tokens tokens. All rows of a run are of nearly one length, so
nothing is lost to padding: this is the peers' best case. m3 and sentence-transformers run in what `auto` is here.
FlagEmbedding runs its first batch twice, as it always does.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from speed_bench.plot import LogPlot
from speed_bench.records import Found, Group
from speed_bench.running import WORK, Contest, say
from speed_bench.table import draw_table, save_results
from speed_bench.texts import cut_texts, make_group, read_texts

from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.device import auto_dtype
from m3cli.encoder.tokenizer import load_tokenizer

LENGTHS = (16, 64, 128, 256, 512, 1024, 2048)
DTYPE = auto_dtype("cpu")
CONTENDERS = {
    "m3 int8": "m3 int8",
    f"m3 {DTYPE}": f"m3 {DTYPE}",
    f"sentence-transformers {DTYPE} 16": "sentence-transformers, dense",
    "FlagEmbedding 16": "FlagEmbedding",
}
"as speed_bench.contender takes them, and as the picture names them"
PICTURE = Path(__file__).resolve().parent / "pictures" / "throughput.svg"


def make_groups(options: argparse.Namespace) -> list[Group]:
    """Cut the corpus to each length that the model takes."""
    checkpoint = read_checkpoint(options.model)
    backend = load_tokenizer(checkpoint).backend
    texts = read_texts(options.corpus)
    limit = checkpoint.default_max_length
    return [
        make_group(
            cut_texts(texts, backend, length=length, count=max(4, options.tokens // length)),
            backend,
            max_length=limit,
            batch=max(1, options.peer_batch_tokens // length),
        )
        for length in LENGTHS
        if length <= limit
    ]


def draw(found: dict[str, list[Found]], groups: list[Group], *, markdown: bool) -> str:
    """Return the table of tokens a second."""
    means = [group.tokens / len(group.texts) for group in groups]
    rows = [
        (CONTENDERS[name], *(f"{group.tokens / each.seconds:,.0f}" for group, each in zip(groups, runs, strict=True)))
        for name, runs in found.items()
    ]
    return draw_table(("tokens a text", *(f"{mean:,.0f}" for mean in means)), rows, markdown=markdown)


def main() -> None:
    """Measure, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--peer-batch-tokens", type=int, default=2048)
    parser.add_argument("--svg", type=Path, default=PICTURE)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    groups = make_groups(options)
    contest = Contest(options.model, groups, cache=WORK)
    measured = {name: contest.measure(name) for name in CONTENDERS}
    found = {name: runs for name, runs in measured.items() if not isinstance(runs, str)}
    say("")
    print(draw(found, groups, markdown=options.markdown))
    lines = {
        CONTENDERS[name]: [
            (length, group.tokens / each.seconds) for length, group, each in zip(LENGTHS, groups, runs, strict=False)
        ]
        for name, runs in found.items()
    }
    options.svg.write_text(LogPlot(lines, x_title="tokens a text", y_title="tokens a second").draw(), encoding="utf-8")
    if options.json:
        sizes = [
            {"length": length, "texts": len(group.texts), "tokens": group.tokens}
            for length, group in zip(LENGTHS, groups, strict=False)
        ]
        runs = {name: [asdict(each) for each in runs] for name, runs in found.items()}
        save_results(options.json, {"groups": sizes, "runs": runs})


if __name__ == "__main__":
    main()
