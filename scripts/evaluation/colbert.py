"""Compare the ways to store ColBERT vectors: bytes per token against nDCG@10, and how far rankings move.

    scripts/quality colbert SET --model CHECKPOINT [--languages de,en] [--json FILE]
        [--plot FILE.svg] [--confirm FOLDER]

SET is the output of `scripts/quality retrieval-set`: a folder for each language with corpus.jsonl, queries.jsonl,
qrels/test.tsv. Passages and queries are encoded once by m3cli's own encoder in float32. Each setting is computed from
that by the function that `m3 encode` stores with, and decoded by the one that `m3 score` and `m3 search` read with.
Every passage of a language is scored for every query of it. nDCG@10 and Kendall's tau (of all passages' MaxSim scores
against float16's) are means over the languages' means. `--confirm` runs `m3 encode`, `m3 search` and `m3 eval` with
three of the settings in the first language, in a new folder. `--plot` needs matplotlib (extra `bench`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.stats import kendalltau

from m3cli.config import ColbertForm
from m3cli.encoder import device as machine
from m3cli.encoder.embeddings import compress_matrices, concat_embeddings, select_rows
from m3cli.encoder.encode import BatchEncoder, FailedRow, pack_texts, tokenise_texts
from m3cli.encoder.heads import OutputOptions
from m3cli.encoder.model import load_model
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.jobs.encode.resolve import open_checkpoint
from m3cli.jobs.eval import measure_queries, parse_measures
from m3cli.records import Embeddings, TokenMatrices
from m3cli.retrieval.scores import decode_vectors

MAX_LENGTH = 512
MEASURE = "nDCG@10"
DEPTH = 100
SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to store the vectors."""

    name: str
    form: ColbertForm
    flags: str
    signed_queries: bool = False
    "queries are signs too, to show the loss"


def _settings() -> list[Setting]:
    def make(name: str, **form: Any) -> Setting:
        flags = " ".join(f"--colbert-{key.replace('_', '-')} {value}" for key, value in form.items())
        return Setting(name=name, form=ColbertForm(**form), flags=flags)

    return [
        make("float16"),
        make("int8", dtype="int8"),
        make("binary", dtype="binary"),
        replace(make("binary, queries too", dtype="binary"), signed_queries=True),
        *(make(f"pool {factor}", pool=factor) for factor in (2, 3, 4)),
        *(make(f"pool {factor}, int8", pool=factor, dtype="int8") for factor in (2, 3, 4, 6, 8)),
        *(make(f"pool {factor}, binary", pool=factor, dtype="binary") for factor in (2, 3, 4)),
        *(make(f"top {number}, int8", top_k=number, dtype="int8") for number in (128, 64)),
    ]


@dataclass
class Result:
    """Results of a setting, one number per language."""

    setting: Setting
    bytes_per_token: list[float] = field(default_factory=list)
    seconds: float = 0.0
    "for choosing, pooling and quantising"
    ndcg: list[float] = field(default_factory=list)
    hybrid: list[float] = field(default_factory=list)
    tau: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Language:
    """One language of the set, encoded."""

    name: str
    passage_ids: list[str]
    query_ids: list[str]
    judgements: dict[str, dict[str, int]]
    passages: Embeddings
    queries: Embeddings
    encode_seconds: float


class Encoder:
    """m3cli's encoder with all outputs in float32."""

    def __init__(self, model: str) -> None:
        checkpoint = open_checkpoint(model)
        self.name, self.device = checkpoint.name, machine.resolve_device(None)
        self._tokenizer = load_tokenizer(checkpoint)
        self._encoder = BatchEncoder(
            load_model(checkpoint, device=self.device, dtype=machine.auto_dtype(self.device)),
            OutputOptions(
                outputs=("dense", "sparse", "colbert"),
                special_ids=self._tokenizer.special_ids,
                dense_dtype="float32",
                colbert_dtype="float32",
                vector_weights=True,
            ),
        )

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Return all outputs of some texts, in their order."""
        tokenised = tokenise_texts(texts, self._tokenizer, max_length=MAX_LENGTH)
        parts: list[Embeddings] = []
        for batch in pack_texts(tokenised, max_batch_tokens=machine.auto_batch_tokens(self.device)):
            for made in self._encoder.encode(batch):
                if isinstance(made, FailedRow):
                    sys.exit(f"a text cannot be encoded: {made.reason} ({made.detail})")
                parts.append(made)
        joined = concat_embeddings(parts)
        return select_rows(joined, np.argsort(joined.rows), rows=np.arange(len(texts)))


def find_languages(root: Path, names: str | None) -> list[Path]:
    """Return the folders of the given languages, or of all."""
    there = sorted(path.parent for path in root.glob("??/corpus.jsonl"))
    return [folder for folder in there if names is None or folder.name in names.split(",")]


def read_languages(folders: Sequence[Path], encoder: Encoder) -> Iterator[Language]:
    """Encode one language after the other."""
    for folder in folders:
        passages, queries = (_read_rows(folder / f"{name}.jsonl") for name in ("corpus", "queries"))
        began = time.perf_counter()
        yield Language(
            name=folder.name,
            passage_ids=list(passages),
            query_ids=list(queries),
            judgements=_read_judgements(folder / "qrels" / "test.tsv"),
            passages=encoder.encode(list(passages.values())),
            queries=encoder.encode(list(queries.values())),
            encode_seconds=time.perf_counter() - began,
        )


def _read_rows(path: Path) -> dict[str, str]:
    rows = map(json.loads, path.read_text().splitlines())
    return {row["_id"]: f"{row['title']}\n{row['text']}" if row.get("title") else row["text"] for row in rows}


def _read_judgements(path: Path) -> dict[str, dict[str, int]]:
    judgements: dict[str, dict[str, int]] = {}
    for line in path.read_text().splitlines()[1:]:
        query, document, relevance = line.split("\t")
        judgements.setdefault(query, {})[document] = int(relevance)
    return judgements


def score_all(queries: TokenMatrices, passages: TokenMatrices) -> NDArray[np.float32]:
    """Return [Q, P] means over a query's vectors of the best product with a passage's."""
    left, right = decode_vectors(queries), decode_vectors(passages)
    lengths = np.diff(queries.indptr)
    best = np.empty((len(left), len(passages.indptr) - 1), np.float32)
    for number, (first, last) in enumerate(zip(passages.indptr[:-1], passages.indptr[1:], strict=True)):
        np.max(left @ right[first:last].T, axis=1, out=best[:, number])
    sums = np.add.reduceat(best, queries.indptr[:-1], axis=0)
    return np.asarray(sums / lengths[:, None], np.float32)


def score_others(language: Language) -> NDArray[np.float32]:
    """Return [Q, P] sums of the dense and the sparse score."""
    queries, passages = language.queries, language.passages
    assert queries.dense_vecs is not None
    assert passages.dense_vecs is not None
    sides = []
    for embeddings in (queries, passages):
        weights = embeddings.lexical_weights
        assert weights is not None
        sides.append(csr_matrix((weights.values, weights.indices, weights.indptr), (len(embeddings.rows), 1 << 18)))
    sparse = (sides[0] @ sides[1].T).toarray()
    total: NDArray[np.float32] = queries.dense_vecs @ passages.dense_vecs.T + sparse
    return total


def measure(scores: NDArray[np.float32], language: Language) -> float:
    """Return the mean nDCG@10 of [Q, P] scores."""
    rankings: dict[str, Mapping[str, float]] = {}
    for query, line in zip(language.query_ids, scores, strict=True):
        best = np.argsort(-line, kind="stable")[:DEPTH]
        rankings[query] = {language.passage_ids[place]: float(line[place]) for place in best}
    values = measure_queries(rankings, language.judgements, parse_measures([MEASURE]))
    return float(values[MEASURE].mean())


def add_language(results: Sequence[Result], language: Language) -> None:
    """Add the results of each setting in a language."""
    passages, queries = language.passages.colbert_vecs, language.queries.colbert_vecs
    assert passages is not None
    assert queries is not None
    others = score_others(language)
    plain: NDArray[np.float32] | None = None
    for result in results:
        began = time.perf_counter()
        stored = compress_matrices(passages, result.setting.form)
        result.seconds += time.perf_counter() - began
        asked = compress_matrices(queries, ColbertForm(dtype="binary")) if result.setting.signed_queries else queries
        scores = score_all(asked, stored)
        plain = scores if plain is None else plain
        held = stored.vectors.nbytes + (0 if stored.scales is None else len(stored.scales) * SCALE_BYTES)
        result.bytes_per_token.append(held / len(passages.vectors))
        result.ndcg.append(measure(scores, language))
        result.hybrid.append(measure(others + scores, language))
        result.tau.append(float(np.mean([kendalltau(*pair)[0] for pair in zip(plain, scores, strict=True)])))
        print(f"{language.name} {result.setting.name}: {result.ndcg[-1]:.4f}", file=sys.stderr)


def make_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the means over the languages and the changes from float16."""
    rows: list[dict[str, Any]] = []
    for result in results:
        mean = {name: float(np.mean(getattr(result, name))) for name in ("bytes_per_token", "ndcg", "hybrid", "tau")}
        rows.append({"setting": result.setting.name, "flags": result.setting.flags, **mean, "seconds": result.seconds})
    first = rows[0]
    for row in rows:
        row["part_of_bytes"] = row["bytes_per_token"] / first["bytes_per_token"]
        row["ndcg_change"] = row["ndcg"] / first["ndcg"] - 1
        row["hybrid_change"] = row["hybrid"] / first["hybrid"] - 1
    return rows


def make_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| | bytes per token | of float16 | nDCG@10, ColBERT alone | | nDCG@10, all three | | Kendall's tau |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        flags = f"`{row['flags']}`" if row["flags"] else "float16, the default"
        if row["setting"].endswith("queries too"):
            flags = "(the same, queries as signs too)"
        lines.append(
            f"| {flags} | {row['bytes_per_token']:.0f} | 1/{1 / row['part_of_bytes']:.1f} | {row['ndcg']:.4f} | "
            f"{row['ndcg_change']:+.1%} | {row['hybrid']:.4f} | {row['hybrid_change']:+.1%} | {row['tau']:.3f} |"
        )
    return "\n".join(lines).replace("| 1/1.0 |", "| 1 |")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw bytes per token against nDCG@10, with the best settings joined."""
    from matplotlib import pyplot  # noqa: PLC0415  optional

    pyplot.rcParams["svg.fonttype"] = "none"
    figure, axes = pyplot.subplots(figsize=(9, 5))
    shown = sorted(
        (row["bytes_per_token"], row["ndcg"], row["setting"]) for row in rows if "queries" not in row["setting"]
    )
    best = [point for number, point in enumerate(shown) if point[1] > max([0.0, *(one[1] for one in shown[:number])])]
    axes.plot([point[0] for point in best], [point[1] for point in best], "--", color="tab:orange")
    axes.scatter([point[0] for point in shown], [point[1] for point in shown])
    for size, value, name in shown:
        axes.annotate(name, (size, value), xytext=(3, 4), textcoords="offset points", fontsize=8, rotation=25)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="bytes per token (log scale)", ylabel=f"{MEASURE} (axis does not start at 0)")
    axes.set_title("ColBERT storage, demo model, 5 languages")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)


def confirm(folder: Path, model: str, results: Sequence[Result], *, work: Path) -> None:
    """Run the real commands with some settings in a language."""
    work.mkdir()
    for result in results:
        if result.setting.name not in ("int8", "binary", "pool 2"):
            continue
        stem = work / result.setting.name.replace(" ", "-")
        out, run = f"{stem}.m3", f"{stem}.trec"
        flags = result.setting.flags.split()
        m3 = [sys.executable, "-m", "m3cli"]
        encode = ["encode", str(folder / "corpus.jsonl"), "--out", out, "--max-length", str(MAX_LENGTH), *flags]
        subprocess.run([*m3, *encode, "--model", model, "--progress", "none"], check=True)
        search = ["search", out, "--queries", str(folder / "queries.jsonl"), "--mode", "colbert", "--out", run]
        subprocess.run([*m3, *search, "--model", model, "--progress", "none"], check=True)
        judged = [*m3, "eval", run, str(folder / "qrels" / "test.tsv"), "--measures", MEASURE, "--json"]
        print(result.setting.name, f"in memory {result.ndcg[0]:.4f}; m3 eval:", file=sys.stderr)
        subprocess.run(judged, check=True, stdout=sys.stderr)


def save(path: Path, encoder: Encoder, results: Sequence[Result], **totals: float) -> None:
    """Write all numbers as JSON."""
    document = {
        "model": encoder.name,
        **totals,
        "rows": make_rows(results),
        "forms": {result.setting.name: asdict(result.setting.form) for result in results},
        "ndcg_by_language": {result.setting.name: result.ndcg for result in results},
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    """Measure the settings and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--languages")
    parser.add_argument("--confirm", type=Path)
    given = parser.parse_args()
    machine.set_threads(machine.auto_threads())
    encoder = Encoder(given.model)
    results = [Result(setting=setting) for setting in _settings()]
    vectors, seconds = 0, 0.0
    folders = find_languages(given.set, given.languages)
    for language in read_languages(folders, encoder):
        add_language(results, language)
        assert language.passages.colbert_vecs is not None
        vectors += len(language.passages.colbert_vecs.vectors)
        seconds += language.encode_seconds
        if given.json:
            save(given.json, encoder, results, vectors=vectors, encode_seconds=seconds)
    rows = make_rows(results)
    print(make_table(rows))
    print(f"\n{vectors:,} passage vectors, {seconds:.0f} s to encode (queries too) on {encoder.device}")
    if given.plot:
        plot(rows, given.plot)
    if given.confirm:
        confirm(folders[0], given.model, results, work=given.confirm)


if __name__ == "__main__":
    main()
