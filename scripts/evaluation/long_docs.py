"""Print recall@10 of each value of --long-docs, as a Markdown table.

    scripts/quality long-docs SET --model DIR --work DIR [--json FILE]

SET is the output of `scripts/quality long-set`. Each of truncate, chunk and merge is encoded into --work with the real
`m3 encode` (an existing folder is reused), searched with `m3 search` and measured with `m3 eval`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WAYS = ("truncate", "chunk", "merge")
MODES = ("dense", "sparse", "colbert", "hybrid")
MEASURE = "Recall@10"


def run_m3(*arguments: object) -> str:
    """Run the command and return its standard output."""
    command = [sys.executable, "-m", "m3cli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def count_rows(folder: Path) -> tuple[int, int]:
    """Return rows and bytes of a folder."""
    found = json.loads(run_m3("info", folder, "--json"))
    return found["counts"]["chunks"], sum(found["bytes"].values())


def measure(folder: Path, source: Path, model: str, mode: str) -> float:
    """Search the folder and return the measure."""
    run = folder.with_name(f"{folder.name}-{mode}.trec")
    run_m3("search", folder, "--queries", source / "queries.jsonl", "--model", model, "--mode", mode, "--out", run)
    found = json.loads(run_m3("eval", run, source / "qrels" / "test.tsv", "--measures", MEASURE, "--json"))
    return float(found["runs"][0]["measures"][MEASURE])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit code is returned."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("set", type=Path, metavar="SET")
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="also write the numbers as JSON")
    options = parser.parse_args(arguments)
    found = {}
    print(f"| `--long-docs` | rows | MB | {' | '.join(MODES)} |")
    print(f"|---|---:|---:|{'---:|' * len(MODES)}")
    for way in WAYS:
        folder = options.work / f"L-{way}"
        run_m3(
            *("encode", options.set / "corpus.jsonl", "--model", options.model, "--long-docs", way),
            *("--out", folder, "--progress", "none"),
        )
        rows, size = count_rows(folder)
        recalls = {mode: measure(folder, options.set, options.model, mode) for mode in MODES}
        found[way] = {"rows": rows, "bytes": size, MEASURE: recalls}
        cells = [f"{recall:.3f}" for recall in recalls.values()]
        print(f"| `{way}` | {rows:,} | {size / 1e6:.0f} | {' | '.join(cells)} |", flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"model": options.model, "set": options.set.name, "ways": found}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
