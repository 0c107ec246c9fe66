"""The job in this process, with a model that is loaded once: what many runs of a few shards can afford."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from m3cli.cli.app import run
from m3cli.config import EncodeRequest, Format
from m3cli.encoder import model, tokenizer
from m3cli.jobs.encode.command import encode_corpus
from m3cli.progress import Progress
from tests.conftest import Completed, load_once
from tests.functional.corpora import FORMATS, SHARD_BYTES, Encode, write_corpus

EncodeWith = Callable[..., int]


@pytest.fixture(scope="session")
def _loaded_once() -> Iterator[None]:
    """Model and tokenizer are loaded by the first run only."""
    with load_once(model, tokenizer):
        yield


@pytest.fixture(scope="session")
def encode_with(tiny_m3: Path, _loaded_once: None) -> EncodeWith:
    """`m3 encode` of some inputs into a folder, as `SETTINGS` say or as they are overruled."""

    def encode(*inputs: Path, out: Path, **settings: Any) -> int:
        options = {
            "model": str(tiny_m3),
            "shard_size": SHARD_BYTES,
            "max_length": 24,
            "dtype": "float32",
            "device": "cpu",
            **settings,
        }
        request = EncodeRequest(inputs=tuple(map(str, inputs)), out=str(out), **options)
        return encode_corpus(request, progress=Progress("none"))

    return encode


@pytest.fixture
def m3_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], _loaded_once: None
) -> Callable[..., Completed]:
    """The command line as a whole, in `tmp_path`, but in this process."""
    monkeypatch.chdir(tmp_path)

    def m3_here(*arguments: object) -> Completed:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        shown = capfd.readouterr()
        return Completed([*map(str, arguments)], code, shown.out, shown.err)

    return m3_here


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory, encode_with: EncodeWith) -> dict[Format, Encode]:
    """The job by format, on one corpus of a few shards with long, short and bad rows."""
    corpus = write_corpus(tmp_path_factory.mktemp("input") / "corpus.jsonl")

    def encoder(chosen: Format) -> Encode:
        return lambda out: encode_with(corpus, out=out, format=chosen)

    return {chosen: encoder(chosen) for chosen in FORMATS}
