"""Locks: which runs may use a folder at the same time, and after a run was killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from m3cli.errors import FolderLocked
from m3cli.store.folder import open_run_folder
from m3cli.store.lock import hold_if_idle
from tests.store import samples

HOLD = """
import sys
from pathlib import Path
from m3cli.store.folder import open_run_folder
from tests.store import samples

with open_run_folder(Path(sys.argv[1]), worker=int(sys.argv[2]), num_workers=int(sys.argv[3])) as folder:
    if sys.argv[4:] == ["init"]:
        with folder.lock.initialising():
            print("held", flush=True)
            sys.stdin.read()
    else:
        print("held", flush=True)
        sys.stdin.read()
"""


@contextmanager
def another_process(root: Path, worker: int = 0, num_workers: int = 1, *extra: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(root), str(worker), str(num_workers), *extra]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        assert process.stdin is not None
        process.stdin.close()


def enter(root: Path, worker: int = 0, num_workers: int = 1) -> None:
    with open_run_folder(root, worker=worker, num_workers=num_workers):
        pass


def test_a_mount_that_cannot_rewrite_a_file_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = os.close

    def refuse(descriptor: int) -> None:  # as an rclone mount does for a file that was there before
        name = Path(f"/proc/self/fd/{descriptor}").readlink()
        close(descriptor)
        if "lock" in name.name:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "close", refuse)
    for _ in range(2):
        with open_run_folder(tmp_path / "out") as folder, folder.lock.initialising():
            pass


def test_second_run_is_an_error_that_names_pid_and_host(tmp_path: Path) -> None:
    with another_process(tmp_path / "out") as holder:
        with pytest.raises(FolderLocked, match=f"in use: pid {holder.pid} on {os.uname().nodename}, since 2"):
            enter(tmp_path / "out")
        with pytest.raises(FolderLocked, match=f"pid {holder.pid} "):
            enter(tmp_path / "out", 0, 2)
    enter(tmp_path / "out")
    assert (tmp_path / "out/_m3/lock").read_bytes() == b""


def test_killed_holder_does_not_block(tmp_path: Path) -> None:
    with another_process(tmp_path / "out") as holder:
        leftover = tmp_path / "out/_m3/tmp/0-of-1/rows--shard-0000000.parquet"
        leftover.write_bytes(b"half")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with open_run_folder(tmp_path / "out"):
            assert not leftover.exists()
            assert str(os.getpid()) in (tmp_path / "out/_m3/lock").read_text()


def test_workers_share_and_the_same_worker_twice_is_an_error(tmp_path: Path) -> None:
    with another_process(tmp_path / "out", 0, 2) as first:
        enter(tmp_path / "out", 1, 2)
        with pytest.raises(FolderLocked, match=f"worker 0/2 of .* is already running: pid {first.pid} "):
            enter(tmp_path / "out", 0, 2)
        with pytest.raises(FolderLocked, match=f"in use: pid {first.pid} "):
            enter(tmp_path / "out")


def test_error_does_not_name_a_killed_worker(tmp_path: Path) -> None:
    with another_process(tmp_path / "out", 0, 2) as first, another_process(tmp_path / "out", 1, 2) as second:
        first.send_signal(signal.SIGKILL)
        first.wait()
        with pytest.raises(FolderLocked, match=f"in use: pid {second.pid} "):
            enter(tmp_path / "out")


@pytest.mark.parametrize(("worker", "num_workers"), [(0, 2), (1, 3), (0, 1)])
def test_who_opens_a_folder_clears_what_dead_workers_left(tmp_path: Path, worker: int, num_workers: int) -> None:
    tmp = tmp_path / "out/_m3/tmp"
    enter(tmp_path / "out")
    for name in ("0-of-2", "1-of-2", "2-of-3"):
        (tmp / name).mkdir()
        (tmp / name / "leftover").write_bytes(b"")
    enter(tmp_path / "out", worker, num_workers)
    assert list(tmp.iterdir()) == []


def test_the_files_of_a_living_worker_stay(tmp_path: Path) -> None:
    with another_process(tmp_path / "out", 2, 3):
        file = tmp_path / "out/_m3/tmp/2-of-3/file"
        file.write_bytes(b"")
        enter(tmp_path / "out", 0, 2)
        assert file.exists()


def test_a_worker_waits_for_who_clears_what_it_left(tmp_path: Path) -> None:
    enter(tmp_path / "out", 0, 2)
    held = threading.Event()

    def clear() -> None:
        with hold_if_idle(tmp_path / "out", "0-of-2") as idle:
            assert idle
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=clear)
    thread.start()
    assert held.wait(10)
    enter(tmp_path / "out", 0, 2)
    thread.join()


def test_only_one_worker_initialises_and_the_other_reads_the_result(tmp_path: Path) -> None:
    with another_process(tmp_path / "out", 0, 2, "init") as first:
        with open_run_folder(tmp_path / "out", worker=1, num_workers=2) as folder:
            with pytest.raises(FolderLocked, match=r"set up by another worker for more than 0\.1 s"):
                folder.lock.initialising(patience=0.1).__enter__()
            first.send_signal(signal.SIGKILL)
            with folder.lock.initialising():
                assert folder.run() is None
                folder.write_run(samples.make_run())
        with open_run_folder(tmp_path / "out", worker=0, num_workers=2) as again, again.lock.initialising():
            assert again.run() == samples.make_run()
