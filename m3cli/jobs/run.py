"""What a folder is made of: settled once from what was typed, the corpus and the checkpoint; adopted by later runs.

`run.json` holds it. A flag that was not typed is adopted from the folder; one that was typed and says something else
is another run, and refused by name. `auto` values (dtype, shard size, batch tokens, threads) are settled here and
nowhere else. The checkpoint's path is no part of it, its content is; the paths of sources help to find them again and
are not compared.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import xxhash

import m3cli
from m3cli.config import (
    ALL_OUTPUTS,
    AUTO_SHARD_SIZE,
    COLBERT_MEMBERS,
    DEFAULT_MODEL,
    DEFAULT_SPLIT,
    OUTPUT_OF,
    EncodeRequest,
    Meaning,
)
from m3cli.corpus.fields import resolve_fields
from m3cli.corpus.streams import PeekableStream
from m3cli.encoder.batcher import fit_length
from m3cli.encoder.checkpoint import Checkpoint, find_checkpoint, identify_checkpoint, read_checkpoint
from m3cli.encoder.chunker import NUM_SPECIALS
from m3cli.errors import ForeignFolder, ModelError, UsageError
from m3cli.records import Fields, Output, Source
from m3cli.store.layout import RESERVED_COLUMNS

_FLAGS = {"id_field": "id", "text_field": "text", "title_field": "title"}
"flags whose settled value is a member of Fields"
_PLAIN = (
    *("outputs", "format", "max_length", "long_docs", "overlap", "split", "mcls", "dtype", "dense_dtype"),
    *(*COLBERT_MEMBERS, "compression"),
    *("title_sep", "keep_text", "prefix", "limit", "shard_size", "max_row_bytes", "dedupe"),
)
"flags whose settled value is a member of Meaning of the same name"
_NEEDED: dict[str, Output] = {**OUTPUT_OF, "mcls": "dense"}
"of each flag that is about one output, that output"
MOST = (1 << 31) - 1
"that a number of tokens or vectors can be"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is in run.json."""

    meaning: Meaning
    sources: tuple[Source, ...]
    model: str
    "the checkpoint's name, for people"
    hashes: dict[str, str]
    "of the checkpoint's files"
    dim: int
    vocabulary: int
    tokenizer_hash: str
    max_batch_tokens: int
    threads: int
    since_path: str | None = None
    "where the older folder was found; not compared"

    @property
    def fingerprint(self) -> str:
        """xxh3_128 (hex) of all that the folder's bytes mean."""
        sources = [[source.name, source.size, source.format, source.compression] for source in self.sources]
        parts = [self.meaning.to_identity(), self.hashes, self.tokenizer_hash, sources]
        return xxhash.xxh3_128_hexdigest(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))

    def to_json(self) -> dict[str, Any]:
        """Build the content of run.json."""
        return {
            "m3cli_version": m3cli.__version__,
            "fingerprint": self.fingerprint,
            "meaning": self.meaning.to_json(),
            "checkpoint": {
                "name": self.model,
                "dim": self.dim,
                "vocabulary": self.vocabulary,
                "hashes": self.hashes,
                "tokenizer_hash": self.tokenizer_hash,
            },
            "sources": [asdict(source) for source in self.sources],
            "since_path": self.since_path,
            "pace": {"max_batch_tokens": self.max_batch_tokens, "threads": self.threads},
        }


def parse_run(document: dict[str, Any]) -> Run:
    """Read the content of run.json back.

    Raises:
        ForeignFolder: another version of m3cli wrote it, with other members.
    """
    try:
        return _parse_members(document)
    except (KeyError, TypeError) as error:
        raise ForeignFolder(
            f"run.json was written by m3cli {document.get('m3cli_version', '?')}, and {m3cli.__version__} cannot read "
            f"it ({error}); go on with the version that began the folder, or use another --out"
        ) from error


def _parse_members(document: dict[str, Any]) -> Run:
    meaning, checkpoint, pace = document["meaning"], document["checkpoint"], document["pace"]
    settled = meaning["fields"]
    lists = {name: tuple(settled[name]) for name in ("kept", "tsv_columns")}
    return Run(
        meaning=Meaning(
            **{**meaning, "fields": Fields(**{**settled, **lists}), "outputs": tuple(meaning["outputs"])},
        ),
        sources=tuple(Source(**source) for source in document["sources"]),
        model=checkpoint["name"],
        hashes=checkpoint["hashes"],
        dim=checkpoint["dim"],
        vocabulary=checkpoint["vocabulary"],
        tokenizer_hash=checkpoint["tokenizer_hash"],
        max_batch_tokens=pace["max_batch_tokens"],
        threads=pace["threads"],
        since_path=document["since_path"],
    )


def open_checkpoint(request: EncodeRequest, *, download: bool = True, heads: bool = True) -> Checkpoint:
    """Find and read the checkpoint that was typed, or that M3_MODEL names, or BAAI/bge-m3."""
    model = name_model(request) or DEFAULT_MODEL
    folder = find_checkpoint(model, revision=request.revision, download=download, heads=heads)
    return read_checkpoint(folder, name=None if folder == Path(model).expanduser() else model)


def name_model(request: EncodeRequest) -> str | None:
    """Return the model that was asked for by flag or environment, None if none was."""
    return request.model or os.environ.get("M3_MODEL") or None


def settle_run(
    request: EncodeRequest,
    *,
    sources: tuple[Source, ...],
    checkpoint: Checkpoint,
    tokenizer_hash: str,
    stdin: PeekableStream | None,
) -> Run:
    """Settle a new folder's run: flags, then defaults, then what corpus, checkpoint and machine say."""
    from m3cli.encoder import device as machine  # noqa: PLC0415  torch, only for a run that will need it

    refuse_endless(request)
    device = machine.resolve_device(request.device)
    outputs = request.outputs or ALL_OUTPUTS
    longest = checkpoint.max_length
    if request.mcls:
        longest = fit_length(longest, every=request.mcls)
    max_length = request.max_length or min(checkpoint.default_max_length, longest)
    check_outputs(outputs, checkpoint)
    refuse_unwanted_flags(request, outputs)
    check_colbert(request, checkpoint)
    if request.compression == "zstd" and request.format == "npy":
        raise UsageError(
            "--compression zstd is for --format parquet: arrays that are mapped into memory are not compressed"
        )
    check_lengths(max_length, request, checkpoint, longest=longest)
    settled: dict[str, Any] = {
        "outputs": outputs,
        "max_length": max_length,
        "split": request.split or DEFAULT_SPLIT,
        "dtype": machine.resolve_dtype(request.dtype, device),
        "shard_size": request.shard_size or auto_shard_size(device, outputs),
    }
    typed = {name: getattr(request, name) for name in _PLAIN if getattr(request, name) is not None}
    meaning = Meaning(fields=settle_fields(request, sources=sources, stdin=stdin), **{**typed, **settled})
    return Run(
        meaning=meaning,
        sources=sources,
        model=checkpoint.name,
        hashes=identify_checkpoint(checkpoint).hashes,
        dim=checkpoint.hidden_size,
        vocabulary=checkpoint.vocab_size,
        tokenizer_hash=tokenizer_hash,
        max_batch_tokens=request.max_batch_tokens or machine.auto_batch_tokens(device),
        threads=machine.auto_threads(),
    )


def settle_fields(request: EncodeRequest, *, sources: Sequence[Source], stdin: PeekableStream | None) -> Fields:
    """Settle which field of a row is what, from the flags and the corpus' first rows."""
    return resolve_fields(
        sources,
        id_field=request.id_field,
        text_field=request.text_field,
        title_field=request.title_field,
        keep_fields=request.keep_fields or (),
        reserved=RESERVED_COLUMNS,
        stdin=stdin,
    )


def auto_shard_size(device: str, outputs: Sequence[Output]) -> int:
    """Return the bytes of text of a shard: enough to keep the device busy, little enough to lose in a crash."""
    if not device.startswith("cuda"):
        return AUTO_SHARD_SIZE["cpu"]
    return AUTO_SHARD_SIZE["cuda with colbert" if "colbert" in outputs else "cuda"]


def check_outputs(outputs: Sequence[Output], checkpoint: Checkpoint) -> None:
    """Refuse outputs that the checkpoint has no head for."""
    missing = [output for output in outputs if output not in checkpoint.outputs]
    if missing:
        raise ModelError(
            f"{checkpoint.folder} has no head for {' and '.join(missing)} (no {missing[0]}_linear.pt); "
            f"name the outputs that it gives with --outputs {','.join(checkpoint.outputs)}, "
            "or use a checkpoint such as BAAI/bge-m3"
        )


def check_colbert(request: EncodeRequest, checkpoint: Checkpoint) -> None:
    """Refuse ways to store ColBERT vectors that this checkpoint does not have."""
    if request.colbert_dtype == "binary" and checkpoint.hidden_size % 8:
        raise UsageError(
            f"--colbert-dtype binary: signs are stored eight to a byte, and the vectors of {checkpoint.name} are "
            f"{checkpoint.hidden_size} wide; use int8"
        )
    if request.colbert_top_k is not None and "sparse" not in checkpoint.outputs:
        raise UsageError(
            f"--colbert-top-k {request.colbert_top_k} goes by lexical weights, and {checkpoint.folder} has no "
            "head for them (no sparse_linear.pt); use --colbert-pool, or a checkpoint such as BAAI/bge-m3"
        )


def refuse_endless(request: EncodeRequest) -> None:
    """Refuse numbers that arrays and run.json cannot hold."""
    for name in ("mcls", "colbert_pool", "colbert_top_k"):
        value = getattr(request, name)
        if value is not None and not value <= MOST:
            raise UsageError(f"{spell_flag(name)} {value}: at most {MOST}")


def refuse_unwanted_flags(request: EncodeRequest, outputs: Sequence[Output]) -> None:
    """Refuse flags about an output that there will not be."""
    for name, output in _NEEDED.items():
        value = getattr(request, name)
        if value is not None and output not in outputs:
            raise UsageError(
                f"{spell_flag(name)} {value} needs {output} among the outputs {','.join(outputs)}; "
                f"leave the flag out, or add {output} to --outputs"
            )


def check_lengths(max_length: int, request: EncodeRequest, checkpoint: Checkpoint, *, longest: int) -> None:
    """Refuse a length that the checkpoint has no positions for, and flags about chunks that there are not."""
    overlap = request.overlap or 0
    if request.split and request.long_docs == "truncate":
        raise UsageError(
            f"--split {request.split} with --long-docs truncate: a document has its first chunk only, which is full; "
            "leave --split out, or choose --long-docs chunk, merge or both"
        )
    if overlap and request.long_docs == "truncate":
        raise UsageError(
            f"--overlap {overlap} with --long-docs truncate: a document has its first chunk only, and none to repeat; "
            "leave --overlap out, or choose --long-docs chunk, merge or both"
        )
    if max_length > longest:
        added = f" beside the <s> that --mcls {request.mcls} adds" if request.mcls else ""
        raise UsageError(
            f"--max-length {max_length}: {checkpoint.name} has {checkpoint.num_positions} positions, "
            f"so a chunk holds at most {longest} tokens{added}"
        )
    if overlap >= max_length - NUM_SPECIALS:
        raise UsageError(
            f"--overlap {overlap}: a chunk of {max_length} tokens holds {max_length - NUM_SPECIALS} of text; "
            "lower --overlap or raise --max-length"
        )


def adopt_run(run: Run, request: EncodeRequest, *, sources: tuple[Source, ...], out: str) -> Run:
    """Go on with a folder's run: refuse what was typed and differs, take today's sources and typed pace.

    Raises:
        ForeignFolder: a typed setting, or the input, is another than the folder's.
    """
    refuse_unwanted_flags(request, request.outputs or run.meaning.outputs)
    for flag in _PLAIN:
        _refuse_other(flag, getattr(request, flag), getattr(run.meaning, flag), out)
    for flag, member in _FLAGS.items():
        typed = getattr(request, flag)
        _refuse_other(flag, typed, getattr(run.meaning.fields, member) or "", out)
    _refuse_other("keep_fields", request.keep_fields, run.meaning.fields.kept, out)
    _refuse_other_sources(run.sources, sources, out)
    return replace(run, sources=sources, max_batch_tokens=request.max_batch_tokens or run.max_batch_tokens)


def _refuse_other(flag: str, typed: object, settled: object, out: str) -> None:
    if typed is None or typed == settled:
        return
    made = f"without {spell_flag(flag)}" if settled is None else f"with {spell_flag(flag)} {_spell(settled)}"
    raise ForeignFolder(
        f"{out} was made {made}, this run asks for {_spell(typed)}; "
        "drop the flag to go on with the folder, or use another --out"
    )


def spell_flag(name: str) -> str:
    """Return a flag as it is typed."""
    return f"--{name.replace('_', '-')}"


def _spell(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "(none)"
    return repr(value) if isinstance(value, str) and (not value or not value.isprintable()) else str(value)


def _refuse_other_sources(before: Sequence[Source], now: Sequence[Source], out: str) -> None:
    names = [source.name for source in before], [source.name for source in now]
    if names[0] != names[1]:
        lost = next((name for name in names[0] if name not in names[1]), None)
        new = next((name for name in names[1] if name not in names[0]), None)
        change = "; ".join([*([f"no {lost} now"] if lost else []), *([f"{new} is new"] if new else [])])
        raise ForeignFolder(
            f"{out} was made from other input ({change or 'another order'}); use another --out for this input"
        )
    for old, new_source in zip(before, now, strict=True):
        if (old.format, old.compression) != (new_source.format, new_source.compression):
            raise ForeignFolder(
                f"{out} read {old.name} as {old.format}, this run reads it as {new_source.format}; use another --out"
            )
        if old.size != new_source.size:
            raise ForeignFolder(
                f"{old.name} has {new_source.size:,} bytes, it had {old.size:,} when {out} was made from it; "
                "use another --out to encode what it is now"
            )


def find_changed(before: Sequence[Source], now: Sequence[Source]) -> frozenset[int]:
    """Return the sources of the same size that were written to since: their finished shards are to be compared."""
    pairs = enumerate(zip(before, now, strict=True))
    return frozenset(number for number, (old, new) in pairs if old.mtime_ns != new.mtime_ns)


def refuse_other_checkpoint(run: Run, checkpoint: Checkpoint, *, out: str) -> None:
    """Refuse a checkpoint whose content is another than the folder's."""
    hashes = identify_checkpoint(checkpoint).hashes
    other = sorted(name for name in {*hashes, *run.hashes} if hashes.get(name) != run.hashes.get(name))
    if other:
        raise ForeignFolder(
            f"{out} was made with model {run.model}, this run has {checkpoint.name}, and their {other[0]} differ; "
            "pass the same checkpoint with --model, or use another --out"
        )


def refuse_other_tokenizer(run: Run, tokenizer_hash: str, *, out: str) -> None:
    """Refuse a tokenizer that cuts texts in another way than the folder's did."""
    if tokenizer_hash != run.tokenizer_hash:
        raise ForeignFolder(
            f"{out} was made with tokenizer {run.tokenizer_hash[:7]}, this version of transformers builds "
            f"{tokenizer_hash[:7]} from the same files; install the version it was begun with, or use another --out"
        )
