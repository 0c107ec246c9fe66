"""The progress of a run on stderr: a panel before it, a bar or log lines during it, a summary after it.

`bar` is tqdm, for a terminal, and before it notes of what a run is waiting for; `log` one plain line every 30 s, for a
cron mail; `json` one object a line, for a machine; `none` errors only. `auto` is bar on a terminal and log elsewhere. A
log file gets the lines of `log`, with their time, in any mode. Control characters in names from the input are escaped.
The remaining work is known in shards of about the same bytes, so the remaining time comes from the shards done and the
tokens of the current one.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, Literal, TextIO, TypeVar

from m3cli.config import ProgressMode
from m3cli.errors import OutputError, count_noun, escape_unprintable, format_duration
from m3cli.paths import is_stream, open_to_append
from m3cli.records import RunPlan, RunSummary

Stage = Literal["loading", "reading", "encoding", "writing"]

_LOG_SECONDS = 30.0
BAR_COLUMNS = 20
"of the bar itself, at least"


T = TypeVar("T")


class Stopwatch:
    """Seconds spent in each stage. Each stage runs in its own thread and counts its own time."""

    def __init__(self) -> None:
        self.seconds: dict[Stage, float] = {"loading": 0.0, "reading": 0.0, "encoding": 0.0, "writing": 0.0}
        self._started = time.perf_counter()

    @contextmanager
    def count(self, stage: Stage) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - began

    def count_each(self, stage: Stage, items: Iterator[T]) -> Iterator[T]:
        """Yield items, adding the time it takes to make each to a stage."""
        while True:
            with self.count(stage):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def total(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._started


class Progress:
    """Shows the progress of a run in the form of a mode; `advance` counts."""

    def __init__(self, mode: ProgressMode, *, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._log_file: Path | None = None
        self._log_failed = False
        terminal = self._stream.isatty()
        self.mode: ProgressMode = ("bar" if terminal else "log") if mode == "auto" else mode
        self._bar: _Bar | None = None
        self._noted = 0
        self._pulse = _RunRate()

    def open_log(self, path: str | None) -> None:
        """Append all further messages to a file too.

        Raises:
            OutputError: it cannot be written.
        """
        if path is None:
            return
        try:
            is_stream(path)
            _append(Path(path), "")
        except OSError as error:
            raise OutputError(f"cannot write --log-file {path}: {error.strerror}; choose another") from error
        self._log_file = Path(path).absolute()

    def note(self, text: str) -> None:
        """Show on a terminal what the run is waiting for, until something else is shown."""
        if self.mode == "bar":
            self.clear_note()
            shown = escape_unprintable(f"m3: {text} ...")[: max(1, get_terminal_size().columns - 1)]
            self._noted = len(shown)
            print(shown, end="", file=self._stream, flush=True)

    def clear_note(self) -> None:
        """Remove the note from the terminal."""
        if self._noted:
            print("\r" + " " * self._noted, end="\r", file=self._stream, flush=True)
            self._noted = 0

    def show_plan(self, plan: RunPlan) -> None:
        """Show the plan of a run."""
        self.clear_note()
        if self.mode in ("bar", "log"):
            from m3cli.tables import plan_panel, print_panel  # noqa: PLC0415  rich is slow, and not always needed

            print_panel(plan_panel(plan), self._stream)
        self._log(
            f"{'going on with' if plan.resumed else 'encoding into'} {plan.out}: {plan.model}, {plan.dtype} on "
            f"{plan.device}, {'unknown shards' if plan.num_shards is None else count_noun(plan.num_shards, 'shard')}, "
            f"{plan.shards_done:,} done"
        )
        self._emit("plan", {name: getattr(plan, name) for name in RunPlan.__slots__})

    def start(self, *, shards_todo: int | None) -> None:
        """Begin to count."""
        self._pulse = _RunRate(shards_todo=shards_todo)
        self.clear_note()
        if self.mode == "bar":
            self._bar = _Bar(self._stream)

    def advance(self, *, documents: int, tokens: int, shards: float) -> None:
        """Count documents and tokens that are encoded, and the part of a shard that they are."""
        self._pulse.add(documents=documents, tokens=tokens, shards=shards)
        if self._bar is not None:
            self._bar.update(self._pulse, tokens)
        if (self.mode in ("log", "json") or self._log_file is not None) and self._pulse.due():
            self._log_progress()

    def begin_shard(self) -> None:
        """Note the start of a shard, in case it is withdrawn."""
        self._pulse.begin_shard()

    def withdraw_shard(self) -> None:
        """Subtract what was counted since the shard began: it is encoded again without some of its documents."""
        tokens = self._pulse.withdraw_shard()
        if self._bar is not None:
            self._bar.update(self._pulse, -tokens)

    def _log_progress(self) -> None:
        pulse = self._pulse
        self._emit("progress", pulse.to_json())
        share = pulse.share_done()
        text = (
            f"{'' if share is None else f'{share:.0%}, '}{count_noun(pulse.documents, 'document')}, "
            f"{count_noun(pulse.tokens, 'token')}, {pulse.rates()}, {format_duration(pulse.seconds_left())} left"
        )
        self._log(text)
        if self.mode == "log":
            self._print(text)

    def stop(self) -> None:
        """End the counting; the line of the bar is kept."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def show_summary(self, summary: RunSummary) -> None:
        """Show the summary of a run; on a terminal also what may come next."""
        if self.mode in ("bar", "log"):
            from m3cli.tables import print_panel, summary_panel  # noqa: PLC0415

            print_panel(summary_panel(summary), self._stream)
        if self.mode == "bar" and summary.shards_done == summary.num_shards:
            out = shlex.quote(escape_unprintable(summary.out))
            print(f'next: m3 search {out} "some words"', file=self._stream)
            print(f"next: m3 load {out} --to qdrant:URL  (or milvus:, pgvector:; files: m3 export)", file=self._stream)
        self._log(
            f"{count_noun(summary.documents, 'document')}, {count_noun(summary.tokens, 'token')}, "
            f"{count_noun(summary.skipped, 'row')} skipped, {summary.shards_done:,} of "
            f"{count_noun(summary.num_shards, 'shard')} done, {summary.seconds['total']:.1f} s"
        )
        self._emit("summary", {name: getattr(summary, name) for name in RunSummary.__slots__})

    def say(self, text: str) -> None:
        """Print a message of one line, above a bar."""
        self._log(text)
        if self.mode in ("bar", "log"):
            self._print(text)
        self._emit("message", {"text": text})

    def log_end(self, text: str, exit_code: int) -> None:
        """Write an error that ends the run to the log file."""
        self._log(f"exit code {exit_code}: {text}")

    def clear_bar(self) -> None:
        """Remove bar and note from the terminal before results are written; the next batch shows the bar again."""
        self.clear_note()
        if self._bar is not None:
            self._bar.clear()
            self._bar.leave = False

    def _print(self, text: str) -> None:
        self.clear_note()
        if self._bar is not None:
            self._bar.clear()
        print(f"m3: {escape_unprintable(text)}", file=self._stream, flush=True)

    def _log(self, text: str) -> None:
        if self._log_file is not None:
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            try:
                _append(self._log_file, f"{now} {escape_unprintable(text)}\n")
            except OSError as error:
                self._warn_of_log(f"cannot write --log-file {self._log_file}: {error.strerror}; the run goes on")

    def _warn_of_log(self, text: str) -> None:
        if not self._log_failed:
            self._log_failed = True  # before `say`, which writes to the log again
            self.say(text)

    def _emit(self, event: str, members: dict[str, object]) -> None:
        if self.mode == "json":
            # Not orjson: a file's name may not be UTF-8, nor may standard error.
            print(json.dumps({"event": event, **members}), file=self._stream, flush=True)


def _append(path: Path, text: str) -> None:
    # Opened again for each line, every half minute or so, as logrotate may have moved the file away.
    with open_to_append(path, wait=False, create=True) as file:
        file.write(text.encode())


class _RunRate:
    """How much of a run is done, and its speed."""

    def __init__(self, *, shards_todo: int | None = None) -> None:
        self.documents = 0
        self.tokens = 0
        self._shards = 0.0
        self._before_shard = (0, 0, 0.0)
        self._shards_todo = shards_todo
        self._started = self._last_beat = time.monotonic()

    def begin_shard(self) -> None:
        self._before_shard = (self.documents, self.tokens, self._shards)

    def withdraw_shard(self) -> int:
        tokens = self.tokens
        self.documents, self.tokens, self._shards = self._before_shard
        return tokens - self.tokens

    def add(self, *, documents: int, tokens: int, shards: float) -> None:
        self.documents += documents
        self.tokens += tokens
        self._shards += shards

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def documents_per_second(self) -> float:
        return self.documents / self.seconds

    def rates(self) -> str:
        return f"{self.documents_per_second:,.1f} documents/s, {self.tokens_per_second:,.0f} tokens/s"

    def describe(self, width: int) -> str:
        """Describe the work in at most so many characters, if possible, with what matters most."""
        done, todo, left = int(self._shards + 1e-6), self._shards_todo, self.seconds_left()
        parts = [
            *([f"{done:,}/{todo:,} shards" if todo else f"{count_noun(done, 'shard')}"] if todo or done else []),
            count_noun(self.documents, "document"),
            f"{self.tokens_per_second:,.0f} tokens/s",
            *([f"{format_duration(left)} left"] if left is not None else []),
        ]
        for dropped in (-3, 0):  # the documents, then the shards
            if len(", ".join(parts)) > width and len(parts) > 2:
                del parts[dropped]
        return ", ".join(parts)

    def share_done(self) -> float | None:
        """Part of this run's work that is done; None where the amount of work is not known."""
        if not self._shards_todo:
            return None
        return min(self._shards / self._shards_todo, 1.0)

    def seconds_left(self) -> float | None:
        share = self.share_done()
        return None if not share else self.seconds * (1 - share) / share

    def due(self) -> bool:
        """Whether a log line is due; asking resets the clock."""
        now = time.monotonic()
        if now - self._last_beat < _LOG_SECONDS:
            return False
        self._last_beat = now
        return True

    def to_json(self) -> dict[str, object]:
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "documents_per_second": round(self.documents_per_second, 1),
            "share_done": self.share_done(),
            "seconds_left": self.seconds_left(),
        }


class _Bar:
    """tqdm; its total is estimated from the tokens and the share done."""

    def __init__(self, stream: TextIO) -> None:
        from tqdm import tqdm  # noqa: PLC0415

        self.leave = self._drawn = True
        self._stream, self._columns = stream, 0
        form = "{percentage:3.0f}%|{bar}| {desc}"
        self._tqdm = tqdm(file=stream, dynamic_ncols=True, bar_format=form)

    def update(self, pulse: _RunRate, tokens: int) -> None:
        columns = self._tqdm.format_dict["ncols"] or 80
        if columns < self._columns:  # the terminal has wrapped the line that was as wide as before
            print("\x1b[A" * ((self._columns - 1) // columns), end="\r\x1b[J", file=self._stream)
            self._tqdm.sp = self._tqdm.status_printer(self._stream)  # or it overwrites a line of the former width
        self._columns = columns
        share = pulse.share_done()
        self._tqdm.total = int(pulse.tokens / share) if share else None
        self._tqdm.set_description_str(pulse.describe(columns - BAR_COLUMNS - len("100%||  ")), refresh=False)
        self._drawn = True
        self._tqdm.update(tokens)

    def clear(self) -> None:
        if self._drawn:
            self._tqdm.clear()
            self._drawn = False

    def close(self) -> None:
        self._tqdm.leave = self.leave
        self._tqdm.close()


class FileMeter:
    """Shows how many bytes of a folder have been read: a bar on a terminal, else a line about every half minute."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._tqdm: Any = None
        self._total = self._read = 0
        self._last_line = time.monotonic()

    def start(self, total: int) -> None:
        """Begin to count up to `total` bytes."""
        self._total, self._read = total, 0
        self._last_line = time.monotonic()
        if not self._quiet and self._stream.isatty():
            from tqdm import tqdm  # noqa: PLC0415

            self._tqdm = tqdm(file=self._stream, total=total, unit="B", unit_scale=True, leave=False, delay=1)

    def advance(self, count: int) -> None:
        """Count bytes that have been read."""
        self._read += count
        if self._tqdm is not None:
            self._tqdm.update(count)
        elif not self._quiet and time.monotonic() - self._last_line >= _LOG_SECONDS:
            self._last_line = time.monotonic()
            share = 100 * self._read / max(self._total, 1)
            print(f"m3: read {self._read:,} of {self._total:,} bytes ({share:.0f} %)", file=self._stream, flush=True)

    def stop(self) -> None:
        """End the counting and remove the bar."""
        if self._tqdm is not None:
            self._tqdm.close()
            self._tqdm = None
