"""Token ids of texts, as `AutoTokenizer` produces them, by its Rust backend.

transformers 5 rebuilds XLM-R's pipeline and ignores the one in `tokenizer.json`, which transformers 4 used; their
tokens of "trailing  " differ. So the hash of the serialised backend is part of a folder's config.

Building the tokenizer with transformers takes seconds. So the serialised backend is stored in a per-user cache, keyed
by the tokenizer files and the versions of the libraries. A cache file starts with its hash and is rebuilt if that is
wrong.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

from m3cli.encoder.checkpoint import DOWNLOAD_AGAIN, TOKENIZER_FILES, Checkpoint
from m3cli.errors import ModelError, first_line

SLICE_TEXTS = 1024
"tokenised together: all other threads wait while the encodings of a slice are freed"
_HASH_LENGTH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A loaded tokenizer without truncation and padding, `<s> ... </s>` around each text."""

    backend: Backend = field(repr=False)
    serialisation_hash: str
    "xxh3_128 (hex) of the backend's own serialisation"
    special_ids: frozenset[int]
    "ids of <s> </s> <pad> <unk>, which have no lexical weight"
    bos_id: int
    eos_id: int

    def encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Return the token ids of each text with `<s>` and `</s>`, computed on all cores."""
        return [
            np.array(encoding.ids, dtype=np.int32)
            for start in range(0, len(texts), SLICE_TEXTS)
            for encoding in self.backend.encode_batch_fast(texts[start : start + SLICE_TEXTS])
        ]

    def token(self, token_id: int) -> str:
        """Return the string of a token id."""
        return str(self.backend.id_to_token(token_id))


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Load a checkpoint's tokenizer, from the per-user cache if possible.

    Raises:
        ModelError: the tokenizer cannot be built, does not begin with `<s>` and end with `</s>`, or has more tokens
            than the model has embeddings.
    """
    cached = _cache_path(checkpoint)
    serialised = _read_cache(cached)
    if serialised is None:
        serialised = _build_backend(checkpoint)
        _write_cache(cached, serialised)
    backend = Backend.from_str(serialised)
    found = {name: backend.token_to_id(name) for name in ("<s>", "</s>", "<pad>", "<unk>")}
    specials = {name: token_id for name, token_id in found.items() if token_id is not None}
    if len(specials) < len(found) or [specials["<s>"], specials["</s>"]] != backend.encode("").ids:
        raise ModelError(
            f"{checkpoint.folder}: its tokenizer does not put <s> and </s> around a text as XLM-R's does; "
            f"{DOWNLOAD_AGAIN}"
        )
    if backend.get_vocab_size() > checkpoint.vocab_size:
        # On CUDA an id without an embedding breaks the process's context, and every later call fails.
        raise ModelError(
            f"{checkpoint.folder}: its tokenizer has {backend.get_vocab_size():,} tokens, and config.json says "
            f"vocab_size {checkpoint.vocab_size:,}; {DOWNLOAD_AGAIN}"
        )
    return Tokenizer(
        backend=backend,
        serialisation_hash=xxhash.xxh3_128_hexdigest(serialised.encode()),
        special_ids=frozenset(specials.values()),
        bos_id=specials["<s>"],
        eos_id=specials["</s>"],
    )


def _build_backend(checkpoint: Checkpoint) -> str:
    from transformers import AutoTokenizer  # noqa: PLC0415  4 s, only where the cache has nothing

    try:
        # The folder is local; remote code never runs.
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
        backend: Backend = tokenizer.backend_tokenizer
    except Exception as error:  # the Rust backend raises plain ones, transformers nearly anything for a corrupt file
        raise ModelError(
            f"{checkpoint.folder}: its tokenizer cannot be loaded: {first_line(error)}; {DOWNLOAD_AGAIN}"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return str(backend.to_str())


def _cache_path(checkpoint: Checkpoint) -> Path:
    digest = xxhash.xxh3_128()
    for name in (*TOKENIZER_FILES, "config.json"):
        path = checkpoint.folder / name
        digest.update(f"{name}\0{path.exists()}\0".encode())
        if path.exists():
            digest.update(path.read_bytes())
    digest.update(f"{version('transformers')}\0{version('tokenizers')}".encode())
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "m3cli" / "tokenizers" / f"{digest.hexdigest()}.json"


def _read_cache(path: Path) -> str | None:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    stated, serialised = content[:_HASH_LENGTH], content[_HASH_LENGTH:]
    return serialised if stated == xxhash.xxh3_128_hexdigest(serialised.encode()) else None


def _write_cache(path: Path, serialised: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with path.open("x", encoding="utf-8") as file:  # a new file: never writes to the target of a link
            file.write(xxhash.xxh3_128_hexdigest(serialised.encode()) + serialised)
    except OSError:
        pass  # without a cache (read-only home) m3 is only slower
