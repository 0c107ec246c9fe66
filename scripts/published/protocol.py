"""The protocol behind the published numbers, one language at a time, by m3's own commands; every step is kept.

    encode corpus (dense, sparse) -> search: dense, sparse, dense+sparse          the 1,000 best of each query
    candidates: the 200 best by dense, of all queries (or by dense and sparse)
    encode candidates (all outputs) -> search: multi-vec, all                     re-ranked, the 200 best
    eval

ColBERT matrices of a whole corpus are terabytes (33 million English passages of MIRACL: about 9 TB), and only those of
candidates are ever looked at. Among the candidates every query finds the same ones as in the whole corpus. What depends
on how candidates are found and stored lies in a folder of its own, so that both ways can be had side by side.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from m3cli.corpus.trec import read_run
from m3cli.jobs.texts_by_id import TextSource
from published.benchmarks import METHODS, Files

DEPTH = 1000
CANDIDATES = 200


class StepFailed(Exception):
    """A command of m3 ended badly; it has said why."""

    def __init__(self, command: list[str], code: int) -> None:
        super().__init__(f"{' '.join(command)} ended with exit code {code}; the same command goes on from there")
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is the same for all languages."""

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
    """Return nDCG@10 in percent by METHODS, doing what is not done yet.

    Raises:
        StepFailed: a command ended badly.
    """
    room = settings.work / lang
    room.mkdir(parents=True, exist_ok=True)
    corpus = room / "corpus.m3"
    encode(files.corpus, corpus, settings, outputs="dense,sparse")
    runs = {name: room / f"{name}-{DEPTH}.trec" for name in ("dense", "sparse")}
    for name, run in runs.items():
        search(corpus, files.queries, run, settings, "--mode", name, "--top-k", str(DEPTH))
    runs["dense+sparse"] = blend(corpus, files.queries, "dense+sparse", settings, depth=DEPTH)
    few = room / f"{settings.candidates_by.replace(',', '+')}-{settings.colbert_dtype}"
    few.mkdir(exist_ok=True)
    texts, candidates = few / "candidates.jsonl", few / "candidates.m3"
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
    worth = (run["measures"]["nDCG@10"] for run in found["runs"])
    return {method: 100 * value for method, value in zip(METHODS, worth, strict=True)}


def encode(source: Path, out: Path, settings: Settings, *flags: str, outputs: str) -> None:
    """Encode, go on, or find that it is done; passages are cut as they were for the published numbers."""
    length = ("--max-length", str(settings.max_length), "--long-docs", "truncate", "--title-sep", settings.title_sep)
    call("encode", str(source), "--out", str(out), "--outputs", outputs, *length, *flags, *_model(settings))


def search(folder: Path, queries: Path, run: Path, settings: Settings, *flags: str) -> None:
    """Search, unless the run is there: m3 writes a run only when it is whole."""
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
    wanted = {
        document for run in runs for ranking in read_run(str(run), top_k=CANDIDATES).values() for document in ranking
    }
    temp = out.with_name(f".{out.name}.tmp")
    with temp.open("w", encoding="utf-8") as file:
        file.writelines(_spell_rows(TextSource(given=str(corpus), flag="corpus", title_sep=title_sep), wanted))
    temp.replace(out)


def call(*arguments: str) -> str:
    """Run m3 and return what it wrote to stdout; what it says goes to stderr as it comes."""
    command = [sys.executable, "-m", "m3cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    # 3: done, but rows were skipped, which m3 has counted.
    if done.returncode not in (0, 3):
        raise StepFailed(["m3", *arguments], done.returncode)
    return done.stdout


def _spell_rows(source: TextSource, wanted: set[str]) -> Iterator[str]:
    for name, text in source.find_texts(wanted):
        yield json.dumps({"_id": name, "text": text}, ensure_ascii=False) + "\n"


def _model(settings: Settings) -> tuple[str, ...]:
    return ("--model", settings.model, *settings.device)
