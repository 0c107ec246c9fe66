"""Tables and panels for people: the panel before a run, the summary after it, what is in a folder. Drawn by rich."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, TextIO

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from m3cli.config import list_non_defaults
from m3cli.errors import count_noun, escape_controls, escape_unprintable, format_duration
from m3cli.records import QueryHits, RunPlan, RunSummary
from m3cli.requests import HITS_SHOWN

_PLAIN_WIDTH = 100
"columns off a terminal, so that a log does not depend on the size of a window"
_BAR_WIDTH = 30
_NAMES_SHOWN = 4
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def open_console(stream: TextIO) -> Console:
    """Return a console on a stream; off a terminal without colours or escape codes."""
    terminal = stream.isatty()
    return Console(file=stream, highlight=False, force_terminal=terminal, width=None if terminal else _PLAIN_WIDTH)


def _plain(text: str) -> Text:
    """Return text without markup, with control characters escaped: it may hold names from the input."""
    return Text(escape_unprintable(text))


def format_bytes(count: float) -> str:
    """Return a byte count as '512 B', '1.5 MiB', '41.0 TiB'."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def _about(count: int | None, suffix: str = "") -> str:
    return "unknown before it is read" if count is None else f"about {count:,}{suffix}"


def _rows() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def print_panel(panel: Panel, stream: TextIO) -> None:
    """Print a panel."""
    open_console(stream).print(panel)


def plan_panel(plan: RunPlan, *, title: str | None = None) -> Panel:
    """Draw the panel that is shown before a run."""
    rows = _rows()
    threads = f" ({count_noun(plan.threads, 'thread')})" if plan.device.startswith("cpu") else ""
    words = f"{plan.model}, {plan.dtype} on {plan.device}{threads}, up to {plan.max_length:,} tokens a chunk"
    rows.add_row("model", _plain(words))
    rows.add_row("output", _plain(f"{plan.out} ({plan.format}): {', '.join(plan.outputs)}"))
    if plan.settings:
        rows.add_row("settings", _plain(_format_options(plan.settings)))
    rows.add_row("fields", _plain(_format_fields(plan.fields)))
    size = "" if plan.input_bytes is None else f" in {format_bytes(plan.input_bytes)}"
    rows.add_row("documents", f"{_about(plan.documents)}{size}")
    if plan.unread:
        rows.add_row("not read", _plain(_format_unread(plan.unread)))
    if plan.tokens is not None:
        rows.add_row("tokens", _about(plan.tokens))
    if plan.num_shards is None:
        rows.add_row("shards", f"{plan.shards_done:,} done, the rest unknown before it is read")
    else:
        todo = plan.num_shards - plan.shards_done
        rows.add_row("shards", f"{plan.num_shards:,}: {plan.shards_done:,} done, {todo:,} to do")
    if plan.bytes_on_disk is not None:
        parts = ", ".join(f"{output} {format_bytes(size)}" for output, size in plan.bytes_on_disk.items())
        rows.add_row("disk", f"about {format_bytes(sum(plan.bytes_on_disk.values()))}: {parts}")
    rows.add_row("free", _format_free(plan))
    if plan.tokens_per_second is not None and plan.seconds is not None:
        rows.add_row("time", f"about {format_duration(plan.seconds)} at {plan.tokens_per_second:,.0f} tokens/s")
    if title is not None:  # m3 plan; before a run, what is still to be chosen is of no use
        for index, (flags, needed) in enumerate((plan.colbert_choices or {}).items()):
            rows.add_row("" if index else "colbert as", f"{format_bytes(needed):>10}  {flags}")
    title = title or ("m3 encode, going on" if plan.resumed else "m3 encode")
    return Panel(rows, title=title, box=box.ROUNDED, expand=False)


def _format_unread(unread: Mapping[str, int]) -> str:
    count = sum(unread.values())
    endings = _name_some([f"{count:,} {ending}" for ending, count in unread.items()])
    return f"{count:,} file{'s' * (count != 1)}: {endings}; name a file itself to read it"


def _format_free(plan: RunPlan) -> str:
    free, needed = format_bytes(plan.free_bytes), plan.bytes_needed
    if needed is None or needed <= plan.free_bytes:
        return free
    return f"{free}: too little, about {format_bytes(needed)} are still to be written"


def summary_panel(summary: RunSummary) -> Panel:
    """Draw the panel that is shown after a run."""
    rows = _rows()
    chunks = f" in {count_noun(summary.chunks, 'chunk')}" if summary.chunks != summary.documents else ""
    earlier = f"; {summary.in_folder:,} in the folder" if summary.in_folder != summary.documents else ""
    rows.add_row("documents", f"{summary.documents:,}{chunks}, {count_noun(summary.tokens, 'token')}{earlier}")
    rows.add_row("skipped", _format_skipped(summary))
    listed = f", listed by m3 info {summary.out} --truncated" if summary.truncated else ""
    rows.add_row("truncated", f"{summary.truncated:,}{listed}")
    if summary.repeated:
        again = ", ".join(f"{count_noun(count, 'row')} in {dtype}" for dtype, count in summary.repeated.items())
        rows.add_row("not finite", f"{again} instead")
    if summary.unread:
        rows.add_row("not read", _plain(_format_unread(summary.unread)))
    if summary.taken or summary.gone is not None:
        gone = "" if summary.gone is None else f"; {count_noun(summary.gone, 'id')} of the older folder not in this one"
        rows.add_row("taken over", f"{count_noun(summary.taken, 'document')}{gone}")
    if summary.duplicate_ids:
        rows.add_row(
            "ids", f"{count_noun(summary.duplicate_ids, 'names', 'name')} several documents each; all are kept"
        )
    if summary.missing_ids:
        rows.add_row("without id", f"{summary.missing_ids:,}, named source:position")
    seconds = summary.seconds
    stages = ", ".join(f"{stage} {seconds[stage]:.1f}" for stage in ("loading", "reading", "encoding", "writing"))
    rows.add_row("seconds", f"{seconds['total']:.1f}: {stages} (stages overlap)")
    rows.add_row("speed", f"{summary.tokens_per_second:,.0f} tokens/s")
    rows.add_row("memory", f"{format_bytes(summary.peak_memory_bytes)} at most")
    rows.add_row("files", f"{count_noun(summary.num_files, 'file')}, {format_bytes(summary.bytes_written)}")
    state = ": complete" if summary.shards_done == summary.num_shards else ""
    rows.add_row("shards", f"{summary.shards_done:,} of {summary.num_shards:,} done{state}")
    return Panel(rows, title=_plain(summary.out), box=box.ROUNDED, expand=False)


def _format_skipped(summary: RunSummary) -> str:
    if not summary.skipped:
        return "0"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in summary.skipped_reasons.items())
    return f"{summary.skipped:,} ({reasons}); see _m3/skipped/"


def info_panel(folder: str, found: dict[str, Any]) -> Panel:
    """Draw what `m3 info` shows; `found` is a `store.describe.FolderDescription` as a dictionary."""
    rows = _rows()
    run, counts = found["run"], found["counts"]
    if run is not None:
        config, checkpoint = run["config"], run["checkpoint"]
        rows.add_row("model", _plain(f"{checkpoint['name']}, {config['dtype']}, {checkpoint['dim']} wide"))
        rows.add_row("settings", _plain(_format_settings(config)))
        rows.add_row("sources", _plain(_name_some([source["name"] for source in run["sources"]])))
    rows.add_row(
        "documents",
        f"{counts['documents']:,} in {count_noun(counts['chunks'], 'row')}, {count_noun(counts['tokens'], 'token')}",
    )
    rows.add_row("skipped", f"{counts['skipped']:,}, truncated {counts['truncated']:,}")
    rows.add_row("shards", f"{found['num_shards']:,} done: {'complete' if found['complete'] else 'work is left'}")
    if (metrics := found["metrics"]) is not None:
        spent = f"{count_noun(metrics['runs'], 'run')}, {format_duration(metrics['seconds']['total'])}"
        rows.add_row("speed", f"{metrics['tokens_per_second']:,.0f} tokens/s in {spent}")
    sizes = found["bytes"]
    parts = ", ".join(f"{output} {format_bytes(size)}" for output, size in sizes.items())
    rows.add_row("disk", f"{format_bytes(sum(sizes.values()))}: {parts}")
    histogram = found["token_histogram"]
    most = max(histogram.values(), default=1)
    for number, (tokens, count) in enumerate(histogram.items()):
        bar = "█" * max(1, round(_BAR_WIDTH * count / most))
        rows.add_row("" if number else "tokens", f"≤ {tokens:>5,}  {bar} {count:,}")
    return Panel(rows, title=_plain(folder), box=box.ROUNDED, expand=False)


def _format_settings(config: dict[str, Any]) -> str:
    fields = _format_fields(config["fields"])
    words = f"{config['format']}, up to {config['max_length']:,} tokens a row, {fields}"
    chosen = _format_options(list_non_defaults(config))
    return f"{words}; {chosen}" if chosen else words


def _format_fields(fields: Mapping[str, str | None]) -> str:
    """Format which field of the input is what."""
    named = [f"{part} from '{fields[part]}'" for part in ("id", "title", "text") if fields[part]]
    return ", ".join(named) if fields["id"] else ", ".join(["id from file name and position", *named])


def _format_options(settings: Mapping[str, Any]) -> str:
    """Format options without their dashes: 'long-docs merge, overlap 32, keep-text'."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        quoted = isinstance(value, str) and value != (value.strip() or None)
        words.append(flag if value is True else f"{flag} {value!r}" if quoted else f"{flag} {value}")
    return ", ".join(words)


def _name_some(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (
        f" and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    )


def draw_table(title: str, rows: Iterable[Sequence[str]], *, columns: Sequence[str] = ()) -> Table:
    """Draw a plain table with a title, cells without markup; without columns it has no header."""
    table = Table(title=title, title_justify="left", show_header=bool(columns), box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*(Text(escape_controls(cell)) for cell in row))
    return table


def hits_table(found: QueryHits) -> Table:
    """Draw the best hits of a query, one in a line with the beginning of its text."""
    title = _plain(found.text or found.query)
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), expand=True)
    kept = any(text is not None for text in found.texts)
    for name, style in (("#", "bold"), ("score", ""), ("id", "")):
        table.add_column(name, style=style, justify="right" if name == "#" else "left", no_wrap=True)
    what = "text" if kept else "" if found.char_start is None else "characters"
    table.add_column(what, no_wrap=True, overflow="ellipsis", ratio=1)
    for index, name in enumerate(found.ids[:HITS_SHOWN]):
        text, span = found.texts[index], ""
        if text is not None:
            span = " ".join(text.split())
        elif found.char_start is not None and found.char_end is not None:
            span = f"{found.char_start[index]:,} to {found.char_end[index]:,}"
        table.add_row(str(index + 1), f"{found.scores[index]:.4f}", _plain(name), _plain(span))
    more = len(found.ids) - HITS_SHOWN
    if more > 0:
        table.caption = f"and {more:,} more: --out FILE has all"
    elif not found.ids:
        table.caption = "nothing found"
    return table


_SHORT = {"sparse+dense": "s+d", "colbert+sparse+dense": "c+s+d"}
_SCORE_WIDTH = 7


class ScoreTable:
    """Pairs with their scores, one in a line, for a terminal of some columns."""

    cleaned = 0

    def __init__(self, stream: BinaryIO, *, width: int, query: str, passage: str, scores: Sequence[str]) -> None:
        self._stream, self._columns, self._scores = stream, (query, passage), scores
        rest = max(24, width - (_SCORE_WIDTH + 2) * len(scores) - 2)
        self._widths = rest // 3, rest - rest // 3
        self._write([_SHORT.get(name, name) for name in scores], ["query", "passage"])

    def append(
        self,
        rows: Sequence[Mapping[str, Any]],
        scores: Mapping[str, Any],
        *,
        raws: object,  # noqa: ARG002  as other tables take it
        batches: object,  # noqa: ARG002
    ) -> None:
        """Append rows and their scores; a missing score is NaN."""
        values = zip(*(scores[name].tolist() for name in self._scores), strict=True)
        for row, numbers in zip(rows, values, strict=True):
            cells = ["" if number != number else f"{number:.4f}" for number in numbers]  # noqa: PLR0124  NaN
            self._write(cells, [str(row.get(name) or "") for name in self._columns])

    def finish(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def _write(self, scores: Sequence[str], texts: Sequence[str]) -> None:
        cells = [cell.rjust(_SCORE_WIDTH) for cell in scores]
        for text, width in zip(texts, self._widths, strict=True):
            plain = escape_unprintable(" ".join(text.split()))
            cut = plain if cell_len(plain) <= width else f"{set_cell_size(plain, width - 1)}…"
            cells.append(set_cell_size(cut, width))
        self._stream.write(f"{'  '.join(cells).rstrip()}\n".encode(errors="replace"))
