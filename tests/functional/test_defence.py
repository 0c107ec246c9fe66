"""The store defends itself: against a second run, another run's folder, changed input, full and forbidden disks."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from m3cli.cli.app import run
from m3cli.errors import CorpusError, OutputError
from m3cli.jobs.encode import pipeline
from m3cli.store import commit
from m3cli.store.layout import MANIFEST_NAME, done_name
from tests.conftest import ROOT, Completed
from tests.crash import folder_bytes
from tests.functional.conftest import EncodeWith
from tests.functional.corpora import SETTINGS, SHARD_BYTES, write_corpus

NO_LIMIT = 1000
"bad rows in so many: none"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", bad_every=NO_LIMIT)


@pytest.fixture
def begun(tmp_path: Path, corpus: Path, encode_with: EncodeWith) -> Path:
    """A folder with its last shard and its manifest missing."""
    out = tmp_path / "out"
    assert encode_with(corpus, out=out) == 0
    last = max((out / "_m3/done").iterdir())
    last.unlink()
    (out / MANIFEST_NAME).unlink()
    return out


def encode(corpus: Path, out: Path, *words: object) -> int:
    """`m3 encode` in this process."""
    return run([str(word) for word in ("encode", corpus, "--out", out, "--progress", "none", *words)])


@contextlib.contextmanager
def slow_run(corpus: Path, out: Path, model: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real run that has begun its folder, and is killed in the end."""
    words = ("encode", corpus, "--out", out, "--model", model, "--progress", "none", *SETTINGS)
    command = [sys.executable, "-m", "m3cli", *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not (out / "_m3/run.json").exists():
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def test_second_run_is_refused_at_once_and_a_dead_one_blocks_nobody(
    begun: Path, corpus: Path, tiny_m3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(begun)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        began = time.process_time()  # what else the machine does is not the point
        assert encode(corpus, begun, "--model", tiny_m3) == 11
        assert time.process_time() - began < 1
        said = capsys.readouterr().err
        assert f"out is in use: pid {holder.pid} on {socket.gethostname()}, since 20" in said
        assert said.count("\n") == 1
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert str(holder.pid).encode() in (begun / "_m3/lock").read_bytes()
    assert encode(corpus, begun, "--model", tiny_m3) == 0


HOLDER = """
import sys
from pathlib import Path
from m3cli.store.folder import open_run_folder

with open_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_second_real_run_is_refused_while_the_first_one_runs(
    tmp_path: Path, tiny_m3: Path, m3: Callable[..., Completed]
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", rows=20_000, bad_every=NO_LIMIT)
    with slow_run(corpus, tmp_path / "out", tiny_m3) as first:
        second = m3("encode", corpus, "--out", "out", "--model", tiny_m3)
        assert first.poll() is None
        assert second.returncode == 11
        assert f"pid {first.pid} on {socket.gethostname()}" in second.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-length", 32], "--max-length 24, this run asks for 32"),
        (["--outputs", "dense"], "--outputs dense,sparse,colbert, this run asks for dense"),
        (["--dtype", "bfloat16"], "--dtype float32, this run asks for bfloat16"),
        (["--format", "npy"], "--format parquet, this run asks for npy"),
        (["--prefix", "passage: "], "--prefix '', this run asks for passage: "),
        (["--shard-size", "2K"], "--shard-size 900, this run asks for 2048"),
    ],
)
def test_other_settings_are_refused_by_name_and_both_values(
    begun: Path, corpus: Path, tiny_m3: Path, capsys: pytest.CaptureFixture[str], words: list[object], said: str
) -> None:
    before = folder_bytes(begun)
    assert encode(corpus, begun, "--model", tiny_m3, *words) == 10
    error = capsys.readouterr().err
    assert said in error
    assert "another --out" in error
    assert folder_bytes(begun) == before


def test_another_model_is_refused_by_name(
    begun: Path, corpus: Path, tiny_m3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other-model"
    shutil.copytree(tiny_m3, other)
    config = other / "config.json"
    config.write_text(config.read_text().replace("\n", " \n", 1))
    assert encode(corpus, begun, "--model", other) == 10
    assert "was made with model random-2x64, this run has other-model, and their config.json differ" in (
        capsys.readouterr().err
    )


def test_other_input_and_other_size_are_refused_by_name(
    begun: Path, corpus: Path, tiny_m3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_corpus(tmp_path / "other.jsonl", seed=1)
    assert encode(other, begun, "--model", tiny_m3) == 10
    assert "was made from other input (no corpus.jsonl now; other.jsonl is new)" in capsys.readouterr().err
    size = corpus.stat().st_size
    with corpus.open("a") as file:
        file.write('{"id": "new", "text": "one more"}\n')
    assert encode(corpus, begun, "--model", tiny_m3) == 10
    assert f"corpus.jsonl has {size + 34:,} bytes, it had {size:,} when out was made" in capsys.readouterr().err


def change_quietly(corpus: Path) -> None:
    """Change a byte of the first row, and leave size and mtime as they were."""
    status = corpus.stat()
    content = bytearray(corpus.read_bytes())
    content[30] ^= 1
    corpus.write_bytes(content)
    os.utime(corpus, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_touched_input_goes_on_and_changed_input_is_refused(
    begun: Path, corpus: Path, tiny_m3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.utime(corpus)
    assert encode(corpus, begun, "--model", tiny_m3) == 0
    change_quietly(corpus)
    os.utime(corpus)
    assert encode(corpus, begun, "--model", tiny_m3) == 10
    error = capsys.readouterr().err
    assert "corpus.jsonl has changed since shard 0 of out was made from it" in error
    assert "--out NEW.m3 --since-run" in error


def test_verify_input_hashes_finished_shards_whatever_their_date(
    begun: Path, corpus: Path, tiny_m3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(corpus, begun, "--model", tiny_m3, "--verify-input") == 0
    assert encode(corpus, begun, "--verify-input") == 0
    change_quietly(corpus)
    assert encode(corpus, begun) == 0
    assert encode(corpus, begun, "--verify-input") == 10
    assert "corpus.jsonl has changed since shard 0" in capsys.readouterr().err


@contextlib.contextmanager
def mounted(folder: Path, *words: str) -> Iterator[Path]:
    """A filesystem of the test's own."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *words, str(folder)], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"mount is refused here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("chosen", ["parquet", "npy"])
def test_full_disk_ends_with_6_and_goes_on_after_space_is_made(
    tmp_path: Path, tiny_m3: Path, encode_with: EncodeWith, capsys: pytest.CaptureFixture[str], chosen: str
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", rows=120, bad_every=NO_LIMIT)
    assert encode_with(corpus, out=tmp_path / "whole", format=chosen) == 0
    whole = folder_bytes(tmp_path / "whole")
    size = sum(map(len, whole.values()))
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={size // 2048}k", "tmpfs") as disk:
        words = ["--model", tiny_m3, "--format", chosen, *SETTINGS]
        assert encode(corpus, disk / "out", *words) == 6
        said = capsys.readouterr().err
        assert "out needs about" in said
        assert "its disk has" in said
        assert "--no-space-check" in said
        assert not (disk / "out").exists()
        assert encode(corpus, disk / "out", *words, "--no-space-check") == 6
        assert "No space left on device; free some space and run the same command again" in capsys.readouterr().err
        assert (disk / "out" / done_name(0)).exists()
        assert run(["check", str(disk / "out")]) == 75
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert encode(corpus, disk / "out", "--model", tiny_m3) == 0
        assert folder_bytes(disk / "out") == whole


@pytest.mark.slow
def test_full_disk_under_the_real_command(tmp_path: Path, tiny_m3: Path, m3: Callable[..., Completed]) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", rows=400, bad_every=NO_LIMIT)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=600k", "tmpfs") as disk:
        words = ("encode", corpus, "--out", disk / "out", "--model", tiny_m3, *SETTINGS)
        done = m3(*words, "--no-space-check")
        assert done.returncode == 6, done.stderr
        assert done.stderr.splitlines()[-1].startswith("m3: cannot write ")
        assert "Traceback" not in done.stderr
        assert m3("check", disk / "out").returncode == 75


@pytest.mark.parametrize("call", ["write", "mkdir"])
def test_no_space_for_the_very_first_files(
    tmp_path: Path, corpus: Path, tiny_m3: Path, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    options = "size=4k" if call == "write" else "nr_inodes=2"
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", options, "tmpfs") as disk:
        assert encode(corpus, disk / "out", "--model", tiny_m3, "--no-space-check", *SETTINGS) == 6
        assert "No space left on device" in capsys.readouterr().err


def test_read_only_folder_is_refused_and_can_be_checked(
    begun: Path, corpus: Path, tiny_m3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(begun, "--bind", str(begun)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(begun)], check=True)
        assert encode(corpus, begun, "--model", tiny_m3) == 6
        said = capsys.readouterr().err
        assert "Read-only file system; choose an --out on a filesystem that can be written" in said
        assert run(["check", str(begun)]) == 75
    assert encode(corpus, begun, "--model", tiny_m3) == 0


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EDQUOT, "raise the quota or free some space"), (errno.EIO, "check the disk before you go on")],
)
@pytest.mark.parametrize("step", ["sync_file", "sync_folder", "rename", "write"])
def test_quota_and_bad_disk_at_any_kind_of_step_cost_nothing(
    tmp_path: Path, corpus: Path, encode_with: EncodeWith, step: str, number: int, remedy: str
) -> None:
    assert encode_with(corpus, out=tmp_path / "whole") == 0
    for after in (0, 3, 9):
        out = tmp_path / f"out-{after}"
        with injected(step, number, after=after), pytest.raises(OutputError, match=remedy) as caught:
            encode_with(corpus, out=out)
        assert os.strerror(number) in str(caught.value)
        assert encode_with(corpus, out=out) == 0
        assert folder_bytes(out) == folder_bytes(tmp_path / "whole")


@contextlib.contextmanager
def injected(step: str, number: int, *, after: int) -> Iterator[None]:
    """Let a named step of the committing module, or a write to a staged file, fail after some that do not."""
    owner: Any = commit.StagedFile if step == "write" else commit
    name = "_write_piece" if step == "write" else step
    real = getattr(owner, name)
    calls = iter(range(10**9))

    def fail(*given: Any) -> Any:
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))
        return real(*given)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(owner, name, fail))
        if step == "sync_file":
            stack.enter_context(mock.patch.object(commit, name, fail))
        yield


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_input_that_vanishes_in_mid_run_is_named_and_what_is_done_is_kept(
    tmp_path: Path, encode_with: EncodeWith, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    first = write_corpus(folder / "a.jsonl", bad_every=NO_LIMIT)
    second = write_corpus(folder / "b.jsonl", rows=60, bad_every=NO_LIMIT, seed=1)
    if kind == "jsonl.gz":
        subprocess.run(["gzip", "-n", str(second)], check=True)
        second = second.with_name("b.jsonl.gz")
    away = tmp_path / "away"
    assert encode_with(folder, out=tmp_path / "whole") == 0
    write_shard = pipeline.write_shard

    def write_and_lose(*given: Any, **settings: Any) -> Any:
        if second.exists():
            second.rename(away)
        return write_shard(*given, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_shard", write_and_lose)
        with pytest.raises(CorpusError, match=rf"{second.name} is missing: put it back and run the same command again"):
            encode_with(folder, out=tmp_path / "out")
    assert first.exists()
    kept = folder_bytes(tmp_path / "out")
    assert done_name(0) in kept
    assert run(["check", str(tmp_path / "out")]) == 75
    away.rename(second)
    assert encode_with(folder, out=tmp_path / "out") == 0
    whole = folder_bytes(tmp_path / "whole")
    assert folder_bytes(tmp_path / "out") == whole
    assert {name: whole[name] for name in kept} == kept


def test_a_pipe_that_ends_on_the_border_of_a_shard_does_not_complete_a_folder(
    tmp_path: Path, m3_here: Callable[..., Completed], tiny_m3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = SHARD_BYTES // 10
    lines = [json.dumps({"id": str(number), "text": "fox"}).encode().ljust(row - 1) + b"\n" for number in range(35)]
    out = tmp_path / "out"

    def pipe(rows: list[bytes]) -> Completed:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"".join(rows))))
        return m3_here("encode", "-", "--model", tiny_m3, "--out", out, "--progress", "none", *SETTINGS)

    assert pipe(lines).returncode == 0
    whole = folder_bytes(out)
    (out / MANIFEST_NAME).unlink()
    (out / done_name(0)).unlink()
    done = pipe(lines[:20])
    assert done.returncode == 10, done.stderr
    assert "out has 4 shards, the input now has 2: it is shorter than it was" in done.stderr
    assert {**folder_bytes(out), MANIFEST_NAME: whole[MANIFEST_NAME]} == whole
    assert not (out / MANIFEST_NAME).exists()
    assert pipe(lines).returncode == 0
    assert folder_bytes(out) == whole


def test_folder_of_something_else_is_refused_untouched(
    tmp_path: Path, corpus: Path, tiny_m3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("mine")
    assert encode(corpus, tmp_path / "thesis", "--model", tiny_m3) == 10
    assert "is not empty and not an m3 folder: choose another --out" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]
