"""Publish a checkpoint folder in one step, and recognise a complete one.

``demo_model.json``, written last, holds the *recipe*: everything that the bytes depend on. Nothing here imports torch,
so that a complete folder is reported at once.
"""

import contextlib
import fcntl
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

Weights = Literal["safetensors", "bin"]
Recipe = Mapping[str, str | int | bool]

RECIPE_FILE = "demo_model.json"
HEADS_FILE = Path(__file__).with_name("heads.json")  # source of the demo model's heads
WEIGHT_FILES: dict[Weights, str] = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
OTHER_FILES = (
    "1_Pooling/config.json",
    "colbert_linear.pt",
    "config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_bert_config.json",
    "sparse_linear.pt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


class DemoModelError(Exception):
    """An error that the user can fix; its text is the one line that is shown."""


def say(line: str) -> None:
    """Print one line of progress on standard error."""
    print(f"make_demo_model: {line}", file=sys.stderr, flush=True)


def is_complete(folder: Path, recipe: Recipe, *, weights: Weights) -> bool:
    """Return whether ``folder`` holds every file of the checkpoint that ``recipe`` describes."""
    return _read_recipe(folder) == recipe and all(
        (folder / name).is_file() for name in (*OTHER_FILES, WEIGHT_FILES[weights])
    )


def check_replaceable(folder: Path) -> None:
    """Raise if ``folder`` exists and was not made by this script."""
    if folder.exists() and _read_recipe(folder) is None and (not folder.is_dir() or any(folder.iterdir())):
        raise DemoModelError(f"{folder} exists and was not made by this script: remove it or name another folder")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock ``out`` against other builds; the lock file stays, since removing it would admit two of them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def published(out: Path, recipe: Recipe) -> Iterator[Path]:
    """Yield a new sibling folder; it replaces ``out`` if the block succeeds and is removed if it raises.

    The sibling's name is fixed, so that the next build removes what a killed one left.
    """
    building, replaced = (out.with_name(f".{out.name}.{state}") for state in ("building", "replaced"))
    try:
        _clear(building, replaced)
        building.mkdir()
        yield building
        write_json(building / RECIPE_FILE, recipe)
        if out.exists():
            out.rename(replaced)
        building.rename(out)
    finally:
        _clear(building, replaced)


def write_json(path: Path, value: object) -> None:
    """Write one JSON file in the hub's style; create its folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _read_recipe(folder: Path) -> object:
    try:
        return json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _clear(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)
