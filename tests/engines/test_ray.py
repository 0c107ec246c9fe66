"""Workers of Ray: what they claim, how they are lost, and that a folder has the same bytes as without them."""

from __future__ import annotations

import gzip
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from m3cli.cli.app import run as m3
from m3cli.engines import ray as engine
from m3cli.engines.ray import ShardCounter
from m3cli.errors import M3Error
from tests.crash import folder_bytes
from tests.functional.corpora import SETTINGS, write_corpus

ON_RAY = ("--engine", "ray", "--num-workers", 2)


def claim_all(counter: ShardCounter, key: tuple[int, int], num_shards: int, done: set[int] | None = None) -> list[int]:
    """Return the shards that a worker claims which asks for each that is not done, in order."""
    start = stop = 0
    taken = []
    for index in range(num_shards):
        if index in (done or ()):
            continue
        if index >= stop:
            got = counter.claim(key, index)
            if got is None:
                break
            start, stop = got
        if start <= index:
            taken.append(index)
    return taken


def test_claims_are_each_shard_once() -> None:
    counter = ShardCounter(100, 2)
    assert counter.claim((0, 0), 0) == (0, 2)
    assert claim_all(counter, (1, 0), 100) == list(range(2, 100))
    assert counter.claim((0, 0), 2) is None
    assert not counter.has_free(100)


def test_a_lost_workers_shards_are_claimed_again() -> None:
    counter = ShardCounter(None, 2)
    for index in range(0, 12, 2):
        assert counter.claim((index // 2 % 2, 0), index) == (index, index + 2)
    assert counter.release((1, 0), done={2, 3, 6})
    assert counter.has_free(None)
    assert not counter.has_free(7)
    assert counter.claim((0, 0), 12) == (12, 14)
    assert claim_all(counter, (1, 1), 14, done={0, 1, 2, 3, 4, 5, 6}) == [7, 10, 11]
    assert not counter.release((1, 1), done=set())
    assert claim_all(counter, (0, 0), 12) == [7, 10, 11]


def test_a_claim_is_about_a_second_of_work() -> None:
    counter = ShardCounter(None, 2)
    counter.claim((0, 0), 0)
    counter._began = time.monotonic() - 10
    assert counter.report((0, 0), (1, 1, 410.0)) is False
    assert counter.claim((0, 0), 2) == (2, 22)
    near_the_end = ShardCounter(40, 2)
    near_the_end._began = time.monotonic() - 10
    near_the_end.report((0, 0), (1, 1, 400.0))
    assert near_the_end.claim((0, 0), 0) == (0, 10)
    near_the_end.stop()
    assert near_the_end.claim((0, 0), 10) is None
    assert near_the_end.report((0, 0), (1, 1, 400.0)) is True


def test_silence_names_the_worker() -> None:
    driver: Any = object.__new__(engine._Driver)
    driver._tasks = {"task": ((3, 0), None)}
    driver._check_silence({(3, 0): 599.0}, 0.0)
    with pytest.raises(M3Error, match="worker 3 has finished, claimed and reported nothing for 10 minutes"):
        driver._check_silence({(3, 0): 601.0}, 0.0)
    with pytest.raises(M3Error, match="no worker has begun within 10 minutes"):
        driver._check_silence({}, 601.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--num-workers", 2), "--num-workers 2 is for --engine ray"),
        (("--engine", "ray"), "give the number of workers with --num-workers N"),
        ((*ON_RAY, "--worker", "0/2"), "--worker 0/2 with --engine ray"),
        ((*ON_RAY, "-"), "standard input with --engine ray"),
        (ON_RAY, "--engine ray needs Ray; type: pip install 'ray>=2.50,<3'"),
    ],
)
def test_options_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: tuple[object, ...], said: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    inputs = () if "-" in words else ("c.jsonl",)
    assert m3(["encode", *inputs, *map(str, words), "--out", "o.m3"]) == 2
    shown = capfd.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    assert m3(["encode", "c.jsonl", *map(str, ON_RAY), "--gpus-per-worker", "1"]) == 2
    assert "--gpus-per-worker 1: there is no CUDA device here" in capfd.readouterr().err


def test_an_address_where_nothing_listens(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, tiny_m3: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    corpus = write_corpus(tmp_path / "c.jsonl", rows=3)
    words = ["encode", *map(str, (corpus, "--out", tmp_path / "o.m3", "--model", tiny_m3, *SETTINGS))]
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        on_cluster = [*words, *map(str, ON_RAY), "--address", address]
        assert m3(on_cluster) == 2
        assert f"--address {address}: there is no Ray cluster" in capfd.readouterr().err
        assert m3(words) == 0
        assert m3(on_cluster) == 0  # nothing to do: a cluster is not needed
    assert "nothing to do" in capfd.readouterr().err


def find_processes(session: int, what: str = "") -> list[int]:
    """Return the processes of a session that live, those with a word in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if os.getsid(int(folder.name)) == session:
                command = (folder / "cmdline").read_bytes()  # of a zombie empty
                if command and what.encode() in command:
                    found.append(int(folder.name))
    return found


def wait_for(condition: Callable[[], object], *, seconds: float = 60) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


class Run:
    """A command on Ray in a session of its own, which all processes that it starts are in."""

    def __init__(self, folder: Path, *words: object, **environment: str) -> None:
        command = [sys.executable, "-m", "m3cli", "encode", *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def find(self, what: str = "") -> list[int]:
        """Return the processes of this run that live, those with a word in their command line."""
        return find_processes(self.process.pid, what)

    def wait(self) -> tuple[int, str]:
        """Wait for the end; return exit code and standard error."""
        printed, shown = self.process.communicate(timeout=400)
        assert not printed
        return self.process.returncode, shown

    def wait_for_shards(self, out: Path, count: int) -> None:
        """Wait until that many shards are done."""
        until = time.monotonic() + 200
        while len(list((out / "_m3/done").glob("*"))) < count:
            assert time.monotonic() < until
            assert self.process.poll() is None, self.wait()
            time.sleep(0.05)

    def check_replaced(self, workers: int) -> None:
        """The run ends whole, after so many workers were lost and replaced, and leaves no process."""
        code, shown = self.wait()
        assert code == 3, shown
        assert shown.count("another one takes its place") == workers
        self.check_nothing_is_left()

    def check_nothing_is_left(self) -> None:
        """Every process of the run ends."""
        until = time.monotonic() + 120
        while left := self.find():
            assert time.monotonic() < until, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
            time.sleep(0.2)


@pytest.fixture
def start(tmp_path: Path, tiny_m3: Path) -> Iterator[Callable[..., Run]]:
    """Start an encode on Ray in `tmp_path`; what is left of it at the end is killed."""
    if find_spec("ray") is None:
        pytest.skip("workers of Ray are not tested live: ray is not installed")
    runs: list[Run] = []

    def begin(*words: object, options: tuple[object, ...] = ON_RAY, **environment: str) -> Run:
        words = (*words, "--model", tiny_m3, *SETTINGS, *options, "--progress", "log")
        runs.append(Run(tmp_path, *words, **environment))
        return runs[-1]

    yield begin
    for run in runs:
        for pid in run.find():
            os.kill(pid, signal.SIGKILL)
        run.process.wait()


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_m3: Path) -> Callable[[Path], dict[str, bytes]]:
    """What a plain run makes of a corpus."""

    def encode(corpus: Path) -> dict[str, bytes]:
        out = tmp_path_factory.mktemp("plain") / "o.m3"
        command = [sys.executable, "-m", "m3cli", "encode", corpus, "--model", tiny_m3, *SETTINGS, "--out", out]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, check=False, text=True)
        assert done.returncode == 3, done.stderr
        return folder_bytes(out)

    return encode


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
def test_two_workers_write_the_bytes_of_a_plain_run(
    start: Callable[..., Run], plain: Callable[[Path], dict[str, bytes]], tmp_path: Path, name: str
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", rows=300, bad_every=50)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(corpus.read_bytes()))
    run = start(name, "--out", "o.m3")
    code, shown = run.wait()
    assert code == 3, shown
    assert "6 invalid JSON" in shown
    run.check_nothing_is_left()
    assert folder_bytes(tmp_path / "o.m3") == plain(tmp_path / name)
    again = start(name, "--out", "o.m3")
    assert "nothing to do" in again.wait()[1]
    assert not [line for line in shown.splitlines() if "(pid=" in line or "WARNING" in line or "INFO" in line]


@pytest.mark.live
@pytest.mark.slow
def test_a_worker_killed_five_times_costs_nothing(
    start: Callable[..., Run], plain: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    corpus, draw = write_corpus(tmp_path / "c.jsonl", rows=20_000, bad_every=1000), random.Random(3)
    run = start("c.jsonl", "--out", "o.m3")
    for kills in range(5):
        run.wait_for_shards(tmp_path / "o.m3", 20 + 60 * kills)
        time.sleep(draw.random() / 4)
        workers = run.find("ray::Worker")
        assert workers, run.wait()
        os.kill(min(workers), signal.SIGKILL)  # the oldest, which has finished a shard
    run.check_replaced(5)
    assert folder_bytes(tmp_path / "o.m3") == plain(corpus)


@pytest.mark.live
@pytest.mark.slow
def test_a_worker_lost_after_the_others_have_ended_is_replaced(
    start: Callable[..., Run], plain: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", rows=3000, bad_every=500)
    run = start("c.jsonl", "--out", "o.m3")
    run.wait_for_shards(tmp_path / "o.m3", 20)
    held = max(run.find("ray::Worker.encode"))
    os.kill(held, signal.SIGSTOP)
    wait_for(lambda: run.find("ray::Worker.encode") == [held], seconds=200)
    os.kill(held, signal.SIGKILL)
    run.check_replaced(1)
    assert folder_bytes(tmp_path / "o.m3") == plain(corpus)


@pytest.mark.live
@pytest.mark.slow
def test_a_killed_or_stopped_driver_is_resumed(
    start: Callable[..., Run], plain: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    corpus, out = write_corpus(tmp_path / "c.jsonl", rows=6000, bad_every=500), tmp_path / "o.m3"
    killed = start("c.jsonl", "--out", "o.m3")
    killed.wait_for_shards(out, 20)
    killed.process.kill()
    killed.wait()
    wait_for(lambda: not (killed.find("ray::Worker") or killed.find("raylet/raylet")))
    assert not (out / "_m3/manifest.json").exists()
    stopped = start("c.jsonl", "--out", "o.m3")
    stopped.wait_for_shards(out, len(list((out / "_m3/done").iterdir())) + 5)
    stopped.process.terminate()
    code, shown = stopped.wait()
    assert code == 75, shown
    assert shown.splitlines()[-1].startswith("m3: stopped by SIGTERM with work left")
    stopped.check_nothing_is_left()
    rest = start("c.jsonl", "--out", "o.m3", options=("--engine", "local"))
    assert rest.wait()[0] == 3
    assert folder_bytes(out) == plain(corpus)
    killed.check_nothing_is_left()  # Ray's own agents end after a minute


@pytest.mark.live
@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_ends_the_run(start: Callable[..., Run], tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", rows=200)
    run = start("c.jsonl", "--out", "o.m3", options=("--engine", "ray", "--num-workers", 1))
    while run.process.poll() is None:
        for pid in run.find("ray::Worker"):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    code, shown = run.wait()
    assert code == 1, shown
    assert "worker 0 was lost 3 times in a row without finishing a shard" in shown.splitlines()[-1]
    run.check_nothing_is_left()


class Cluster:
    """A cluster of Ray on this machine, which asks for a token."""

    def __init__(self, folder: Path) -> None:
        (folder / "token").write_text(secrets.token_hex(32))
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        self.ray = str(Path(sys.executable).with_name("ray"))
        self.nodes: list[subprocess.Popen[bytes]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.place = free.getsockname()
        self.address = f"127.0.0.1:{self.place[1]}"
        self.start_node("--head", f"--port={self.place[1]}", "--include-dashboard=false")
        wait_for(self.listens)

    def listens(self) -> bool:
        """Whether the head node is there."""
        with socket.socket() as tried:
            return tried.connect_ex(self.place) == 0

    def count_nodes(self) -> int:
        """Return how many nodes have joined."""
        command = [self.ray, "status", f"--address={self.address}"]
        done = subprocess.run(command, env={**os.environ, **self.token}, capture_output=True, check=False)
        return done.stdout.count(b" node_")

    def start_node(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a node with a CPU, in a session of its own."""
        node = subprocess.Popen(
            [self.ray, "start", "--num-cpus=1", "--disable-usage-stats", "--block", *words],
            env={**os.environ, **self.token},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.nodes.append(node)
        return node


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """Kill all processes of a node."""
    for pid in find_processes(node.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of one node, killed at the end."""
    if find_spec("ray") is None:
        pytest.skip("a cluster of Ray is not tested live: ray is not installed")
    started = Cluster(tmp_path)
    yield started
    for node in started.nodes:
        kill_node(node)


@pytest.mark.live
@pytest.mark.slow
def test_a_cluster_with_fewer_places_than_workers(
    start: Callable[..., Run], plain: Callable[[Path], dict[str, bytes]], tmp_path: Path, cluster: Cluster
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", rows=300, bad_every=50)
    options = (*ON_RAY, "--address", cluster.address)
    code, shown = start("c.jsonl", "--out", "o.m3", options=options).wait()
    assert code == 2, shown
    assert shown.splitlines()[-1].startswith(f"m3: --address {cluster.address}: the Ray cluster asks for its token")
    code, shown = start("c.jsonl", "--out", "o.m3", options=options, **cluster.token).wait()
    assert code == 3, shown
    assert folder_bytes(tmp_path / "o.m3") == plain(corpus)


@pytest.mark.live
@pytest.mark.slow
def test_a_lost_node_costs_nothing(
    start: Callable[..., Run], plain: Callable[[Path], dict[str, bytes]], tmp_path: Path, cluster: Cluster
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", rows=9000, bad_every=500)
    node = cluster.start_node(f"--address={cluster.address}")
    wait_for(lambda: cluster.count_nodes() == 2)
    run = start("c.jsonl", "--out", "o.m3", options=(*ON_RAY, "--address", cluster.address), **cluster.token)
    wait_for(lambda: find_processes(node.pid, "ray::Worker.encode"))
    run.wait_for_shards(tmp_path / "o.m3", 20)
    kill_node(node)
    code, shown = run.wait()
    assert code == 3, shown
    assert "another one takes its place" in shown
    assert folder_bytes(tmp_path / "o.m3") == plain(corpus)


@pytest.mark.live
@pytest.mark.slow
def test_an_error_of_a_worker_is_that_of_the_run(start: Callable[..., Run], tmp_path: Path) -> None:
    # More than the driver reads to find the fields.
    lines = write_corpus(tmp_path / "c.jsonl", rows=400, bad_every=1000).read_bytes()
    lines = lines.replace(b'{"id"', b'{"more": "%s", "id"' % (b"x" * 9000))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines)[:-200])
    run = start("c.jsonl.gz", "--out", "o.m3")
    code, shown = run.wait()
    assert code == 4, shown
    assert "c.jsonl.gz ends in the middle of its gzip data" in shown.splitlines()[-1]
    assert list((tmp_path / "o.m3/_m3/done").iterdir())
    run.check_nothing_is_left()
