"""The house itself: what README, names, sizes and folders promise is so."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from write_readme_parts import NoMarkers, find_help_parts, read_first_line, write_parts

from m3cli.cli.app import app
from tests.conftest import ROOT

MAX_LINES = 600
TOP_LEVEL = {"m3cli", "tests", "scripts", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
EMPTY_NAMES = {"util", "utils", "helper", "helpers", "common", "base", "core", "misc"}
# Tests of more than one module: the command as a whole, numbers against another program, a device, and scripts/.
SHARED_TESTS = {"functional", "parity", "scripts", "gpu", "exporters", "live"}
HEAVY = {"torch", "pyarrow", "transformers", "tokenizers", "safetensors", "scipy", "huggingface_hub"}

MODULES = sorted((ROOT / "m3cli").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def list_files() -> list[str]:
    """All files that are in git, or would be with the next `git add`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [path for path in listed.split("\0") if path and (ROOT / path).exists()]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_shows_modules_and_help_as_they_are() -> None:
    assert readme() == write_parts(readme()), "README.md is out of date; run scripts/write_readme_parts.py"


def test_readme_shows_the_help_of_every_command() -> None:
    missing = {"m3", *(f"m3 {command}" for command in COMMANDS)} - set(find_help_parts(readme()))
    assert not missing, f"put <!-- help: NAME --> and <!-- /help --> for {missing} into README.md"


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(NoMarkers):
        write_parts(readme().replace("<!-- modules -->", ""))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_flag_has_help(command: str) -> None:
    assert COMMANDS[command].help
    assert [flag.name for flag in COMMANDS[command].params if not flag.help] == []


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_module_opens_with_its_sentence_and_is_small(module: Path) -> None:
    assert re.fullmatch(r".{10,}\.", read_first_line(module)), "the first line of the docstring is a sentence"
    num_lines = len(module.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES


def test_no_module_has_an_empty_name() -> None:
    assert [name(path) for path in MODULES if {path.stem, path.parent.name} & EMPTY_NAMES] == []


def mirrored(test: Path) -> list[Path]:
    """Where the module of a test may lie: its name may begin with its rooms', and a package is a module too.

    At the top a document has its test as well: test_readme.py.
    """
    *rooms, _ = test.relative_to(ROOT / "tests").parts
    stem = test.stem.removeprefix("test_")
    names = {stem, stem.removeprefix("_".join(rooms) + "_"), *(stem.removeprefix(f"{room}_") for room in rooms)}
    folder = ROOT.joinpath("m3cli", *rooms)
    places = [folder / place for stem in names for place in (f"{stem}.py", f"{stem}/__init__.py")]
    return places if rooms else [*places, ROOT / f"{stem.upper()}.md"]


@pytest.mark.parametrize("test", [test for test in TESTS if test != Path(__file__)], ids=name)
def test_every_test_mirrors_a_module(test: Path) -> None:
    room = test.relative_to(ROOT / "tests").parts[0]
    assert room in SHARED_TESTS or any(path.exists() for path in mirrored(test)), (
        f"there is no {' or '.join(name(path) for path in mirrored(test))}"
    )


def test_top_level_holds_only_what_belongs_there() -> None:
    names = {path.partition("/")[0] for path in list_files()}
    assert {top for top in names if not top.startswith(".")} == TOP_LEVEL


def test_no_file_names_a_machine_or_a_package_host() -> None:
    # Spelt in pieces, or this file would be found.
    paths = "|".join(f"/{folder}/" for folder in ("work", "opt", "root", "mnt", r"home/\w+"))
    hosts = "|".join(("py" + r"pi\.org", "python" + "hosted", r"download\.py" + "torch", "index" + "-url"))
    # An address or a name of ours may go on with the same word: .../work/, _m3/work/.
    telling = re.compile(rf"(?<![\w.*/-])(?:{paths})|{hosts}")
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in list_files()
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if telling.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    code = "import sys; from m3cli.cli.app import run; run(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert HEAVY.isdisjoint(done.stderr.split())


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*")), ids=name)
def test_every_script_says_what_it_does(script: Path) -> None:
    if script.is_dir() or script.suffix == ".txt":
        return
    text = script.read_text(encoding="utf-8")
    if script.suffix == ".py":
        assert ast.get_docstring(ast.parse(text))
    else:
        assert re.match(r"#!/usr/bin/env bash\n# [A-Z].+\n(.*\n)+?set -euo pipefail\n", text)
    assert script.stat().st_mode & 0o111, "scripts are started by their name"
