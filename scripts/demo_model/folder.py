"""How the checkpoint's folder comes to be in one step, and how a whole one is told from a half-built or another one.

``demo_model.json``, written last, holds the *recipe*: everything the bytes depend on. Nothing here needs torch, so that
"it is there already" is said at once.
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from demo_model.progress import DemoModelError

Weights = Literal["safetensors", "bin"]
Recipe = Mapping[str, str | int | bool]

RECIPE_FILE = "demo_model.json"
HEADS_FILE = Path(__file__).with_name("heads.json")  # no part of the checkpoint: what its heads are made of
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


def is_whole(folder: Path, recipe: Recipe, *, weights: Weights) -> bool:
    """Say whether ``folder`` holds every file of the checkpoint that ``recipe`` describes."""
    return _read_recipe(folder) == recipe and all(
        (folder / name).is_file() for name in (*OTHER_FILES, WEIGHT_FILES[weights])
    )


def check_replaceable(folder: Path) -> None:
    """Refuse to build over anything that this script has not made."""
    if folder.exists() and _read_recipe(folder) is None and (not folder.is_dir() or any(folder.iterdir())):
        raise DemoModelError(f"{folder} exists and was not made by this script: remove it or name another folder")


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep other builds of ``out`` waiting; the lock's file stays, as removing it would let two of them in."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def published(out: Path, recipe: Recipe) -> Iterator[Path]:
    """Give a new sibling folder to fill; it takes the place of ``out`` if the block ends well, and goes if it does not.

    The sibling's name is fixed, so that the next build clears what a killed one has left.
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
    """Write one JSON file as the hub's are written, making its folder where it has none."""
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
