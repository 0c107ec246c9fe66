#!/usr/bin/env python3
"""Encode a fixed set of small corpora in many ways and print the hash of each file written.

Two commits write the same folders if their lists are equal:

    scripts/fixed_runs.py NEW > new.txt; git switch OTHER; scripts/fixed_runs.py OLD > old.txt; diff old.txt new.txt

run.json, the manifest (it holds run.json's hash), metrics and locks are left out: everything else of a folder is bytes
that users keep. Random weights, two layers, float32, two threads; about a minute.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.update(OMP_NUM_THREADS="2", HF_HUB_OFFLINE="1", XDG_CACHE_HOME=str(ROOT / ".cache"))
MODEL = ROOT / ".cache" / "models" / "random-2x64"
LEFT_OUT = {"_m3/run.json", "_m3/manifest.json", "_m3/metrics.json"}
NUM_ROWS = 90
NPY = ["--format", "npy"]
RUNS: dict[str, list[str]] = {
    "plain": [],
    "npy": NPY,
    "dense": ["--outputs", "dense", "--dense-dtype", "float32"],
    "sparse": ["--outputs", "sparse", *NPY],
    "zstd": ["--compression", "zstd", "--keep-text", "--keep-fields", "lang"],
    "prefix": ["--prefix", "passage: ", "--dedupe", "--title-field", "lang", "--title-sep", " | "],
    "tokens": ["--split", "tokens", "--overlap", "5"],
    "mcls": ["--mcls", "8"],
    "limit": ["--limit", "33", *NPY],
    **{f"{mode}-{form}": ["--long-docs", mode, "--format", form] for mode in ("merge", "both", "truncate")
       for form in ("parquet", "npy")},
    **{f"{dtype}-{form}": ["--colbert-dtype", dtype, "--format", form] for dtype in ("int8", "binary")
       for form in ("parquet", "npy")},
    "pool": ["--colbert-pool", "2"],
    "pool-binary": ["--colbert-pool", "2", "--colbert-dtype", "binary", *NPY],
    "top-k": ["--colbert-top-k", "6"],
    "merge-int8": ["--long-docs", "merge", "--colbert-dtype", "int8", "--colbert-top-k", "9", "--overlap", "3"],
}  # fmt: skip


def write_corpora(folder: Path) -> dict[str, Path]:
    """Write the same texts, short, long and unusable rows among them, in each input format."""
    sample = ROOT / ".cache" / "sample.jsonl"
    if not sample.exists():
        subprocess.run([sys.executable, ROOT / "scripts" / "make_sample_corpus.py", sample], check=True)
    rows = [json.loads(line) for line in sample.read_text(encoding="utf-8").splitlines()[: 20 * NUM_ROWS : 20]]
    rows[7]["text"] = " ".join(row["text"] for row in rows[:40])
    rows[11]["text"] = rows[12]["text"] = rows[10]["text"]
    rows[13]["text"] = ""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "{broken\n"
    paths = {name: folder / f"corpus.{name}" for name in ("jsonl", "jsonl.gz", "tsv", "txt", "parquet")}
    paths["jsonl"].write_text(lines, encoding="utf-8")
    paths["jsonl.gz"].write_bytes(gzip.compress(lines.encode(), mtime=0))
    flat = [row["text"].replace("\n", " ").replace("\t", " ") for row in rows]
    paths["txt"].write_text("\n".join(flat) + "\n", encoding="utf-8")
    paths["tsv"].write_text("id\ttext\n" + "".join(f"t{n}\t{text}\n" for n, text in enumerate(flat)), encoding="utf-8")
    import pyarrow as pa  # noqa: PLC0415  after the threads are chosen
    from pyarrow import parquet  # noqa: PLC0415

    columns = {"id": [f"p{n}" for n in range(len(rows))], "text": flat, "n": list(range(len(rows)))}
    parquet.write_table(pa.table(columns), paths["parquet"], row_group_size=25)
    changed = [row if n % 10 else {**row, "text": f"New: {row['text']}"} for n, row in enumerate(rows[:-3])]
    paths["night"] = folder / "night.jsonl"
    paths["night"].write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    return paths


def encode(*arguments: object) -> None:
    """Run `m3 encode`; rows that cannot be encoded are part of the corpus, so 3 is its exit code."""
    from m3cli.cli.app import run  # noqa: PLC0415  torch reads the number of threads when it is imported

    common = ["--model", MODEL, "--max-length", "32", "--shard-size", "4K", "--dtype", "float32", "--device", "cpu"]
    code = run(["encode", *map(str, [*arguments, *common, "--max-batch-tokens", "700", "--progress", "none"])])
    if code not in (0, 3):
        raise SystemExit(f"fixed_runs: exit code {code} of {arguments}")


def main() -> None:
    """Encode, then print `hash  folder/file` for each file."""
    folder = Path(sys.argv[1]).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    builder = ROOT / "scripts" / "make_demo_model.py"
    subprocess.run([sys.executable, builder, MODEL, "--random", "--layers", "2", "--hidden", "64"], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    paths = write_corpora(folder)
    for name, options in RUNS.items():
        encode(paths["jsonl"], "--out", folder / f"{name}.m3", *options)
    for name in ("jsonl.gz", "tsv", "txt"):
        encode(paths[name], "--out", folder / f"from-{name}.m3")
    encode(paths["parquet"], "--out", folder / "from-parquet.m3", "--keep-fields", "n")
    for worker in (1, 0):
        encode(paths["jsonl"], "--out", folder / "workers.m3", "--worker", f"{worker}/2")
    for name, old in (("night", "plain"), ("night-npy", "npy"), ("night-merge", "merge-parquet")):
        encode(paths["night"], "--out", folder / f"{name}.m3", "--since-run", folder / f"{old}.m3", *RUNS[old])
    for path in sorted(folder.glob("*.m3/**/*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name.partition("/")[2] not in LEFT_OUT and "lock" not in path.name:
            print(hashlib.sha256(path.read_bytes()).hexdigest()[:16], name)


if __name__ == "__main__":
    main()
