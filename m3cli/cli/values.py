"""Values of flags: sizes, lists and shares, from the words a user types."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from m3cli.config import ALL_OUTPUTS, Dtype
from m3cli.errors import UsageError
from m3cli.records import Output

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
