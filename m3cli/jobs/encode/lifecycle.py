"""What ends a run early (a signal, its time, too many skipped rows, first rows that all fail), and its metrics file."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from m3cli.errors import (
    EXIT_INTERRUPTED,
    CorpusError,
    FolderLocked,
    M3Error,
    ModelError,
    OutputError,
    Stopped,
    count_noun,
)
from m3cli.records import ShardCounts, SkippedRow

_log = logging.getLogger(__name__)

SECONDS_BETWEEN = 30.0
TOO_LARGE = "merged ColBERT matrix too large"
FIRST_ROWS = 100
"that fail for one reason before any document is encoded, and the run is aborted"

_HELP = {
    "running": "1 while the run goes on, 0 after it.",
    "started_timestamp_seconds": "When the run started.",
    "updated_timestamp_seconds": "When this file was written.",
    "exit_code": "Exit code of the run: 0 done, 3 done but rows were skipped, 75 stopped with work left.",
    "documents": "Documents that this run has committed.",
    "chunks": "Rows that this run has committed.",
    "tokens": "Tokens that this run has committed.",
    "skipped": "Rows of the input that this run has skipped.",
    "bytes_written": "Bytes of the files that this run has committed.",
    "shards_done": "Shards of the folder that are done.",
    "shards": "Shards of the folder, where that is known.",
    "tokens_per_second": "Tokens committed per second of encoding.",
    "peak_memory_bytes": "Most memory that the process has held at once.",
}
MIN_ROWS = 1000
"rows before a percentage is compared with the limit; a complete folder is always compared"


class Stop:
    """Whether and why a run is to end early. A signal or a timer sets it; the run reads it between batches."""

    def __init__(self) -> None:
        self.reason: str | None = None
        "such as 'stopped by SIGTERM'; None: the run continues"
        self.at_once = False
        "whether the current shard is aborted, too"

    def check(self, *, in_shard: bool = False) -> None:
        """Raise Stopped if the run is to end here."""
        if self.reason is not None and (self.at_once or not in_shard):
            raise Stopped(f"{self.reason} with work left; run the same command again to resume")


def check_max_skipped(
    counts: ShardCounts, limit: float | None, reasons: Counter[str], *, out: str, complete: bool
) -> None:
    """Compare a folder with --max-skipped; its done shards stay.

    Raises:
        CorpusError: more rows were skipped than that.
    """
    if limit is None:
        return
    rows = counts.documents + counts.skipped
    if isinstance(limit, int):
        exceeded, shown = counts.skipped > limit, f"{limit:,}"
    else:
        exceeded, shown = counts.skipped > limit * rows and (complete or rows >= MIN_ROWS), f"{limit * 100:g}%"
    if exceeded:
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(3))
        raise CorpusError(
            f"{counts.skipped:,} of {count_noun(rows, 'row was', 'rows were')} skipped, more than --max-skipped {shown}"
            f"{f' ({why})' if why else ''}; see {out}/_m3/skipped, then fix the input or raise --max-skipped"
        )


class FirstRows:
    """The rows before the first document that is encoded: if all fail for one reason, the run is aborted.

    One bad row is data; FIRST_ROWS of them, or all rows there are, mean that the corpus is not what it was taken for.
    """

    def __init__(self, before: ShardCounts, *, worker: int = 0, num_workers: int = 1) -> None:
        self.decided = before.documents > 0 or worker > 0
        "whether the run goes on, whatever comes"
        self._alone = num_workers == 1
        self._count = before.skipped
        self._first: SkippedRow | None = None

    def add(self, skipped: Sequence[SkippedRow]) -> None:
        """Count the rows of a shard without documents.

        Raises:
            CorpusError: they are enough, and all fail for one reason; ModelError where that is the device's memory.
        """
        self._count += len(skipped)
        self._first = self._first or next(iter(skipped), None)
        if self._first is not None and any(row.reason != self._first.reason for row in skipped):
            self.decided = True
        elif self._count >= FIRST_ROWS:
            self._abort()
        # Of several workers none sees the rows that come next.
        self.decided = self.decided or not self._alone

    def end(self) -> None:
        """Note that there are no more rows.

        Raises:
            CorpusError: as `add`.
        """
        if not self.decided and self._first is not None:
            self._abort()

    def _abort(self) -> None:
        if self._first is None:
            return
        from m3cli.encoder.encode import NOT_A_NUMBER, OUT_OF_MEMORY  # noqa: PLC0415  torch

        reason, detail = self._first.reason, self._first.detail
        remedies = {
            OUT_OF_MEMORY: "free memory on the device",
            NOT_A_NUMBER: "use another checkpoint, or --dtype float32",
            TOO_LARGE: "",  # it is in the detail
        }
        remedy = remedies.get(reason, "check the format and the fields (--text-field, --input-format)")
        rows = f"all of the first {self._count:,} rows" if self._count > 1 else "the first row"
        raise (ModelError if reason == OUT_OF_MEMORY else CorpusError)(
            f"{rows}, from {self._first.source} on, would be skipped: "
            f"{reason}{f' ({detail})' if detail else ''}{'; ' if remedy else ''}{remedy}"
        )


class MetricsFile:
    """The numbers of one run; without a path nothing is written."""

    def __init__(self, path: Path | None, *, out: str) -> None:
        self.numbers: dict[str, float] = {"running": 1, "started_timestamp_seconds": time.time()}
        self.out = out
        self.path = path
        self._written = 0.0
        self._failed = False

    @property
    def due(self) -> bool:
        """Whether the file is half a minute old."""
        return self.path is not None and time.monotonic() - self._written >= SECONDS_BETWEEN

    def write(self) -> None:
        """Replace the file; a failure is a warning, once, as the corpus does not suffer from it."""
        if self.path is None:
            return
        self._written = time.monotonic()
        self.numbers["updated_timestamp_seconds"] = time.time()
        try:
            from m3cli.store.commit import publish_outside  # noqa: PLC0415  pyarrow, not for --help

            with publish_outside(self.path, wait=False) as file:
                file.write(self.render().encode())
        except OutputError as error:
            if not self._failed:
                _log.warning(
                    "cannot write --metrics %s: %s; the run goes on",
                    self.path,
                    getattr(error.__cause__, "strerror", error),
                )
            self._failed = True

    def render(self) -> str:
        """Return the numbers in Prometheus' text format."""
        lines = []
        label = self.out.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        for name, text in _HELP.items():
            if name in self.numbers:
                value = repr(round(self.numbers[name], 3))
                lines += [f"# HELP m3_{name} {text}", f"# TYPE m3_{name} gauge"]
                lines.append(f'm3_{name}{{out="{label}"}} {value}')
        return "\n".join([*lines, ""])


@contextmanager
def keep_metrics(path: str | None, *, out: str) -> Iterator[MetricsFile]:
    """Write a run's numbers when it ends, however it ends, with its exit code.

    The code that the run gives back is to be put among the numbers.

    Raises:
        OutputError: the file cannot be written, found out at once.
    """
    from m3cli.store.commit import check_writable  # noqa: PLC0415  pyarrow, not for --help

    check_writable(path)
    metrics = MetricsFile(None if path is None else Path(path).absolute(), out=out)
    code: float = 1
    try:
        yield metrics
        code = metrics.numbers["exit_code"]
    except FolderLocked:
        metrics.path = None  # the run that holds the folder writes the file, too
        raise
    except M3Error as error:
        code = error.exit_code
        raise
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        raise
    finally:
        metrics.numbers.update(running=0, exit_code=code)
        metrics.write()
