"""Names of fields: those that are found by themselves, and the flags of each command that name others."""

from __future__ import annotations

from dataclasses import dataclass

TEXT_NAMES = ("text", "contents", "content", "body", "passage", "document", "query")
ID_NAMES = ("_id", "docid", "id", "doc_id", "query_id", "qid", "pid", "docno", "doc_no", "uuid", "key")
TITLE_NAMES = ("title",)


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
