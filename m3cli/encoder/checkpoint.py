"""A checkpoint in BGE-M3's file layout: where it lies, what it is, what makes two of them the same.

Layout (BAAI/bge-m3 on the hub): `config.json` of an XLM-RoBERTa, weights as `model.safetensors` or `pytorch_model.bin`
(or their sharded form with an index), `tokenizer.json`, `sparse_linear.pt`, `colbert_linear.pt`,
`1_Pooling/config.json`. Without the two `.pt` heads a checkpoint gives dense vectors only. Nothing here loads torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import xxhash

from m3cli.config import MAX_LENGTH_CEILING
from m3cli.errors import ModelError, refuse_unreachable
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
HEAD_FILES = {"sparse": "sparse_linear.pt", "colbert": "colbert_linear.pt"}
POOLING_FILE = "1_Pooling/config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_EDGE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint's files say of it, weights unread."""

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
    "what it can give: dense always, sparse and colbert where their heads are there"
    weight_files: tuple[Path, ...]

    @property
    def max_length(self) -> int:
        """Longest chunk in tokens, <s> and </s> included, that may be asked for."""
        return self.num_positions - POSITION_OFFSET

    @property
    def default_max_length(self) -> int:
        """Longest chunk in tokens if nothing is asked for."""
        return min(MAX_LENGTH_CEILING, self.max_length)


def find_checkpoint(model: str, *, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint: a path as it is, a hub id from the hub's cache or else downloaded.

    Raises:
        ModelError: neither a folder nor to be had from the hub.
    """
    folder = Path(model).expanduser()
    refuse_unreachable(folder, ModelError)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"--model {model} is a file; give the folder that holds config.json and the weights")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(f"--model {model}: no such folder; give a checkpoint folder or a hub id such as BAAI/bge-m3")
    return _fetch_from_hub(model, revision=revision)


def _fetch_from_hub(model: str, *, revision: str | None) -> Path:
    # The hub's client logs retries and prints bars of its own; a missing hub must be one line.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download  # noqa: PLC0415  half a second, only for hub ids
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    wanted = ["config.json", POOLING_FILE, *TOKENIZER_FILES, *HEAD_FILES.values(), "*.safetensors", "*.index.json"]
    patterns = [*wanted, "pytorch_model*.bin"]
    ignored = ["onnx/*", "openvino/*"]
    try:
        cached = Path(
            snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=ignored, local_files_only=True
            )
        )
        if (cached / "config.json").exists() and _find_weights(cached) and (cached / "tokenizer.json").exists():
            return cached
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass  # not in the cache: ask the hub
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {model} is neither a folder nor in the hub's cache, and the hub does not give it ({reason[:160]}); "
            "download it elsewhere and pass its folder with --model, or set M3_MODEL"
        ) from error


def read_checkpoint(folder: Path, *, name: str | None = None) -> Checkpoint:
    """Read what a checkpoint is from its small files.

    Raises:
        ModelError: not a folder with an XLM-RoBERTa checkpoint in BGE-M3's layout.
    """
    config = _read_config(folder)
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
    heads = [output for output, file in HEAD_FILES.items() if (folder / file).exists()]
    try:
        return Checkpoint(
            folder=folder,
            name=name or folder.resolve().name,
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            num_heads=int(config["num_attention_heads"]),
            vocab_size=int(config["vocab_size"]),
            num_positions=int(config["max_position_embeddings"]),
            pad_token_id=int(config.get("pad_token_id", 1)),
            layer_norm_eps=float(config.get("layer_norm_eps", 1e-5)),
            pooling=_read_pooling(folder),
            outputs=("dense", *(output for output in ("sparse", "colbert") if output in heads)),
            weight_files=weights,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'}: {error!r} is missing or not a number") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} is not a model folder (no config.json); give the folder of a checkpoint such as BAAI/bge-m3"
        ) from error
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    return config


def _find_weights(folder: Path) -> tuple[Path, ...]:
    """Return the weight files, safetensors before pickled ones, the parts of an index in name order."""
    for name in _WEIGHTS:
        path = folder / name
        if not path.exists():
            continue
        if not name.endswith(".index.json"):
            return (path,)
        parts = sorted(set(orjson.loads(path.read_bytes())["weight_map"].values()))
        missing = [part for part in parts if not (folder / part).exists()]
        if missing:
            raise ModelError(f"{path} names {missing[0]}, which is not there; download the checkpoint again")
        return tuple(folder / part for part in parts)
    return ()


def _read_pooling(folder: Path) -> Pooling:
    """Return the pooling that sentence-transformers' `1_Pooling` names; cls, as BGE-M3 has it, where there is none."""
    path = folder / POOLING_FILE
    if not path.exists():
        return "cls"
    config = orjson.loads(path.read_bytes())
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
    """Hash what makes two checkpoints the same, wherever they lie.

    Small files (config, pooling, heads, tokenizer) are hashed whole, each weight file by its size and its first and
    last MiB: 2 GB need not be read before every run, and a retrained or converted file differs in its ends.
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
