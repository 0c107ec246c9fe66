"""The whole job dies at any durable step, or at any moment, and goes on as if nothing had been.

In one process the model is loaded once and the job driven as `m3 encode` drives it; with `slow`, at every durable step
of both formats, and as a real process that gets a real SIGKILL. M3_KILLS=100 sets how many of those.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from m3cli.config import Format
from m3cli.jobs.check import check_folder
from m3cli.progress import FileMeter
from m3cli.requests import CheckRequest
from m3cli.store.documents import is_ours
from m3cli.store.layout import RUN_NAME
from tests.conftest import ROOT, Completed
from tests.crash import Steps, crash_at, folder_bytes
from tests.functional.conftest import EncodeWith
from tests.functional.corpora import FORMATS, SETTINGS, Encode, write_corpus


def count_steps(encode: Encode, out: Path, *, writes: bool = False) -> Steps:
    with crash_at(None, writes=writes) as steps:
        assert encode(out) == 3
    return steps


def die_and_go_on(encode: Encode, out: Path, step: int, whole: dict[str, bytes], *, writes: bool = False) -> None:
    """Die before a step; what is left must be undamaged and true, and the next run must make it whole."""
    with crash_at(step, writes=writes) as crashed:
        encode(out)
    assert crashed.dead
    if out.exists() and is_ours(out):
        check = check_folder(CheckRequest(folder=str(out)), meter=FileMeter(quiet=True))
        assert (check.faults, check.exit_code) in (((), 75), ((), 3))
        there = folder_bytes(out)
        assert {name: whole[name] for name in there} == there
    with crash_at(None):
        assert encode(out) == 3
    assert folder_bytes(out) == whole
    shutil.rmtree(out)


@pytest.mark.parametrize("chosen", FORMATS)
def test_death_at_some_durable_steps_costs_nothing(
    tmp_path: Path, encoders: dict[Format, Encode], chosen: Format
) -> None:
    steps = count_steps(encoders[chosen], tmp_path / "whole")
    whole = folder_bytes(tmp_path / "whole")
    assert len(steps.log) > 40
    for step in random.Random(chosen).sample(range(len(steps.log)), 6):
        die_and_go_on(encoders[chosen], tmp_path / "out", step, whole)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", FORMATS)
def test_death_at_every_durable_step_costs_nothing(
    tmp_path: Path, encoders: dict[Format, Encode], chosen: Format
) -> None:
    steps = count_steps(encoders[chosen], tmp_path / "whole")
    whole = folder_bytes(tmp_path / "whole")
    for step in range(len(steps.log)):
        die_and_go_on(encoders[chosen], tmp_path / "out", step, whole)
    sys.stdout.write(f"{chosen}: died at each of {len(steps.log)} durable steps\n")


@pytest.mark.slow
@pytest.mark.parametrize("chosen", FORMATS)
def test_death_in_the_middle_of_writing_costs_nothing(
    tmp_path: Path, encoders: dict[Format, Encode], chosen: Format
) -> None:
    steps = count_steps(encoders[chosen], tmp_path / "whole", writes=True)
    whole = folder_bytes(tmp_path / "whole")
    places = [place for place, (step, _) in enumerate(steps.log) if step == "write"]
    chosen_places = places if "M3_KILLS" in os.environ else random.Random(chosen).sample(places, 20)
    for step in chosen_places:
        die_and_go_on(encoders[chosen], tmp_path / "out", step, whole, writes=True)
    sys.stdout.write(f"{chosen}: died at {len(chosen_places)} of {len(places)} writes\n")


@pytest.mark.parametrize("chosen", FORMATS)
def test_data_then_entry_then_manifest_each_durable_before_the_next(
    tmp_path: Path, encoders: dict[Format, Encode], chosen: Format
) -> None:
    # That each file is fsynced before its rename, and each folder before an entry, crash_at itself asserts.
    steps = count_steps(encoders[chosen], tmp_path / "whole").log
    entries = [place for place, (step, name) in enumerate(steps) if step == "rename" and is_entry(name)]
    renames = [name for step, name in steps if step == "rename"]
    assert renames[0] == "run.json"
    assert renames[-2:] == ["manifest.json", "metrics.json"]
    assert len(entries) >= 3
    for place in entries:
        assert steps[place + 1] == ("sync_folder", "done")
    last_data = max(place for place, (step, name) in enumerate(steps) if step == "rename" and name.startswith("shard-"))
    assert last_data == entries[-1] < steps.index(("rename", "manifest.json"))


def is_entry(name: str) -> bool:
    return re.fullmatch(r"shard-\d+\.json", name) is not None


def command(corpus: Path, out: Path, folder: Path, *more: object) -> list[str]:
    words = ("encode", corpus, "--out", out, "--model", folder, *SETTINGS, "--progress", "none", *more)
    return [str(word) for word in words]


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "step"), [("parquet", 20), ("npy", 47)])
def test_real_kill_before_a_durable_step(
    tmp_path: Path, encode_with: EncodeWith, tiny_m3: Path, m3: Callable[..., Completed], chosen: Format, step: int
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    encode_with(corpus, out=tmp_path / "whole", format=chosen)
    words = command(corpus, tmp_path / "out", tiny_m3, "--format", chosen)
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash", str(step), *words],
        cwd=ROOT,
        check=False,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert m3("check", "out").returncode == 75
    assert encode_with(corpus, out=tmp_path / "out") == 3
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def join_calls(lines: Iterable[str]) -> Iterator[str]:
    """Yield strace's lines, a call that another thread's stands in the middle of whole where it ends."""
    begun: dict[str, str] = {}
    for line in lines:
        process, _, call = line.partition(" ")
        if call.endswith(" <unfinished ...>"):
            begun[process] = call.removesuffix(" <unfinished ...>")
        elif resumed := re.search(r"<\.\.\. \w+ resumed>(.*)", call):
            yield f"{process} {begun.pop(process)}{resumed[1]}"
        else:
            yield line


def test_a_call_that_is_told_in_two_parts_is_one() -> None:
    told = ["7 fsync(5</a> <unfinished ...>", '8 rename("/b", "/c") = 0', "7 <... fsync resumed>)  = 0"]
    assert list(join_calls(told)) == ['8 rename("/b", "/c") = 0', "7 fsync(5</a>)  = 0"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_real_calls_come_in_the_order_that_the_harness_assumes(tmp_path: Path, tiny_m3: Path) -> None:
    corpus, trace = write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "trace"
    calls = "fsync,fdatasync,rename,renameat,renameat2"
    strace = ["strace", "-f", "-y", "--seccomp-bpf", "-e", f"trace={calls}", "-o", str(trace)]
    words = command(corpus, tmp_path / "out", tiny_m3, "--format", "npy")
    done = subprocess.run([*strace, sys.executable, "-m", "m3cli", *words], check=False, capture_output=True, cwd=ROOT)
    if done.returncode == 1 and b"ptrace" in done.stderr:
        pytest.skip("ptrace is not allowed here")
    assert done.returncode == 3, done.stderr.decode()
    synced: set[str] = set()
    pending: set[str] = set()
    published = 0
    for line in join_calls(trace.read_text().splitlines()):
        if match := re.search(r"fsync\(\d+<([^>]+)>\) += 0", line):
            synced.add(match[1])
            pending.discard(match[1])
        elif (match := re.search(r'rename\w*\((?:\w+, )?"([^"]+)", (?:\w+, )?"([^"]+)"', line)) and "/out/" in match[2]:
            assert match[1] in synced, f"{match[2]} is published without fsync"
            final = Path(match[2])
            if is_entry(final.name) or final.name == "manifest.json":
                assert not pending, f"{final} is published before {pending} is durable"
            pending.add(str(final.parent))
            synced.discard(match[1])
            published += 1
    assert not pending
    assert published > 20


@pytest.mark.slow
def test_kill_at_random_moments_costs_nothing(tmp_path: Path, tiny_m3: Path, encode_with: EncodeWith) -> None:
    kills_wanted = int(os.environ.get("M3_KILLS", "8"))
    draw = random.Random(os.environ.get("M3_SEED", "0"))
    corpus = write_corpus(tmp_path / "corpus.jsonl", rows=700, longest=120, bad_every=97)
    wholes = {}
    for chosen in FORMATS:
        encode_with(corpus, out=tmp_path / f"whole-{chosen}", format=chosen)
        wholes[chosen] = folder_bytes(tmp_path / f"whole-{chosen}")
    kills = finished = 0
    while kills < kills_wanted:
        chosen = FORMATS[finished % 2]
        out = tmp_path / "out"
        words = command(corpus, out, tiny_m3, "--format", chosen)
        if kill_at_a_moment(words, out, draw):
            kills += 1
            check = check_folder(CheckRequest(folder=str(out)), meter=FileMeter(quiet=True))
            assert (check.faults, check.exit_code) in (((), 75), ((), 3))
            there = folder_bytes(out)
            assert {name: wholes[chosen][name] for name in there} == there
        else:
            assert folder_bytes(out) == wholes[chosen]
            finished += 1
            shutil.rmtree(out)
    if (tmp_path / "out").exists():
        assert encode_with(corpus, out=tmp_path / "out") == 3
        assert folder_bytes(tmp_path / "out") == wholes[FORMATS[finished % 2]]
        finished += 1
    sys.stdout.write(f"kills survived: {kills}, folders finished byte-identical: {finished}, rows lost: 0\n")


def kill_at_a_moment(words: list[str], out: Path, draw: random.Random) -> bool:
    """Run the real command and kill it some time after it is in its folder; False if it was done before that."""
    lock = out / "_m3" / "lock"
    with subprocess.Popen([sys.executable, "-m", "m3cli", *words], cwd=ROOT, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        # Two in three die while shards are being written, the others anywhere from the first step on.
        moment = draw.choice(("lock", "entry", "entry"))
        before = count_entries(out)
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                if lock.stat().st_size and (moment == "lock" or count_entries(out) > before):
                    break
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 2.0 if moment == "lock" else 0.3))
        process.kill()
        process.wait()
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert process.returncode in (3, -signal.SIGKILL), said
    return process.returncode == -signal.SIGKILL and (out / RUN_NAME).exists()


def count_entries(out: Path) -> int:
    done = out / "_m3" / "done"
    return len(os.listdir(done)) if done.is_dir() else 0  # noqa: PTH208 - the names are enough
