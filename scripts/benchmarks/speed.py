"""Tokens per second of m3 and its peers, on the same texts and checkpoint, loading excluded, in one run.

    scripts/bench speed --model DIR --corpus FILE.jsonl [--documents 600] [--device cuda] [--json OUT.json] [--markdown]

m3 runs its own stages (tokenise, batch, encode, order) in memory for dense + sparse + ColBERT. FlagEmbedding runs
`encode` for all three, in float32 (its only choice on a CPU; float16 on a GPU). sentence-transformers gives dense
vectors only, as do the exports to ONNX, which run on a CPU: in onnxruntime with dynamic int8 (per channel, matmuls
only) and in OpenVINO (int8: NNCF's static one). Both get padded batches sorted by tokens, within a budget of padded
tokens. Where a contender has settings (batch or budget), all are run and the best counts. A peer that is not installed
is skipped. --json keeps all runs; "encoding" among m3's stages is the model alone, from the first batch to the last
vector on the host.

The machine's own matmul rate is taken before and after; the better one counts. A model's share of it is its FLOPs over
the real tokens per second. Padding is the share of the positions a model ran that were not a token of a text, or one
that it ran before. Peak memory is that of the process, with the loaded model, or a GPU's own. Each contender runs in a
process of its own; on a noisy machine compare within one run only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.contest import WORK, Contest, Found, Group, encode, open_work, say
from benchmarks.peers import read_max_length
from benchmarks.report import EMPTY, draw_table, format_bytes, format_share, make_parser, save_results
from benchmarks.texts import cut_texts, make_group, mix_rows, read_texts, split_sentences
from m3cli.encoder.device import INT8, cpu_has

REFERENCE = "FlagEmbedding"
"beginning of the label that others are compared with"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes that determine an encoder's matmuls."""

    layers: int
    width: int
    inner: int
    "of the feed-forward part"


def read_shape(model: Path) -> Shape:
    """Read the sizes from a checkpoint's config.json."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return Shape(layers=config["num_hidden_layers"], width=config["hidden_size"], inner=config["intermediate_size"])


def count_flops(shape: Shape, lengths: Sequence[int]) -> float:
    """Count a forward pass's FLOPs over rows of these many tokens, attention included, embeddings and heads not.

    A token and layer takes 8 C^2 for query, key, value and output, 4 C I for the feed-forward part, and 4 C L for
    attention at length L (scores, and the sum over values).
    """
    per_token = 8 * shape.width**2 + 4 * shape.width * shape.inner
    squares = sum(length**2 for length in lengths)
    return float(shape.layers * (per_token * sum(lengths) + 4 * shape.width * squares))


def padding_share(*, run: int, real: int) -> float:
    """Return the share of the positions a model ran that were padding, or tokens that it ran before."""
    return 1 - real / run if run else 0.0


def idle_share(stages: Mapping[str, float]) -> float:
    """Return the share of a run's seconds in which the encoder was idle."""
    return 1 - stages["encoding"] / sum(stages.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A row of the table: the settings of which the best counts."""

    label: str
    dtype: str
    settings: tuple[str, ...]
    "as benchmarks.contender takes them"
    outputs: str = "dense"


def list_contenders(device: str) -> tuple[Contender, ...]:
    """Return the contenders of a device, FlagEmbedding in its dtype there."""
    on_cpu = device == "cpu"
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "int8" if on_cpu else "float16")
    if on_cpu and not cpu_has(INT8):
        dtypes = ("float32", "bfloat16")
    peer_dtypes = ("float32", "bfloat16") if on_cpu else ("bfloat16", "float16")
    peer_batches = (2, 4, 8, 16, 32) if on_cpu else (32, 128)
    reference = "float32" if on_cpu else "float16"
    exports = (("onnxruntime", "int8"), *(("OpenVINO", dtype) for dtype in dtypes)) if on_cpu else ()
    return (
        *(
            Contender(label=f"m3 {dtype}", dtype=dtype, settings=(f"m3 {dtype}",), outputs="all three")
            for dtype in dtypes
        ),
        Contender(
            label=f"m3 {dtypes[-1]}, two",
            dtype=dtypes[-1],
            settings=(f"m3 {dtypes[-1]} dense,sparse",),
            outputs="dense, sparse",
        ),
        Contender(
            label=f"{REFERENCE} {reference}",
            dtype=reference,
            settings=tuple(f"FlagEmbedding {batch}" for batch in (peer_batches if on_cpu else (16, 64, 256))),
            outputs="all three",
        ),
        *(
            Contender(
                label=f"sentence-transformers {dtype}",
                dtype=dtype,
                settings=tuple(f"sentence-transformers {dtype} {batch}" for batch in peer_batches),
            )
            for dtype in peer_dtypes
        ),
        *(
            Contender(
                label=f"{kind} {dtype}",
                dtype=dtype,
                settings=tuple(f"{kind} {dtype} {budget}" for budget in (2048, 4096)),
            )
            for kind, dtype in exports
        ),
    )


def run_all(contest: Contest, contenders: Sequence[Contender], *, rounds: int) -> dict[str, list[Found] | str]:
    """Measure every setting of every contender in each round; the fastest run of each counts."""
    best: dict[str, list[Found] | str] = {}
    for setting in [setting for _ in range(rounds) for contender in contenders for setting in contender.settings]:
        found, before = contest.measure(setting), best.get(setting)
        if isinstance(before, list) and (isinstance(found, str) or before[0].seconds <= found[0].seconds):
            continue
        best[setting] = found
    return best


def pick_best(contender: Contender, found: Mapping[str, list[Found] | str]) -> tuple[str, Found] | str:
    """Return the fastest setting and its numbers, or why there is none."""
    ran = [(setting, each[0]) for setting in contender.settings if not isinstance(each := found[setting], str)]
    if ran:
        return min(ran, key=lambda pair: pair[1].seconds)
    return str(found[contender.settings[0]])


def sum_up(
    contender: Contender,
    best: tuple[str, Found],
    group: Group,
    *,
    flops: float,
    matmul: Mapping[str, float],
    device: str,
) -> dict[str, Any]:
    """Return a contender's row of the table."""
    setting, found = best
    rate = matmul.get(contender.dtype)
    model_seconds = found.stages.get("encoding", found.seconds)
    # On a GPU the host's stages overlap with the model's in m3 encode, so the share is the model's own.
    share_seconds = found.seconds if device == "cpu" else model_seconds
    return {
        "setting": setting,
        "outputs": contender.outputs,
        "tokens_per_second": group.tokens / found.seconds,
        "model_tokens_per_second": group.tokens / model_seconds,
        "share_of_matmul": None if rate is None else flops / share_seconds / rate,
        "padding_share": padding_share(run=found.positions, real=group.tokens),
        "peak_bytes": found.peak_bytes,
        "stages": found.stages,
        "idle_share": idle_share(found.stages) if found.stages else None,
    }


def draw(rows: Mapping[str, dict[str, Any] | str], *, markdown: bool) -> str:
    """Return the table of the contenders that ran."""
    reference = next((row for label, row in rows.items() if label.startswith(REFERENCE)), None)
    header = ("", "outputs", "tokens/s", "times FlagEmbedding", "of matmul", "padding", "peak memory")
    lines = []
    for label, row in rows.items():
        if isinstance(row, str):
            lines.append((label, row, *[EMPTY] * 5))
            continue
        tokens = row["tokens_per_second"]
        setting = row["setting"].split()[-1]
        lines.append(
            (
                f"{label}, {setting}" if setting.isdigit() else label,
                row["outputs"],
                f"{tokens:,.0f}",
                f"{tokens / reference['tokens_per_second']:.2f}" if isinstance(reference, dict) else EMPTY,
                format_share(row["share_of_matmul"]),
                format_share(row["padding_share"]),
                format_bytes(row["peak_bytes"]),
            )
        )
    return draw_table(header, lines, markdown=markdown)


def draw_stages(rows: Mapping[str, dict[str, Any] | str], *, markdown: bool) -> str:
    """Return the table of m3's stages."""
    timed = {label: row for label, row in rows.items() if isinstance(row, dict) and row["stages"]}
    names = [name for row in timed.values() for name in row["stages"]]
    header = ("", *(f"{name}, s" for name in dict.fromkeys(names)), "encoder idle", "model alone, tokens/s")
    return draw_table(
        header,
        [
            (
                label,
                *(f"{spent:.3f}" for spent in row["stages"].values()),
                format_share(row["idle_share"]),
                f"{row['model_tokens_per_second']:,.0f}",
            )
            for label, row in timed.items()
        ],
        markdown=markdown,
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:i]")
    parser.add_argument("--documents", type=int, help="default: 600 on a CPU, 60,000 on a GPU")
    parser.add_argument("--paragraphs", action="store_true", help="measure on paragraphs of the documents")
    parser.add_argument("--length", type=int, help="measure on pieces of the documents of about so many tokens")
    parser.add_argument("--rounds", type=int, default=1, help="the fastest run of each setting counts")
    parser.add_argument("--only", help="contenders whose name has one of these words, comma-separated")
    parser.add_argument("--cache", type=Path, default=WORK, help="for ONNX exports")
    parser.add_argument("--end-to-end", action="store_true", help="also time m3 encode; always on a GPU")
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    options.documents = options.documents or (60_000 if on_gpu else 600)
    options.end_to_end = options.end_to_end or on_gpu
    return options


def choose_texts(options: argparse.Namespace, backend: Any) -> list[str]:
    """Return texts of the corpus; on a GPU, which needs more, texts mixed of its sentences where it has too few."""
    if options.length:
        return cut_texts(read_texts(options.corpus), backend, length=options.length, count=options.documents)
    texts = read_texts(options.corpus, options.documents, paragraphs=options.paragraphs)
    if len(texts) >= options.documents or options.device == "cpu":
        return texts
    return [json.loads(line)["text"] for line in mix_rows(split_sentences(texts), count=options.documents)]


def encode_texts(texts: Sequence[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the metrics of the real `m3 encode`, whose stages overlap, by outputs."""
    found = {}
    with open_work(options.cache) as work:
        corpus = work / "texts.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        for outputs in ("dense,sparse", "dense,sparse,colbert"):
            flags = ("--model", str(options.model), "--device", options.device, "--outputs", outputs)
            found[outputs] = encode(corpus, work / f"{outputs}.m3", *flags, "--long-docs", "truncate").metrics
    return found


def main() -> None:
    """Measure all contenders and print the tables."""
    options = parse_options()
    words = options.only.split(",") if options.only else [""]
    contenders = [each for each in list_contenders(options.device) if any(word in each.label for word in words)]
    backend = AutoTokenizer.from_pretrained(options.model).backend_tokenizer
    texts = choose_texts(options, backend)
    group = make_group(texts, backend, max_length=read_max_length(options.model))
    shape = read_shape(options.model)
    flops = count_flops(shape, group.lengths)
    contest = Contest(options.model, [group], cache=options.cache, device=options.device)
    before = contest.ask("matmul")
    tokenizer = contest.measure("tokenizer")
    found = run_all(contest, contenders, rounds=options.rounds)
    after = contest.ask("matmul")
    end_to_end = encode_texts(texts, options) if options.end_to_end else {}
    matmul = {dtype: max(rate, after[dtype]) for dtype, rate in before.items()}
    rows: dict[str, dict[str, Any] | str] = {}
    for contender in contenders:
        best = pick_best(contender, found)
        rows[contender.label] = (
            best
            if isinstance(best, str)
            else sum_up(contender, best, group, flops=flops, matmul=matmul, device=options.device)
        )
    say("")
    print(f"{len(texts)} texts, {group.tokens:,} tokens; {shape.layers} layers, {shape.width} wide\n")
    print(draw(rows, markdown=options.markdown) + "\n")
    print(draw_stages(rows, markdown=options.markdown) + "\n")
    print("matmul: " + ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in matmul.items()))
    if not isinstance(tokenizer, str):
        print(f"tokenizer alone: {group.tokens / tokenizer[0].seconds:,.0f} tokens/s")
    for outputs, metrics in end_to_end.items():
        print(f"m3 encode {outputs}, end to end: {metrics['tokens_per_second']:,.0f} tokens/s")
    if options.json:
        runs = {name: each if isinstance(each, str) else asdict(each[0]) for name, each in found.items()}
        head: dict[str, Any] = {
            "end_to_end": end_to_end,
            "texts": len(texts),
            "tokens": group.tokens,
            "flops": flops,
            "shape": asdict(shape),
        }
        bare = None if isinstance(tokenizer, str) else group.tokens / tokenizer[0].seconds
        save_results(
            options.json, {**head, "matmul": matmul, "tokenizer_tokens_per_second": bare, "rows": rows, "runs": runs}
        )


if __name__ == "__main__":
    main()
