"""Texts by their ids, from corpus files as `m3 encode` reads them or from a folder that has kept its texts.

Each search is one pass over the corpus; nothing but what is wanted is held.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from m3cli.corpus.field_flags import FieldFlags
from m3cli.corpus.fields import kept_schema, resolve_fields
from m3cli.corpus.plan import plan_shards
from m3cli.corpus.reader import Action, read_shards
from m3cli.corpus.sources import find_sources
from m3cli.errors import CorpusError, UsageError, refuse_unreachable
from m3cli.records import Shard
from m3cli.store.passages import iter_passages
from m3cli.store.reader import open_folder

_FLAGS = FieldFlags(format=None)
_SHARD_BYTES = 8 << 20
"of text, held while they are looked through"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """Where texts are; fields are those of `m3 encode`, None: found by themselves."""

    given: str
    flag: str
    "for messages"
    id_field: str | None = None
    text_field: str | None = None
    title_field: str | None = None
    title_sep: str = "\n"
    field_flags: FieldFlags = _FLAGS
    "for messages"

    def find_texts(self, wanted: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield id and text of each wanted document that is there; of several with one id the first.

        Raises:
            UsageError: standard input, which cannot be read twice, or a folder without texts.
            CorpusError: it cannot be read.
        """
        if self.given == "-":
            raise UsageError(f"{self.flag} -: texts are looked up by id, more than once; give a file or a folder")
        refuse_unreachable(Path(self.given, "_m3"), CorpusError)
        left = set(wanted)
        for name, text in self._iter_folder(left) if Path(self.given, "_m3").is_dir() else self._iter_files(left):
            if name in left:
                left.remove(name)
                yield name, text
            if not left:
                return

    def _iter_folder(self, wanted: Collection[str]) -> Iterator[tuple[str, str]]:
        yield from iter_passages(open_folder(Path(self.given)), wanted)

    def _iter_files(self, wanted: Collection[str]) -> Iterator[tuple[str, str]]:
        sources = find_sources([self.given], format_flag=self.field_flags.format)
        fields = resolve_fields(
            sources,
            id_field=self.id_field,
            text_field=self.text_field,
            title_field=self.title_field,
            flags=self.field_flags,
        )
        if fields.id is None:
            raise UsageError(
                f"{self.flag} {self.given}: its rows have no field that is known for ids; "
                f"name it with {self.field_flags.id}"
            )
        shards = read_shards(
            sources,
            plan=plan_shards(sources, fields=fields, shard_size=_SHARD_BYTES),
            fields=fields,
            schema=kept_schema(sources, fields),
            title_sep=self.title_sep,
            ask=_read,
        )
        for shard in shards:
            for document in shard.documents:
                if document.id in wanted:
                    yield document.id, document.text


def _read(_shard: Shard) -> Action:
    return "read"
