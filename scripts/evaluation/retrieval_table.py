"""Measure every way of ranking on the retrieval set and print Markdown tables: nDCG@10 and Recall@100 by language.

    scripts/quality retrieval-table                          with the demo model, 5 minutes on 2 cores
    scripts/quality retrieval-table --model ./checkpoint     with another checkpoint

The set, the encoded folders and the runs are made once and kept below --out (.demo/retrieval); each other checkpoint
has a folder of its own there. The numbers are in table.json as well. Remove a folder to measure again. All steps are
`m3 encode`, `m3 search` and `m3 eval` in this process, which saves a hundred starts. Only the last column is computed
here: the number of distinct tokens of the query in the document, the baseline of a trained sparse head.

The last lines check what is claimed: sparse above overlap, all three above each one. For the demo model a claim that
does not hold is exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

import make_demo_model
from evaluation import retrieval_set
from m3cli.cli.app import run as run_m3

ROOT = Path(__file__).resolve().parents[2]
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
    """Print the tables for the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(prog="retrieval-table", description="Measure all ways of ranking on the set.")
    parser.add_argument("--model", type=Path, help="checkpoint (default: the demo model)")
    parser.add_argument("--set", type=Path, help="default: OUT/set, made if missing (needs apt-get)")
    parser.add_argument("--out", type=Path, default=ROOT / ".demo" / "retrieval", metavar="DIR")
    options = parser.parse_args(argv)
    data, out, model = options.set or options.out / "set", options.out, options.model
    if model is None:
        model = ROOT / ".demo" / "model"
        if code := make_demo_model.main([str(model)]):
            return code
    else:
        # Two checkpoints may have one name, and no folder takes the vectors of both.
        out /= f"{model.name}-{hashlib.blake2b(str(model.resolve()).encode(), digest_size=4).hexdigest()}"
    if options.set is None and not (data / "sources.json").exists() and (code := retrieval_set.main([str(data)])):
        return code
    out.mkdir(parents=True, exist_ok=True)
    table = measure_all(data, model=model, out=out)
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for measure_name in ("nDCG@10", "Recall@100"):
        print(format_table(table, measure_name))
    claims = check_claims(table["mean"])
    for words, holds in claims:
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {words}")
    return int(options.model is None and not all(holds for _, holds in claims))


def measure_all(data: Path, *, model: Path, out: Path) -> dict[str, Measures]:
    """Return the measures of each language, their mean, and those across languages."""
    languages = sorted(path.parent.name for path in data.glob("*/corpus.jsonl") if path.parent.name != CROSS)
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = {
        name: measure(data / name, name=name, model=model, out=out, tokenizer=tokenizer) for name in (*languages, CROSS)
    }
    table = {**{name: found[name] for name in languages}, "mean": average([found[name] for name in languages])}
    return {**table, f"{CROSS} ({PIVOT})": found[CROSS]}


def check_claims(mean: Measures) -> list[tuple[str, bool]]:
    """Return each claim on the mean over languages, with its numbers, and whether it holds."""
    value = {mode: measures[CLAIMED] for mode, measures in mean.items()}
    pairs = [("sparse", OVERLAP), *(("all", single) for single in ("dense", "sparse", "ColBERT"))]
    return [
        (
            f"{better} is above {worse} in mean {CLAIMED}: {value[better]:.4f}, {value[worse]:.4f}",
            value[better] > value[worse],
        )
        for better, worse in pairs
    ]


def measure(part: Path, *, name: str, model: Path, out: Path, tokenizer: PreTrainedTokenizerBase) -> Measures:
    """Encode, search and evaluate one part of the set."""
    corpus, queries = out / f"{PIVOT if name == CROSS else name}.m3", out / f"{name}-queries.m3"
    for source, folder in ((part / "corpus.jsonl", corpus), (part / "queries.jsonl", queries)):
        _m3("encode", source, "--model", model, "--out", folder, "--keep-text", "--progress", "none")
    runs: dict[str, Path] = {}
    for mode, flags in MODES.items():
        runs[mode] = out / "runs" / name / f"{mode}.trec"
        runs[mode].parent.mkdir(parents=True, exist_ok=True)
        asked = part / "queries.jsonl" if "bm25" in flags else queries
        named = ("--model", model) if "m3" in flags else ()  # the only mode here that tokenises texts
        _m3("search", corpus, "--queries", asked, *flags, "--top-k", TOP_K, "--out", runs[mode], *named)
    runs[OVERLAP] = out / "runs" / name / f"{OVERLAP}.trec"
    write_overlap(part, runs[OVERLAP], tokenizer=tokenizer)
    raw = io.BytesIO()
    shown = io.TextIOWrapper(raw, encoding="utf-8")
    with contextlib.redirect_stdout(shown):
        _m3("eval", *runs.values(), part / "qrels" / "test.tsv", "--json")
        shown.flush()
    measured: list[Any] = json.loads(raw.getvalue())["runs"]
    return {mode: row["measures"] for mode, row in zip(runs, measured, strict=True)}


def write_overlap(part: Path, run: Path, *, tokenizer: PreTrainedTokenizerBase) -> None:
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


def _read_tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[set[int]]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tokens = tokenizer([row["text"] for row in rows], add_special_tokens=False)["input_ids"]
    return [row["_id"] for row in rows], [set(ids) - set(tokenizer.all_special_ids) for ids in tokens]


def average(parts: Sequence[Measures]) -> Measures:
    """Return the mean over parts, each counting the same."""
    return {
        mode: {name: sum(part[mode][name] for part in parts) / len(parts) for name in measures}
        for mode, measures in parts[0].items()
    }


def format_table(table: Mapping[str, Measures], measure_name: str) -> str:
    """Return a Markdown table, one row per language, the best value of a row in bold."""
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
