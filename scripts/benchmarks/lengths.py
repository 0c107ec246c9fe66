"""Tokens per second by text length, m3 and its peers, in one run; as a table and as a picture.

    scripts/bench lengths --model DIR --corpus FILE.jsonl [--tokens 49152] [--svg FILE.svg]

For each length pieces of the corpus of about so many tokens are cut, --tokens tokens in all; FlagEmbedding and
sentence-transformers get them in batches of --peer-batch-tokens tokens. All rows of a run are of nearly one length, so
nothing is lost to padding: this is the peers' best case. m3 and sentence-transformers run in --dtype. FlagEmbedding
runs its first batch twice, as it always does. The picture needs matplotlib (extra `bench`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.contest import WORK, Contest, Found, Group, say
from benchmarks.peers import read_max_length
from benchmarks.report import draw_table, make_parser, save_results
from benchmarks.texts import cut_texts, make_group, read_texts
from m3cli.encoder.device import INT8, cpu_has

LENGTHS = (16, 64, 128, 256, 512, 1024, 2048)


def list_contenders(dtype: str) -> dict[str, str]:
    """Return the contenders as benchmarks.contender takes them, with their names in the picture."""
    return {
        **({"m3 int8": "m3 int8"} if cpu_has(INT8) else {}),
        f"m3 {dtype}": f"m3 {dtype}",
        f"sentence-transformers {dtype} 16": "sentence-transformers, dense (1 of 3 outputs)",
        "FlagEmbedding 16": "FlagEmbedding",
    }


def make_groups(options: argparse.Namespace) -> list[Group]:
    """Cut the corpus to each length that the model takes."""
    backend = AutoTokenizer.from_pretrained(options.model).backend_tokenizer
    texts = read_texts(options.corpus)
    limit = read_max_length(options.model)
    return [
        make_group(
            cut_texts(texts, backend, length=length, count=max(4, options.tokens // length)),
            backend,
            max_length=limit,
            batch=max(1, options.peer_batch_tokens // length),
        )
        for length in options.lengths
        if length <= limit
    ]


def draw(rates: Mapping[str, Sequence[float]], groups: Sequence[Group], *, markdown: bool) -> str:
    """Return the table of tokens per second."""
    means = [f"{group.tokens / len(group.texts):,.0f}" for group in groups]
    rows = [(name, *(f"{rate:,.0f}" for rate in each)) for name, each in rates.items()]
    return draw_table(("tokens per text", *means), rows, markdown=markdown)


def plot(rates: Mapping[str, Sequence[float]], lengths: Sequence[int], path: Path) -> None:
    """Draw a line per contender."""
    from matplotlib import pyplot  # noqa: PLC0415  optional

    pyplot.rcParams["svg.fonttype"] = "none"
    figure, axes = pyplot.subplots(figsize=(8, 4.6))
    for name, each in rates.items():
        axes.plot(lengths, each, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_yticks([1000, 2000, 5000, 10000], ["1,000", "2,000", "5,000", "10,000"])
    axes.minorticks_off()
    axes.set(xlabel="tokens per text (log scale)", ylabel="tokens per second (log scale)")
    axes.set_title("All texts of one length, 4 layers of BGE-M3's width, 2-core CPU")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Measure, print the table, draw the picture."""
    parser = make_parser(__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=49152)
    parser.add_argument("--peer-batch-tokens", type=int, default=2048)
    parser.add_argument("--svg", type=Path, help="draw the picture there")
    options = parser.parse_args()
    if options.svg and find_spec("matplotlib") is None:
        parser.error(f"--svg {options.svg} needs matplotlib; install it with: pip install matplotlib")
    groups = make_groups(options)
    contest = Contest(options.model, groups, cache=WORK)
    contenders = list_contenders(options.dtype)
    measured = {name: contest.measure(name) for name in contenders}
    runs: dict[str, list[Found]] = {name: each for name, each in measured.items() if not isinstance(each, str)}
    rates = {
        contenders[name]: [group.tokens / one.seconds for group, one in zip(groups, each, strict=True)]
        for name, each in runs.items()
    }
    say("")
    print(draw(rates, groups, markdown=options.markdown))
    if options.json:
        sizes = [
            {"length": length, "texts": len(group.texts), "tokens": group.tokens}
            for length, group in zip(options.lengths, groups, strict=False)
        ]
        save_results(
            options.json,
            {"groups": sizes, "runs": {name: [asdict(one) for one in each] for name, each in runs.items()}},
        )
    if options.svg:
        plot(rates, options.lengths[: len(groups)], options.svg)


if __name__ == "__main__":
    main()
