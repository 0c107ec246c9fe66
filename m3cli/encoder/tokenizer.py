"""Token ids of texts, as `AutoTokenizer` produces them, by its Rust backend.

transformers 5 rebuilds XLM-R's pipeline and ignores the one in `tokenizer.json`, which transformers 4 used; their
tokens of "trailing  " differ. So the hash of the serialised backend is part of a folder's config.

Building the tokenizer with transformers takes seconds. So the serialised backend is stored in a per-user cache, keyed
by the tokenizer files and the versions of the libraries. A cache file starts with its hash and is rebuilt if that is
wrong.

A text of any size is tokenised in segments of at most SEGMENT_CHARS characters, so time and memory are linear. Segments
end before white space, where the tokens are the same as without segments. A segment without white space (a script
without blanks, joined-up data) ends between two characters, after a full stop if one is near. There the next token may
differ.
"""

# ruff: noqa: RUF001  - punctuation of other scripts is meant

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from tokenizers import Encoding
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


SEGMENT_CHARS = 1 << 15
CONTEXT_CHARS = 64
"of text around a segment, for rating its first and last borders"
TOKEN_CHARS = 8
"characters a token, as a rule: limits a segment of a text of which only the beginning is needed"
SPARE_TOKENS = 16
"tokens read in addition, because the last ones of a segment may differ from those of the text"
SEGMENTS_TOGETHER = 32
"tokenised in parallel"
_BLANKS = (" ", "\n", "\t")
_WHITE_SPACE = " \n\t\r"
_SENTENCE_ENDS = ("。", "！", "？", "।", "།", "។")
_EXTENDING = 16
"characters that a cut without white space may move back, to keep a mark with its letter"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokens:
    """T tokens of a text, or of its beginning."""

    lead_ids: NDArray[np.int32]
    "tokens of the prefix before the text's first token, which may contain the end of the prefix"
    prefix_ids: NDArray[np.int32]
    "tokens of the complete prefix, for chunks after the first"
    input_ids: NDArray[np.int32]
    "[T], without <s>, </s> and prefix"
    starts: NDArray[np.int64]
    "[T], code points of the text; the first is 0"
    levels: NDArray[np.uint8]
    "[T], the `Border` before each token"


class _Reading:
    """A text that is being tokenised, segment by segment."""

    def __init__(self, text: str, *, prefix: str, segment_chars: int) -> None:
        self._text, self._prefix = text, prefix
        self._spans = cut_segments(text, segment_chars=segment_chars)
        self._last = -1
        self._ids: list[NDArray[np.int32]] = []
        self._starts: list[NDArray[np.int64]] = []
        self._levels: list[NDArray[np.uint8]] = []
        self._lead_ids = self._prefix_ids = np.empty(0, np.int32)
        self.num_tokens = 0

    @property
    def ended(self) -> bool:
        return self._last == len(self._text)

    def next_spans(self, count: int) -> list[tuple[int, int]]:
        spans = list(islice(self._spans, count))
        self._last = spans[-1][1]
        return spans

    def segment(self, span: tuple[int, int]) -> str:
        first, last = span
        return self._text[first:last] if first else self._prefix + self._text[:last]

    def add(self, span: tuple[int, int], encoding: Encoding, tokenizer: Tokenizer) -> None:
        first, last = span
        input_ids = np.array(encoding.ids, np.int32)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2) + (first - (0 if first else len(self._prefix)))
        if self._prefix and not first:
            # A token that reaches past the prefix (a word with the blank before it) belongs to the text.
            num_lead = int(np.count_nonzero(offsets[:, 1] <= 0))
            self._lead_ids, input_ids, offsets = input_ids[:num_lead], input_ids[num_lead:], offsets[num_lead:]
            self._prefix_ids = self._lead_ids
            if len(offsets) and offsets[0, 0] + len(self._prefix) < len(self._prefix.rstrip()):
                encoded = tokenizer.backend.encode(self._prefix, add_special_tokens=False)
                self._prefix_ids = np.array(encoded.ids, np.int32)
            offsets = np.maximum(offsets, 0)
        low, high = max(0, first - CONTEXT_CHARS), min(len(self._text), last + CONTEXT_CHARS)
        self._ids.append(input_ids)
        self._starts.append(offsets[:, 0])
        self._levels.append(rate_borders(self._text[low:high], offsets[:, 0] - low, offsets[:, 1] - low))
        self.num_tokens += len(input_ids)

    def join(self) -> TextTokens:
        starts = np.concatenate(self._starts)
        starts[:1] = 0
        return TextTokens(
            lead_ids=self._lead_ids,
            prefix_ids=self._prefix_ids,
            input_ids=np.concatenate(self._ids),
            starts=starts,
            levels=np.concatenate(self._levels),
        )


def read_texts(
    texts: Iterable[str], tokenizer: Tokenizer, *, prefix: str = "", enough: int | None = None
) -> Iterator[TextTokens]:
    """Yield the tokens of each text, segments of several texts in parallel.

    With `enough`, a text is read only until it has more than that many tokens.
    """
    segment_chars = SEGMENT_CHARS if enough is None else min(SEGMENT_CHARS, TOKEN_CHARS * (enough + SPARE_TOKENS))
    texts = iter(texts)
    while group := [
        _Reading(text, prefix=prefix, segment_chars=segment_chars) for text in islice(texts, SEGMENTS_TOGETHER)
    ]:
        remaining = group
        while remaining:
            count = 1 if enough is not None else max(1, SEGMENTS_TOGETHER // len(remaining))
            spans = [(reading, span) for reading in remaining for span in reading.next_spans(count)]
            segments = [reading.segment(span) for reading, span in spans]
            encodings = tokenizer.backend.encode_batch(segments, add_special_tokens=False)
            for (reading, span), encoding in zip(spans, encodings, strict=True):
                reading.add(span, encoding, tokenizer)
            remaining = [
                reading
                for reading in remaining
                if not reading.ended and (enough is None or reading.num_tokens <= enough + SPARE_TOKENS)
            ]
        yield from (reading.join() for reading in group)


def cut_segments(text: str, *, segment_chars: int) -> Iterator[tuple[int, int]]:
    """Yield the segments [start, stop) of a text, at least one, of at most `segment_chars` each."""
    start = 0
    while len(text) - start > segment_chars:
        stop = _find_cut(text, start, start + segment_chars)
        yield start, stop
        start = stop
    yield start, len(text)


def _find_cut(text: str, start: int, limit: int) -> int:
    """Return the last good place to cut in (start, limit]."""
    blank = max(text.rfind(character, start + 1, limit) for character in _BLANKS)
    if blank > start:
        # Several blanks may be one token; blanks as long as a segment are cut all the same.
        before = start + len(text[start:blank].rstrip(_WHITE_SPACE))
        return before if before > start else blank
    near = limit - (limit - start) // 4
    stop = max(text.rfind(character, near, limit) for character in _SENTENCE_ENDS)
    if stop >= 0:
        return stop + 1
    context = text[limit - _EXTENDING : limit + 1]
    offsets = np.arange(1, _EXTENDING + 1)
    good = np.flatnonzero(rate_borders(context, offsets, offsets + 1) > Border.GRAPHEME)
    return limit - _EXTENDING + int(offsets[good[-1]]) if len(good) else limit


class Border(IntEnum):
    """Rating of the border between two tokens; a higher one is a better place to cut."""

    CHARACTER = 0
    "inside a code point that became several tokens"
    GRAPHEME = 1
    "inside a grapheme, which a reader sees as one character"
    INSIDE_WORD = 2
    WORD = 3
    LINE = 4
    SENTENCE = 5
    PARAGRAPH = 6


def _codes(characters: str) -> NDArray[np.uint32]:
    return np.frombuffer(characters.encode("utf-32-le"), np.uint32)


_STOPS = _codes(".!?…؟۔։‼⁇⁈⁉")
"end a sentence if white space follows"
_FULL_STOPS = _codes("。！？｡．।॥።፧။៕།༎")
"end a sentence without white space"
_PAUSES = _codes("，、；：､፣፤،")
"end a phrase without white space"
_CLOSERS = _codes("\"'’”»)]}」』）】》〉〕｣")
_JOINER = 0x200D
_REGIONAL = (0x1F1E6, 0x1F1FF)
_LEADING_JAMO = (0x1100, 0x115F)
_SYLLABLES = (0xAC00, 0xD7A3)
_SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], np.uint32)
_MORE_EXTENDING = frozenset("\u200c\u200d\u0e33\u0eb3")
"joiners, and the vowels am of Thai and Lao"


def rate_borders(text: str, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Rate the border before each token.

    Args:
        text: code points of the tokens, and a few before and after them as context.
        starts: [T] first code point of each token, ascending.
        ends: [T] code point after each token.

    Returns:
        [T] a `Border` each; the first one as if a token ended before it.
    """
    if not len(starts):
        return np.empty(0, np.uint8)
    codes = _codes(text)
    space = np.isin(codes, _SPACES)
    at = np.minimum(starts, len(codes) - 1)
    indices = np.arange(len(codes))
    # The white space around a border is [left + 1, right).
    left = np.concatenate(([-1], np.maximum.accumulate(np.where(space, -1, indices))))[at]
    right = np.minimum.accumulate(np.where(space, len(codes), indices)[::-1])[::-1][at]
    has_space = right - left > 1
    breaks = np.concatenate(([0], np.cumsum(codes == ord("\n"))))
    num_breaks = breaks[right] - breaks[left + 1]
    levels = np.full(len(starts), Border.INSIDE_WORD, np.uint8)
    word = has_space | np.isin(codes[left], _PAUSES)
    levels[word] = Border.WORD
    levels[num_breaks == 1] = Border.LINE
    levels[_ends_sentence(codes, space, left, right)] = Border.SENTENCE
    levels[num_breaks > 1] = Border.PARAGRAPH
    levels[_splits_grapheme(codes, at)] = Border.GRAPHEME
    shared = np.concatenate(([False], (starts[1:] < ends[:-1]) | (starts[1:] <= starts[:-1])))
    levels[shared] = Border.CHARACTER
    return levels


def _ends_sentence(
    codes: NDArray[np.uint32], space: NDArray[np.bool_], left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return whether a sentence ends at a border: in the last character before it and before closing quotes."""
    indices = np.arange(len(codes))
    closes = np.isin(codes, _CLOSERS)
    last = np.maximum.accumulate(np.where(space | closes, -1, indices))[left]
    ender, follower = codes[last], codes[np.minimum(right, len(codes) - 1)]
    has_space = right - left > 1
    lower = _ask(follower, str.islower)
    ends = (np.isin(ender, _STOPS) & has_space & ~lower) | (
        np.isin(ender, _FULL_STOPS) & ~np.isin(follower, np.concatenate((_CLOSERS, _FULL_STOPS)))
    )
    found: NDArray[np.bool_] = ends & (last >= 0) & (left >= 0)
    return found


def _splits_grapheme(codes: NDArray[np.uint32], at: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether the characters before and at an index form one grapheme."""
    here, before = codes[at], codes[np.maximum(at - 1, 0)]
    flags = _within(here, *_REGIONAL) & _within(before, *_REGIONAL)
    line_end = (here == ord("\n")) & (before == ord("\r"))
    conjunct = _ask(before, _is_virama) & _ask(here, str.isalpha)
    syllable = _within(before, *_LEADING_JAMO) & (_within(here, *_LEADING_JAMO) | _within(here, *_SYLLABLES))
    split: NDArray[np.bool_] = _ask(here, _extends) | (before == _JOINER) | flags | line_end | conjunct | syllable
    return split & (at > 0)


def _within(codes: NDArray[np.uint32], first: int, last: int) -> NDArray[np.bool_]:
    return (codes >= first) & (codes <= last)


def _ask(codes: NDArray[np.uint32], question: Callable[[str], bool]) -> NDArray[np.bool_]:
    """Return the answer for each code point, with one call for each distinct one."""
    unique, inverse = np.unique(codes, return_inverse=True)
    answers = np.array([question(chr(code)) for code in unique.tolist()], np.bool_)
    found: NDArray[np.bool_] = answers[inverse.reshape(-1)]
    return found


@lru_cache(maxsize=1 << 14)
def _extends(character: str) -> bool:
    """Return whether a character extends the one before it: marks, joiners, skin tones, tags, later jamo of Hangul."""
    code = ord(character)
    return (
        unicodedata.category(character) in ("Mn", "Me", "Mc")
        or character in _MORE_EXTENDING
        or 0x1F3FB <= code <= 0x1F3FF
        or 0xE0020 <= code <= 0xE007F
        or 0x1160 <= code <= 0x11FF
        or 0xD7B0 <= code <= 0xD7FB
    )


@lru_cache(maxsize=1 << 14)
def _is_virama(character: str) -> bool:
    return unicodedata.combining(character) == 9
