"""Flags that several commands take, each spelled once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

import typer

from m3cli.config import ALL_OUTPUTS, ID_NAMES, TEXT_NAMES, TITLE_NAMES, Dtype
from m3cli.errors import UsageError
from m3cli.records import Output

_CORPUS, _MODEL, _OUTPUT, _MEANING, _SPEED = "Corpus", "Model", "Output", "Long documents", "Speed"

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="JSONL, TSV or text lines (also .gz, .zst), Parquet, folders, globs, or '-' for standard input.",
        show_default=False,
    ),
]
Out = Annotated[
    str | None,
    typer.Option("--out", "-o", help="Output folder; by default the input's name with .m3.", rich_help_panel=_OUTPUT),
]
Model = Annotated[
    str | None,
    typer.Option(help="Checkpoint folder or hub id; by default $M3_MODEL or BAAI/bge-m3.", rich_help_panel=_MODEL),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=_MODEL)]
Outputs = Annotated[
    str | None,
    typer.Option(help="Some of dense,sparse,colbert; by default all three.", rich_help_panel=_OUTPUT),
]
Format = Annotated[str | None, typer.Option(help="parquet (default) or npy.", rich_help_panel=_OUTPUT)]
InputFormat = Annotated[
    str,
    typer.Option(help="auto, jsonl, tsv, text or parquet; auto goes by the ending.", rich_help_panel=_CORPUS),
]
IdField = Annotated[
    str | None,
    typer.Option(
        help=f"Field of the id; by default the first of {', '.join(ID_NAMES)}; '' for none.", rich_help_panel=_CORPUS
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(help=f"Field of the text; by default the first of {', '.join(TEXT_NAMES)}.", rich_help_panel=_CORPUS),
]
TitleField = Annotated[
    str | None,
    typer.Option(
        help=f"Field of the title; by default {', '.join(TITLE_NAMES)}; '' for none.", rich_help_panel=_CORPUS
    ),
]
TitleSep = Annotated[
    str | None,
    typer.Option(help="Between title and text; by default a line break.", rich_help_panel=_CORPUS),
]
KeepFields = Annotated[
    str | None,
    typer.Option(help="Fields to copy into the output, with commas between them.", rich_help_panel=_CORPUS),
]
KeepText = Annotated[
    bool | None,
    typer.Option("--keep-text", help="Write each chunk's text as column 'text'.", rich_help_panel=_CORPUS),
]
Prefix = Annotated[
    str | None, typer.Option(help="Words before every chunk, such as 'query: '.", rich_help_panel=_CORPUS)
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N rows of the input.", rich_help_panel=_CORPUS)]
MaxRowBytes = Annotated[
    str | None,
    typer.Option(help="Skip rows longer than this; by default 64M.", rich_help_panel=_CORPUS),
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=8, help="Tokens of a chunk; by default 8192 or what the model holds.", rich_help_panel=_MEANING),
]
LongDocs = Annotated[
    str | None,
    typer.Option(
        help="chunk (default): one row a chunk; merge: one row a document, made of its chunks; both: chunks and, of "
        "documents of several, a row of their own; truncate: the first chunk only.",
        rich_help_panel=_MEANING,
    ),
]
Overlap = Annotated[
    int | None,
    typer.Option(min=0, help="Tokens that a chunk repeats of the one before; by default 0.", rich_help_panel=_MEANING),
]
Split = Annotated[
    str | None,
    typer.Option(
        help="sentence (default): chunks of like length, cut behind a paragraph, sentence or word; tokens: full ones.",
        rich_help_panel=_MEANING,
    ),
]
Mcls = Annotated[
    int | None,
    typer.Option(
        "--mcls",
        min=1,
        metavar="N",
        help="Put a <s> before every N tokens (256 in M3's paper); the dense vector is the mean of their states.",
        rich_help_panel=_MEANING,
    ),
]
DtypeName = Annotated[
    str | None,
    typer.Option(
        help="auto, float32, bfloat16, float16, or int8 on a CPU; auto: float16 on a GPU, bfloat16 on a CPU with it.",
        rich_help_panel=_SPEED,
    ),
]
DenseDtype = Annotated[
    str | None,
    typer.Option(help="float16 (default) or float32, of the dense vectors on disk.", rich_help_panel=_OUTPUT),
]
ColbertDtype = Annotated[
    str | None,
    typer.Option(
        help="float16 (default), int8 (half of that) or binary (signs: a sixteenth), of ColBERT vectors on disk.",
        rich_help_panel=_OUTPUT,
    ),
]
ColbertPool = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="K",
        help="Merge like ColBERT vectors of a row until one in K is left; by default none are.",
        rich_help_panel=_OUTPUT,
    ),
]
ColbertTopK = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Keep only a row's N ColBERT vectors of the largest lexical weights.",
        rich_help_panel=_OUTPUT,
    ),
]
Compression = Annotated[
    str | None,
    typer.Option(
        help="none (default) or zstd, of the vectors in Parquet; a tenth less for float16.", rich_help_panel=_OUTPUT
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_SPEED)]
MaxBatchTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens that go through the model together; by default by device.", rich_help_panel=_SPEED
    ),
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        help="Bytes of text of a shard, such as 8M; by default 512K on a CPU, 8M or 32M on a GPU.",
        rich_help_panel=_SPEED,
    ),
]
Worker = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Do only the I-th of N shares of the shards (I from 0).", rich_help_panel=_SPEED),
]
VerifyInput = Annotated[
    bool,
    typer.Option(
        "--verify-input",
        help="Hash the input of all finished shards again, even of files with their old date.",
        rich_help_panel=_CORPUS,
    ),
]
NoSpaceCheck = Annotated[
    bool,
    typer.Option("--no-space-check", help="Begin even where the disk may be too small.", rich_help_panel=_OUTPUT),
]
SinceRun = Annotated[
    str | None,
    typer.Option(
        metavar="OLD.m3",
        help="Take the vectors of texts that an older folder has over from it, and encode the others.",
        rich_help_panel=_CORPUS,
    ),
]
Gone = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="List the ids of --since-run that are gone, as JSON lines.", rich_help_panel=_OUTPUT
    ),
]
Dedupe = Annotated[
    bool | None,
    typer.Option("--dedupe", help="Encode equal texts of a shard once.", rich_help_panel=_CORPUS),
]
MaxSkipped = Annotated[
    str | None,
    typer.Option(
        "--max-skipped",
        metavar="N|P%",
        help="End with exit code 4 if more rows than that are skipped; by default there is no limit.",
        rich_help_panel=_CORPUS,
    ),
]
MaxRuntime = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Stop after a time such as 55m or 7h30m, with exit code 75 if work is left.",
        rich_help_panel=_SPEED,
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Keep the run's numbers there, for Prometheus.", rich_help_panel=_OUTPUT),
]
LogFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Append what happens, with its time, to a file.", rich_help_panel=_OUTPUT),
]
ProgressMode = Annotated[str, typer.Option("--progress", help="auto, bar, log, json or none.", rich_help_panel=_OUTPUT)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
DTYPES = ("auto", *get_args(Dtype))
_LARGEST = 1 << 53
"of any number: JSON and float64 hold it exactly, and 64 bits hold what is made of it"
_LONGEST = 100 * 365 * 86400.0
"seconds"


def check_numbers(typed: Mapping[str, Any]) -> None:
    """Refuse numbers that nothing has so many of; `typed` are values by the names of their options."""
    for name, value in typed.items():
        if isinstance(value, int) and value > _LARGEST:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected a number up to {_LARGEST:,}")


def check_choices(typed: Mapping[str, Any], choices_of: Mapping[str, Sequence[str]]) -> None:
    """Refuse a value that is none of an option's choices."""
    for name, choices in choices_of.items():
        value = typed.get(name)
        if value is not None and value not in choices:
            raise UsageError(f"--{name.replace('_', '-')} {value!r}: expected {', '.join(choices)}")


def parse_size(flag: str, text: str | None) -> int | None:
    """Read '512K', '8 MiB', '1.5G' or plain bytes; None and 'auto' stay None."""
    if text is None or text == "auto":
        return None
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * _FACTORS[match[2].lower()] if match else 0
    if not 1 <= size <= _LARGEST:
        most = f"at most {_LARGEST >> 40:,}T, " if size > _LARGEST else ""
        raise UsageError(f"{flag} {_shorten(text)}: expected a size {most}such as 512K, 8M or 1G")
    return int(size)


def _shorten(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}..."


def parse_names(text: str | None) -> tuple[str, ...] | None:
    """Read 'a,b'; None stays None."""
    if text is None:
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_outputs(text: str | None) -> tuple[Output, ...] | None:
    """Read 'sparse,dense' into the order dense, sparse, colbert; None stays None."""
    names = parse_names(text)
    if names is None:
        return None
    unknown = [name for name in names if name not in ALL_OUTPUTS]
    if unknown or not names:
        raise UsageError(f"--outputs {text!r}: expected some of {', '.join(ALL_OUTPUTS)}, with commas between them")
    return tuple(output for output in ALL_OUTPUTS if output in names)


def parse_worker(text: str | None) -> tuple[int, int]:
    """Read 'I/N' with I from 0."""
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d{1,15})/(\d{1,15})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"--worker {_shorten(text)}: expected I/N with I from 0 to N - 1, such as 0/3, 1/3 and 2/3")
    return int(match[1]), int(match[2])


def parse_max_skipped(text: str | None) -> int | float | None:
    """Read a number of rows as an int, or '2.5%' as a part of all rows, a float."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15})|(\d+(?:\.\d+)?)\s*%", text.strip())
    if not match or (match[2] and float(match[2]) > 100):
        raise UsageError(
            f"--max-skipped {_shorten(text)}: expected a number of rows such as 100, or a part such as 0.5%"
        )
    return int(match[1]) if match[1] else float(match[2]) / 100


def parse_duration(flag: str, text: str | None) -> float | None:
    """Read '55m', '7h30m', '90s' or '90' (seconds)."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    units = (86400, 3600, 60, 1)
    seconds = sum(float(part or 0) * unit for part, unit in zip(match.groups(), units, strict=True)) if match else 0.0
    if seconds > _LONGEST:
        raise UsageError(f"{flag} {_shorten(text)}: more than a hundred years; without {flag} there is no limit")
    if not seconds:
        raise UsageError(f"{flag} {_shorten(text)}: expected a time such as 55m, 7h30m or 90s")
    return seconds


def auto(text: str | None) -> str | None:
    """Return None for 'auto', which is the same as not typing the flag."""
    return None if text == "auto" else text
