"""Threads: items in order, errors in the reader, and no thread remains."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.concurrency import has_live_threads, parallel_map, prefetch


class Broken(Exception):
    """Raised by the work."""


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_results_are_in_order_whichever_is_ready_first(pauses: list[int], threads: int) -> None:
    def work(item: tuple[int, int]) -> int:
        time.sleep(item[1] / 2000)
        return item[0]

    assert list(parallel_map(work, enumerate(pauses), threads=threads, name="test")) == list(range(len(pauses)))
    assert not has_live_threads()


def test_all_threads_work_at_once() -> None:
    meeting = threading.Barrier(3)
    assert len(list(parallel_map(lambda _: meeting.wait(timeout=60), range(6), threads=3, name="test"))) == 6


def test_no_more_items_are_read_than_the_threads_need() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = parallel_map(lambda item: item, items(), threads=3, name="test")
    assert (next(results), len(taken)) == (0, 6)
    assert (next(results), len(taken)) == (1, 7)
    results.close()
    assert len(taken) == 7
    assert not has_live_threads()


def test_an_error_comes_at_the_position_of_its_item() -> None:
    def work(item: int) -> int:
        if item == 4:
            raise Broken
        return item

    results = parallel_map(work, range(20), threads=2, name="test")
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(Broken):
        next(results)
    assert not has_live_threads()


def test_an_error_of_the_items_comes_through_and_ends_the_threads() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise Broken

    with pytest.raises(Broken):
        list(parallel_map(lambda item: item, items(), threads=2, name="test"))
    assert not has_live_threads()


def test_items_that_are_not_started_when_the_reader_ends_are_dropped() -> None:
    begun, gate = [], threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item > 0:
            gate.wait(60)
        return item

    results = parallel_map(work, range(100), threads=2, name="test")
    assert next(results) == 0
    while len(begun) < 3:
        time.sleep(0.001)
    threading.Timer(0.05, gate.set).start()
    results.close()
    assert sorted(begun) == [0, 1, 2]
    assert not has_live_threads()


def test_a_thread_runs_ahead_of_its_reader_and_stops_with_it() -> None:
    taken, closed = [], []

    def items() -> Iterator[int]:
        try:
            for item in range(100):
                taken.append(item)
                yield item
        finally:
            closed.append(True)

    ahead = prefetch(items(), depth=2, name="test")
    assert next(ahead) == 0
    while len(taken) < 4:
        time.sleep(0.001)
    ahead.close()
    assert (len(taken), closed) == (4, [True])
    assert not has_live_threads()


def test_an_error_ahead_is_raised_where_items_are_read() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise Broken

    ahead = prefetch(items(), depth=1, name="test")
    assert next(ahead) == 0
    with pytest.raises(Broken):
        next(ahead)
