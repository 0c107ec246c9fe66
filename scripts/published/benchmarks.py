"""What was published of BGE-M3 on MIRACL and MLDR, with which settings, and how the benchmarks' files are called.

Numbers are nDCG@10 in percent, from the tables of BAAI/bge-m3's model card as of July 2024 (the paper's first version
has lower averages for MIRACL). Files are found by name wherever they lie below the data's folder, as the data sets'
own repositories name them; any of them may be compressed (.gz, .zst).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

METHODS = ("dense", "sparse", "multi-vec", "dense+sparse", "all")


class MissingData(Exception):
    """A file that the protocol needs is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Where one language's data lie."""

    corpus: Path
    queries: Path
    qrels: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark, and how its numbers were made. In file names {lang} stands for the language."""

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
            MissingData: one is not there, or is there twice.
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
    raise MissingData(f"{data} has no {wanted} (also .gz, .zst), at whatever depth")


def _match(data: Path, name: str, lang: str) -> list[Path]:
    spelt = name.format(lang=lang)
    return sorted(path for ending in ("", ".gz", ".zst") for path in data.rglob(spelt + ending))


def _read_table(table: str) -> dict[str, tuple[float, ...]]:
    """Read rows of numbers, one a method, under a row of languages."""
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
        # The queries' own rows name the passages that answer them.
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
