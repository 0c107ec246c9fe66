"""What people type by habit: completion, help, other names of options, what other programs call them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Completed
from tests.functional.test_terminal import terminal

M3 = Callable[..., Completed]


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """Surroundings of a shell with the command m3, and a home folder of its own."""
    command = tmp_path / "bin" / "m3"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m m3cli "$@"\n')
    command.chmod(0o755)
    (tmp_path / ".bashrc").write_text("PS1='$ '\n")
    path = f"{command.parent}:{os.environ['PATH']}"
    return {"HOME": str(tmp_path), "PATH": path, "PYTHONPATH": str(ROOT), "BASH_SILENCE_DEPRECATION_WARNING": "1"}


@pytest.mark.slow
def test_a_bash_completes_commands_options_and_choices(tmp_path: Path, home: dict[str, str]) -> None:
    (tmp_path / "corpus.jsonl").touch()
    with terminal(tmp_path, program=("bash", "-i"), **home) as shell:
        shell.wait_for("$ ")
        shell.type("m3 --install-completion\n")
        shell.wait_for("restart the terminal")
        shell.type("source ~/.bashrc\n")
        for typed, completed in (
            ("m3 enc\t", "m3 encode "),
            ("corp\t", "corpus.jsonl "),
            ("--dty\t", "--dtype "),
            ("bf\t", "bfloat16 "),
            ("--outputs dense,sp\t", "dense,sparse "),
            ("--progress n\t", "--progress none "),
        ):
            shell.type(typed)
            shell.wait_for(completed)


def test_other_shells_complete_choices_too() -> None:
    for shell, words in (("zsh", "m3 search c.m3 --mode s"), ("fish", "m3 search c.m3 --mode s")):
        done = subprocess.run(
            [sys.executable, "-m", "m3cli"],
            env={
                **os.environ,
                "_M3_COMPLETE": f"complete_{shell}",
                "_TYPER_COMPLETE_ARGS": words,
                "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            },
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "sparse" in done.stdout
        assert "dense" not in done.stdout


def test_help_and_version_in_other_words(m3_here: M3) -> None:
    assert m3_here("help", "encode").stdout == m3_here("encode", "--help").stdout
    assert m3_here("help").stdout == m3_here("--help").stdout
    assert m3_here("-V").stdout == m3_here("--version").stdout
    done = m3_here("help", "encod")
    assert done.returncode == 2
    assert "no command 'encod', only encode, plan" in done.stderr


def test_quiet_prints_errors_only(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "a", "text": "a fox"}\n')
    model = ("--model", tiny_m3, "--dtype", "fp32", "--outputs", "dense")
    done = m3_here("encode", "c.jsonl", *model, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = m3_here("search", "c.m3", "fox", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert m3_here("encode", "d.jsonl", *model, "--quiet").stderr.startswith("m3: ")
    assert m3_here("encode", "c.jsonl", "--quiet", "--progress", "log").returncode == 2
    done = m3_here("encode", "c.jsonl", *model, "--device", "gpu:7", "--out", "e.m3")
    assert done.returncode == 2
    assert "--device cuda:7: " in done.stderr


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("encode c.jsonl --resume", "--resume; the same command again resumes"),
        ("encode c.jsonl --overwrite", "--overwrite; a folder is never overwritten: give another --out"),
        ("encode c.jsonl --batch-size 8", "--batch-size; --max-batch-tokens N limits"),
        ("search c.m3 words --gpu", "--gpu; --device cuda does it"),
        ("info c.m3 --gpu", "--gpu (Possible options: --input)"),
    ],
)
def test_options_of_other_programs_are_answered_with_ours(m3_here: M3, typed: str, said: str) -> None:
    done = m3_here(*typed.split())
    assert done.returncode == 2
    assert done.stderr == f"m3: No such option: {said}" + done.stderr.partition(said)[2]
    assert done.stderr.count("\n") == 1


def test_runs_alone_are_compared(m3_here: M3, tmp_path: Path) -> None:
    orders = {"a": "0123456789", "b": "1023456789", "c": "9876543210", "d": "abcdefghij"}
    for name, order in orders.items():
        lines = [f"q{query} Q0 d{each} 1 {-rank} {name}\n" for query in (1, 2) for rank, each in enumerate(order)]
        (tmp_path / f"{name}.trec").write_text("".join(lines))
    rows = [line.split("\t") for line in m3_here("eval", *(f"{name}.trec" for name in "abcd")).stdout.splitlines()]
    assert rows[0] == ["run", "queries", "overlap@10", "Kendall's tau"]
    assert rows[1:] == [
        ["b.trec", "2", "1.0000", f"{1 - 2 * 1 / 45:.4f}"],
        ["c.trec", "2", "1.0000", "-1.0000"],
        ["d.trec", "2", "0.0000", "nan"],
    ]
    (tmp_path / "e.trec").write_text("q9 Q0 d1 1 1 e\n")
    assert m3_here("eval", "a.trec", "e.trec").returncode == 4


def test_an_id_with_a_typing_error_is_answered_with_near_ones(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    rows = "".join(f'{{"id": "auth/en/00{number}", "text": "a fox"}}\n' for number in range(20, 40))
    (tmp_path / "c.jsonl").write_text(rows)
    assert m3_here("encode", "c.jsonl", "--model", tiny_m3, "--outputs", "dense", "--quiet").returncode == 0
    for typed, near in (
        ("auth/en/003", "auth/en/003"),
        ("Auth/en/0022", "auth/en/0022"),
        ("uth/en/0031", "auth/en/0031"),
    ):
        done = m3_here("info", "c.m3", "--id", typed)
        assert done.returncode == 2
        assert f"no document with id '{typed}'; near ids: '{near}" in done.stderr
    assert "near ids" not in m3_here("info", "c.m3", "--id", "a completely other id").stderr
