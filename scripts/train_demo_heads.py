#!/usr/bin/env python3
"""Trains the demo model's heads and writes them where scripts/make_demo_model.py takes them from.

    scripts/train_demo_heads.py CHECKPOINT [--out FILE] [--cache DIR]       default: scripts/demo_model/heads.json

CHECKPOINT is a demo model, with whatever heads: its encoder is frozen. The texts are titles and bodies in some 30
languages from two Debian packages, GNOME's help and Debian's install guide, fetched by `apt-get download` into --cache;
the retrieval set (scripts/make_retrieval_set.py) is from another. Takes a few minutes on a CPU. The file holds 769
numbers, so that building the model needs neither the texts nor this. Needs m3cli's own environment.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from make_retrieval_set import CACHE
from retrieval_set.debian import SourceError, fetch_packages, read_version

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "scripts" / "demo_model" / "heads.json"
PAIRS_PER_LANGUAGE = 100
HELD_OUT = 4  # every fourth language is for the sparse head's scale, not for its direction


def main(argv: Sequence[str] | None = None) -> int:
    """Train the heads of the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description="Train the demo model's heads on texts of other packages.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="where packages are kept")
    options = parser.parse_args(argv)
    try:
        train(options.checkpoint, out=options.out, cache=options.cache)
    except (SourceError, OSError) as error:
        _say(f"error: {error}")
        return 1
    return 0


def train(checkpoint: Path, *, out: Path, cache: Path) -> None:
    """Fetch, encode, fit, write."""
    import torch  # noqa: PLC0415  takes seconds
    from demo_heads.fit import fit_direction, fit_scale, make_group, measure_gains, measure_mean, sum_scores  # noqa: PLC0415
    from demo_heads.states import compute_states  # noqa: PLC0415
    from demo_heads.texts import PACKAGES, choose_pairs, read_sections  # noqa: PLC0415

    packages = fetch_packages(PACKAGES, cache)
    pairs = choose_pairs(read_sections(packages), per_language=PAIRS_PER_LANGUAGE)
    _say(f"{len(pairs):,} titles and texts, {len({pair.lang for pair in pairs})} languages: encoding")
    titles = compute_states(checkpoint, [pair.title for pair in pairs])
    texts = compute_states(checkpoint, [pair.text for pair in pairs])
    mean = measure_mean(texts)
    groups = []
    for _, members in groupby(range(len(pairs)), key=lambda index: pairs[index].lang):
        own = list(members)
        groups.append(make_group([titles[index] for index in own], [texts[index] for index in own], mean=mean))
    held_out, fitted = groups[::HELD_OUT], [group for place, group in enumerate(groups) if place % HELD_OUT]
    _say("fitting")
    head = fit_scale(held_out, fit_direction(fitted))
    for name, weights in {"dense": (1, 0, 0), "sparse": (0, 1, 0), "colbert": (0, 0, 1), "all": (1, 1, 1)}.items():
        gains = torch.cat([measure_gains(sum_scores(group, head, weights)) for group in held_out])
        _say(f"nDCG in the languages held out, {name}: {gains.mean():.3f}")
    written = {
        "trained_on": {name: read_version(path) for name, path in packages.items()},
        "colbert_bias": [round(-value, 5) for value in mean.tolist()],
        "sparse_weight": [round(value, 5) for value in head.weight.tolist()],
        "sparse_bias": round(float(head.bias), 5),
    }
    out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    _say(f"{out} is written")


def _say(text: str) -> None:
    print(f"train_demo_heads: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
