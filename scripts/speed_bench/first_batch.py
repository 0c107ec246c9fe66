"""Runs m3 and tells on stderr how long after START (seconds since 1970) its first batch goes into the model.

    python first_batch.py START encode ...

Nothing is imported sooner or later than m3 alone would: the function is wrapped when its module comes.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULE, FUNCTION = "m3cli.encoder.encode", "run_model"


class Watcher(importlib.abc.MetaPathFinder):
    """Wraps a function of a module as soon as that is imported."""

    def __init__(self, start: float) -> None:
        self._start = start

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ARG002
        """Find the module with the others' help, and make it tell."""
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_wrap(module: ModuleType) -> None:
            load(module)
            setattr(module, FUNCTION, self._wrap(getattr(module, FUNCTION)))

        spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return spec

    def _wrap(self, function: Any) -> Any:
        waiting = True

        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal waiting
            if waiting:
                waiting = False
                print(f"first batch after {time.time() - self._start:.3f}", file=sys.stderr)
            return function(*arguments, **named)

        return wrapped


if __name__ == "__main__":
    sys.meta_path.insert(0, Watcher(float(sys.argv.pop(1))))
    # Beside this file lie modules with names of packages.
    del sys.path[0]
    from m3cli.__main__ import main

    main()
