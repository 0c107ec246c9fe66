"""Settings: shown where they are not the default, refused where they would do nothing, and planned as encoded."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Completed

M3 = Callable[..., Completed]
LONG = "a word of a long text " * 20


def write(name: str, *ids: str) -> None:
    rows = "".join(json.dumps({"id": each, "text": f"{each} {LONG}"}) + "\n" for each in ids).encode()
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)


@pytest.fixture
def encode(m3_here: M3, tiny_m3: Path) -> M3:
    def encode(*arguments: object, command: str = "encode") -> Completed:
        return m3_here(command, *arguments, "--model", tiny_m3)

    return encode


def test_what_is_not_the_default_is_shown_everywhere(encode: M3, m3_here: M3) -> None:
    write("a.jsonl", "1", "2")
    flags = (
        *("--max-length", 32, "--long-docs", "merge", "--split", "tokens", "--overlap", 4, "--mcls", 8),
        *("--colbert-dtype", "int8", "--prefix", "query: ", "--keep-text"),
    )
    words = "long-docs merge, overlap 4, split tokens, mcls 8, colbert-dtype int8, prefix 'query: ', keep-text"
    for done in (
        encode("a.jsonl", *flags, command="plan"),
        encode("a.jsonl", *flags, "--progress", "log"),
        m3_here("info", "a.m3"),
    ):
        assert done.returncode == 0, done.stderr
        shown = re.sub(r"[\s│]+", " ", done.stdout + done.stderr)
        assert words in shown, shown
    write("b.jsonl", "1")
    for done in (encode("b.jsonl", "--progress", "log"), m3_here("info", "b.m3")):
        assert not re.search("settings.*(split|long-docs|overlap|;)", done.stdout + done.stderr)


def test_the_scales_of_int8_vectors_are_part_of_them(encode: M3, m3_here: M3) -> None:
    write("a.jsonl", *map(str, range(200)))
    sizes = {}
    for dtype in ("float16", "int8"):
        encode("a.jsonl", "--colbert-dtype", dtype, "--out", dtype)
        sizes[dtype] = json.loads(m3_here("info", dtype, "--json").stdout)["bytes"]
    assert sizes["int8"]["rows"] < sizes["float16"]["rows"] + 2000
    assert sizes["int8"]["colbert"] == pytest.approx(sizes["float16"]["colbert"] * 68 / 128, rel=0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split", "tokens", "--long-docs", "truncate"), "--split tokens with --long-docs truncate"),
        (("--dense-dtype", "float32", "--outputs", "sparse"), "--dense-dtype float32 needs dense among the outputs"),
        (("--mcls", "8", "--outputs", "sparse,colbert"), "--mcls 8 needs dense among the outputs sparse,colbert"),
    ],
)
@pytest.mark.parametrize("command", ["encode", "plan"])
def test_flags_that_would_do_nothing_are_refused(
    encode: M3, command: str, flags: tuple[str, ...], message: str
) -> None:
    write("a.jsonl", "1")
    refused = encode("a.jsonl", *flags, command=command)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not Path("a.m3").exists()


def test_a_plan_expects_a_time_at_a_measured_rate(m3_here: M3, tiny_m3: Path, tmp_path: Path) -> None:
    rows = [{"name": f"n{number}", "body": "Some words of a text. " * (1 + number % 90)} for number in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ("a.jsonl", "--model", tiny_m3, "--shard-size", "16K", "--id-field", "")
    planned = json.loads(m3_here("plan", *words, "--json").stdout)
    assert planned["tokens_per_second"] > 1000
    assert planned["seconds"] > planned["tokens"] / planned["tokens_per_second"]
    assert planned["fields"] == {"id": None, "title": None, "text": "body"}
    shown = m3_here("plan", *words).stdout
    assert re.search(r"time +about \d+ s at [\d,]+ tokens/s", shown)
    assert "id from file name and position, text from 'body'" in shown
    assert m3_here("encode", *words).returncode == 0
    assert "time " not in m3_here("plan", *words).stdout, "nothing is left to do"


@pytest.mark.parametrize(
    "flags",
    [("--title-sep", " "), ("--max-row-bytes", "1M"), ("--dedupe",), ("--since-run", "old.m3")],
    ids=lambda flags: flags[0],
)
def test_a_plan_has_the_fingerprint_of_the_run(encode: M3, m3_here: M3, flags: tuple[str, ...]) -> None:
    write("a.jsonl", "1", "2")
    assert encode("a.jsonl", "--out", "old.m3").returncode == 0
    plain = json.loads(encode("a.jsonl", "--json", command="plan").stdout)
    planned = json.loads(encode("a.jsonl", *flags, "--json", command="plan").stdout)
    assert planned["fingerprint"] != plain["fingerprint"]
    assert encode("a.jsonl", *flags).returncode == 0
    run = json.loads(m3_here("info", "a.m3", "--json").stdout)["run"]
    assert run["fingerprint"] == planned["fingerprint"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--id", "1", "--text", "--input", "-"), "--input -: standard input is not searched"),
        (("--id", "1", "--input", "a.jsonl"), "--input a.jsonl needs --text"),
        (("--id", "1", "--truncated"), "--truncated and --id 1"),
        (("--text",), "--text and --input need --id"),
    ],
)
def test_info_refuses_what_cannot_be_meant(encode: M3, m3_here: M3, flags: tuple[str, ...], message: str) -> None:
    write("a.jsonl", "1")
    assert encode("a.jsonl").returncode == 0
    refused = m3_here("info", "a.m3", *flags)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


def test_info_finds_a_text_in_one_file_of_several(encode: M3, m3_here: M3) -> None:
    for number in range(3):
        write(f"in/{number}.jsonl", f"a{number}", f"b{number}")
    write("in/3.jsonl.gz", "a3", "b3")
    assert encode("in", "--out", "o.m3", "--max-length", 32).returncode == 0
    Path("in").rename("moved")
    Path("one.jsonl").write_bytes(Path("moved/1.jsonl").read_bytes())
    for name in ("one.jsonl", "moved/1.jsonl", "moved"):
        found = m3_here("info", "o.m3", "--id", "b1", "--text", "--json", "--input", name)
        assert found.returncode == 0, found.stderr
        assert " ".join(chunk["text"].strip() for chunk in json.loads(found.stdout)) == f"b1 {LONG}".strip()
    assert m3_here("info", "o.m3", "--id", "b3", "--text", "--input", "moved").returncode == 0
    refused = m3_here("info", "o.m3", "--id", "a1", "--text", "--input", "moved/3.jsonl.gz")
    assert refused.returncode == 10
    assert "the document is in 1.jsonl" in refused.stderr
    assert "name that file, name the folder with all 4 files of the input, or drop --text" in refused.stderr
    refused = m3_here("info", "o.m3", "--id", "a3", "--text", "--input", "moved/3.jsonl.gz")
    assert "name the folder with all 4 files" in refused.stderr
    assert "--out" not in refused.stderr
    changed = Path("one.jsonl").read_text().replace("word", "worm")
    Path("one.jsonl").write_text(changed)
    refused = m3_here("info", "o.m3", "--id", "b1", "--text", "--input", "one.jsonl")
    assert "1.jsonl has changed since o.m3 was made from it" in refused.stderr


def test_a_folder_that_an_inherited_option_left_incomplete_names_the_command_for_the_rest(
    encode: M3, m3_here: M3, tmp_path: Path
) -> None:
    """The command is typed as it is printed, and the trial's vectors are reused."""
    write("my data.jsonl", *"abcde")
    flags = ("--max-length", 24, "--dtype", "float32", "--prefix", "p: ", "--out", "old.m3")
    assert encode("my data.jsonl", *flags, "--limit", 2).returncode == 0
    assert "for the rest" not in encode("my data.jsonl", "--out", "old.m3", "--limit", 2).stderr
    done = encode("my data.jsonl", "--out", "old.m3")
    assert done.returncode == 0
    line = next(line for line in done.stderr.splitlines() if "for the rest" in line)
    said, command = line.split("; for the rest: ")
    assert said.endswith("old.m3 was begun with --limit 2 and has no more than that")
    words = shlex.split(command)
    assert words[:2] == ["m3", "encode"]
    rest = m3_here(*words[1:], "--progress", "log")
    assert rest.returncode == 0, rest.stderr
    assert re.search(r"taken over +2 documents", rest.stderr), rest.stderr
    assert json.loads(m3_here("info", "NEW.m3", "--json").stdout)["counts"]["documents"] == 5

    more = encode("my data.jsonl", "--out", "old.m3", "--limit", 3)
    assert more.returncode == 10
    assert "--since-run old.m3" in more.stderr
    assert more.stderr.rstrip().endswith("--limit 3")


def test_a_limit_that_left_nothing_out_is_not_spoken_of(encode: M3) -> None:
    write("a.jsonl", *"ab")
    assert encode("a.jsonl", "--limit", 5).returncode == 0
    assert "for the rest" not in encode("a.jsonl").stderr


def test_outputs_that_were_not_typed_again_are_named(encode: M3) -> None:
    write("a.jsonl", *"ab")
    assert encode("a.jsonl", "--outputs", "dense").returncode == 0
    done = encode("a.jsonl")
    assert done.returncode == 0
    assert "a.m3 was begun with --outputs dense" in done.stderr
    assert "for the rest: m3 encode a.jsonl --out NEW.m3" in done.stderr
    assert "--since-run" not in done.stderr


def test_a_run_that_goes_on_says_what_its_limit_leaves_out(encode: M3, tmp_path: Path) -> None:
    write("a.jsonl", *"abcde")
    assert encode("a.jsonl", "--limit", 4, "--shard-size", 600).returncode == 0
    (tmp_path / "a.m3/_m3/manifest.json").unlink()
    (tmp_path / "a.m3/_m3/done/shard-0000000.json").unlink()
    done = encode("a.jsonl", "--progress", "log")
    assert done.returncode == 0
    assert "a.m3 was begun with --limit 4" in done.stderr


def test_outputs_that_a_checkpoint_does_not_give_are_left_out_by_name_only(
    m3_here: M3, tiny_m3: Path, tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    for path in tiny_m3.iterdir():
        if not path.name.endswith("_linear.pt"):
            (tmp_path / "bare" / path.name).symlink_to(path)
    write("a.jsonl", "1")
    for command in ("encode", "plan"):
        done = m3_here(command, "a.jsonl", "--model", "bare")
        assert (done.returncode, done.stdout) == (5, "")
        assert "bare has no head for sparse and colbert (no sparse_linear.pt)" in done.stderr
        assert "name the outputs that it gives with --outputs dense" in done.stderr
    assert not Path("a.m3").exists()
    assert m3_here("encode", "a.jsonl", "--model", "bare", "--outputs", "dense").returncode == 0
    assert m3_here("encode", "a.jsonl", "--model", "bare").returncode == 0, "the folder has chosen"
    done = m3_here("search", "a.m3", "--model", "bare", "--queries", "words", "-k", 1)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
