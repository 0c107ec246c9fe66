"""Check and measure m3 on a GPU machine without network: right or wrong, kernels, speed, ColBERT. Writes JSON.

    scripts/bench gpu --tokenizer CHECKPOINT --corpus FILE.jsonl --json OUT.json [--parts correct,probe,...]

It takes about 20 minutes on one GPU. CHECKPOINT gives its tokenizer only: the model is random, of BGE-M3's size, and
the corpus is mixed of FILE's sentences, 250 tokens a row. Packages that the machine lacks are unpacked from the wheels
in $M3_WHEELS. PYTEST_ADDOPTS="-n 6" runs the tests in six processes.

correct: tests/gpu; all dtypes against transformers in float32; the same bytes twice and after a kill; m3 check.
probe:   benchmarks.kernels.
speed:   m3 encode end to end at two shard sizes.
peers:   benchmarks.speed, with FlagEmbedding if it is installed, on a twentieth of the corpus.
colbert: m3 encode with all outputs, float16 and int8; dense and ColBERT search on the device and on the CPU.

A part that fails is in the JSON with its error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.contest import SCRIPTS, WORK, encode, say
from benchmarks.report import save_results
from benchmarks.texts import read_texts, split_sentences, write_rows
from m3cli.config import Dtype
from m3cli.encoder.checkpoint import TOKENIZER_FILES, read_checkpoint
from m3cli.encoder.encode import BatchEncoder, FailedRow, TokenisedTexts, pack_texts
from m3cli.encoder.heads import OutputOptions
from m3cli.encoder.model import load_model

LENGTHS = (8192, 8191, 4097, 1025, 513, 512, 511, 129, 128, 127, 65, 64, 3, 3)
"tokens: borders of the kernels' tiles"
SHARD_SIZES = ("32M", "8M")
SENTENCES = 25
"of a row, at most: 250 tokens in the mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The machine, and what is measured on it."""

    device: str
    work: Path
    model: Path
    tests: Path
    "checkpoints and sample for tests/gpu"
    sentences: list[str]
    documents: int
    "of the corpus for speed; the other parts take less of them"
    tokens: int
    "of a full batch"
    seconds: float
    "for each kernel"

    @property
    def dtype(self) -> str:
        """The dtype that is measured."""
        return "float16" if self.device != "cpu" else "float32"

    def make_corpus(self, count: int) -> Path:
        """Return a corpus of so many rows, made once."""
        path = self.work / f"corpus-{count}.jsonl"
        return path if path.exists() else write_rows(path, self.sentences, count=count, most=SENTENCES)

    def flags(self, *more: str) -> tuple[str, ...]:
        """Return the options of every encode."""
        return ("--model", str(self.model), "--device", self.device, "--dtype", self.dtype, *more)


def make_checkpoint(out: Path, tokenizer: Path, *, layers: int, hidden: int) -> Path:
    """Make a random checkpoint with a tokenizer of another one, or return the one made before."""
    from demo_model import checkpoint as demo  # noqa: PLC0415  transformers, seconds

    if (out / "sparse_linear.pt").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    (out / "1_Pooling").mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, out / name)
    dtype = torch.float16 if layers > 4 else torch.float32
    shape = demo.EncoderShape(
        hidden=hidden,
        layers=layers,
        heads=max(1, hidden // 64),
        intermediate=4 * hidden,
        vocabulary=250_002,
        positions=8194,
    )
    demo.write_config(out, shape, dtype=dtype)
    demo.write_sentence_transformers(out, shape, pooling="cls", prompts={})
    demo.write_weights(out, demo.random_state(shape, seed=0, dtype=dtype), weights="safetensors")
    demo.write_heads(out, demo.random_heads(out, shape, seed=0))
    return out


def run(*command: object, **environment: str) -> str:
    """Run a module of Python and return its standard output; raise with the end of its errors if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=SCRIPTS.parent,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr).strip()[-3000:]}")
    return done.stdout


def check_all(site: Site) -> dict[str, Any]:
    """Run the GPU tests and compare numbers and bytes."""
    found: dict[str, Any] = {}
    try:
        plugins = ("-p", "no:cacheprovider", "-p", "no:benchmark")
        out = run("pytest", "-q", "--tb=short", *plugins, "tests/gpu", M3_TEST_FILES=str(site.tests))
        found["tests"] = out.strip().splitlines()[-1]
    except RuntimeError as error:
        found["tests"] = found["error"] = str(error)
    found["parity"] = compare_dtypes(site)
    corpus = site.make_corpus(site.documents // 10)
    flags = site.flags("--outputs", "dense,sparse", "--shard-size", "1M")
    folders = [site.work / f"{name}.m3" for name in ("first", "second", "killed")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = [encode(corpus, folder, *flags).wall_seconds for folder in folders[:2]]
    kill_encode(corpus, folders[2], *flags, seconds=0.6 * min(seconds))
    run("m3cli", "encode", corpus, "--out", folders[2], "--progress", "none", *flags)
    found["differing_files"] = [
        f"{folder.name}/{path.name}"
        for folder in folders[1:]
        for path in sorted((folders[0] / "rows").iterdir())
        if path.read_bytes() != (folder / "rows" / path.name).read_bytes()
    ]
    flags = ("--sample", "20", "--model", str(site.model), "--device", site.device)
    run("m3cli", "check", folders[0], *flags)
    if found["differing_files"]:
        found["error"] = "two runs wrote different bytes"
    return found


def kill_encode(corpus: Path, out: Path, *flags: str, seconds: float) -> None:
    """Start an encode and kill it after some seconds."""
    words = ("encode", str(corpus), "--out", str(out), "--progress", "none", *flags)
    process = subprocess.Popen([sys.executable, "-m", "m3cli", *words], stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def compare_dtypes(site: Site) -> dict[str, Any]:
    """Return the least cosine of each dtype's vectors to transformers in float32 on the same device."""
    from transformers import XLMRobertaModel  # noqa: PLC0415

    on_cpu = site.device == "cpu"
    draw = np.random.default_rng(0)
    lengths = [70, 31, 5] if on_cpu else [*LENGTHS, *draw.integers(3, 300, 200).tolist()]
    ids = tuple(
        np.concatenate(([0], draw.integers(4, 250_000, length - 2), [2])).astype(np.int32) for length in lengths
    )
    reference: Any = XLMRobertaModel.from_pretrained(site.model, add_pooling_layer=False, dtype=torch.float32)
    reference = reference.to(site.device).train(mode=False)
    with torch.inference_mode():
        states = [
            reference(torch.from_numpy(one[None].astype(np.int64)).to(site.device)).last_hidden_state[0, 0]
            for one in ids
        ]
        exact = torch.nn.functional.normalize(torch.stack(states), dim=-1).cpu().numpy()
    del reference
    kinds = [("float32", 4096), ("bfloat16", 4096)] if on_cpu else [("float16", 65536), ("float16", 8192)]
    kinds += [] if on_cpu else [("bfloat16", 65536), ("float32", 16384)]
    found = {}
    for dtype, budget in kinds:
        model = load_model(read_checkpoint(site.model), device=site.device, dtype=cast("Dtype", dtype))
        options = OutputOptions(outputs=("dense", "sparse", "colbert"), special_ids={0, 1, 2, 3}, dense_dtype="float32")
        dense = np.zeros(exact.shape, np.float32)
        for made in BatchEncoder(model, options).encode_all(
            pack_texts(TokenisedTexts(input_ids=ids, truncated=0), max_batch_tokens=budget)
        ):
            if not isinstance(made, FailedRow) and made.dense_vecs is not None:
                dense[made.rows] = made.dense_vecs
        cosines = (dense * exact).sum(1)
        found[f"{dtype}, {budget}"] = {
            "least_cosine": float(cosines.min()),
            "at_length": lengths[int(cosines.argmin())],
        }
    return found


def probe_kernels(site: Site) -> dict[str, Any]:
    """Measure the kernels in a process of their own."""
    side = 8192 if site.device != "cpu" else 256
    words = ("--device", site.device, "--tokens", site.tokens, "--seconds", site.seconds, "--side", side)
    found: dict[str, Any] = json.loads(run("benchmarks.kernels", site.model, *words).splitlines()[-1])
    return found


def measure_speed(site: Site) -> dict[str, Any]:
    """Measure m3 encode end to end."""
    corpus = site.make_corpus(site.documents)
    flags = ("--outputs", "dense,sparse", "--shard-size")
    return {f"dense + sparse, shards of {size}": measure_encode(site, corpus, *flags, size) for size in SHARD_SIZES}


def compare_peers(site: Site) -> dict[str, Any]:
    """Measure the model apart from m3 encode, and FlagEmbedding."""
    path = site.work / "speed.json"
    words = ("--model", site.model, "--corpus", site.make_corpus(site.documents), "--device", site.device)
    # On a CPU, where this command is only tried out, the peer would take a minute.
    names = f"m3 {site.dtype}" + ("" if site.device == "cpu" else ",FlagEmbedding")
    run("benchmarks.speed", *words, "--only", names, "--documents", max(4, site.documents // 20), "--json", path)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def measure_encode(site: Site, corpus: Path, *flags: str) -> dict[str, Any]:
    """Return the numbers of one run of m3 encode."""
    out = site.work / "measured.m3"
    shutil.rmtree(out, ignore_errors=True)
    metrics = encode(corpus, out, *site.flags(*flags)).metrics
    shutil.rmtree(out)
    names = ("tokens", "tokens_per_second", "seconds", "peak_memory_bytes", "peak_device_bytes", "repeated")
    return {name: metrics[name] for name in names}


def measure_colbert(site: Site) -> dict[str, Any]:
    """Measure all three outputs, and compare searches on the device with those on the CPU."""
    found: dict[str, Any] = {}
    corpus, few = site.make_corpus(site.documents // 4), site.make_corpus(site.documents // 100)
    for form in ("float16", "int8"):
        found[f"all three, {form}"] = measure_encode(site, corpus, "--colbert-dtype", form)
    queries, folder = site.make_corpus(10), site.work / "searched.m3"
    shutil.rmtree(folder, ignore_errors=True)
    encode(few, folder, *site.flags())
    for mode in ("dense", "colbert"):
        hits, seconds = [], {}
        for device in dict.fromkeys(("cpu", site.device)):
            out = site.work / f"{mode}.{device}.trec"
            words = ("--queries", queries, "--mode", mode, "--device", device, "--model", site.model, "--out", out)
            began = time.perf_counter()
            run("m3cli", "search", folder, *words, "--dtype", "float32")
            seconds[device] = time.perf_counter() - began
            hits.append({tuple(line.split()[:3:2]) for line in out.read_text(encoding="utf-8").splitlines()})
        found[f"search, {mode}"] = {"seconds": seconds, "hits_shared": len(hits[0] & hits[-1]) / max(1, len(hits[0]))}
    return found


PARTS: dict[str, Callable[[Site], dict[str, Any]]] = {
    "correct": check_all,
    "probe": probe_kernels,
    "speed": measure_speed,
    "peers": compare_peers,
    "colbert": measure_colbert,
}


def main() -> int:
    """Run the parts and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a checkpoint, for its tokenizer")
    parser.add_argument("--corpus", type=Path, required=True, help="JSONL, for its sentences")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--documents", type=int, default=300_000)
    parser.add_argument("--batch", type=int, default=65536, help="tokens of the probe's batch")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each kernel")
    parser.add_argument("--work", type=Path, default=WORK / "gpu", help="for checkpoints, corpora and outputs; kept")
    options = parser.parse_args()
    work = options.work.absolute()
    tests = work / "tests"
    tests.mkdir(parents=True, exist_ok=True)
    shutil.copy(options.corpus, tests / "sample.jsonl")
    make_checkpoint(tests / "random-2x64", options.tokenizer, layers=2, hidden=64)
    size = f"random-{options.layers}x{options.hidden}"
    site = Site(
        device=options.device,
        work=work,
        tests=tests,
        model=make_checkpoint(tests / size, options.tokenizer, layers=options.layers, hidden=options.hidden),
        sentences=split_sentences(read_texts(options.corpus)),
        documents=options.documents,
        tokens=options.batch,
        seconds=options.seconds,
    )
    on_gpu = options.device != "cpu"
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "cuda": torch.version.cuda}
    for name in options.parts.split(","):
        began = time.perf_counter()
        try:
            results[name] = PARTS[name](site)
        except Exception as error:  # the other parts still run
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["part_seconds"] = round(time.perf_counter() - began, 1)
        say(f"{name}: {results[name].get('error', 'done')}, {results[name]['part_seconds']} s")
        save_results(options.json, results)
    return int(any("error" in results[name] for name in options.parts.split(",")))


if __name__ == "__main__":
    sys.exit(main())
