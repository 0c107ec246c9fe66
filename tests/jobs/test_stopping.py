from __future__ import annotations

from collections import Counter

import pytest

from m3cli.errors import CorpusError, Stopped
from m3cli.jobs.encode.lifecycle import MIN_ROWS, Stop, check_max_skipped
from m3cli.records import ShardCounts


def hold(limit: float | None, *, skipped: int, rows: int, complete: bool = False) -> None:
    counts = ShardCounts(documents=rows - skipped, skipped=skipped)
    check_max_skipped(counts, limit, Counter({"empty text": skipped}), out="o.m3", complete=complete)


def test_without_a_limit_all_may_be_skipped() -> None:
    hold(None, skipped=10**6, rows=10**6, complete=True)


def test_a_number_of_rows_is_held_at_once() -> None:
    hold(3, skipped=3, rows=10)
    with pytest.raises(CorpusError, match=r"4 of 10 rows were skipped, more than --max-skipped 3 \(4 empty text\)"):
        hold(3, skipped=4, rows=10)
    with pytest.raises(CorpusError, match="--max-skipped 0"):
        hold(0, skipped=1, rows=10)


def test_a_part_of_the_rows_tells_nothing_before_there_are_enough() -> None:
    hold(0.01, skipped=MIN_ROWS - 1, rows=MIN_ROWS - 1)
    hold(0.01, skipped=10, rows=MIN_ROWS)
    with pytest.raises(CorpusError, match="more than --max-skipped 1%"):
        hold(0.01, skipped=11, rows=MIN_ROWS)
    with pytest.raises(CorpusError, match="more than --max-skipped 1%"):
        hold(0.01, skipped=1, rows=10, complete=True)


def test_a_run_ends_between_shards_or_at_once() -> None:
    stop = Stop()
    stop.check()
    stop.reason = "stopped by a test"
    stop.check(in_shard=True)
    with pytest.raises(Stopped, match="stopped by a test with work left"):
        stop.check()
    stop.at_once = True
    with pytest.raises(Stopped):
        stop.check(in_shard=True)
