"""What a folder is made of: settled once from what was typed, the corpus and the checkpoint; adopted by later runs.

`run.json` holds it. A flag that was not typed is adopted from the folder; one that was typed and says something else
is another run, and refused by name. `auto` values (dtype, shard size, batch tokens, threads) are settled here and
nowhere else. The checkpoint's path is no part of it, its content is; the paths of sources help to find them again and
are not compared.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from m3cli.config import (
    ALL_OUTPUTS,
    AUTO_SHARD_SIZE,
    COLBERT_MEMBERS,
    DEFAULT_MODEL,
    MAX_LENGTH_CEILING,
    OUTPUT_OF,
    CheckpointConfig,
    EncodeConfig,
    EncodeRequest,
    RunConfig,
    Runtime,
    list_chosen,
)
from m3cli.corpus.field_flags import ID_NAMES, TEXT_NAMES, TITLE_NAMES
from m3cli.corpus.fields import resolve_fields
from m3cli.corpus.streams import PeekableStream
from m3cli.encoder.batcher import fit_length
from m3cli.encoder.checkpoint import HEAD_FILES, Checkpoint, find_checkpoint, hash_checkpoint, read_checkpoint
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
"flags whose settled value is a member of EncodeConfig of the same name"
_NEEDED: dict[str, Output] = {**OUTPUT_OF, "mcls": "dense"}
"of each flag that is about one output, that output"
MOST = (1 << 31) - 1
"that a number of tokens or vectors can be"


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
) -> RunConfig:
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
        "dtype": machine.resolve_dtype(request.dtype, device),
        "shard_size": request.shard_size or auto_shard_size(device, outputs),
    }
    typed = {name: getattr(request, name) for name in _PLAIN if getattr(request, name) is not None}
    config = EncodeConfig(fields=settle_fields(request, sources=sources, stdin=stdin), **{**typed, **settled})
    return RunConfig(
        config=config,
        checkpoint=CheckpointConfig(
            name=checkpoint.name,
            path=str(checkpoint.folder.absolute()),
            revision=request.revision,
            dim=checkpoint.hidden_size,
            vocabulary=checkpoint.vocab_size,
            hashes=hash_checkpoint(checkpoint),
            tokenizer_hash=tokenizer_hash,
        ),
        sources=sources,
        runtime=Runtime(
            max_batch_tokens=request.max_batch_tokens or machine.auto_batch_tokens(device),
            threads=machine.auto_threads(),
        ),
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


def describe_rest(run: RunConfig, request: EncodeRequest, *, out: str, rows: int | None = None) -> str | None:
    """Return what an option that a folder was begun with leaves out, and the command that encodes it; None: nothing.

    Only options that were not typed again count: who types one knows of it. A complete folder of fewer `rows` than its
    limit has the whole input.
    """
    config, left = run.config, []
    limited = request.limit is None and config.limit is not None and (rows is None or rows >= config.limit)
    if limited:
        left.append(f"--limit {config.limit}")
    heads = [output for output, name in HEAD_FILES.items() if name in run.checkpoint.hashes]
    missing = [output for output in heads if output not in config.outputs]
    if request.outputs is None and ("dense" not in config.outputs or missing):
        left.append(f"--outputs {','.join(config.outputs)}")
    if not left:
        return None
    command = spell_command(run, request, since=out if limited and len(left) == 1 else None)
    return f"{out} was begun with {' and '.join(left)} and has no more than that; for the rest: {command}"


def spell_command(run: RunConfig, request: EncodeRequest, *, since: str | None) -> str:
    """Return the command that encodes a folder's input as the folder was, without its limit, into a new folder.

    With `since` the outputs are those of that folder and its vectors are reused; without, all outputs are made.
    """
    config, fields = run.config, run.config.fields
    words = ["m3", "encode", *request.inputs, "--out", "NEW.m3"]
    if since is not None:
        words += ["--since-run", since]
    if (model := name_model(request)) is not None or run.checkpoint.name != DEFAULT_MODEL:
        words += ["--model", model or run.checkpoint.path]
    options: dict[str, Any] = {
        "outputs": config.outputs if since is not None and config.outputs != ALL_OUTPUTS else None,
        "max_length": config.max_length if config.max_length != MAX_LENGTH_CEILING else None,
        "dtype": config.dtype if config.dtype in ("float32", "int8") else None,
        "format": config.format if config.format != "parquet" else None,
        "text_field": fields.text if fields.text not in ("", *TEXT_NAMES) else None,
        "id_field": fields.id if fields.id not in ID_NAMES else None,
        "title_field": fields.title if fields.title not in TITLE_NAMES else None,
        "keep_fields": fields.kept or None,
        **list_chosen(config.to_json()),
        "limit": None,
    }
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [_join(value)])]
    return shlex.join(words)


def _join(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def adopt_run(run: RunConfig, request: EncodeRequest, *, sources: tuple[Source, ...], out: str) -> RunConfig:
    """Go on with a folder's run: refuse what was typed and differs, take today's sources and typed pace.

    Raises:
        ForeignFolder: a typed setting, or the input, is another than the folder's.
    """
    refuse_unwanted_flags(request, request.outputs or run.config.outputs)
    if request.limit is not None and run.config.limit not in (None, request.limit):
        raise ForeignFolder(
            f"{out} was made with --limit {run.config.limit}, this run asks for {request.limit}; for more rows: "
            f"{spell_command(run, request, since=request.out or out)} --limit {request.limit}"
        )
    for flag in _PLAIN:
        _refuse_other(flag, getattr(request, flag), getattr(run.config, flag), out)
    for flag, member in _FLAGS.items():
        typed = getattr(request, flag)
        _refuse_other(flag, typed, getattr(run.config.fields, member) or "", out)
    _refuse_other("keep_fields", request.keep_fields, run.config.fields.kept, out)
    _refuse_other_sources(run.sources, sources, out)
    runtime = replace(run.runtime, max_batch_tokens=request.max_batch_tokens or run.runtime.max_batch_tokens)
    return replace(run, sources=sources, runtime=runtime)


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


def refuse_other_checkpoint(run: RunConfig, checkpoint: Checkpoint, *, out: str) -> None:
    """Refuse a checkpoint whose content is another than the folder's."""
    if (other := find_other_file(run.checkpoint, checkpoint)) is not None:
        raise ForeignFolder(
            f"{out} was made with model {run.checkpoint.name}, this run has {checkpoint.name}, and their {other} "
            "differ; pass the same checkpoint with --model, or use another --out"
        )


def find_other_file(made: CheckpointConfig, checkpoint: Checkpoint) -> str | None:
    """Return a file of which a checkpoint has another content than the one that a folder was made with."""
    hashes = hash_checkpoint(checkpoint)
    return next((name for name in sorted({*hashes, *made.hashes}) if hashes.get(name) != made.hashes.get(name)), None)


def refuse_other_tokenizer(run: RunConfig, tokenizer_hash: str, *, out: str) -> None:
    """Refuse a tokenizer that cuts texts in another way than the folder's did."""
    made = run.checkpoint.tokenizer_hash
    if tokenizer_hash != made:
        raise ForeignFolder(
            f"{out} was made with tokenizer {made[:7]}, this version of transformers builds "
            f"{tokenizer_hash[:7]} from the same files; install the version it was begun with, or use another --out"
        )
