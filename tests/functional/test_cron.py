"""What a nightly job needs: it ends when it is told to, says so by its exit code, and leaves no mess in its mail."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from m3cli.cli import terminal
from m3cli.encoder import encode as encoding
from m3cli.encoder.model import run_model as real_run_model
from m3cli.jobs.encode import lifecycle
from m3cli.records import Batch
from tests.conftest import Completed

M3 = Callable[..., Completed]
FLAGS = ("--dtype", "float32", "--outputs", "dense", "--shard-size", "2K", "--max-batch-tokens", "256")
METRIC = re.compile(r'm3_(\w+)\{out="(.*)"\} (\S+)')


def write_corpus(path: Path, num_rows: int) -> None:
    rows = [{"id": str(n), "text": f"row {n} " * (n % 20 + 1)} for n in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def count_done(folder: Path) -> int:
    return len(list((folder / "_m3" / "done").glob("*.json")))


def read_metrics(path: Path) -> dict[str, float]:
    return {name: float(value) for name, _, value in METRIC.findall(path.read_text(encoding="utf-8"))}


@contextmanager
def m3_running(folder: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Start the command and wait until it has committed something; it is dead when this is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "m3cli", "encode", *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 120
        while process.poll() is None and not list(folder.glob("*.m3/_m3/done/*.json")):
            assert time.monotonic() < until
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_sigterm_ends_with_75_and_the_next_run_goes_on(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 4000)
    flags = ("--model", tiny_m3, *FLAGS, "--metrics", "m3.prom", "--log-file", "m3.log")
    with m3_running(tmp_path, "c.jsonl", *flags) as process:
        second_began = time.monotonic()
        second = subprocess.run(
            [sys.executable, "-m", "m3cli", "encode", "c.jsonl", "--model", tiny_m3, "--metrics", "m3.prom"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        second_took = time.monotonic() - second_began
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        took = time.monotonic() - began
    assert second.returncode == 11, second.stderr
    assert f"pid {process.pid}" in second.stderr
    assert second.stderr.count("\n") == 1
    assert second_took < 20, "nothing slow is loaded; the limit is for a busy machine"
    assert process.returncode == 75, stderr
    assert stderr.splitlines()[-1] == "m3: stopped by SIGTERM with work left; run the same command again to resume"
    assert took < 10
    assert list((tmp_path / "c.m3" / "_m3" / "tmp").iterdir()) == []
    done = count_done(tmp_path / "c.m3")
    assert done >= 1
    assert not (tmp_path / "c.m3/_m3/manifest.json").exists()
    assert read_metrics(tmp_path / "m3.prom")["exit_code"] == 75
    assert "exit code 75: stopped by SIGTERM" in (tmp_path / "m3.log").read_text(encoding="utf-8")
    assert "\x1b" not in stderr
    assert m3_here("encode", "c.jsonl", *flags).returncode == 0
    assert count_done(tmp_path / "c.m3") > done


def test_ctrl_c_says_what_is_kept_and_the_next_run_resumes(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 4000)
    flags = ("--model", tiny_m3, *FLAGS, "--log-file", "m3.log")
    with m3_running(tmp_path, "c.jsonl", *flags) as process:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    told = re.fullmatch(
        r"m3: interrupted: (\d+) of (\d+) shards are kept; run the same command again to resume",
        stderr.splitlines()[-1],
    )
    assert told, stderr
    assert int(told[1]) == count_done(tmp_path / "c.m3") >= 1
    assert "exit code 130: interrupted: " in (tmp_path / "m3.log").read_text(encoding="utf-8")
    assert m3_here("encode", "c.jsonl", *flags).returncode == 0
    assert count_done(tmp_path / "c.m3") == int(told[2])


@pytest.fixture
def slow_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let every batch take some seconds more."""

    def slow_down(seconds: float) -> None:
        def run_model(model: Any, batch: Batch) -> Any:
            time.sleep(seconds)
            return real_run_model(model, batch)

        monkeypatch.setattr(encoding, "run_model", run_model)

    return slow_down


def test_max_runtime_finishes_the_shard_in_hand(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, slow_model: Callable[[float], None]
) -> None:
    write_corpus(tmp_path / "c.jsonl", 300)
    flags = ("--model", tiny_m3, *FLAGS)
    slow_model(0.1)
    done = m3_here("encode", "c.jsonl", *flags, "--max-runtime", "2s")
    assert done.returncode == 75, done.stderr
    assert "stopped after --max-runtime 2s with work left" in done.stderr.splitlines()[-1]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    before = count_done(tmp_path / "c.m3")
    slow_model(0)
    done = m3_here("encode", "c.jsonl", *flags, "--max-runtime", "1h")
    assert done.returncode == 0, done.stderr
    assert count_done(tmp_path / "c.m3") > before


def test_max_runtime_gives_a_long_shard_up(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, slow_model: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "c.jsonl", 300)
    monkeypatch.setattr(terminal, "GRACE", 0.5)
    slow_model(0.3)
    began = time.monotonic()
    flags = ("--dtype", "float32", "--shard-size", "1M", "--max-batch-tokens", "256", "--max-runtime", "1.5s")
    done = m3_here("encode", "c.jsonl", "--model", tiny_m3, *flags)
    assert done.returncode == 75, done.stderr
    assert time.monotonic() - began < 20
    assert count_done(tmp_path / "c.m3") == 0
    assert list((tmp_path / "c.m3" / "_m3" / "tmp").iterdir()) == []


HANG = """
import sys, time
from m3cli import concurrency
from m3cli.encoder import encode as encoding
from m3cli.encoder.model import run_model as real_run_model
concurrency.JOIN_TIMEOUT = 1.0
encoding.run_model = lambda model, batch: time.sleep(600)
from m3cli.cli.app import run
from m3cli.cli.terminal import leave
print("ready", flush=True)
leave(run(sys.argv[1:]))
"""


def test_sigterm_does_not_wait_for_a_batch_that_takes_minutes(tmp_path: Path, tiny_m3: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 100)
    arguments = ["encode", "c.jsonl", "--model", str(tiny_m3), *FLAGS, "--progress", "json"]
    with subprocess.Popen(
        [sys.executable, "-c", HANG, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert json.loads(process.stderr.readline())["event"] == "plan"
        time.sleep(1.0)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - began < 10
    assert process.returncode == 75, stderr
    assert json.loads(stderr.splitlines()[-1])["exit_code"] == 75


@pytest.mark.parametrize("mode", ["auto", "log", "json", "none"])
def test_off_a_terminal_there_is_no_bar_and_no_escape(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    write_corpus(tmp_path / "c.jsonl", 50)
    done = m3_here("encode", "c.jsonl", "--model", tiny_m3, *FLAGS, "--progress", mode)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    if mode == "json":
        events = [json.loads(line)["event"] for line in done.stderr.splitlines()]
        assert events[0] == "plan"
        assert events[-1] == "summary"
    if mode == "none":
        assert done.stderr == ""


def test_as_json_warnings_and_errors_are_objects_too(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_model(model: Any, batch: Batch) -> Any:
        if len(batch.input_ids) > 100:
            raise torch.OutOfMemoryError("injected")
        return real_run_model(model, batch)

    monkeypatch.setattr(encoding, "run_model", run_model)
    rows = [{"id": str(n), "text": "text" if n else ""} for n in range(60)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ("--model", tiny_m3, "--dtype", "float32", "--progress", "json", "--max-skipped", "0")
    done = m3_here("encode", "c.jsonl", *flags)
    assert done.returncode == 4
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["event"] for event in events] == ["plan", "message", "error"]
    assert "out of memory" in events[1]["text"]
    assert events[2]["exit_code"] == 4


def test_metrics_are_for_prometheus(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "SECONDS_BETWEEN", 0.0)
    written: list[dict[str, float]] = []
    real = lifecycle.MetricsFile.write

    def write(self: lifecycle.MetricsFile) -> None:
        real(self)
        written.append(read_metrics(tmp_path / "m3.prom"))

    monkeypatch.setattr(lifecycle.MetricsFile, "write", write)
    write_corpus(tmp_path / 'a "b".jsonl', 100)
    flags = ("--model", tiny_m3, *FLAGS, "--metrics", "m3.prom")
    assert m3_here("encode", 'a "b".jsonl', *flags).returncode == 0
    assert len(written) > 3
    assert [numbers["running"] for numbers in written] == [1.0] * (len(written) - 1) + [0.0]
    assert written[-1]["exit_code"] == 0
    assert written[-1]["documents"] == 100
    assert written[-1]["shards"] == written[-1]["shards_done"] == count_done(tmp_path / 'a "b".m3')
    text = (tmp_path / "m3.prom").read_text(encoding="utf-8")
    assert r'm3_documents{out="a \"b\".m3"} 100' in text
    assert text.endswith("\n")
    assert text.count("# TYPE") == text.count("# HELP") == len([line for line in text.splitlines() if line[0] == "m"])
    assert [path.name for path in tmp_path.iterdir() if "prom" in path.name] == ["m3.prom"]
    assert m3_here("encode", "gone.jsonl", *flags).returncode == 4
    assert read_metrics(tmp_path / "m3.prom")["exit_code"] == 4
    done = m3_here("encode", 'a "b".jsonl', "--metrics", "no/such/folder.prom")
    assert done.returncode == 6
    assert "no/such" in done.stderr


def test_a_log_file_has_a_time_on_every_line_and_grows(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    write_corpus(tmp_path / "a\x1b[31m.jsonl", 50)
    flags = ("--model", tiny_m3, *FLAGS, "--log-file", "m3.log", "--progress", "none")
    assert m3_here("encode", "a\x1b[31m.jsonl", *flags).returncode == 0
    first = (tmp_path / "m3.log").read_text(encoding="utf-8")
    assert m3_here("encode", "a\x1b[31m.jsonl", *flags).returncode == 0
    assert m3_here("encode", "a\x1b[31m.jsonl", *flags, "--max-length", "9").returncode == 10
    log = (tmp_path / "m3.log").read_text(encoding="utf-8")
    assert log.startswith(first)
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d \S", line) for line in log.splitlines())
    assert "\x1b" not in log
    assert "nothing to do" in log
    assert "exit code 10" in log
    assert m3_here("encode", "a\x1b[31m.jsonl", "--log-file", "no/such/file").returncode == 6


def test_flags_that_cannot_be_meant_are_usage_errors(m3_here: M3, tmp_path: Path) -> None:
    for flag, value in (("--max-runtime", "soon"), ("--max-skipped", "some"), ("--max-skipped", "101%")):
        done = m3_here("encode", "c.jsonl", flag, value)
        assert done.returncode == 2
        assert f"{flag} '{value}'" in done.stderr
