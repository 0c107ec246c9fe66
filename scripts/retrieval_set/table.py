"""Encodes the retrieval set, searches it in every mode, measures the runs, prints a table: `scripts/retrieval_table`.

All of it are `m3 encode`, `m3 search` and `m3 eval`, run one after the other in this process, which spares a hundred
starts. Only the last column is made here: how many distinct tokens of the query the document has, none weighing more
than another, which a trained sparse head has to beat.
"""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3cli.cli.app import run as run_m3
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.tokenizer import Tokenizer, load_tokenizer

MODES = {
    "dense": ["--mode", "dense"],
    "sparse": ["--mode", "sparse"],
    "ColBERT": ["--mode", "colbert"],
    "dense+sparse": ["--mode", "hybrid", "--weights", "1,1,0"],
    "all": ["--mode", "hybrid", "--weights", "1,1,1"],
    "BM25 (M3's tokens)": ["--mode", "bm25", "--tokenizer", "m3"],
    "BM25 (words)": ["--mode", "bm25", "--tokenizer", "plain"],
}
OVERLAP = "term overlap"
CLAIMED = "nDCG@10"
TOP_K = 100
CROSS, PIVOT = "cross", "en"

Measures = Mapping[str, Mapping[str, float]]  # way of ranking -> measure -> value


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table for the set and the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(prog="retrieval_table", description="Measure all ways of ranking on the set.")
    parser.add_argument("set", type=Path, metavar="SET")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--must-hold", action="store_true", help="exit code 1 if what is claimed does not hold")
    options = parser.parse_args(argv)
    tokenizer = load_tokenizer(read_checkpoint(options.model))
    languages = sorted(path.parent.name for path in options.set.glob("*/corpus.jsonl") if path.parent.name != CROSS)
    found = {
        name: measure(options.set / name, name=name, model=options.model, out=options.out, tokenizer=tokenizer)
        for name in (*languages, CROSS)
    }
    table = {**{name: found[name] for name in languages}, "mean": average([found[name] for name in languages])}
    table[f"{CROSS} ({PIVOT})"] = found[CROSS]
    (options.out / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for measure_name in ("nDCG@10", "Recall@100"):
        print(spell_table(table, measure_name))
    claims = judge_claims(table["mean"])
    for words, holds in claims:
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {words}")
    return int(options.must_hold and not all(holds for _, holds in claims))


def judge_claims(mean: Measures) -> list[tuple[str, bool]]:
    """Return what is claimed of the mean over languages, in words with the numbers, and whether it holds."""
    value = {mode: measures[CLAIMED] for mode, measures in mean.items()}
    pairs = [("sparse", OVERLAP), *(("all", single) for single in ("dense", "sparse", "ColBERT"))]
    return [
        (
            f"{better} is above {worse} in mean {CLAIMED}: {value[better]:.4f}, {value[worse]:.4f}",
            value[better] > value[worse],
        )
        for better, worse in pairs
    ]


def measure(part: Path, *, name: str, model: Path, out: Path, tokenizer: Tokenizer) -> Measures:
    """Encode, search and evaluate one part of the set."""
    corpus, queries = out / f"{PIVOT if name == CROSS else name}.m3", out / f"{name}-queries.m3"
    for source, folder in ((part / "corpus.jsonl", corpus), (part / "queries.jsonl", queries)):
        _m3("encode", source, "--model", model, "--out", folder, "--keep-text", "--progress", "none")
    runs: dict[str, Path] = {}
    for mode, flags in MODES.items():
        runs[mode] = out / "runs" / name / f"{mode}.trec"
        runs[mode].parent.mkdir(parents=True, exist_ok=True)
        asked = part / "queries.jsonl" if "bm25" in flags else queries
        named = ("--model", model) if "m3" in flags else ()  # nothing else here has texts to cut up
        _m3("search", corpus, "--queries", asked, *flags, "--top-k", TOP_K, "--out", runs[mode], *named)
    runs[OVERLAP] = out / "runs" / name / f"{OVERLAP}.trec"
    write_overlap(part, runs[OVERLAP], tokenizer=tokenizer)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        _m3("eval", *runs.values(), part / "qrels" / "test.tsv", "--json")
    measured: list[Any] = json.loads(shown.getvalue())["runs"]
    return {mode: row["measures"] for mode, row in zip(runs, measured, strict=True)}


def write_overlap(part: Path, run: Path, *, tokenizer: Tokenizer) -> None:
    """Rank the documents of a part by the number of the query's tokens in them, and write a TREC run."""
    (query_ids, queries), (document_ids, documents) = (
        _read_tokens(part / name, tokenizer) for name in ("queries.jsonl", "corpus.jsonl")
    )
    with run.open("w", encoding="utf-8") as lines:
        for query_id, query in zip(query_ids, queries, strict=True):
            counts = [len(query & document) for document in documents]
            best = sorted(range(len(counts)), key=lambda place: -counts[place])[:TOP_K]
            lines.writelines(
                f"{query_id} Q0 {document_ids[place]} {rank} {counts[place]} overlap\n"
                for rank, place in enumerate(best, start=1)
                if counts[place]
            )


def _read_tokens(path: Path, tokenizer: Tokenizer) -> tuple[list[str], list[set[int]]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tokens = tokenizer.encode([row["text"] for row in rows])
    return [row["_id"] for row in rows], [set(ids.tolist()) - tokenizer.special_ids for ids in tokens]


def average(parts: Sequence[Measures]) -> Measures:
    """Return the mean over parts, each counting the same."""
    return {
        mode: {name: sum(part[mode][name] for part in parts) / len(parts) for name in measures}
        for mode, measures in parts[0].items()
    }


def spell_table(table: Mapping[str, Measures], measure_name: str) -> str:
    """Return a Markdown table, a row a language, the best of a row in bold."""
    modes = list(next(iter(table.values())))
    lines = [f"| {measure_name} | {' | '.join(modes)} |", f"|---|{'---:|' * len(modes)}"]
    for name, measures in table.items():
        values = [f"{measures[mode][measure_name]:.3f}" for mode in modes]
        best = max(values)
        lines.append(f"| {name} | {' | '.join(f'**{value}**' if value == best else value for value in values)} |")
    return "\n".join(lines) + "\n"


def _m3(*arguments: object) -> None:
    code = run_m3([str(argument) for argument in arguments])
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
