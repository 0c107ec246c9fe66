"""Checkpoints in BGE-M3's file layout: find, check, describe and hash them.

Layout (BAAI/bge-m3 on the hub): `config.json` of an XLM-RoBERTa, weights as `model.safetensors` or `pytorch_model.bin`
(or their sharded form with an index), `tokenizer.json`, `sparse_linear.pt`, `colbert_linear.pt`,
`1_Pooling/config.json`. Without the two `.pt` heads a checkpoint has dense vectors only. This module loads no torch.

A corrupt file is an error before anything is loaded from it. A hub cache that another library wrote often lacks the
heads and the pooling: these small files are then downloaded.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import xxhash

from m3cli.config import MAX_LENGTH_CEILING
from m3cli.errors import ModelError, check_reachable, first_line
from m3cli.records import Output

Pooling = Literal["cls", "mean", "lasttoken"]

POSITION_OFFSET = 2
"XLM-R's positions start at padding_idx + 1 = 2 for every sequence, so 8,194 positions hold 8,192 tokens"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.bpe.model",
)
HEAD_FILES: dict[Output, str] = {"sparse": "sparse_linear.pt", "colbert": "colbert_linear.pt"}
POOLING_FILE = "1_Pooling/config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_DOWNLOADED = (
    *("config.json", POOLING_FILE, *TOKENIZER_FILES, *HEAD_FILES.values()),
    *("*.safetensors", "*.index.json", "pytorch_model*.bin"),
)
"files of a hub's repository"
_IGNORED = ("onnx/*", "openvino/*")
_HUB_SECONDS = 10.0
_EDGE = 1 << 20
_HEAD = 200
"bytes read to recognise a Git LFS pointer or an HTML page"
_LFS_POINTER = b"version https://git-lfs"
_HTML = (b"<!doctype html", b"<html")
_LEAST_POSITIONS = POSITION_OFFSET + 3
"<s>, one token and </s>"
_MOST = (1 << 31) - 1
DOWNLOAD_AGAIN = "download the checkpoint again"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Properties of a checkpoint, read from its files without the weights."""

    folder: Path
    name: str
    "hub id, or the folder's name"
    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    num_positions: int
    pad_token_id: int
    layer_norm_eps: float
    pooling: Pooling
    outputs: tuple[Output, ...]
    "dense always, sparse and colbert if the files of their heads exist"
    weight_files: tuple[Path, ...]

    @property
    def max_length(self) -> int:
        """Most tokens of a chunk that the positions allow, <s> and </s> included."""
        return self.num_positions - POSITION_OFFSET

    @property
    def default_max_length(self) -> int:
        """Most tokens of a chunk by default."""
        return min(MAX_LENGTH_CEILING, self.max_length)


def find_checkpoint(model: str, *, revision: str | None = None, download: bool = True, heads: bool = True) -> Path:
    """Return the folder of a checkpoint: a path as is, a hub id from the hub's cache or else downloaded.

    Args:
        model: a folder or a hub id.
        revision: of the hub's repository.
        download: False uses the hub's cache only.
        heads: whether heads and pooling that the cache lacks are downloaded too.

    Raises:
        ModelError: neither a folder nor available from the hub.
    """
    folder = Path(model).expanduser()
    check_reachable(folder, ModelError)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"--model {model} is a file; give the folder that holds config.json and the weights")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(f"--model {model}: no such folder; give a checkpoint folder or a hub id such as BAAI/bge-m3")
    return _fetch_from_hub(model, revision=revision, download=download, heads=heads)


def _fetch_from_hub(model: str, *, revision: str | None, download: bool, heads: bool) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download  # noqa: PLC0415  half a second, only for hub ids

    patterns: dict[str, Any] = {"allow_patterns": [*_DOWNLOADED], "ignore_patterns": [*_IGNORED]}
    cached: Path | None = None
    try:
        cached = Path(snapshot_download(model, revision=revision, local_files_only=True, **patterns))
    except (OSError, ValueError) as error:
        if known := getattr(error, "snapshot_path", None):  # in the cache, but not all of what the hub has
            cached = Path(known)
    if cached is not None and _holds_model(cached):
        if download and heads:
            _fetch_small_files(model, cached)
        return cached
    if not download:
        raise ModelError(f"{model} is neither a folder nor in the hub's cache; {_log_download(model)}")
    try:
        return Path(snapshot_download(model, revision=revision, **patterns))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model} is neither a folder nor in the hub's cache, and {_explain(error, revision=revision)}; "
            f"{_log_download(model)}"
        ) from error


def _holds_model(folder: Path) -> bool:
    """Return whether a cached snapshot has config, tokenizer and all parts of the weights."""
    try:
        weights = _find_weights(folder)
    except ModelError:
        return False
    return bool(weights) and all((folder / name).exists() for name in ("config.json", "tokenizer.json"))


def _fetch_small_files(model: str, cached: Path) -> None:
    """Download heads and pooling that a cached snapshot lacks; the cache remembers those that the hub lacks too."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache  # noqa: PLC0415
    from huggingface_hub.errors import EntryNotFoundError, HTTPError  # type: ignore[attr-defined]  # noqa: PLC0415

    commit, files = cached.name, (POOLING_FILE, *HEAD_FILES.values())
    unknown = [name for name in files if try_to_load_from_cache(model, name, revision=commit) is None]
    if not unknown:
        return
    try:
        # The download's own retries take half a minute; this has none.
        listed = HfApi().model_info(model, revision=commit, timeout=_HUB_SECONDS).siblings or ()
        published = {file.rfilename for file in listed}
        for name in (name for name in unknown if name in published):
            hf_hub_download(model, name, revision=commit)
        for name in (name for name in unknown if name not in published):
            with suppress(EntryNotFoundError):  # the cache remembers it
                hf_hub_download(model, name, revision=commit)
    except (OSError, ValueError, HTTPError) as error:
        reason = _explain(error, revision=commit)
        _log.warning("%s: the hub's cache lacks %s, and %s", model, ", ".join(unknown), reason)


def _explain(error: Exception, *, revision: str | None) -> str:
    """Return why the hub does not give a checkpoint, as a clause."""
    from huggingface_hub import constants, errors  # noqa: PLC0415

    if isinstance(error, errors.GatedRepoError):
        return "its publisher wants to know who downloads it (hf auth login)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no public model of that name (hf auth login gives access to others)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has no revision {revision} of it"
    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked (HF_HUB_OFFLINE is set)"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub does not give it ({first_line(error)})"
    return "the hub cannot be reached"


def _log_download(model: str) -> str:
    folder = model.rpartition("/")[2]
    return f"where the hub can be reached: hf download {model} --local-dir {folder}, then --model {folder}"


def check_content(path: Path) -> None:
    """Check that a file is not the remains of a failed download.

    Raises:
        ModelError: it is empty, a Git LFS pointer or a web page, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; check who may read it") from error
    if head.startswith(_LFS_POINTER):
        raise ModelError(
            f"{path} is a Git LFS pointer, not the file itself; run 'git lfs pull' in {path.parent}, "
            "or fetch the checkpoint with 'hf download'"
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_HTML):
        raise ModelError(f"{path} is an HTML page, not the file itself; fetch the checkpoint with 'hf download'")
    if not head:
        raise ModelError(f"{path} is empty; {DOWNLOAD_AGAIN}")


def read_checkpoint(folder: Path, *, name: str | None = None) -> Checkpoint:
    """Read a checkpoint's properties from its small files, and check the content of the others.

    Raises:
        ModelError: not a folder with an XLM-RoBERTa checkpoint in BGE-M3's layout, or one with a corrupt file.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(
            f"{folder} is not a model folder (no config.json); give the folder of a checkpoint such as BAAI/bge-m3"
        )
    config = _read_object(path)
    if config.get("model_type") != "xlm-roberta":
        raise ModelError(
            f"{folder}: model_type is {config.get('model_type')!r}; m3 runs XLM-RoBERTa checkpoints such as BAAI/bge-m3"
        )
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("hidden_act", "gelu") != "gelu":
        raise ModelError(f"{folder}: config.json asks for positions or an activation that XLM-RoBERTa does not have")
    weights = _find_weights(folder)
    if not weights:
        raise ModelError(f"{folder} holds no weights; expected one of {', '.join(_WEIGHTS)}")
    if not (folder / "tokenizer.json").exists() and not (folder / "sentencepiece.bpe.model").exists():
        raise ModelError(f"{folder} holds no tokenizer; expected tokenizer.json")
    small = [folder / file for file in (*TOKENIZER_FILES, *HEAD_FILES.values())]
    for file in (*weights, *(file for file in small if file.exists())):
        check_content(file)
    outputs: list[Output] = ["dense", *(output for output, file in HEAD_FILES.items() if (folder / file).exists())]
    shape = _read_shape(path, config)
    return Checkpoint(
        folder=folder,
        name=name or folder.resolve().name,
        pad_token_id=_read_number(path, config, "pad_token_id", least=0, default=1),
        layer_norm_eps=_read_epsilon(path, config),
        pooling=_read_pooling(folder),
        outputs=tuple(outputs),
        weight_files=weights,
        **shape,
    )


def _read_shape(path: Path, config: dict[str, Any]) -> dict[str, int]:
    shape = {
        member: _read_number(path, config, key, least=least)
        for member, key, least in (
            ("num_layers", "num_hidden_layers", 1),
            ("hidden_size", "hidden_size", 1),
            ("num_heads", "num_attention_heads", 1),
            ("vocab_size", "vocab_size", 1),
            ("num_positions", "max_position_embeddings", _LEAST_POSITIONS),
        )
    }
    if shape["hidden_size"] % shape["num_heads"]:
        raise ModelError(
            f"{path}: num_attention_heads is {shape['num_heads']}, which does not divide "
            f"hidden_size {shape['hidden_size']}; {DOWNLOAD_AGAIN}"
        )
    return shape


def _read_number(path: Path, config: dict[str, Any], key: str, *, least: int, default: int | None = None) -> int:
    number = config.get(key, default)
    if type(number) is not int or not least <= number <= _MOST:
        found = "missing" if number is None else repr(number)[:40]
        raise ModelError(f"{path}: {key} is {found}, expected an integer of at least {least}; {DOWNLOAD_AGAIN}")
    return number


def _read_epsilon(path: Path, config: dict[str, Any]) -> float:
    number = config.get("layer_norm_eps", 1e-5)
    if type(number) not in (int, float) or not 0 <= number < 1:
        raise ModelError(f"{path}: layer_norm_eps is {repr(number)[:40]}, expected a small number; {DOWNLOAD_AGAIN}")
    return float(number)


def _read_object(path: Path) -> dict[str, Any]:
    check_content(path)
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}; {DOWNLOAD_AGAIN}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object; {DOWNLOAD_AGAIN}")
    return content


def _find_weights(folder: Path) -> tuple[Path, ...]:
    """Return the weight files: safetensors before pickled ones, the parts of an index in name order."""
    for name in _WEIGHTS:
        path = folder / name
        if path.exists():
            return _list_parts(path) if name.endswith(".index.json") else (path,)
    return ()


def _list_parts(index: Path) -> tuple[Path, ...]:
    names = _read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index} has no weight_map, which names the weight files; {DOWNLOAD_AGAIN}")
    for part in names.values():
        if not isinstance(part, str) or Path(part).name != part or part == "..":
            raise ModelError(
                f"{index} names {part!r}, expected a file of the same folder; get the checkpoint from its publisher"
            )
    parts = tuple(index.parent / part for part in sorted(set(names.values())))
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise ModelError(f"{index} names {missing[0]}, which is missing; {DOWNLOAD_AGAIN}")
    return parts


def _read_pooling(folder: Path) -> Pooling:
    """Return the pooling that sentence-transformers' `1_Pooling` names; cls, as in BGE-M3, if the file is missing."""
    path = folder / POOLING_FILE
    if not path.exists():
        return "cls"
    config = _read_object(path)
    if isinstance(mode := config.get("pooling_mode"), str):  # sentence-transformers 5 and later
        names = [mode]
    else:
        prefix = "pooling_mode_"
        flags = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}
        chosen = [key.removeprefix(prefix) for key, on in config.items() if key.startswith(prefix) and on]
        names = [flags.get(key, key) for key in chosen]
    if names not in (["cls"], ["mean"], ["lasttoken"]):
        raise ModelError(f"{path}: pooling {', '.join(names) or 'none'} is not supported; cls, mean or lasttoken is")
    return names[0]  # type: ignore[return-value]


def hash_checkpoint(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the hashes that identify a checkpoint in any folder.

    Small files (config, pooling, heads, tokenizer) are hashed completely, weight files by size, first and last MiB.
    A retrained or converted weight file differs there, and 2 GB are not read before every run.
    """
    hashes: dict[str, str] = {}
    for name in ("config.json", POOLING_FILE, *HEAD_FILES.values(), *TOKENIZER_FILES):
        path = checkpoint.folder / name
        if path.exists():
            hashes[name] = xxhash.xxh3_128_hexdigest(path.read_bytes())
    for path in checkpoint.weight_files:
        hashes[path.name] = _hash_ends(path)
    return dict(sorted(hashes.items()))


def _hash_ends(path: Path) -> str:
    size = path.stat().st_size
    digest = xxhash.xxh3_128(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        digest.update(file.read(_EDGE))
        file.seek(max(_EDGE, size - _EDGE))
        digest.update(file.read(_EDGE))
    return digest.hexdigest()
