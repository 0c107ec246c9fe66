"""Time `m3 export` by target and number of rows, with its peak memory.

    scripts/bench export [--rows 100000 1000000] [--targets milvus elasticsearch pgvector] [--dim 64] [--weights 60]

A folder of random unit vectors and lexical weights is written for each number of rows, in float16 and Parquet;
--weights 0: dense vectors only. Each export is a process of its own, timed from start to exit.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.contest import CommandFailed, open_work, say
from benchmarks.report import draw_table, format_bytes, make_parser, save_results
from benchmarks.stored import write_vectors

_MEASURED = """
import sys
from benchmarks.contest import read_host_peak
from m3cli.cli.app import run
code = run(sys.argv[1:])
print(read_host_peak())
sys.exit(code)
"""


def export(folder: Path, out: Path, target: str) -> dict[str, Any]:
    """Export a folder; return the seconds, the bytes written and the most memory held."""
    words = ("export", str(folder), "--to", target, "--out", str(out), "--progress", "none")
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _MEASURED, *words], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise CommandFailed(done.stderr.strip())
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return {"seconds": seconds, "bytes": written, "peak_bytes": int(done.stdout.split()[-1])}


def main() -> None:
    """Time all exports and print a table."""
    parser = make_parser(__doc__, needs_model=False)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--targets", nargs="+", default=["milvus", "elasticsearch", "pgvector"])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--weights", type=int, default=60)
    parser.add_argument("--work", type=Path, default=Path("/var/tmp"), help="for folders and exports: gigabytes")
    options: argparse.Namespace = parser.parse_args()
    figures: list[dict[str, Any]] = []
    with open_work(options.work) as work:
        for rows in options.rows:
            folder = work / f"{rows}.m3"
            write_vectors(folder, rows=rows, dim=options.dim, form="parquet", weights=options.weights)
            for target in options.targets:
                figures.append({"target": target, "rows": rows, **export(folder, work / "out", target)})
                say(f"{target}, {rows:,} rows: {figures[-1]['seconds']:.1f} s")
            shutil.rmtree(folder)
    lines = [
        (
            f"{each['target']}, {each['rows']:,}",
            f"{each['seconds']:.1f}",
            f"{each['rows'] / each['seconds']:,.0f}",
            f"{each['bytes'] / each['seconds'] / 1e6:,.0f}",
            format_bytes(each["peak_bytes"]),
        )
        for each in figures
    ]
    header = ("target, rows", "seconds", "rows/s", "MB/s written", "peak memory")
    print(draw_table(header, lines, markdown=options.markdown))
    if options.json:
        save_results(options.json, {"dim": options.dim, "weights": options.weights, "runs": figures})


if __name__ == "__main__":
    main()
