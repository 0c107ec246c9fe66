"""Threads: an iterator that is prefetched, a function applied to items in parallel, and a lock.

An error in a thread is raised in the reader. If the reader ends early (an exception, Ctrl-C, `close()`), each thread
stops after its current item, the inner iterator is closed, and all threads are joined. A thread that is busy for longer
than `JOIN_TIMEOUT` keeps running, so that the process can stop (`has_live_threads`). This is usual on a slow CPU.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import Empty, Full, Queue, SimpleQueue
from threading import Event, RLock, Thread
from threading import enumerate as list_threads
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

POLL_SECONDS = 0.1
"seconds between checks whether the other side has ended; a new item wakes its reader at once"
JOIN_TIMEOUT = 15.0
"seconds"
_TURN = RLock()


class _End:
    """Marks the end in the queue."""


def prefetch(items: Iterator[T], *, depth: int, name: str) -> Generator[T, None, None]:
    """Yield `items`, which a thread produces at most `depth` items ahead."""
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


def parallel_map(work: Callable[[T], R], items: Iterable[T], *, threads: int, name: str) -> Generator[R, None, None]:
    """Yield `work(item)` for each item, in order, computed by `threads` threads.

    Items are read in the reader's thread, at most two for each thread ahead of the results.
    """
    tasks: SimpleQueue[tuple[Future[R], T] | None] = SimpleQueue()
    runners = [
        _Runner(target=_run_tasks, args=(work, tasks), name=f"{name} {number}", daemon=True)
        for number in range(threads)
    ]
    waiting = deque[Future[R]]()
    try:
        for runner in runners:
            runner.start()
        for item in items:
            result = Future[R]()
            tasks.put((result, item))
            waiting.append(result)
            if len(waiting) == 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for result in waiting:
            result.cancel()
        for _ in runners:
            tasks.put(None)
        deadline = time.monotonic() + JOIN_TIMEOUT
        for runner in runners:
            if runner.ident is not None:  # it was started
                runner.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def take_turn() -> Iterator[None]:
    """Wait until no other thread of this process is inside; the number of torch's threads is one for the process."""
    with _TURN:
        yield


def has_live_threads() -> bool:
    """Return whether a thread is still busy with an item."""
    return any(isinstance(thread, _Runner) for thread in list_threads())


class _Runner(Thread):
    """A thread of this module."""


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


def _run_tasks(work: Callable[[T], R], tasks: SimpleQueue[tuple[Future[R], T] | None]) -> None:
    while (task := tasks.get()) is not None:
        result, item = task
        if not result.set_running_or_notify_cancel():
            continue
        try:
            result.set_result(work(item))
        except BaseException as error:
            result.set_exception(error)
        del task, result, item  # frees them before the next task


def _put(queue: Queue[T | _End | BaseException], item: T | _End | BaseException, stop: Event) -> bool:
    while not stop.is_set():
        try:
            queue.put(item, timeout=POLL_SECONDS)
        except Full:
            continue
        return True
    return False
