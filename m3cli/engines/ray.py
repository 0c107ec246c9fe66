"""`m3 encode --engine ray`: worker actors of Ray that claim the shards of one folder.

The driver resolves run.json and holds the folder as one more worker, so that no other run begins. A counter actor hands
out runs of shard numbers, and knows who holds what. Each worker is `encode_corpus` with a lock of its own, and asks the
counter instead of its stripe. A lost worker's shards that are not on disk are free again, and a new actor takes its
place. Neither data nor vectors pass through Ray: a worker reads the input and writes the folder.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from m3cli.config import EncodeRequest
from m3cli.corpus.remote import is_remote
from m3cli.corpus.streams import PeekableStream, check_unchanged
from m3cli.errors import FolderLocked, M3Error, Stopped, UsageError, first_line
from m3cli.jobs.encode.command import Work, add_id_counts, encode_corpus, prepare_run, summarise
from m3cli.jobs.encode.increment import PreviousFolder
from m3cli.jobs.encode.lifecycle import Stop
from m3cli.jobs.encode.resolve import NewRun, OpenRun
from m3cli.progress import Progress
from m3cli.records import RunSummary

SILENCE = 600.0
"seconds without a sign of life that end a run"
MAX_LOSSES = 3
"of a worker in a row, without a shard in between"
CLAIM_SECONDS, LEAST_CLAIM = 1.0, 2
"of work in a claim; shards in it"
POLL_SECONDS, REPORT_SECONDS = 0.5, 1.0
STOP_SECONDS = 60.0
"that workers have for the shard in hand after SIGTERM"
LOCK_SECONDS = 60.0
"that a worker waits for the lock of the one that it replaces"
ANSWER_SECONDS = 10.0
"that the host of a cluster has to accept a connection"
_NO_CLUSTER = "there is no Ray cluster; start one, or leave the option out"
_REFUSALS = {
    "AuthToken": "the Ray cluster asks for its token; set RAY_AUTH_MODE=token, and have the token of its head node in "
    "~/.ray/auth_token or RAY_AUTH_TOKEN",
    "Version mismatch": "the cluster has another version of Ray or Python; install its versions here",
}
"by a word of what Ray says"
OBJECT_STORE_BYTES = 100 << 20
"nothing is put into it"


def check_options(request: EncodeRequest) -> None:
    """Raise UsageError for options of Ray without it, or that contradict it."""
    options = {
        "--num-workers": request.ray_workers,
        "--gpus-per-worker": request.gpus_per_worker,
        "--cpus-per-worker": request.cpus_per_worker,
        "--address": request.address,
    }
    if request.engine != "ray":
        for flag, value in options.items():
            if value is not None:
                raise UsageError(f"{flag} {value} is for --engine ray; leave it out, or add --engine ray")
    elif request.ray_workers is None:
        raise UsageError("--engine ray: give the number of workers with --num-workers N")
    elif request.num_workers > 1:
        raise UsageError(
            f"--worker {request.worker}/{request.num_workers} with --engine ray: Ray's workers claim shards"
        )
    elif "-" in request.inputs:
        raise UsageError("standard input with --engine ray, where each worker reads the input; give files")


def encode_on_ray(request: EncodeRequest, *, progress: Progress, stop: Stop) -> int:
    """Encode a corpus with workers of Ray, or resume the folder of an earlier run, as `encode_corpus` does.

    Raises:
        UsageError: Ray is not installed, or there is no such cluster or GPU.
        M3Error: of a worker; or a worker is lost again and again, or shows no sign of life.
    """
    ray = _import_ray()
    if request.gpus_per_worker == 0:
        request = replace(request, device=request.device or "cpu")
    elif request.gpus_per_worker:
        from m3cli.encoder.device import resolve_device  # noqa: PLC0415  torch, only to look for GPUs

        if request.device == "cpu" or resolve_device(None) == "cpu":
            raise UsageError(f"--gpus-per-worker {request.gpus_per_worker}: there is no CUDA device here; leave it out")
    if request.cpus_per_worker:
        os.environ["OMP_NUM_THREADS"] = str(request.cpus_per_worker)  # read by torch when it is imported
    workers = request.ray_workers or 1
    request = replace(request, share=(workers, workers + 1))
    return encode_corpus(
        request, progress=progress, stop=stop, wants=lambda _: False, encode_with=partial(_encode_with_workers, ray)
    )


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = signal.getsignal(signal.SIGTERM)
    try:
        import ray  # noqa: PLC0415  only here and in the workers
    except ImportError as error:
        raise UsageError("--engine ray needs Ray; type: pip install 'ray>=2.50,<3'") from error
    finally:
        signal.signal(signal.SIGTERM, before)  # ray sets its own
    return ray


def _encode_with_workers(
    ray: Any,
    opened: OpenRun,
    request: EncodeRequest,
    *,
    fresh: NewRun | None,
    todo: int | None,
    stdin: PeekableStream | None,  # noqa: ARG001  none, as check_options says
    work: Work,
) -> None:
    """Encode the remaining shards and report, as `encode` does in this process."""
    from m3cli.encoder.device import resolve_device  # noqa: PLC0415  torch, only where there is work

    device = resolve_device(request.device).partition(":")[0]
    gpus = (device == "cuda") if request.gpus_per_worker is None else request.gpus_per_worker
    shown = f"{device}, {request.ray_workers} Ray workers"
    _, previous, unread = prepare_run(opened, request, fresh=fresh, device=shown, work=work)
    # Ray prints a page for each lost worker, which `_Driver` reports in a line.
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), _cluster(ray, request, work.stop):
        work.progress.start(shards_todo=todo)
        driver = _Driver(ray, _make_worker_request(request, opened, device), opened, work, gpus=int(gpus))
        try:
            driver.run()
        except ray.exceptions.RayError as error:
            raise M3Error(f"Ray failed: {first_line(error)[:300]}; run the same command again to resume") from error
        finally:
            work.progress.stop()
    _report(opened, request, work, driver, previous=previous, unread=unread)


def _report(
    opened: OpenRun,
    request: EncodeRequest,
    work: Work,
    driver: _Driver,
    *,
    previous: PreviousFolder | None,
    unread: dict[str, int],
) -> None:
    """Count what the workers have written, write the manifest, show the summary.

    Raises:
        Stopped: the run was stopped, and work is left.
    """
    entries, tally = opened.folder.done(), work.tally
    for entry in (entries[index] for index in entries.keys() - opened.done.keys()):
        tally.counts += entry.counts
        tally.num_shards += 1
        tally.num_files += len(entry.files)
        tally.num_bytes += sum(file.length for file in entry.files)
    for summary in driver.summaries:
        tally.reasons.update(summary.skipped_reasons)
        tally.num_reused += summary.taken
        for stage in work.watch.seconds:
            work.watch.seconds[stage] += summary.seconds[stage]
    num_shards = driver.num_shards
    if num_shards is None or len(entries) < num_shards:
        work.stop.check()
        raise M3Error(f"{len(entries):,} shards are done, and no worker goes on; run the same command again")
    for source in opened.run.sources:
        check_unchanged(source)
    opened.folder.write_manifest(num_shards)
    opened.folder.add_up_metrics()
    total = summarise(opened, work, seconds=time.monotonic() - driver.began, device_bytes=0, unread=unread)
    peaks = [summary.peak_memory_bytes for summary in driver.summaries]
    total = replace(total, num_shards=num_shards, peak_memory_bytes=max(peaks, default=0))
    work.progress.show_summary(add_id_counts(total, opened, request, previous))


def _make_worker_request(request: EncodeRequest, opened: OpenRun, device: str) -> EncodeRequest:
    """Return the options of the workers, which may run in another working folder."""
    model = request.model or os.environ.get("M3_MODEL")
    since = request.since_run or opened.run.since_path
    return replace(
        request,
        inputs=tuple(each if is_remote(each) else str(Path(each).absolute()) for each in request.inputs),
        out=str(opened.folder.path),
        model=str(Path(model).absolute()) if model and Path(model).is_dir() else model,
        since_run=since and str(Path(since).absolute()),
        device=device,
        space_check=False,
        metrics=None,
        log_file=None,
        gone=None,
    )


@contextmanager
def _cluster(ray: Any, request: EncodeRequest, stop: Stop) -> Iterator[None]:
    """Connect to a cluster, or start one of this machine; SIGTERM inside is noted in `stop`."""
    address = request.address or os.environ.get("RAY_ADDRESS") or "local"
    _check_address(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_worker_niceness", "0")  # as without Ray; it would be 15
        cpus = (request.ray_workers or 1) * (request.cpus_per_worker or 1)
        options |= {"num_cpus": cpus, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        _connect(ray, address, options)
        # Raised inside of Ray's own code, an exception would be lost.
        signal.signal(signal.SIGTERM, lambda *_: _note(stop, "stopped by SIGTERM"))
        yield
    except SystemExit as error:  # by ray's own handler, while it starts
        raise Stopped("stopped by SIGTERM with work left; run the same command again to resume") from error
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _check_address(address: str) -> None:
    """Raise UsageError if nothing listens at an address, where Ray itself would try for more than ten minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise UsageError(f"--address {address}: {_NO_CLUSTER}") from error


def _connect(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Connect to a cluster, or start one.

    Raises:
        UsageError: there is none, or it refuses this client.
    """
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError) as error:
        said = f"{error} {error.__cause__}"
        reason = next((reason for word, reason in _REFUSALS.items() if word in said), None)
        if reason is None and not isinstance(error, ConnectionError):
            raise
        raise UsageError(f"--address {address}: {reason or _NO_CLUSTER}") from error


def _note(stop: Stop, reason: str) -> None:
    stop.reason = stop.reason or reason


Key = tuple[int, int]
"number of a worker, and how often it was lost before"


class _Driver:
    """The actors of a run."""

    def __init__(self, ray: Any, request: EncodeRequest, opened: OpenRun, work: Work, *, gpus: int) -> None:
        self.summaries: list[RunSummary] = []
        self.num_shards = opened.num_shards
        self.began = time.monotonic()
        "when the first worker began to encode"
        self._ray, self._request, self._opened, self._work = ray, request, opened, work
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        make_counter = ray.remote(ShardCounter).options(num_cpus=0, scheduling_strategy=here).remote
        self._counter = make_counter(self.num_shards, request.ray_workers)
        options = {"num_cpus": request.cpus_per_worker or 1, "num_gpus": gpus, "max_restarts": 0}
        self._make_actor = ray.remote(Worker).options(**options).remote
        self._tasks: dict[Any, tuple[Key, Any]] = {}
        self._losses: Counter[int] = Counter()
        "of each worker since it finished a shard"
        self._shown = (0, 0, 0.0)

    def run(self) -> None:
        """Return when no shard is left that a worker can do, or the run was stopped and the workers have ended."""
        for number in range(self._request.ray_workers or 0):
            self._start((number, 0))
        stop, begun, deadline = self._work.stop, time.monotonic(), None
        while self._tasks:
            for task in self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)[0]:
                self._finish(task)
            totals, silent = self._ray.get(self._counter.look.remote())
            self._show(totals)
            unstarted = all(key not in silent for key, _ in self._tasks.values())
            begun = begun if unstarted else time.monotonic()
            self._check_silence(silent, time.monotonic() - begun)
            if stop.reason is not None and deadline is None:
                self._ray.get(self._counter.stop.remote())
                deadline = time.monotonic() + STOP_SECONDS
            if deadline and (time.monotonic() > deadline or stop.at_once or unstarted):
                return
            if unstarted and self.summaries and not self._has_free():
                return
            time.sleep(POLL_SECONDS)

    def _has_free(self) -> bool:
        return bool(self._ray.get(self._counter.has_free.remote(self.num_shards)))

    def _start(self, key: Key, actor: Any = None) -> None:
        if actor is None:
            request = replace(self._request, share=(key[0], self._request.num_workers))
            actor = self._make_actor(request, self._counter, key, self._opened.run.runtime.threads)
        self._tasks[actor.encode.remote()] = key, actor

    def _finish(self, task: Any) -> None:
        """Take the result of a worker that has ended; start another one if it was lost or shards are free."""
        key, actor = self._tasks.pop(task)
        try:
            result = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause or error
            raise M3Error(f"worker {key[0]}: {type(cause).__name__}: {first_line(cause)[:300]}") from error
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            self._replace(key, error)
            return
        if isinstance(result, Stopped) and self._work.stop.reason is not None:
            return
        if isinstance(result, M3Error):
            raise result
        if result is not None:
            self.summaries.append(result)
            self.num_shards = max(self.num_shards or 0, result.num_shards)
        if self._work.stop.reason is None and self._has_free():
            self._start(key, actor)

    def _replace(self, key: Key, error: Exception) -> None:
        number, losses = key
        why = first_line(error)[:300]
        done = self._opened.folder.list_done()
        progressed = self._ray.get(self._counter.release.remote(key, done))
        self._losses[number] = 1 if progressed else self._losses[number] + 1
        if self._losses[number] == MAX_LOSSES:
            raise M3Error(
                f"worker {number} was lost {MAX_LOSSES} times in a row without finishing a shard "
                f"({why}); give it more memory and run the same command again"
            ) from error
        if self._work.stop.reason is None:
            self._work.progress.say(f"worker {number} was lost ({why.rstrip('.')}); another one takes its place")
            self._start((number, losses + 1))

    def _show(self, totals: tuple[int, int, float]) -> None:
        documents, tokens, shards = (now - then for now, then in zip(totals, self._shown, strict=True))
        if not self._shown[1]:
            self.began = time.monotonic()
        self._shown = totals
        if tokens:
            self._work.progress.advance(documents=int(documents), tokens=int(tokens), shards=shards)

    def _check_silence(self, silent: dict[Key, float], seconds: float) -> None:
        """Raise M3Error if a worker has shown no sign of life for long, or for `seconds` none of them has begun."""
        for key, _ in self._tasks.values():
            if silent.get(key, 0.0) > SILENCE:
                raise M3Error(
                    f"worker {key[0]} has finished, claimed and reported nothing for {SILENCE / 60:g} minutes; "
                    "see its machine, and run the same command again"
                )
        if seconds > SILENCE:
            raise M3Error(
                f"no worker has begun within {SILENCE / 60:g} minutes; "
                "see `ray status` for free CPUs and GPUs, and run the same command again"
            )


class ShardCounter:
    """The actor that hands out runs of shard numbers; its calls come one at a time."""

    def __init__(self, num_shards: int | None, num_workers: int) -> None:
        self._num_shards, self._num_workers = num_shards, num_workers
        self._next = 0
        "all shards before it are done, held or free"
        self._free: set[int] = set()
        "of lost workers"
        self._held: dict[Key, set[int]] = {}
        self._totals: dict[Key, tuple[int, int, float]] = {}
        self._seen: dict[Key, float] = {}
        self._began: float | None = None
        self._stopped = False

    def claim(self, key: Key, index: int) -> tuple[int, int] | None:
        """Return the range of shards from `index` on that the worker does next; None: there is none."""
        now = self._seen[key] = time.monotonic()
        self._began = self._began or now
        if self._stopped:
            return None
        size = self._choose_size(now)
        start = min((free for free in self._free if free >= index), default=max(index, self._next))
        stop = start + 1
        if start in self._free:
            while stop in self._free and stop - start < size:
                stop += 1
        elif self._num_shards is None or start < self._num_shards:
            self._next = stop = start + size
        else:
            return None
        self._free.difference_update(range(start, stop))
        self._held.setdefault(key, set()).update(range(start, stop))
        return start, stop

    def _choose_size(self, now: float) -> int:
        """Return about a second of a worker's work, less where the end is near."""
        assert self._began is not None
        done = sum(shards for *_, shards in self._totals.values())
        size = int(CLAIM_SECONDS * done / max(now - self._began, 1.0) / self._num_workers)
        if self._num_shards is not None:
            size = min(size, (self._num_shards - self._next) // (2 * self._num_workers))
        return max(LEAST_CLAIM, size)

    def report(self, key: Key, totals: tuple[int, int, float]) -> bool:
        """Note documents, tokens and shards of a worker so far; return whether it is to stop."""
        self._seen[key] = time.monotonic()
        self._totals[key] = totals
        return self._stopped

    def look(self) -> tuple[tuple[int, int, float], dict[Key, float]]:
        """Return the totals of all workers, and the seconds since each was heard of."""
        now = time.monotonic()
        documents, tokens, shards = zip((0, 0, 0.0), *self._totals.values(), strict=False)
        return (sum(documents), sum(tokens), sum(shards)), {key: now - seen for key, seen in self._seen.items()}

    def release(self, key: Key, done: set[int]) -> bool:
        """Free what a lost worker held and is not done; return whether some of it is done."""
        held = self._held.pop(key, set())
        self._free |= held - done
        return bool(held & done)

    def has_free(self, num_shards: int | None) -> bool:
        """Return whether shards of lost workers are left to be claimed."""
        return any(num_shards is None or index < num_shards for index in self._free)

    def stop(self) -> None:
        """Hand out no more."""
        self._stopped = True


class Worker:
    """The actor that encodes what it claims."""

    def __init__(self, request: EncodeRequest, counter: Any, key: Key, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # Ray sets 1; torch is not imported yet
        self._request, self._counter, self._key = request, counter, key

    def encode(self) -> RunSummary | M3Error | None:
        """Encode claimed shards until there are no more; return the summary (None: nothing to do), or the error."""
        stop, deadline = Stop(), time.monotonic() + LOCK_SECONDS
        progress = _Reporter(self._counter, self._key, stop)
        progress.report()
        while True:
            try:
                encode_corpus(
                    self._request, progress=progress, stop=stop, wants=_Claims(self._counter, self._key, stop)
                )
            except FolderLocked as error:
                if time.monotonic() > deadline:
                    return error
            except M3Error as error:
                return error
            else:
                return progress.summary
            time.sleep(1.0)


class _Claims:
    """Whether a shard is among those that the counter hands to a worker."""

    def __init__(self, counter: Any, key: Key, stop: Stop) -> None:
        self._counter, self._key, self._stop = counter, key, stop
        self._range: tuple[int, int] | None = (0, 0)

    def __call__(self, index: int) -> bool:
        import ray  # noqa: PLC0415

        if self._range is not None and index >= self._range[1]:
            self._range = ray.get(self._counter.claim.remote(self._key, index))
        return self._range is not None and self._range[0] <= index and self._stop.reason is None


class _Reporter(Progress):
    """Sends the progress of a worker to the counter, whose answer may stop it."""

    def __init__(self, counter: Any, key: Key, stop: Stop) -> None:
        super().__init__("none")
        self.summary: RunSummary | None = None
        self._counter, self._key, self._stop = counter, key, stop
        self._totals = self._before = (0, 0, 0.0)
        self._reply: Any = None
        self._reported = 0.0

    def advance(self, *, documents: int, tokens: int, shards: float) -> None:
        """Count, and report about every second."""
        self._totals = (self._totals[0] + documents, self._totals[1] + tokens, self._totals[2] + shards)
        if time.monotonic() - self._reported > REPORT_SECONDS:
            self.report()

    def begin_shard(self) -> None:
        """Note the start of a shard."""
        self._before = self._totals

    def withdraw_shard(self) -> None:
        """Subtract what was counted since."""
        self._totals = self._before

    def show_summary(self, summary: RunSummary) -> None:
        """Keep the summary for the driver."""
        self.summary = summary
        self.report()

    def report(self) -> None:
        """Send the totals, and read the answer to the last ones."""
        import ray  # noqa: PLC0415

        if self._reply is not None and ray.get(self._reply):
            _note(self._stop, "stopped by the driver")
        self._reply = self._counter.report.remote(self._key, self._totals)
        self._reported = time.monotonic()
