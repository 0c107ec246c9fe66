"""Encode, search and measure a benchmark as BGE-M3's publishers did, and print the numbers next to the published ones.

    scripts/quality published miracl --data DIR --model DIR --work DIR [--languages ar,de] [...]
    scripts/quality published mldr   --data DIR --model DIR --work DIR [...]

--data holds the benchmark as its own repositories lay it out, at any depth; any file may be compressed (.gz, .zst):

    MIRACL   miracl-corpus-v1.0-LANG/docs-*.jsonl.gz, topics.miracl-v1.0-LANG-dev.tsv, qrels.miracl-v1.0-LANG-dev.tsv
    MLDR     mldr-v1.0-LANG/corpus.jsonl.gz, mldr-v1.0-LANG/test.jsonl.gz (or qrels.mldr-v1.0-LANG-test.tsv)

The steps for one language, each a command of m3, each kept:

    encode corpus (dense, sparse) -> search: dense, sparse, dense+sparse          the 1,000 best of each query
    candidates: the 200 best by dense, of all queries (or by dense and sparse)
    encode candidates (all outputs) -> search: multi-vec, all                     re-ranked, the 200 best
    eval

ColBERT matrices of a complete corpus are terabytes (33 million English passages of MIRACL: about 9 TB), and only those
of candidates are used. Among them every query finds the same ones as in the complete corpus. Results that depend on
how candidates are found and stored are in a folder of their own, so that both variants can be kept.

The same command again resumes: encoding by itself, and existing runs are kept. Languages without data are left out of
the table and of both averages. Exit codes: 0 done, 1 error (one line), 2 usage, or that of the failed command.

Published numbers are nDCG@10 in percent, from the tables of BAAI/bge-m3's model card as of July 2024 (the paper's first
version has lower averages for MIRACL).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m3cli.errors import M3Error
from m3cli.jobs.rerank import TextSource

METHODS = ("dense", "sparse", "multi-vec", "dense+sparse", "all")
DEPTH = 1000
CANDIDATES = 200

Scores = Mapping[str, Mapping[str, float]]


class MissingData(Exception):
    """A file that the protocol needs is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Paths of one language's data."""

    corpus: Path
    queries: Path
    qrels: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark and the settings of its published numbers; {lang} in file names is the language."""

    name: str
    split: str
    scores: Mapping[str, tuple[float, ...]]
    "of each language, by METHODS"
    average: tuple[float, ...]
    "over all languages, by METHODS"
    max_length: int
    "tokens of a passage"
    weights: Mapping[str, str]
    "dense,sparse,colbert of what is combined"
    corpus: tuple[str, ...]
    "names that the corpus may have, a file or a folder, below a folder of the benchmark's; so for the other two"
    queries: tuple[str, ...]
    qrels: tuple[str, ...]

    def find_files(self, data: Path, lang: str) -> Files:
        """Find a language's files below a folder.

        Raises:
            MissingData: one is missing, or exists twice.
        """
        return Files(
            corpus=_find(data, self.corpus, lang),
            queries=_find(data, self.queries, lang),
            qrels=_find(data, self.qrels, lang),
        )

    def find_languages(self, data: Path) -> tuple[str, ...]:
        """Return the languages whose corpus is there, in the order of the published table."""
        return tuple(lang for lang in self.scores if any(_match(data, name, lang) for name in self.corpus))


def _find(data: Path, names: tuple[str, ...], lang: str) -> Path:
    for name in names:
        found = _match(data, name, lang)
        if len(found) > 1:
            raise MissingData(f"{data} has {found[0].relative_to(data)} and {found[1].relative_to(data)}: leave one")
        if found:
            return found[0]
    wanted = " or ".join(name.format(lang=lang) for name in names)
    raise MissingData(f"{data} has no {wanted} (also .gz, .zst), at any depth")


def _match(data: Path, name: str, lang: str) -> list[Path]:
    name = name.format(lang=lang)
    return sorted(path for ending in ("", ".gz", ".zst") for path in data.rglob(name + ending))


def _read_table(table: str) -> dict[str, tuple[float, ...]]:
    """Read rows of numbers, one per method, under a row of languages."""
    head, *rows = [line.split() for line in table.strip().splitlines()]
    return dict(zip(head, zip(*([float(cell) for cell in row] for row in rows), strict=True), strict=True))


BENCHMARKS = {
    "miracl": Benchmark(
        name="MIRACL",
        split="dev",
        average=(69.2, 53.9, 70.5, 70.4, 71.5),
        max_length=512,
        weights={"dense+sparse": "1,0.3,0", "multi-vec": "0,0,1", "all": "1,0.3,1"},
        corpus=("miracl-corpus-v1.0-{lang}",),
        queries=("topics.miracl-v1.0-{lang}-dev.tsv",),
        qrels=("qrels.miracl-v1.0-{lang}-dev.tsv",),
        scores=_read_table("""
            ar   bn   en   es   fa   fi   fr   hi   id   ja   ko   ru   sw   te   th   zh   de   yo
            78.4 80.0 56.9 56.1 60.9 78.6 58.3 59.5 56.1 72.8 69.9 70.1 78.7 86.2 82.6 62.7 56.7 81.8
            67.1 68.9 43.8 38.6 45.1 65.4 35.3 48.2 48.9 56.1 61.5 44.5 57.9 79.1 70.9 36.1 32.5 70.0
            79.6 81.0 59.3 57.8 62.0 80.1 59.4 61.5 58.3 74.5 71.2 71.2 79.1 87.9 83.0 63.7 58.0 82.4
            79.6 80.7 58.8 58.1 62.3 79.7 58.0 62.9 58.3 73.9 71.2 69.8 78.5 87.2 83.1 63.5 57.7 83.3
            80.2 81.5 59.6 59.7 63.4 80.4 61.2 63.3 59.0 75.2 72.1 71.7 79.6 88.1 83.7 64.9 59.8 83.5
        """),
    ),
    "mldr": Benchmark(
        name="MLDR",
        split="test",
        average=(52.5, 62.2, 57.6, 64.8, 65.0),
        max_length=8192,
        weights={"dense+sparse": "0.2,0.8,0", "multi-vec": "0,0,1", "all": "0.15,0.5,0.35"},
        corpus=("mldr-v1.0-{lang}/corpus.jsonl",),
        queries=("mldr-v1.0-{lang}/test.jsonl",),
        # The rows of queries name the passages that answer them.
        qrels=("qrels.mldr-v1.0-{lang}-test.tsv", "mldr-v1.0-{lang}/test.jsonl"),
        scores=_read_table("""
            ar   de   en   es   fr   hi   it   ja   ko   pt   ru   th   zh
            47.6 46.1 48.9 74.8 73.8 40.7 62.7 50.9 42.9 74.4 59.5 33.6 26.0
            58.7 53.0 62.1 87.4 82.7 49.6 74.7 53.9 47.9 85.2 72.9 40.3 40.5
            56.6 50.4 55.8 79.5 77.2 46.6 66.8 52.8 48.8 77.5 64.2 39.4 32.7
            63.0 56.4 64.2 88.7 84.2 52.3 75.8 58.5 53.1 86.0 75.6 42.9 42.0
            64.7 57.9 63.8 86.8 83.9 52.2 75.5 60.1 55.7 85.4 73.8 44.7 40.0
        """),
    ),
}


class StepFailed(Exception):
    """A command of m3 failed; it has printed the reason."""

    def __init__(self, command: list[str], code: int) -> None:
        super().__init__(f"{' '.join(command)} ended with exit code {code}; the same command resumes there")
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings shared by all languages."""

    work: Path
    model: str
    max_length: int
    title_sep: str
    weights: dict[str, str]
    candidates_by: str
    "dense, as published, or dense,sparse"
    colbert_dtype: str
    "of the candidates' ColBERT vectors on disk"
    device: tuple[str, ...]
    "flags of device and dtype, for commands that load a model"


def measure_language(files: Files, lang: str, settings: Settings) -> dict[str, float]:
    """Return nDCG@10 in percent by METHODS; run the steps that are missing.

    Raises:
        StepFailed: a command ended badly.
    """
    folder = settings.work / lang
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.m3"
    encode(files.corpus, corpus, settings, outputs="dense,sparse")
    runs = {name: folder / f"{name}-{DEPTH}.trec" for name in ("dense", "sparse")}
    for name, run in runs.items():
        search(corpus, files.queries, run, settings, "--mode", name, "--top-k", str(DEPTH))
    runs["dense+sparse"] = blend(corpus, files.queries, "dense+sparse", settings, depth=DEPTH)
    reranked = folder / f"{settings.candidates_by.replace(',', '+')}-{settings.colbert_dtype}"
    reranked.mkdir(exist_ok=True)
    texts, candidates = reranked / "candidates.jsonl", reranked / "candidates.m3"
    if not texts.exists():
        lists = [runs[name] for name in settings.candidates_by.split(",")]
        write_candidates(files.corpus, lists, texts, title_sep=settings.title_sep)
    stored = ("--colbert-dtype", settings.colbert_dtype)
    encode(texts, candidates, settings, *stored, outputs="dense,sparse,colbert")
    by = ("--candidates-by", settings.candidates_by)
    for name in ("multi-vec", "all"):
        runs[name] = blend(candidates, files.queries, name, settings, *by, depth=CANDIDATES)
    ordered = [str(runs[method]) for method in METHODS]
    found = json.loads(call("eval", *ordered, str(files.qrels), "--measures", "nDCG@10", "--json"))
    values = (run["measures"]["nDCG@10"] for run in found["runs"])
    return {method: 100 * value for method, value in zip(METHODS, values, strict=True)}


def encode(source: Path, out: Path, settings: Settings, *flags: str, outputs: str) -> None:
    """Encode or resume; passages are truncated as for the published numbers."""
    length = ("--max-length", str(settings.max_length), "--long-docs", "truncate", "--title-sep", settings.title_sep)
    call("encode", str(source), "--out", str(out), "--outputs", outputs, *length, *flags, *_model(settings))


def search(folder: Path, queries: Path, run: Path, settings: Settings, *flags: str) -> None:
    """Search, unless the run exists: m3 writes a run only when it is complete."""
    if not run.exists():
        call("search", str(folder), "--queries", str(queries), *flags, "--out", str(run), *_model(settings))


def blend(folder: Path, queries: Path, method: str, settings: Settings, *flags: str, depth: int) -> Path:
    """Search by several outputs together; another weight gives another run."""
    weights = settings.weights[method]
    run = folder.parent / f"{method}-{weights.replace(',', '_')}.trec"
    hybrid = ("--mode", "hybrid", "--weights", weights, "--candidates", str(depth), "--top-k", str(depth))
    search(folder, queries, run, settings, *hybrid, *flags)
    return run


def write_candidates(corpus: Path, runs: Iterable[Path], out: Path, *, title_sep: str) -> None:
    """Write the texts of the documents that are among the best of some query, in the corpus' order."""
    wanted = set().union(*(read_best(run) for run in runs))
    source = TextSource(given=str(corpus), flag="corpus", title_sep=title_sep)
    temp = out.with_name(f".{out.name}.tmp")
    with temp.open("w", encoding="utf-8") as file:
        for name, text in source.find_texts(wanted):
            file.write(json.dumps({"_id": name, "text": text}, ensure_ascii=False) + "\n")
    temp.replace(out)


def read_best(run: Path) -> set[str]:
    """Return the ids of the best documents of any query of a TREC run that m3 wrote."""
    lines = (line.split() for line in run.read_text(encoding="utf-8").splitlines())
    return {document for _, _, document, rank, *_ in lines if int(rank) <= CANDIDATES}


def call(*arguments: str) -> str:
    """Run m3 and return its standard output; its standard error is passed through."""
    command = [sys.executable, "-m", "m3cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    # 3: done, but rows were skipped, which m3 has counted.
    if done.returncode not in (0, 3):
        raise StepFailed(["m3", *arguments], done.returncode)
    return done.stdout


def _model(settings: Settings) -> tuple[str, ...]:
    return ("--model", settings.model, *settings.device)


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
    """Return a Markdown table: per language our and the published number by every method, and the averages."""
    head = ["language", *(f"{method} | published" for method in METHODS)]
    lines = [f"| {' | '.join(head)} |", "| --- " + "| ---: " * (2 * len(METHODS)) + "|"]
    theirs = {lang: dict(zip(METHODS, benchmark.scores[lang], strict=True)) for lang in found}
    lines += [_draw_row(lang, found[lang], theirs[lang]) for lang in found]
    is_complete = len(found) == len(benchmark.scores)
    # The published average is of numbers with more digits than the table has.
    average = dict(zip(METHODS, benchmark.average, strict=True)) if is_complete else _average(theirs)
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
    """Run the missing steps and print the table."""
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
        # A missing file is reported before the first hour of work.
        files = {lang: benchmark.find_files(options.data, lang) for lang in languages}
        found = {lang: measure_language(files[lang], lang, settings) for lang in languages}
    except (MissingData, M3Error) as error:
        print(f"{options.benchmark}: {error}", file=sys.stderr)
        return 1
    except StepFailed as error:
        print(f"{options.benchmark}: {error}", file=sys.stderr)
        return error.code
    print(f"{benchmark.name} {benchmark.split}, nDCG@10, next to the numbers published for BAAI/bge-m3\n")
    print(draw_table(benchmark, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
