"""What tests share: checkpoints on disk, built once a checkout, and the real command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"

# The tokenizer cache of tests lives with the checkout, not in the home of whoever runs them.
os.environ["XDG_CACHE_HOME"] = str(CACHE)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("M3_MODEL", None)

Completed = subprocess.CompletedProcess[str]


def build_model(name: str, *arguments: str) -> Path:
    """Build a checkpoint with the project's own script; quick if it has been built before."""
    folder = CACHE / "models" / name
    script = ROOT / "scripts" / "make_demo_model.py"
    subprocess.run([sys.executable, script, folder, *arguments], check=True, capture_output=True)
    return folder


def build_sample() -> Path:
    """Build the multilingual sample corpus with the project's own script; quick if it has been built before."""
    corpus = CACHE / "sample.jsonl"
    if not corpus.exists():
        script = ROOT / "scripts" / "make_sample_corpus.py"
        subprocess.run([sys.executable, script, corpus], check=True, capture_output=True)
    return corpus


@pytest.fixture(scope="session")
def tiny_m3() -> Path:
    """A random checkpoint, 2 layers, 64 wide, real tokenizer, 8,194 positions, all three heads."""
    return build_model("random-2x64", "--random", "--layers", "2", "--hidden", "64")


@pytest.fixture(scope="session")
def demo_m3() -> Path:
    """The demo checkpoint: multilingual-e5-small with M3 heads, 514 positions."""
    return build_model("demo", "--corpus", str(build_sample()))


@pytest.fixture
def m3(tmp_path: Path) -> Callable[..., Completed]:
    """Run the real command in a subprocess, in `tmp_path`."""

    def run(*arguments: object, cwd: Path = tmp_path, stdin: bytes | None = None, **environment: str) -> Completed:
        done = subprocess.run(
            [sys.executable, "-m", "m3cli", *map(str, arguments)],
            cwd=cwd,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            env={**os.environ, **environment},
            capture_output=True,
            check=False,
            timeout=300,
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run
