"""What a user sees: one line an error, a table or a bar on a terminal, and no escapes from the data."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3cli.errors import CorpusError
from tests.conftest import Completed

M3 = Callable[..., Completed]
FLAGS = ("--dtype", "float32", "--outputs", "dense,sparse", "--max-length", "32")
M3_PROGRAM = (sys.executable, "-m", "m3cli")
ESCAPE = "\x1b[31m"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Terminal:
    """A command on a terminal of 80 columns."""

    def __init__(self, folder: Path, *arguments: object, program: Sequence[str] = M3_PROGRAM, **named: str) -> None:
        self.shown = ""
        self._master, slave = pty.openpty()
        self.resize(80)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *program, *map(str, arguments)],  # for Ctrl-C
            cwd=folder,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", **named},
        )
        os.close(slave)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, words: str, *, times: int = 1) -> None:
        until = time.monotonic() + 120
        while self.shown.count(words) < times:
            assert time.monotonic() < until, self.shown
            assert self._read(1.0), f"it has ended without {words!r}: {self.shown}"

    def finish(self) -> str:
        """Wait for the end, and return all that was shown."""
        until = time.monotonic() + 120
        while self._read(1.0):
            assert time.monotonic() < until, self.shown
        self.process.wait(timeout=60)
        return self.shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self, seconds: float) -> bool:
        """Read what is there; say whether more may come."""
        if select.select([self._master], [], [], seconds)[0]:
            try:
                self.shown += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                return False
        return True


@contextmanager
def terminal(folder: Path, *arguments: object, program: Sequence[str] = M3_PROGRAM, **named: str) -> Iterator[Terminal]:
    opened = Terminal(folder, *arguments, program=program, **named)
    try:
        yield opened
    finally:
        opened.close()


def render(shown: str) -> list[str]:
    """Return the lines that a terminal shows in the end: a carriage return goes back, what follows overwrites."""
    lines, column = [""], 0
    for char in COLOUR.sub("", shown):
        if char == "\r":
            column = 0
        elif char == "\n":
            lines.append("")
            column = 0
        else:
            line = lines[-1].ljust(column)
            lines[-1] = line[:column] + char + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Let a job end, or do, as a test wants it to."""

    def replace(name: str, what: Any) -> None:
        def job(*_: Any, **__: Any) -> Any:
            if isinstance(what, BaseException):
                raise what
            return what()

        monkeypatch.setattr(name, job)

    return replace


INFO = "m3cli.jobs.info.describe_folder"
JOBS = {
    "encode": (("c.jsonl",), "m3cli.jobs.encode.command.encode_corpus"),
    "score": (("c.tsv",), "m3cli.jobs.score.command.score_pairs"),
    "search": (("c.m3", "-q", "words"), "m3cli.jobs.search.command.search_corpus"),
    "rerank": (("c.trec", "--queries", "q", "--corpus", "c"), "m3cli.jobs.rerank.rerank_run"),
}
"by command: arguments, and what does its work"


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (ValueError("odd\n  value"), "internal error: ValueError: odd value; run again with --debug", 1),
        (AssertionError(), "internal error: AssertionError; run again with --debug", 1),
        (OSError(22, "Invalid argument", "x"), "internal error: OSError: [Errno 22] Invalid argument: 'x'; run ", 1),
        (OSError(5, "Input/output error", "x"), "x cannot be reached: Input/output error; run the same command", 6),
        (OSError(107, "Not connected"), "a disk cannot be reached: Not connected; run the same command again", 6),
        (RecursionError("x" * 999), "internal error: RecursionError: [...]; run again with --debug", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (CorpusError("a\x1b[31m.jsonl: bad"), "a\\x1b[31m.jsonl: bad", 4),
    ],
)
def test_whatever_ends_a_command_is_one_line(
    m3_here: M3, broken: Callable[[str, Any], None], error: BaseException, line: str, code: int
) -> None:
    broken(INFO, error)
    done = m3_here("info", ".")
    assert done.returncode == code
    assert done.stderr.startswith(f"m3: {line}")
    assert done.stderr.count("\n") == 1
    for command, (arguments, job) in JOBS.items():
        broken(job, error)
        done = m3_here(command, *arguments, "--progress", "json")
        assert done.returncode == code
        assert [json.loads(text)["exit_code"] for text in done.stderr.splitlines()] == [code]
        assert json.loads(done.stderr)["text"].startswith(str(error) if code == 4 else line)
        assert m3_here(command, *arguments).stderr.startswith(f"m3: {line}")
    done = m3_here("info", ".", "--debug")
    assert done.returncode == code
    assert ("Traceback" in done.stderr) == (code != 130)


def test_the_log_file_has_the_unexpected_end(m3_here: M3, tmp_path: Path, broken: Callable[[str, Any], None]) -> None:
    broken("m3cli.jobs.encode.command.find_sources", ValueError("odd"))
    assert m3_here("encode", "c.jsonl", "--log-file", "m3.log").returncode == 1
    assert "exit code 1: internal error: ValueError: odd" in (tmp_path / "m3.log").read_text(encoding="utf-8")


def test_as_json_every_line_is_an_object(
    m3_here: M3, tmp_path: Path, broken: Callable[[str, Any], None], tiny_m3: Path
) -> None:
    def warn() -> int:
        logging.getLogger("m3cli.test").warning("a warning of %s", ESCAPE)
        return 0

    for command, (arguments, job) in JOBS.items():
        done = m3_here(command, *arguments, "--progress=json", "--device", "tpu" if command == "encode" else "cpu")
        events = [json.loads(line) for line in done.stderr.splitlines()]
        assert events[-1]["event"] == "error", command
        assert events[-1]["exit_code"] == done.returncode != 0
        broken(job, warn)
        assert m3_here(command, *arguments, "--progress", "json").stderr == (
            json.dumps({"event": "message", "text": f"a warning of {ESCAPE}"}) + "\n"
        )
        assert m3_here(command, *arguments).stderr == "m3: a warning of \\x1b[31m\n"
    done = m3_here("encode", "c.jsonl", "--limit", "x", "--progress", "json")
    assert json.loads(done.stderr)["exit_code"] == done.returncode == 2


def test_as_json_names_that_are_not_utf8_are_told(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.jsonl")
    try:
        (folder / name).write_text('{"id": "1", "text": "x"}\n', encoding="utf-8")
    except OSError:
        pytest.skip("this filesystem takes UTF-8 names only")
    done = m3_here("encode", "in", "--model", tiny_m3, "--progress", "json")
    assert done.returncode == 4, done.stderr
    assert name in json.loads(done.stderr)["text"]


def test_a_query_typed_on_a_terminal_ends_with_one_ctrl_d(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "a", "text": "words"}\n', encoding="utf-8")
    assert m3_here("encode", "c.jsonl", "--model", tiny_m3, *FLAGS).returncode == 0
    with terminal(tmp_path, "search", "c.m3", "-q", "-", "--model", tiny_m3, "--dtype", "float32") as opened:
        opened.wait_for("Ctrl-D")
        opened.type("words of a query\n\x04")
        shown = opened.finish()
    assert opened.process.returncode == 0, shown
    assert "1 query" in shown


@pytest.fixture
def encoded(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> Path:
    """A folder without text, made from c.jsonl and a Parquet file, that remembers its checkpoint."""
    rows = [{"docno": f"fox {number}", "body": f"the quick fox {number} " * 9} for number in range(9)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = pa.table({"docno": ["dog"], "body": ["a lazy dog\x1b[31m"], "lang": ["en"]})
    pq.write_table(table, tmp_path / "d.parquet")
    done = m3_here("encode", "c.jsonl", "d.parquet", "--out", "c.m3", "--model", tiny_m3, "--shard-size", "400", *FLAGS)
    assert done.returncode == 0, done.stderr
    return tmp_path / "c.m3"


def test_a_search_in_one_line_shows_text_of_the_input(
    encoded: Path, on_terminal: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, shown = on_terminal("search", "c.m3", "the quick fox 3")
    assert code == 0
    lines = shown.splitlines()
    assert "text" in lines[1]
    assert sum("the quick fox" in line for line in lines[2:]) == 9
    assert sum("a lazy dog\\x1b[31m" in line for line in lines) == 1
    (tmp_path / "c.jsonl").write_text("other", encoding="utf-8")
    code, shown = on_terminal("search", "c.m3", "the quick fox 3")
    assert code == 0
    assert "the quick fox 1" not in shown
    assert " 0 to " in shown


@pytest.mark.slow
def test_without_a_query_a_terminal_asks_for_one_after_the_other(encoded: Path, tmp_path: Path) -> None:
    with terminal(tmp_path, "search", "c.m3", "--dtype", "float32") as opened:
        opened.wait_for("query> ")
        opened.type("the quick fox 3\n")
        opened.wait_for("fox 8")
        opened.wait_for("query> ", times=2)
        opened.type("\n")
        opened.wait_for("query> ", times=3)
        opened.type("lazy dog\n")
        opened.wait_for("query> ", times=4)  # typed before the prompt, Ctrl-D would be lost
        opened.type("\x04")
        shown = opened.finish()
    assert opened.process.returncode == 0, shown
    assert shown.count("query> ") == 4
    assert shown.count("float32 on cpu") == 1, "the model is loaded once"
    with terminal(tmp_path, "search", "c.m3", "--dtype", "float32") as opened:
        opened.wait_for("query> ")
        # Shown, so that it has been read: Ctrl-C discards what is not read yet, and readline would wait for it. Just
        # before the next read Ctrl-C counts only at the next key; a person presses it again.
        opened.type("half a que")
        opened.wait_for("half a que")
        for _ in range(20):
            if opened.process.poll() is None:
                opened.type("\x03")
                with suppress(subprocess.TimeoutExpired):
                    opened.process.wait(timeout=3)
        shown = opened.finish()
    assert opened.process.returncode == 130
    assert shown.rstrip().endswith("m3: interrupted")


def test_without_a_query_a_pipe_is_told_to_give_one(encoded: Path, m3_here: M3) -> None:
    done = m3_here("search", "c.m3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no query: give its words after DIR" in done.stderr


def test_two_texts_are_scored(
    m3_here: M3, on_terminal: Callable[..., tuple[int, str]], tmp_path: Path, tiny_m3: Path
) -> None:
    (tmp_path / "a fox").write_text("no pairs", encoding="utf-8")
    model = ("--model", tiny_m3, "--dtype", "float32")
    done = m3_here("score", "a fox", "the fox", *model)
    header, row = [line.split("\t") for line in done.stdout.splitlines()]
    assert (header[:3], row[:2]) == (["query", "passage", "dense"], ["a fox", "the fox"])
    assert "scoring the words 'a fox'" in done.stderr
    code, shown = on_terminal("score", "a fox", "the 狐狸 fox" * 20, *model)
    lines = shown.splitlines()
    assert code == 0
    assert lines[0].split() == ["dense", "sparse", "colbert", "s+d", "c+s+d", "query", "passage"]
    assert lines[1].endswith("…")
    assert m3_here("score", "a fox", " ", *model).returncode == 3
    assert m3_here("score", "a fox", "x", "--query-field", "q", *model).returncode == 2


def test_an_encode_on_a_terminal_is_shown_from_its_first_moment_to_what_comes_next(
    tmp_path: Path, tiny_m3: Path
) -> None:
    rows = [json.dumps({"id": str(number), "text": "some words " * 200}) for number in range(1000)]
    (tmp_path / "c.jsonl").write_text("\n".join(rows), encoding="utf-8")
    flags = ("--model", tiny_m3, *FLAGS, "--shard-size", 20_000)
    command = ("encode", "c.jsonl", *flags)
    with terminal(tmp_path, *command) as opened:
        opened.wait_for("m3: reading c.jsonl ...")
        began = len(opened.shown)
        opened.wait_for("m3: loading random-2x64 ...")
        opened.wait_for("/112 shards", times=3)
        wide = re.findall(r"\d%\|([^|]*)\| [^|\r]+ left", opened.shown)
        opened.resize(60)
        opened.wait_for("\x1b[J")
        narrow = len(opened.shown)
        opened.wait_for(" left", times=opened.shown.count(" left") + 3)
        while not any((tmp_path / "c.m3" / "_m3").glob("done/*")):  # else nothing is resumed
            opened.wait_for(" left", times=opened.shown.count(" left") + 1)
        opened.type("\x03")
        shown = opened.finish()
    assert opened.process.returncode == 130
    assert re.search(r"m3: interrupted: \d+ of 112 shards are kept; run the same command again", shown)
    assert shown.index("╭") > began, "the note is there before anything is imported"
    assert min(map(len, wide)) >= 20
    lines = [line for line in shown[narrow:].split("\r") if "%|" in line and line.endswith("left")]
    assert lines
    assert max(map(len, lines)) <= 60
    with terminal(tmp_path, *command) as opened:
        shown = opened.finish()
    lines = render(shown)
    assert any("tokens; 1,000 in the folder" in line for line in lines)
    assert lines[-3:] == [
        'next: m3 search c.m3 "some words"',
        "next: m3 load c.m3 --to qdrant:URL  (or milvus:, pgvector:; files: m3 export)",
        "",
    ]
    assert not any(line.startswith("m3: ") for line in lines), "notes are gone"


def test_scores_on_a_terminal_have_lines_of_their_own(tmp_path: Path, tiny_m3: Path) -> None:
    pairs = [f"query {number}\tpassage {number} {ESCAPE}" for number in range(40)]
    (tmp_path / "p.tsv").write_text("".join(f"{pair}\n" for pair in ["query\tpassage", *pairs]), encoding="utf-8")
    with terminal(tmp_path, "score", "p.tsv", "--model", tiny_m3, "--max-batch-tokens", "64") as opened:
        shown = opened.finish()
    assert opened.process.returncode == 0, shown
    lines = render(shown)
    assert "  0%|" in shown, "there was a bar"
    assert not [line for line in lines if "tokens [" in line]
    rows = [line for line in lines if "passage " in line and not line.startswith("m3:")]
    assert len(rows) == len(pairs)
    assert all(re.match(r"( *-?\d\.\d{4}  ){5}query \d+ +passage \d+ \\x1b", row) for row in rows)
    assert max(map(len, rows)) <= 80


@pytest.fixture
def on_terminal(m3_here: M3, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """The command line in this process, its standard output a terminal."""

    def run(*arguments: object) -> tuple[int, str]:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        with monkeypatch.context() as patch, os.fdopen(slave, "w", encoding="utf-8") as stdout:
            patch.setattr(sys, "stdout", stdout)
            patch.setenv("TERM", "xterm-256color")
            code = m3_here(*arguments).returncode
        shown = b""
        with os.fdopen(master, "rb", buffering=0) as reader:
            try:
                while part := reader.read(65536):
                    shown += part
            except OSError:
                pass
        return code, COLOUR.sub("", shown.decode()) if "--explain" not in arguments else shown.decode()

    return run


def test_escapes_of_the_data_reach_files_and_pipes_but_no_terminal(
    m3_here: M3, on_terminal: Callable[..., tuple[int, str]], tmp_path: Path, tiny_m3: Path
) -> None:
    name, words = f"a{ESCAPE}b\x9b", f"some{ESCAPE} text \u3000 \u200c of many words " * 9
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": name, "text": words}) + "\n", encoding="utf-8")
    (tmp_path / "p.tsv").write_text(f"query\tpassage\nq{ESCAPE}\tp{ESCAPE}\n", encoding="utf-8")
    model = ("--model", tiny_m3, "--dtype", "float32")
    encoded = m3_here(
        "encode",
        "c.jsonl",
        *model,
        "--outputs",
        "dense",
        "--max-length",
        "16",
        "--keep-text",
        "--long-docs",
        "truncate",
    )
    assert encoded.returncode == 0, encoded.stderr
    for command in (
        ("info", "c.m3", "--id", name, "--text"),
        ("info", "c.m3", "--truncated"),
        ("search", "c.m3", "-q", "words", "--format", "trec", *model),
        ("search", "c.m3", "-q", "words", "--format", "jsonl", *model),
        ("score", "p.tsv", *model),
        ("score", "p.tsv", *model, "--explain"),
    ):
        piped = m3_here(*command)
        assert piped.returncode == 0, piped.stderr
        assert ESCAPE in piped.stdout or "\\u001b[31m" in piped.stdout, command
        code, shown = on_terminal(*command)
        assert code == 0
        assert ESCAPE not in shown, command
        assert "\x9b" not in shown
        assert "\\x1b[31m" in shown or "\\u001b[31m" in shown, command
    assert "\u3000 \u200c" in on_terminal("info", "c.m3", "--id", name, "--text")[1], "what does no harm stays"


def test_the_chunks_of_a_document_line_up_on_a_terminal(
    m3_here: M3, on_terminal: Callable[..., tuple[int, str]], tmp_path: Path, tiny_m3: Path
) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "a", "text": "many words " * 40}) + "\n", encoding="utf-8")
    model = ("--model", tiny_m3, "--dtype", "float32", "--outputs", "dense", "--max-length", "16")
    assert m3_here("encode", "c.jsonl", *model).returncode == 0
    lines = on_terminal("info", "c.m3", "--id", "a")[1].splitlines()
    assert len({line.rstrip().rfind(line.split()[1]) for line in lines}) == 1, lines
    assert "\t" not in "".join(lines)
    assert m3_here("info", "c.m3", "--id", "a").stdout.splitlines()[0] == "chunk\tcharacters\ttokens"


def test_usage_errors_name_the_command_and_end_their_sentence(m3_here: M3) -> None:
    for typed, said in (
        ("encode c.jsonl --limit x", "--limit 'x': "),
        ("encode c.jsonl --limit=0", "--limit '0': "),
        ("search c.m3 -q x -k 1.5", "--top-k '1.5': "),
        ("encode c.jsonl --limt 1", "No such option: --limt (Possible options: --limit, --quiet, --split). See "),
        ("score p.tsv --weights 1e308,1e308,1", "--weights '1e308,1e308,1': expected three numbers from 0 to "),
        ("score p.tsv --dtype fp8", "--dtype 'fp8': expected auto, float32, bfloat16, float16, int8, nf4\n"),
    ):
        done = m3_here(*typed.split())
        assert done.returncode == 2
        assert done.stderr.startswith(f"m3: {said}")
        assert f". See 'm3 {typed.split()[0]} --help'.\n" in done.stderr or typed.startswith("score")
    done = m3_here("encod")
    assert done.returncode == 2
    assert done.stderr.endswith(". See 'm3 --help'.\n")
    done = m3_here()
    assert (done.returncode, done.stderr) == (2, "")
    assert "Usage" in done.stdout


@pytest.mark.parametrize("command", ["encode", "plan"])
def test_help_is_one_page_of_common_options_and_help_all_has_all(
    m3_here: M3, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = m3_here(command, "--help").stdout.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[:3] == ["Input:", "Model:", "Output:"]
    assert lines[lines.index("Examples:") + 1].startswith(f"  m3 {command} ")
    assert len(lines) - lines.index("Examples:") == 4
    assert "[default: parquet]" in "".join(lines)
    assert "<" not in "".join(lines)
    everything = m3_here(command, "--help-all").stdout
    assert "  --mcls N " in everything
    assert {line for line in lines if line.startswith("  -")} < set(everything.splitlines())
    for form in ("-h", "--help"):
        assert "--mcls" not in m3_here(command, form).stdout


BEYOND = (
    ("encode c.jsonl", "--limit --max-length --overlap --mcls --colbert-pool --colbert-top-k --max-batch-tokens"),
    ("encode c.jsonl", "--shard-size --max-row-bytes --max-skipped --max-runtime"),
    ("plan c.jsonl", "--limit --max-length --overlap --mcls --colbert-pool --colbert-top-k --shard-size"),
    ("check c.m3", "--sample --seed"),
    ("score p.tsv", "--max-batch-tokens --max-query-length --max-passage-length"),
    ("search c.m3 -q words", "--top-k --candidates --max-query-length --max-batch-tokens"),
    ("rerank r.trec --queries q.jsonl --corpus c.jsonl", "--top-k --max-length --max-batch-tokens"),
)


@pytest.mark.parametrize(("command", "options"), BEYOND)
def test_numbers_that_no_machine_counts_are_usage_errors(m3_here: M3, command: str, options: str) -> None:
    for option in options.split():
        for number in (2**54, 10**30, "9" * 5000):
            done = m3_here(*command.split(), option, number)
            assert done.returncode == 2, (option, number, done.stderr)
            assert option in done.stderr
            assert done.stderr.count("\n") == 1
            assert len(done.stderr) < 400


def test_a_time_that_no_clock_counts_is_a_usage_error(m3_here: M3) -> None:
    for option in ("99999999999h", "37000d", "1" * 400 + "s"):
        done = m3_here("encode", "c.jsonl", "--max-runtime", option)
        assert done.returncode == 2
        assert "--max-runtime" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_standard_output_that_is_not_utf8_crashes_nothing(
    m3: M3, m3_here: M3, tmp_path: Path, tiny_m3: Path, environment: dict[str, str]
) -> None:
    row = {"id": "Łąka", "text": "zażółć 😀 " * 30}
    (tmp_path / "Łąka.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    model = ("--model", tiny_m3, "--dtype", "float32", "--outputs", "dense", "--max-length", "16")
    assert m3_here("encode", "Łąka.jsonl", *model, "--out", "c.m3").returncode == 0
    done = m3("info", "c.m3", **environment)
    assert done.returncode == 0, done.stderr
    assert "documents" in done.stdout
    done = m3("info", "c.m3", "--json", **environment)
    assert json.loads(done.stdout)["run"]["sources"][0]["name"] == "Łąka.jsonl"


def test_a_working_folder_that_was_removed_is_one_line(m3: M3, tmp_path: Path) -> None:
    script = f"mkdir gone; cd gone; rmdir ../gone; exec '{sys.executable}' -m m3cli encode /nowhere/c.jsonl"
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 2
    assert done.stderr == "m3: the working folder has been removed: cd to one that exists and run again\n"
