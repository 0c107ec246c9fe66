"""What the flags that name fields are called: each command spells its own, and messages name what its user can type."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldFlags:
    """The names of a command's flags, as they are typed; those of `m3 encode` unless others are given."""

    text: str = "--text-field"
    id: str = "--id-field"
    title: str = "--title-field"
    kept: str = "--keep-fields"
    format: str | None = "--input-format"
    "None: the command has no such flag"


ENCODE_FLAGS = FieldFlags()
