"""What ends a run before its work is done: a signal, its time, or too many rows that are skipped."""

from __future__ import annotations

from collections import Counter

from m3cli.errors import CorpusError, Stopped, count_noun
from m3cli.records import ShardCounts

MIN_ROWS = 1000
"rows before a part of them tells anything; at the end it is held to the limit in any case"


class Stop:
    """Whether and why a run is to end early. Who asks for it sets it; the run looks at it where it can end well."""

    def __init__(self) -> None:
        self.reason: str | None = None
        "such as 'stopped by SIGTERM'; None: go on"
        self.at_once = False
        "whether the shard in hand is given up, too"

    def check(self, *, in_shard: bool = False) -> None:
        """Raise Stopped if this is a place to stop at."""
        if self.reason is not None and (self.at_once or not in_shard):
            raise Stopped(f"{self.reason} with work left; run the same command again to go on")


def refuse_too_many_skipped(
    counts: ShardCounts, limit: float | None, reasons: Counter[str], *, out: str, complete: bool
) -> None:
    """Hold a folder to `--max-skipped`; what is done in it stays.

    Raises:
        CorpusError: more rows were skipped than that.
    """
    if limit is None:
        return
    rows = counts.documents + counts.skipped
    if isinstance(limit, int):
        exceeded, spelt = counts.skipped > limit, f"{limit:,}"
    else:
        exceeded, spelt = counts.skipped > limit * rows and (complete or rows >= MIN_ROWS), f"{limit * 100:g}%"
    if exceeded:
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(3))
        raise CorpusError(
            f"{counts.skipped:,} of {count_noun(rows, 'row was', 'rows were')} skipped, more than --max-skipped {spelt}"
            f"{f' ({why})' if why else ''}; see {out}/_m3/skipped, then mend the input or raise --max-skipped"
        )
