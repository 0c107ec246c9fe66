#!/usr/bin/env python3
"""Encodes, searches and measures a benchmark as BGE-M3's publishers did, and prints the numbers beside theirs.

    scripts/reproduce_published.py miracl --data DIR --model DIR --work DIR [--languages ar,de] [...]
    scripts/reproduce_published.py mldr   --data DIR --model DIR --work DIR [...]

DIR of --data holds the benchmark as its own repositories lay it out, at whatever depth:

    MIRACL   miracl-corpus-v1.0-LANG/docs-*.jsonl.gz, topics.miracl-v1.0-LANG-dev.tsv, qrels.miracl-v1.0-LANG-dev.tsv
    MLDR     mldr-v1.0-LANG/corpus.jsonl.gz, mldr-v1.0-LANG/test.jsonl.gz (qrels.mldr-v1.0-LANG-test.tsv where there is)

Run again, it goes on where it stopped: encoding by itself, and runs that are there are kept. Languages without data are
left out of the table, and of both averages. Exit codes: 0 done, 1 fault (one line), 2 usage, or that of the command of
m3 that ended badly.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from published.benchmarks import BENCHMARKS, METHODS, Benchmark, MissingData
from published.protocol import Settings, StepFailed, measure_language

from m3cli.errors import M3Error

Scores = Mapping[str, Mapping[str, float]]


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure a benchmark as BGE-M3's publishers did.")
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the benchmark's files")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="for vectors and runs, which are kept")
    parser.add_argument("--model", default=os.environ.get("M3_MODEL", "BAAI/bge-m3"), help="default: %(default)s")
    parser.add_argument("--languages", metavar="A,B", help="default: all whose corpus is there")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a passage, if not the published ones")
    parser.add_argument("--title-sep", default="\n", help="between title and text (default: a line break)")
    parser.add_argument("--weights", metavar="D,S,C", help="of 'all' (default: the published ones)")
    parser.add_argument(
        "--candidates-by",
        choices=("dense", "dense,sparse"),
        default="dense",
        help="whose 200 best multi-vec and all re-rank (default: dense, as published)",
    )
    parser.add_argument(
        "--colbert-dtype",
        choices=("float16", "int8", "binary"),
        default="float16",
        help="of the candidates' ColBERT vectors on disk; a passage of 8,192 tokens takes 16, 8 or 1 MiB",
    )
    parser.add_argument("--device", metavar="DEVICE", help="as m3 encode has it")
    parser.add_argument("--dtype", metavar="DTYPE", help="as m3 encode has it")
    return parser.parse_args(argv)


def draw_table(benchmark: Benchmark, found: Scores) -> str:
    """Return a Markdown table: of each language ours and theirs by every method, and the averages over them."""
    head = ["language", *(f"{method} | published" for method in METHODS)]
    lines = [f"| {' | '.join(head)} |", "| --- " + "| ---: " * (2 * len(METHODS)) + "|"]
    theirs = {lang: dict(zip(METHODS, benchmark.scores[lang], strict=True)) for lang in found}
    lines += [_draw_row(lang, found[lang], theirs[lang]) for lang in found]
    whole = len(found) == len(benchmark.scores)
    # What was published as the average is of numbers with more digits than the table has.
    average = dict(zip(METHODS, benchmark.average, strict=True)) if whole else _average(theirs)
    lines.append(_draw_row(f"average of {len(found)}", _average(found), average))
    return "\n".join(lines)


def _draw_row(name: str, ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    return f"| {name} | {' | '.join(f'{ours[method]:.1f} | {theirs[method]:.1f}' for method in METHODS)} |"


def _average(scores: Scores) -> dict[str, float]:
    return {method: sum(each[method] for each in scores.values()) / len(scores) for method in METHODS}


def choose_languages(benchmark: Benchmark, options: argparse.Namespace) -> tuple[str, ...]:
    """Return the languages that were asked for, or those that are there."""
    if options.languages is None:
        found = benchmark.find_languages(options.data)
        if not found:
            raise MissingData(f"{options.data} has no corpus of {benchmark.name}, such as {benchmark.corpus[0]}")
        return found
    asked = tuple(options.languages.split(","))
    unknown = [lang for lang in asked if lang not in benchmark.scores]
    if unknown:
        raise MissingData(f"--languages {unknown[0]}: {benchmark.name} has {', '.join(benchmark.scores)}")
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is not done yet, and print the table."""
    options = parse_options(argv)
    benchmark = BENCHMARKS[options.benchmark]
    weights = dict(benchmark.weights) | ({"all": options.weights} if options.weights else {})
    device = [
        part for flag in ("device", "dtype") if (value := getattr(options, flag)) for part in (f"--{flag}", value)
    ]
    settings = Settings(
        work=options.work,
        model=options.model,
        max_length=options.max_length or benchmark.max_length,
        title_sep=options.title_sep,
        weights=weights,
        candidates_by=options.candidates_by,
        colbert_dtype=options.colbert_dtype,
        device=tuple(device),
    )
    try:
        languages = choose_languages(benchmark, options)
        # All files are found before the first hour is spent.
        files = {lang: benchmark.find_files(options.data, lang) for lang in languages}
        found = {lang: measure_language(files[lang], lang, settings) for lang in languages}
    except (MissingData, M3Error) as error:
        print(f"{options.benchmark}: {error}", file=sys.stderr)
        return 1
    except StepFailed as error:
        print(f"{options.benchmark}: {error}", file=sys.stderr)
        return error.code
    print(f"{benchmark.name} {benchmark.split}, nDCG@10, beside what was published for BAAI/bge-m3\n")
    print(draw_table(benchmark, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
