"""`--since-run OLD.m3`: reuse the vectors of texts that a previous folder has.

The previous folder may be unfinished, in the other format, and from other sources, fields and shards. Options that
change a text's vectors must be equal. A hash of what it held is part of the new folder's config.

A shard that would be the same in every byte is not written again: its files are linked. Of other shards rows are
copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from m3cli.config import REQUIRED_OUTPUT, EncodeRequest, RunConfig, list_field_options, list_non_defaults
from m3cli.encoder.embeddings import join_chunks, select_chunks, select_rows
from m3cli.errors import ForeignFolder
from m3cli.records import Chunks, Document, DoneEntry, Embeddings, Origins, ShardText, Source, is_among
from m3cli.store.commit import publish_outside
from m3cli.store.folder import RunFolder
from m3cli.store.layout import RowForm
from m3cli.store.lookup import TextIndex
from m3cli.store.reader import OutputFolder, iter_ids, open_folder

MAY_DIFFER = frozenset(
    (
        *("fields", "outputs", "title_sep", "keep_text", "limit", "shard_size", "max_row_bytes"),
        *("format", "compression", "dedupe", "since"),
    )
)
"options that do not change the vectors of a text"
MAX_SLICES = 64
"of contiguous rows, read without a copy; more rows apart are gathered"


def inherit_options(request: EncodeRequest, run: RunConfig, sources: Sequence[Source]) -> EncodeRequest:
    """Return a request with the options of a previous folder that are not typed; `limit` is not inherited.

    Names of fields are inherited where a source has the name of one of that folder's.
    """
    outputs = request.outputs or run.config.outputs
    options = {name: getattr(run.config, name) for name in ("max_length", "dtype", "shard_size", "format")}
    options |= {**list_non_defaults(run.config.to_json()), "outputs": outputs, "limit": None}
    if {source.name for source in run.sources} & {source.name for source in sources}:
        options |= list_field_options(run.config.fields)
    inherited = {
        name: value
        for name, value in options.items()
        if getattr(request, name) is None and REQUIRED_OUTPUT.get(name, outputs[0]) in outputs
    }
    return replace(request, **inherited)


def resolve_increment(run: RunConfig, old: OutputFolder, *, typed: str | None) -> RunConfig:
    """Make a previous folder, typed as --since-run, part of a new run's config.

    Raises:
        ForeignFolder: its vectors differ from those that this run would make.
    """
    then, path = old.run, typed
    options = then.config.to_json()
    unused = {name for name, output in REQUIRED_OUTPUT.items() if output not in run.config.outputs}
    unused.discard("mcls")  # changes the vectors of all outputs
    for name, value in run.config.to_json().items():
        if name not in MAY_DIFFER | unused and options[name] != value:
            raise ForeignFolder(
                f"--since-run {path} was made with --{name.replace('_', '-')} {options[name]}, this run has {value}; "
                "use the same, or leave --since-run out"
            )
    missing = [output for output in run.config.outputs if output not in then.config.outputs]
    if missing:
        raise ForeignFolder(
            f"--since-run {path} has no {missing[0]} output; use --outputs {','.join(then.config.outputs)}, "
            "or leave --since-run out"
        )
    made, mine = then.checkpoint, run.checkpoint
    if (made.hashes, made.tokenizer_hash) != (mine.hashes, mine.tokenizer_hash):
        raise ForeignFolder(
            f"--since-run {path} was made with model {made.name}, this run has {mine.name}, and they differ; "
            "pass the same checkpoint with --model, or leave --since-run out"
        )
    return replace(run, config=replace(run.config, since=identify(old)), since_path=str(old.path))


def identify(folder: OutputFolder) -> str:
    """Hash what a folder holds."""
    files = [
        [index, *((record.name, record.xxh3_128) for record in entry.files)] for index, entry in folder.entries.items()
    ]
    return xxhash.xxh3_128_hexdigest(orjson.dumps(files))


def open_previous(run: RunConfig, typed: str | None, *, out: str) -> PreviousFolder | None:
    """Open the previous folder of a run: --since-run, or the path in run.json.

    Raises:
        ForeignFolder: it differs from when the run was begun.
    """
    path = typed or run.since_path
    if path is None:
        return None
    if run.config.since is None:
        raise ForeignFolder(
            f"{out} was begun without --since-run; leave the option out to resume the folder, or use another --out"
        )
    old = open_folder(Path(path))
    if identify(old) != run.config.since:
        raise ForeignFolder(
            f"--since-run {path} does not hold what it held when {out} was begun; put it back as it was, "
            "or use another --out"
        )
    return PreviousFolder(old, run)


class PreviousFolder:
    """A folder whose vectors are reused."""

    def __init__(self, folder: OutputFolder, run: RunConfig) -> None:
        self._folder = folder
        self._texts = TextIndex(folder, outputs=run.config.outputs)
        then, now = (replace(each.config, since=None, limit=None) for each in (folder.run, run))
        self._same_options = then == now

    def link(self, text: ShardText, *, source: str, form: RowForm, into: RunFolder) -> DoneEntry | None:
        """Stage the files of a shard as hard links, if this run would write the same; None: it would not, or cannot.

        Args:
            text: the shard.
            source: name of its source.
            form: of the new folder's rows.
            into: the new folder.

        Raises:
            DamageFound: a file is damaged.
        """
        entry = self._folder.entries.get(text.shard.index)
        if not self._same_options or entry is None:
            return None
        if (entry.shard, entry.source, entry.input_hash) != (text.shard, source, text.input_hash):
            return None
        if entry.counts.skipped != len(text.skipped):  # a row that failed in the model may not fail again
            return None
        self._texts.check_hashes(text.shard.index)
        return entry if into.link_files(entry, self._folder.path, form=form) else None

    def cut(self, documents: Sequence[Document], cut: Callable[[Sequence[Document]], Chunks]) -> tuple[Chunks, Origins]:
        """Return the rows of documents: as the previous folder has them where it has the text, else cut by `cut`."""
        taken, origins = self._texts.find(documents)
        others = np.setdiff1d(np.arange(len(documents)), taken.document)
        fresh = cut([documents[number] for number in others.tolist()])
        both = join_chunks(taken, replace(fresh, document=others[fresh.document]))
        order = np.argsort(both.document, kind="stable")
        rows = np.flatnonzero(order < taken.num_rows)
        return select_chunks(both, order), replace(origins, rows=rows)

    def read(self, origins: Origins, *, start: int, stop: int) -> Iterator[Embeddings]:
        """Read the vectors of those rows in [start, stop) that the previous folder has."""
        window = slice(*np.searchsorted(origins.rows, (start, stop)))
        wanted = Origins(rows=origins.rows[window], shard=origins.shard[window], row=origins.row[window])
        for part, places, rows in self._texts.read(wanted):
            breaks = np.flatnonzero(np.diff(places) != 1) + 1
            # Where little has changed, most rows are contiguous, and slices copy nothing.
            cuts = breaks if len(breaks) < MAX_SLICES else breaks[:0]
            for places_cut, rows_cut in zip(np.split(places, cuts), np.split(rows, cuts), strict=True):
                yield select_rows(part.embeddings, places_cut, rows=rows_cut)

    def write_removed_ids(self, hashes: Mapping[int, NDArray[np.int64]], *, listing: str | None) -> int:
        """Count the ids of the previous folder that the complete new one lacks, and list them as JSON lines.

        Args:
            hashes: of the ids of the new folder, by shard.
            listing: the file to list them in; None: they are counted only.
        """
        there = np.sort(np.concatenate([np.empty(0, np.int64), *hashes.values()]))
        gone = 0
        with nullcontext() if listing is None else publish_outside(Path(listing).absolute()) as file:
            for ids, hashed in iter_ids(self._folder.path, self._folder.entries):
                for place in np.flatnonzero(~is_among(hashed, there)).tolist():
                    gone += 1
                    if file is not None:
                        file.write(orjson.dumps({"id": ids[place].as_py()}, option=orjson.OPT_APPEND_NEWLINE))
        return gone
