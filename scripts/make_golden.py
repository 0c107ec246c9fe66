#!/usr/bin/env python3
"""Write FlagEmbedding's numbers for the demo checkpoint, the reference of m3's parity tests.

    scripts/make_golden.py CHECKPOINT [--out FILE]          default: tests/parity/golden_demo.json

The model card's four sentences and a few in other languages: token ids, lexical weights by token string, and every
score of `compute_score` with weights 0.4, 0.2, 0.4, pair by pair (so that no passage is padded),
float32 on a CPU. Run it again whenever the demo model's heads are trained again. Needs FlagEmbedding, a development
dependency.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = [0.4, 0.2, 0.4]
QUERIES = ["What is BGE M3?", "Defination of BM25", "パスワードを変更する", "Wie ändere ich mein Passwort?"]
PASSAGES = [
    "BGE M3 is an embedding model supporting dense retrieval, lexical matching and multi-vector interaction.",
    "BM25 is a bag-of-words retrieval function that ranks a set of documents based on the query terms appearing in "
    "each document",
    "Your password was changed.",
    "您的密码已更改。",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Write FlagEmbedding's values for a checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "parity" / "golden_demo.json")
    options = parser.parse_args(argv)
    values = compute_golden(options.checkpoint)
    options.out.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: {len(values['scores']['dense'])} pairs", file=sys.stderr)
    return 0


def compute_golden(checkpoint: Path) -> dict[str, Any]:
    """Return FlagEmbedding's values for the sentences."""
    from FlagEmbedding import BGEM3FlagModel  # noqa: PLC0415  6 s, not for --help

    pooling = _read_pooling(checkpoint)
    model = BGEM3FlagModel(str(checkpoint), use_fp16=False, devices="cpu", pooling_method=pooling)
    texts = QUERIES + PASSAGES
    made = model.encode(texts, return_dense=True, return_sparse=True, return_colbert_vecs=False)
    pairs = [(query, passage) for query in QUERIES for passage in PASSAGES]
    scores: dict[str, list[float]] = {}
    for pair in pairs:
        for mode, value in model.compute_score([pair], weights_for_different_modes=WEIGHTS).items():
            scores.setdefault(mode, []).extend(value)
    return {
        "made_by": {name: version(name) for name in ("FlagEmbedding", "transformers", "torch")},
        "queries": QUERIES,
        "passages": PASSAGES,
        "weights": WEIGHTS,
        "input_ids": [model.tokenizer(text)["input_ids"] for text in texts],
        "lexical_weights": [
            {token: float(weight) for token, weight in weights.items()}
            for weights in model.convert_id_to_token(made["lexical_weights"])
        ],
        "scores": scores,
    }


def _read_pooling(checkpoint: Path) -> str:
    config = json.loads((checkpoint / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    return "mean" if config.get("pooling_mode_mean_tokens") or config.get("pooling_mode") == "mean" else "cls"


if __name__ == "__main__":
    sys.exit(main())
