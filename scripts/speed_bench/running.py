"""Starts contenders one after the other, each in a process of its own, and finds what runs here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from speed_bench.records import Found, Group

SCRIPTS = Path(__file__).resolve().parent.parent
WORK = SCRIPTS.parent / ".cache" / "bench"
"where nothing else is said: exports, corpora and outputs"
NEEDS = {
    "FlagEmbedding": ("FlagEmbedding",),
    "sentence-transformers": ("sentence_transformers",),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "OpenVINO": ("openvino", "onnxruntime", "onnx", "onnxscript"),
}
"packages by kind of contender; OpenVINO reads what onnx's export has made"


def find_missing(contender: str) -> list[str]:
    """Return the packages that a contender needs and that are not installed."""
    return [package for package in NEEDS.get(contender.split(maxsplit=1)[0], ()) if find_spec(package) is None]


def say(line: str) -> None:
    """Tell people how far it is."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def open_work(parent: Path) -> Iterator[Path]:
    """Give a folder that goes with all that is in it."""
    folder = parent / f"run-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class ContenderFailed(Exception):
    """A contender's process ended with an error."""


class Contest:
    """The texts on which contenders are measured, and where their exports lie."""

    def __init__(self, model: Path, groups: Sequence[Group], *, cache: Path, device: str = "cpu") -> None:
        self._model, self._cache, self._device = model, cache, device
        self._groups = json.dumps([asdict(group) for group in groups])

    def ask(self, name: str) -> Any:
        """Return what the process of a contender prints.

        Raises:
            ContenderFailed: it ended with an error.
        """
        command = [sys.executable, "-m", "speed_bench.contender", self._model, name, self._cache, self._device]
        paths = [str(SCRIPTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(
            list(map(str, command)),
            input=self._groups,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        if done.returncode:
            raise ContenderFailed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return json.loads(done.stdout.strip().splitlines()[-1])

    def measure(self, name: str) -> list[Found] | str:
        """Measure a contender on each group; a word where it cannot run."""
        if missing := find_missing(name):
            say(f"{name}: skipped, {', '.join(missing)} not installed")
            return f"skipped: {', '.join(missing)} not installed"
        try:
            if name.split(maxsplit=1)[0] in ("onnxruntime", "OpenVINO"):
                self.ask("export")
            found = [Found(**each) for each in self.ask(name)]
        except ContenderFailed as error:
            say(f"{name}: failed, {error}")
            return f"failed: {error}"
        say(f"{name}: {sum(each.seconds for each in found):.1f} s")
        return found
