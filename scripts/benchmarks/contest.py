"""Run contenders and the real `m3 encode`, each in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1]
WORK = SCRIPTS.parent / ".cache" / "bench"
"default folder of exports, corpora and outputs"
NEEDS = {
    "FlagEmbedding": ("FlagEmbedding",),
    "sentence-transformers": ("sentence_transformers",),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "OpenVINO": ("openvino", "onnxruntime", "onnx", "onnxscript"),
    "OpenVINO int8": ("openvino", "nncf", "onnxruntime", "onnx", "onnxscript"),
}
"packages by kind of contender; OpenVINO reads the ONNX export"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Texts that are run and timed together."""

    texts: list[str]
    lengths: list[int]
    "tokens of each, <s> and </s> included, cut to what the model takes"
    batch: int | None = None
    "texts in a peer's batch, instead of the number in its name"
    seconds: float = 0.0
    "how long it is run, again and again; the median counts"

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Result of one run over a group."""

    positions: int
    "tokens and padding that the model ran"
    stages: dict[str, float] = field(default_factory=dict)
    "seconds by stage"


Runner = Callable[[Group], Made]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Measurements of a contender on a group."""

    seconds: float
    positions: int
    stages: dict[str, float]
    peak_bytes: int
    "most memory that the process had held by then"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A run of `m3 encode`."""

    wall_seconds: float
    "from process start to exit"
    metrics: dict[str, Any]
    "of _m3/metrics.json"


class CommandFailed(Exception):
    """A command of m3 or a contender ended with an error."""


def run_m3(*arguments: str, environment: dict[str, str] | None = None) -> float:
    """Run a command of m3 and return the seconds from process start to exit.

    Raises:
        CommandFailed: its exit code is not 0.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "m3cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise CommandFailed(done.stderr.strip())
    return seconds


def encode(corpus: Path, out: Path, *flags: str, environment: dict[str, str] | None = None) -> Encoded:
    """Run `m3 encode` and read the folder's metrics."""
    words = ("encode", str(corpus), "--out", str(out), "--progress", "none", *flags)
    seconds = run_m3(*words, environment=environment)
    metrics = json.loads((out / "_m3" / "metrics.json").read_text(encoding="utf-8"))
    return Encoded(wall_seconds=seconds, metrics=metrics)


def find_missing(contender: str) -> list[str]:
    """Return the packages that a contender needs and that are not installed."""
    needs = NEEDS.get(" ".join(contender.split()[:2])) or NEEDS.get(contender.split(maxsplit=1)[0], ())
    return [package for package in needs if find_spec(package) is None]


def read_host_peak() -> int:
    """Return the most memory this process has held, in bytes.

    ru_maxrss alone may be the parent's: Linux keeps it over fork and exec.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def say(line: str) -> None:
    """Print one line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def open_work(parent: Path) -> Iterator[Path]:
    """Yield a folder that is removed at the end."""
    folder = parent / f"run-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Contest:
    """The texts on which contenders are measured, and the folder of their exports."""

    def __init__(self, model: Path, groups: Sequence[Group], *, cache: Path, device: str = "cpu") -> None:
        self._model, self._cache, self._device = model, cache, device
        self._groups = json.dumps([asdict(group) for group in groups])

    def ask(self, name: str, environment: Mapping[str, str] | None = None) -> Any:
        """Return the output of a contender's process, with `environment` added to this one's.

        Raises:
            CommandFailed: it ended with an error.
        """
        command = [sys.executable, "-m", "benchmarks.contender", self._model, name, self._cache, self._device]
        paths = [str(SCRIPTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        more = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(environment or {})}
        done = subprocess.run(
            list(map(str, command)),
            input=self._groups,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **more},
        )
        if done.returncode:
            raise CommandFailed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return json.loads(done.stdout.strip().splitlines()[-1])

    def measure(self, name: str, environment: Mapping[str, str] | None = None) -> list[Found] | str:
        """Measure a contender on each group; return the reason if it cannot run."""
        if missing := find_missing(name):
            say(f"{name}: skipped, {', '.join(missing)} not installed")
            return f"skipped: {', '.join(missing)} not installed"
        try:
            if name.split(maxsplit=1)[0] in ("onnxruntime", "OpenVINO"):
                self.ask("export")
            found = [Found(**each) for each in self.ask(name, environment)]
        except CommandFailed as error:
            say(f"{name}: failed, {error}")
            return f"failed: {error}"
        say(f"{name}: {sum(each.seconds for each in found):.1f} s")
        return found
