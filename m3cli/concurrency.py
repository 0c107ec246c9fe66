"""The one place with threads: an iterator run ahead of its reader, and items worked on by several threads at once.

An error in a thread is raised where items are read. Leaving the reader early (an exception, Ctrl-C, `close()`) stops
each thread after its current item, closes the inner iterator, and waits for all threads. A thread that is still busy
after `JOIN_TIMEOUT` is left running, since a process that was told to stop must stop; `has_live_threads` tells so. This
is usual with a large model on a slow CPU, where one batch takes longer than that.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from queue import Empty, Full, Queue, SimpleQueue
from threading import Event, Thread
from threading import enumerate as list_threads
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

POLL_SECONDS = 0.1
"seconds between two looks at whether the other side has gone; a handed-over item wakes its waiter at once"
JOIN_TIMEOUT = 15.0
"seconds"


class _End:
    """Stands in the queue behind the last item."""


def prefetch(items: Iterator[T], *, depth: int, name: str) -> Generator[T, None, None]:
    """Yield `items`, made by a thread that stays at most `depth` finished items ahead."""
    queue: Queue[T | _End | BaseException] = Queue(maxsize=depth)
    stop = Event()
    thread = _Runner(target=_fill, args=(items, queue, stop), name=name, daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = queue.get(timeout=POLL_SECONDS)
            except Empty:
                continue
            if isinstance(item, _End):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(JOIN_TIMEOUT)


def parallel_map(
    work: Callable[[T], R], items: Iterable[T], *, num_threads: int, name: str
) -> Generator[R, None, None]:
    """Yield `work(item)` for each item, in order, by `num_threads` threads at once.

    Items are taken as results are read: at most two for each thread.
    """
    tasks: SimpleQueue[tuple[Future[R], T] | None] = SimpleQueue()
    threads = [
        _Runner(target=_work_off, args=(work, tasks), name=f"{name} {number}", daemon=True)
        for number in range(num_threads)
    ]
    waiting = deque[Future[R]]()
    try:
        for thread in threads:
            thread.start()
        for item in items:
            result = Future[R]()
            tasks.put((result, item))
            waiting.append(result)
            if len(waiting) == 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for result in waiting:
            result.cancel()
        for _ in threads:
            tasks.put(None)
        deadline = time.monotonic() + JOIN_TIMEOUT
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join(max(0.0, deadline - time.monotonic()))


def has_live_threads() -> bool:
    """Return whether a thread is still busy with an item."""
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


def _work_off(work: Callable[[T], R], tasks: SimpleQueue[tuple[Future[R], T] | None]) -> None:
    while (task := tasks.get()) is not None:
        result, item = task
        if not result.set_running_or_notify_cancel():
            continue
        try:
            result.set_result(work(item))
        except BaseException as error:
            result.set_exception(error)
        del task, result, item  # or the last of them would be kept until the next comes


def _put(queue: Queue[T | _End | BaseException], item: T | _End | BaseException, stop: Event) -> bool:
    while not stop.is_set():
        try:
            queue.put(item, timeout=POLL_SECONDS)
        except Full:
            continue
        return True
    return False
