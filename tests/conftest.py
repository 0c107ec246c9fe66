"""What tests share: checkpoints on disk, built once a checkout, and the real command."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"

# The tokenizer cache of tests lives with the checkout, not in the home of whoever runs them.
os.environ["XDG_CACHE_HOME"] = str(CACHE)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("M3_MODEL", None)

# A shell ignores Ctrl-C in what it starts in the background, and commands that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# For a long search by hand: pytest --hypothesis-profile=search. Whole runs of scripts/test take hypothesis' own "ci".
hypothesis.settings.register_profile("search", max_examples=2000, deadline=None)

Completed = subprocess.CompletedProcess[str]


@contextmanager
def build_alone() -> Iterator[None]:
    """Hold a lock of this checkout: the test processes share what they build."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


PREBUILT = "M3_TEST_FILES"
"""environment variable: a folder with checkpoints and sample.jsonl, which are taken as they are. Building them needs
packages that a bare GPU machine lacks; scripts/bench gpu makes such a folder"""


def find_prebuilt(name: str) -> Path | None:
    """Return a checkpoint or a corpus of the folder in the environment; None: it is to be built."""
    if not (folder := os.environ.get(PREBUILT)):
        return None
    path = Path(folder, name).absolute()
    if not path.exists():
        pytest.skip(f"{PREBUILT}={folder} has no {name}")
    return path


def build_model(name: str, *arguments: str) -> Path:
    """Build a checkpoint with the project's own script; quick if it has been built before."""
    if prebuilt := find_prebuilt(name):
        return prebuilt
    folder = CACHE / "models" / name
    script = ROOT / "scripts" / "make_demo_model.py"
    with build_alone():
        subprocess.run([sys.executable, script, folder, *arguments], check=True, capture_output=True)
    return folder


def build_sample() -> Path:
    """Build the multilingual sample corpus with the project's own script; quick if it has been built before."""
    if prebuilt := find_prebuilt("sample.jsonl"):
        return prebuilt
    corpus = CACHE / "sample.jsonl"
    with build_alone():
        if not corpus.exists():
            script = ROOT / "scripts" / "make_sample_corpus.py"
            subprocess.run([sys.executable, script, corpus], check=True, capture_output=True)
    return corpus


@contextmanager
def load_once(*modules: ModuleType) -> Iterator[None]:
    """Let `load_model` and `load_tokenizer`, wherever these modules have them, load each checkpoint once."""
    kept: dict[Any, Any] = {}

    def once(load: Callable[..., Any]) -> Callable[..., Any]:
        def cached(checkpoint: Any, **settings: Any) -> Any:
            key = load.__name__, checkpoint.folder, *settings.values()
            if key not in kept:
                kept[key] = load(checkpoint, **settings)
            return kept[key]

        return cached

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name in ("load_model", "load_tokenizer"):
                if hasattr(module, name):
                    patch.setattr(module, name, once(getattr(module, name)))
        yield


@pytest.fixture(scope="session")
def tiny_m3() -> Path:
    """A random checkpoint, 2 layers, 64 wide, real tokenizer, 8,194 positions, all three heads."""
    return build_model("random-2x64", "--random", "--layers", "2", "--hidden", "64")


@pytest.fixture(scope="session")
def demo_m3() -> Path:
    """The demo checkpoint: multilingual-e5-small with M3 heads, 514 positions."""
    return build_model("demo")


@pytest.fixture(scope="session")
def cross_encoder(tiny_m3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random cross-encoder in the layout of BAAI/bge-reranker-v2-m3: 2 layers, 64 wide, one label, real tokenizer."""
    import torch  # noqa: PLC0415  seconds, only for tests that need it
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("models") / "cross-encoder"
    torch.manual_seed(0)
    config = XLMRobertaConfig.from_pretrained(tiny_m3)
    config.num_labels = 1
    config.initializer_range = 0.2  # of 0.02, as by default, all logits would be nearly alike
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tiny_m3 / name).exists():
            shutil.copy(tiny_m3 / name, folder / name)
    return folder


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
