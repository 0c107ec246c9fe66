"""Rules of the project: help for everything, quick start-up, sizes, files, words."""

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

from m3cli.cli.app import app
from tests.conftest import ROOT

MAX_LINES = 600
MAX_README_LINES = 250
TOP_LEVEL = {"m3cli", "tests", "scripts", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
EMPTY_NAMES = {"util", "utils", "helper", "helpers", "common", "base", "core", "misc"}
HEAVY = {"torch", "pyarrow", "ray", "transformers", "tokenizers", "safetensors", "scipy", "huggingface_hub"}

MODULES = sorted((ROOT / "m3cli").rglob("*.py"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "m3cli").rglob("*.md")),
    *(ROOT / "scripts").rglob("*.md"),
]
COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
OPTIONS = {
    "encode": """
        --address --colbert-dtype --colbert-pool --colbert-top-k --compression --cpus-per-worker --dedupe --dense-dtype
        --device --dtype --engine --format --gone --gpus-per-worker --help-all --id-field --input-format --keep-fields
        --keep-text --limit --log-file --long-docs --max-batch-tokens --max-length --max-row-bytes --max-runtime
        --max-skipped --mcls --metrics --model --no-space-check --num-workers --out --outputs --overlap --per-file
        --prefix --progress --quiet --revision --shard-size --since-run --split --text-field --title-field --title-sep
        --verify-input --worker -o
    """,
    "plan": """
        --colbert-dtype --colbert-pool --colbert-top-k --compression --dedupe --dense-dtype --device --dtype --format
        --help-all --id-field --input-format --json --keep-fields --keep-text --limit --long-docs --max-length
        --max-row-bytes --mcls --model --out --outputs --overlap --per-file --prefix --revision --shard-size --since-run
        --split --text-field --title-field --title-sep -o
    """,
    "info": "--id --input --json --text --truncated",
    "check": "--device --help-all --json --model --repair --revision --sample --seed",
    "score": """
        --chunks --corpus --device --dtype --explain --help-all --input-format --max-batch-tokens --max-passage-length
        --max-query-length --model --modes --out --passage-field --progress --queries --query-field --quiet --revision
        --weights -o
    """,
    "search": """
        --candidates --candidates-by --device --dtype --format --fusion --help-all --input --input-format --level
        --max-batch-tokens --max-query-length --mode --model --out --progress --queries --query-field --query-id-field
        --query-prefix --quiet --revision --tokenizer --top-k --weights -k -o -q
    """,
    "eval": "--json --measures",
    "rerank": """
        --corpus --device --dtype --help-all --id-field --max-batch-tokens --max-length --model --normalise --out
        --progress --queries --query-field --query-id-field --quiet --revision --text-field --title-field --title-sep
        --top-k -o
    """,
    "export": "--fields --name --no-space-check --out --outputs --progress --quiet --to -o",
    "load": "--fields --left-out --name --outputs --progress --quiet --since --to",
    "convert": "--out --progress --quiet --revision --to -o",
    "help": "",
    "doctor": "--device --help-all --json --model --revision",
}
"of each command, by name"


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def list_files() -> list[str]:
    """All files that are in git, or would be after the next `git add`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [path for path in listed.split("\0") if path and (ROOT / path).exists()]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_flag_has_help(command: str) -> None:
    assert COMMANDS[command].help
    assert [flag.name for flag in COMMANDS[command].params if not flag.help] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_keeps_its_options(command: str) -> None:
    options = [option for option in COMMANDS[command].params if option.param_type_name == "option"]
    assert sorted(name for option in options for name in option.opts) == OPTIONS[command].split()


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_a_module_has_a_docstring_and_a_readable_size(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= MAX_LINES


def test_no_module_has_an_empty_name() -> None:
    assert [name(path) for path in MODULES if {path.stem, path.parent.name} & EMPTY_NAMES] == []


def test_the_readme_is_a_front_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    written_later = {"m3cli/README.md", "m3cli/exporters/README.md", "m3cli/api/README.md"}
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))]
    targets = [(page.parent / link).resolve() for link in links if link and "://" not in link]
    assert [path for path in targets if not path.exists() and name(path) not in written_later] == []


def test_top_level_holds_only_what_belongs_there() -> None:
    names = {path.partition("/")[0] for path in list_files()}
    assert {top for top in names if not top.startswith(".")} == TOP_LEVEL


def test_no_file_names_a_machine_or_a_package_host() -> None:
    # The patterns are written in pieces, or this file would be found.
    paths = "|".join(f"/{folder}/" for folder in ("work", "opt", "root", "mnt", r"home/\w+"))
    hosts = "|".join(("py" + r"pi\.org", "python" + "hosted", r"download\.py" + "torch", "index" + "-url"))
    # A longer path may contain such a folder: .../work/, _m3/work/.
    telling = re.compile(rf"(?<![\w.*/-])(?:{paths})|{hosts}")
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in list_files()
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if telling.search(line) and not line.endswith("not tried here")  # a public address that users need
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
    if script.is_dir() or script.suffix in (".txt", ".md"):
        return
    text = script.read_text(encoding="utf-8")
    if script.suffix == ".py":
        assert ast.get_docstring(ast.parse(text))
    else:
        assert re.match(r"#!/usr/bin/env bash\n# [A-Z].+\n(.*\n)+?set -euo pipefail\n", text)
    assert script.stat().st_mode & 0o111, "scripts are started by their name"


def test_words_that_are_avoided_are_found() -> None:
    page = ROOT / ".cache" / "words.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text("We recommend the option.\nThe value is set" + "tled in ref" + "use_x, be" + "side.\n")
    command = [sys.executable, str(ROOT / "scripts" / "check_words.py"), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    page.unlink()
    assert done.returncode == 1
    assert [line.rpartition(":")[0].rpartition(":")[2] for line in done.stdout.splitlines()] == ["2"] * 3
