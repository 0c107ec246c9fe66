"""The one place with threads: an iterator run ahead of its reader.

An error in the thread is raised where items are read. Leaving the reader early (an exception, Ctrl-C, `close()`) stops
the thread after the item it is at, closes the inner iterator there, and waits for both. A thread that is not through
with its item after `PATIENCE` is left behind, for a process that was told to stop must: `has_stragglers` tells.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from threading import enumerate as list_threads
from typing import TypeVar

T = TypeVar("T")

_GLANCE = 0.1
"seconds between two looks at whether the other side has gone; a handed-over item wakes its waiter at once"
PATIENCE = 15.0
"seconds"


class _End:
    """Stands in the queue behind the last item."""


def run_ahead(items: Iterator[T], *, depth: int, name: str) -> Generator[T, None, None]:
    """Yield `items`, made by a thread that stays at most `depth` finished items ahead."""
    queue: Queue[T | _End | BaseException] = Queue(maxsize=depth)
    stop = Event()
    thread = _Runner(target=_fill, args=(items, queue, stop), name=name, daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = queue.get(timeout=_GLANCE)
            except Empty:
                continue
            if isinstance(item, _End):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(PATIENCE)


def has_stragglers() -> bool:
    """Whether a thread was left behind in the middle of an item."""
    return any(isinstance(thread, _Runner) for thread in list_threads())


class _Runner(Thread):
    """A thread that runs ahead."""


def _fill(items: Iterator[T], queue: Queue[T | _End | BaseException], stop: Event) -> None:
    last: _End | BaseException = _End()
    try:
        for item in items:
            if not _put(queue, item, stop):
                break
    except BaseException as error:
        last = error
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()
        _put(queue, last, stop)


def _put(queue: Queue[T | _End | BaseException], item: T | _End | BaseException, stop: Event) -> bool:
    while not stop.is_set():
        try:
            queue.put(item, timeout=_GLANCE)
        except Full:
            continue
        return True
    return False
