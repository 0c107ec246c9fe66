"""What a command writes never replaces what it reads, nor what is not an ordinary file, and stays on this machine."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from m3cli.errors import OutputError
from m3cli.jobs.encode.lifecycle import MetricsFile
from m3cli.store import commit
from tests.conftest import Completed
from tests.crash import folder_bytes

M3 = Callable[..., Completed]
FLAGS = ("--dtype", "float32", "--device", "cpu", "--outputs", "dense", "--no-space-check", "--progress", "none")


def write_corpus(path: Path, rows: int = 8) -> Path:
    lines = [json.dumps({"id": f"{path.stem}-{row}", "text": f"text {row} of {path.stem}"}) for row in range(rows)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def base(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> Path:
    """A working folder with a corpus, an encoded folder of it, queries, pairs, a run and a small checkpoint."""
    write_corpus(tmp_path / "corpus.jsonl")
    write_corpus(tmp_path / "more" / "a.jsonl")
    write_corpus(tmp_path / "queries.jsonl", rows=2)
    (tmp_path / "pairs.tsv").write_text("query\tpassage\none\ttwo\n")
    (tmp_path / "run.trec").write_text("queries-0 Q0 corpus-1 1 9 t\n")
    (tmp_path / "link.jsonl").symlink_to("corpus.jsonl")
    os.link(tmp_path / "corpus.jsonl", tmp_path / "hard.jsonl")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert m3_here("encode", "corpus.jsonl", "--model", tiny_m3, "--out", "base.m3", *FLAGS).returncode == 0
    return tmp_path


ENCODE = ("encode", "corpus.jsonl", "--out", "new.m3", "--model", "model")
SEARCH = ("search", "base.m3", "--queries", "queries.jsonl", "--format", "trec")
SCORE = ("score", "pairs.tsv")
RERANK = ("rerank", "run.trec", "--queries", "queries.jsonl", "--corpus", "more", "--model", "model")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*ENCODE, "--metrics", "corpus.jsonl"), "--metrics corpus.jsonl"),
        ((*ENCODE, "--metrics", "link.jsonl"), "--metrics link.jsonl"),
        ((*ENCODE, "--log-file", "hard.jsonl"), "--log-file hard.jsonl"),
        ((*ENCODE, "--log-file", "model/config.json"), "--log-file model/config.json"),
        ((*ENCODE, "--since-run", "base.m3", "--gone", "./corpus.jsonl"), "--gone ./corpus.jsonl"),
        ((*ENCODE, "--since-run", "base.m3", "--gone", "base.m3/_m3/run.json"), "inside base.m3"),
        ((*ENCODE, "--metrics", "base.m3/rows/shard-0000000.parquet"), "inside base.m3"),
        ((*ENCODE, "--metrics", "m3.out", "--log-file", "m3.out"), "--metrics m3.out and --log-file m3.out"),
        (("encode", "more", "--out", "new.m3", "--metrics", "more/a.jsonl"), "--metrics more/a.jsonl"),
        (("encode", "more/*.jsonl", "--out", "new.m3", "--metrics", "more/a.jsonl"), "--metrics more/a.jsonl"),
        (("encode", "missing", "corpus.jsonl", "--out", "new.m3", "--metrics", "corpus.jsonl"), "--metrics corpus"),
        (("encode", "more", "--out", "base.m3/rows/new", "--model", "model"), "inside base.m3"),
        (("encode", "more", "--out", "base.m3", "--since-run", "base.m3"), "--out base.m3"),
        ((*SEARCH, "--out", "queries.jsonl"), "--out queries.jsonl"),
        ((*SEARCH, "--out", "base.m3/rows/shard-0000000.parquet"), "inside base.m3"),
        ((*SEARCH, "--mode", "bm25", "--input", "corpus.jsonl", "--out", "link.jsonl"), "--out link.jsonl"),
        ((*SCORE, "--out", "pairs.tsv"), "--out pairs.tsv"),
        ((*SCORE, "--out", "base.m3/rows/x.tsv"), "inside base.m3"),
        ((*RERANK, "--out", "run.trec"), "--out run.trec"),
        ((*RERANK, "--out", "queries.jsonl"), "--out queries.jsonl"),
        ((*RERANK, "--out", "more/a.jsonl"), "--out more/a.jsonl"),
    ],
)
def test_a_file_that_is_read_is_never_written_to(m3_here: M3, base: Path, words: tuple[str, ...], said: str) -> None:
    before = files_of(base)
    done = m3_here(*words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert files_of(base) == before


@pytest.mark.parametrize("remote", ["s3://bucket/x.jsonl", "hf://datasets/x.jsonl", "https://host/x.jsonl"])
def test_outputs_elsewhere_are_refused_by_name(m3_here: M3, base: Path, remote: str) -> None:
    encode = ("encode", "corpus.jsonl", "--model", "model")
    for words, option in (
        ((*encode, "--out", remote), "--out"),
        (("plan", "corpus.jsonl", "--model", "model", "--out", remote), "--out"),
        ((*encode, "--metrics", remote), "--metrics"),
        ((*encode, "--log-file", remote), "--log-file"),
        ((*encode, "--since-run", "base.m3", "--gone", remote), "--gone"),
        ((*SEARCH, "--out", remote), "--out"),
        ((*SCORE, "--out", remote), "--out"),
        ((*RERANK, "--out", remote), "--out"),
    ):
        before = files_of(base)
        done = m3_here(*words)
        assert done.returncode == 2, done.stderr
        assert f"{option} {remote}" in done.stderr
        assert files_of(base) == before
        assert not (base / remote.partition("/")[0]).exists()


def read_pipe(path: Path) -> Callable[[], bytes]:
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()))
    reader.start()

    def wait() -> bytes:
        reader.join(timeout=60)
        return found[0]

    return wait


def test_a_pipe_is_written_into_and_stays_a_pipe(m3_here: M3, base: Path, tiny_m3: Path) -> None:
    os.mkfifo(base / "pipe.trec")
    (base / "link.trec").symlink_to("pipe.trec")
    for name in ("pipe.trec", "link.trec"):
        read = read_pipe(base / "pipe.trec")
        done = m3_here(*SEARCH, "--model", tiny_m3, "--dtype", "float32", "--top-k", 2, "--out", name)
        assert done.returncode == 0, done.stderr
        assert read().count(b"\n") == 4
        assert stat.S_ISFIFO((base / "pipe.trec").stat().st_mode)
    assert (base / "link.trec").is_symlink()


def test_a_device_is_written_into_and_stays_a_device(m3_here: M3, base: Path, tiny_m3: Path) -> None:
    try:
        os.mknod(base / "device.tsv", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # what /dev/null is
        (base / "device.tsv").open("wb").close()
    except PermissionError:
        pytest.skip("only root makes devices, and not everywhere")
    device = "device.tsv"
    words = ("encode", "corpus.jsonl", "--model", tiny_m3, "--out", "new.m3", *FLAGS)
    assert m3_here(*words, "--metrics", device, "--log-file", device).returncode == 0
    again = ("--since-run", "base.m3", "--gone", device, "--out", "newer.m3")
    assert m3_here(*words, *again).returncode == 0
    done = m3_here("score", "pairs.tsv", "--model", tiny_m3, "--dtype", "float32", "--out", device)
    assert done.returncode == 0, done.stderr
    assert stat.S_ISCHR((base / "device.tsv").stat().st_mode)


def test_standard_output_by_name_is_written_into(m3: M3, base: Path, tiny_m3: Path) -> None:
    done = m3(*SEARCH, "--model", tiny_m3, "--dtype", "float32", "--top-k", 1, "--out", "/dev/stdout")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 2


def test_a_folder_is_refused_where_a_file_is_written(m3_here: M3, base: Path) -> None:
    for words in ((*ENCODE, "--metrics", "more"), (*ENCODE, "--log-file", "more"), (*SEARCH, "--out", "more")):
        done = m3_here(*words)
        assert done.returncode == 6, done.stderr
        assert "more: it is a folder" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_link_stays_and_what_it_points_to_is_replaced(m3_here: M3, base: Path, tiny_m3: Path) -> None:
    (base / "m3.prom").symlink_to("there.prom")
    words = ("encode", "corpus.jsonl", "--model", tiny_m3, "--out", "base.m3", *FLAGS)
    assert m3_here(*words, "--metrics", "m3.prom").returncode == 0
    assert (base / "m3.prom").is_symlink()
    assert "m3_exit_code" in (base / "there.prom").read_text()


@pytest.mark.parametrize("name", ["x" * 300, "loop"])
def test_a_folder_that_the_system_does_not_look_at_is_one_line(m3_here: M3, base: Path, name: str) -> None:
    (base / "loop").symlink_to("loop")
    for words in (
        ("encode", "corpus.jsonl", "--model", "model", "--out", name),
        ("plan", "corpus.jsonl", "--model", "model", "--out", name),
        ("encode", "corpus.jsonl", "--model", "model", "--out", f"{name}/below"),
        (*SEARCH, "--out", f"{name}/x.trec"),
        (*SEARCH, "--out", "y" * 300 + ".trec"),
        (*SCORE, "--out", f"{name}/x.tsv"),
        (*RERANK, "--out", f"{name}/x.trec"),
        ("check", name),
        ("info", name),
        ("search", name, "--queries", "words"),
    ):
        done = m3_here(*words)
        assert done.returncode == 6, (words, done.stderr)
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr


def test_what_a_run_writes_into_its_input_folder_is_not_read(m3_here: M3, base: Path, tiny_m3: Path) -> None:
    words: tuple[object, ...] = ("encode", "more", "--model", tiny_m3, "--out", "more/out", *FLAGS)
    words = (*words, "--log-file", "more/log.txt", "--metrics", "more/m3.txt")
    first = m3_here(*words)
    assert first.returncode == 0, first.stderr
    assert m3_here(*words).returncode == 0
    log = (base / "more" / "log.txt").read_text()
    assert "1 of 1 shard done" in log
    assert "nothing to do" in log
    run = json.loads((base / "more" / "out" / "_m3" / "run.json").read_bytes())
    assert [source["name"] for source in run["sources"]] == ["a.jsonl"]
    for given in ("more", "more/**/*.jsonl"):
        planned = m3_here("plan", given, "--model", tiny_m3, "--out", "other.m3", "--json", "--outputs", "dense")
        assert planned.returncode == 0, planned.stderr
    assert m3_here("encode", "more/out", "--model", tiny_m3, "--out", "other.m3").returncode == 4


def test_gone_needs_an_older_folder(m3_here: M3, base: Path, tiny_m3: Path) -> None:
    words = ("encode", "corpus.jsonl", "--model", tiny_m3, *FLAGS, "--gone", "gone.jsonl")
    for out in ("new.m3", "base.m3"):
        done = m3_here(*words, "--out", out)
        assert done.returncode == 2, done.stderr
        assert "--gone gone.jsonl needs --since-run" in done.stderr
    assert m3_here(*words, "--out", "new.m3", "--since-run", "base.m3").returncode == 0
    (base / "gone.jsonl").unlink()
    assert m3_here(*words, "--out", "new.m3").returncode == 0, "the folder knows its older one"
    assert (base / "gone.jsonl").exists()


def test_rerank_writes_json_lines(m3_here: M3, base: Path, cross_encoder: Path) -> None:
    words = ("rerank", "run.trec", "--queries", "queries.jsonl", "--corpus", "corpus.jsonl", "--model", cross_encoder)
    assert m3_here(*words, "--dtype", "float32", "--out", "new.jsonl").returncode == 0
    rows = [json.loads(line) for line in (base / "new.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["queries-0"]
    assert rows[0]["query"] == "text 0 of queries"
    assert [(hit["id"], hit["rank"]) for hit in rows[0]["hits"]] == [("corpus-1", 1)]
    done = m3_here(*words, "--out", "new.parquet")
    assert done.returncode == 2
    assert "its ending tells the format" in done.stderr


def test_metrics_and_log_that_fail_on_the_way_cost_a_warning(
    m3_here: M3, base: Path, tiny_m3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m3cli.jobs.encode.lifecycle.SECONDS_BETWEEN", 0.0)
    real = MetricsFile.write

    def write(self: MetricsFile) -> None:
        for name in ("m3.prom", "m3.log"):
            (base / "gauges" / name).unlink(missing_ok=True)
        if (base / "gauges").exists():
            (base / "gauges").rmdir()
        real(self)

    (base / "gauges").mkdir()
    monkeypatch.setattr(MetricsFile, "write", write)
    words = ("encode", "corpus.jsonl", "--model", tiny_m3, "--out", "new.m3", *FLAGS[:-2], "--progress", "log")
    done = m3_here(*words, "--metrics", "gauges/m3.prom", "--log-file", "gauges/m3.log")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot write --metrics") == 1
    assert done.stderr.count("cannot write --log-file") == 1
    assert m3_here("check", "new.m3").returncode == 0


def test_what_cannot_be_written_is_told_before_any_work_and_in_the_metrics(m3_here: M3, base: Path) -> None:
    before = folder_bytes(base / "base.m3")
    for flag in ("--metrics", "--log-file", "--gone"):
        words = [*ENCODE, "--since-run", "base.m3", flag, "no/such"]
        if flag != "--metrics":
            (base / "m3.prom").write_text("m3_exit_code 0\n")
            words += ["--metrics", "m3.prom"]
        done = m3_here(*words)
        assert done.returncode == 6, done.stderr
        assert f"{flag} no/such" in done.stderr or "no/such" in done.stderr
        if flag != "--metrics":
            assert 'm3_exit_code{out="new.m3"} 6' in (base / "m3.prom").read_text()
    assert not (base / "new.m3").exists()
    assert folder_bytes(base / "base.m3") == before


def test_a_pipe_without_a_reader_does_not_stop_a_run(m3_here: M3, base: Path, tiny_m3: Path) -> None:
    os.mkfifo(base / "pipe")
    assert m3_here(*ENCODE, "--log-file", "pipe").returncode == 6
    words = ("encode", "corpus.jsonl", "--model", tiny_m3, "--out", "new.m3", *FLAGS[:-1], "log")
    done = m3_here(*words, "--metrics", "pipe")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot write --metrics") == 1


def test_block_devices_and_sockets_are_refused(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "disk", stat.S_IFBLK | 0o666, os.makedev(250, 250))
    except PermissionError:
        pytest.skip("only root makes devices")
    with pytest.raises(OutputError, match="it is a block device"):
        commit.check_writable(str(tmp_path / "disk"))
