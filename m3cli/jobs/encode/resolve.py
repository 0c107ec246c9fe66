"""Resolve a new run or resume an old one: from the options that were typed to an open folder.

`run.json` holds the config. An option that was not typed comes from the folder; one that was typed with another value
is an error (exit code 10) that names the option. `auto` values (dtype, shard size, batch tokens, threads) are resolved
here and nowhere else. The checkpoint's content is compared, its path is not; nor are the paths of sources.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3cli.config import (
    ALL_OUTPUTS,
    AUTO_SHARD_SIZE,
    COMPARED_OPTIONS,
    DEFAULT_MODEL,
    MAX_LENGTH_CEILING,
    REQUIRED_OUTPUT,
    CheckpointConfig,
    EncodeConfig,
    EncodeRequest,
    ModelChoice,
    RunConfig,
    Runtime,
    list_field_options,
    list_non_defaults,
)
from m3cli.corpus.fields import kept_schema, resolve_fields
from m3cli.corpus.plan import Plan, plan_shards
from m3cli.corpus.reader import Action, read_shards
from m3cli.corpus.streams import PeekableStream
from m3cli.encoder.checkpoint import HEAD_FILES, Checkpoint, find_checkpoint, hash_checkpoint, read_checkpoint
from m3cli.encoder.chunker import NUM_SPECIALS, fit_length
from m3cli.errors import ForeignFolder, ModelError, UsageError
from m3cli.jobs.encode.increment import inherit_options, resolve_increment
from m3cli.records import DoneEntry, Fields, Output, Shard, ShardCounts, ShardText, Source
from m3cli.store.folder import RunFolder
from m3cli.store.layout import RESERVED_COLUMNS, RowForm
from m3cli.store.reader import open_folder

if TYPE_CHECKING:
    from m3cli.encoder.tokenizer import Tokenizer
    from m3cli.jobs.encode.estimate import Estimate


_FLAGS = {"id_field": "id", "text_field": "text", "title_field": "title"}
"options that become a member of Fields"
MAX_INT32 = (1 << 31) - 1
"the largest number of tokens or vectors"


def open_checkpoint(
    model: str | None, revision: str | None = None, *, download: bool = True, heads: bool = True
) -> Checkpoint:
    """Find and read the checkpoint `model`, or that of M3_MODEL, or BAAI/bge-m3."""
    model = model or os.environ.get("M3_MODEL") or DEFAULT_MODEL
    folder = find_checkpoint(model, revision=revision, download=download, heads=heads)
    return read_checkpoint(folder, name=None if folder == Path(model).expanduser() else model)


def open_checkpoint_of(request: ModelChoice, run: RunConfig) -> Checkpoint:
    """Open the checkpoint that is named, or else the one that made a folder, or the default one."""
    model, revision = next(iter(list_models(run.checkpoint, request)), (None, request.revision))
    checkpoint = open_checkpoint(model, revision)
    return replace(checkpoint, name=run.checkpoint.name) if model == run.checkpoint.path else checkpoint


def list_models(made: CheckpointConfig, request: ModelChoice) -> list[tuple[str, str | None]]:
    """Return what may be the checkpoint of a folder, in order, each with its revision.

    It is --model, or else M3_MODEL, the path that the folder remembers, and its hub id.
    """
    if request.model is not None:
        return [(request.model, request.revision)]
    models = []
    if named := os.environ.get("M3_MODEL"):
        models.append((named, request.revision))
    if Path(made.path).is_dir():
        models.append((made.path, None))
    if made.name.count("/") == 1:
        models.append((made.name, request.revision or made.revision))
    return models


def name_model(request: EncodeRequest) -> str | None:
    """Return the model named by --model or M3_MODEL; None: neither is set."""
    return request.model or os.environ.get("M3_MODEL") or None


def resolve_config(
    request: EncodeRequest,
    *,
    sources: tuple[Source, ...],
    checkpoint: Checkpoint,
    tokenizer_hash: str,
    stdin: PeekableStream | None,
) -> RunConfig:
    """Resolve the config of a new folder: typed options, then defaults, then corpus, checkpoint and machine."""
    from m3cli.encoder import device as machine  # noqa: PLC0415  torch, only for a run that will need it

    check_ranges(request)
    device = machine.resolve_device(request.device)
    outputs = request.outputs or ALL_OUTPUTS
    longest = checkpoint.max_length
    if request.mcls:
        longest = fit_length(longest, every=request.mcls)
    max_length = request.max_length or min(checkpoint.default_max_length, longest)
    check_outputs(outputs, checkpoint)
    check_needed_outputs(request, outputs)
    check_colbert(request, checkpoint)
    if request.compression == "zstd" and request.format == "npy":
        raise UsageError(
            "--compression zstd is for --format parquet: arrays that are mapped into memory are not compressed"
        )
    check_lengths(max_length, request, checkpoint, longest=longest)
    resolved: dict[str, Any] = {
        "outputs": outputs,
        "max_length": max_length,
        "dtype": machine.resolve_dtype(request.dtype, device),
        "shard_size": request.shard_size or auto_shard_size(device),
    }
    typed = {name: getattr(request, name) for name in COMPARED_OPTIONS if getattr(request, name) is not None}
    config = EncodeConfig(fields=resolve_run_fields(request, sources=sources, stdin=stdin), **{**typed, **resolved})
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


def resolve_run_fields(request: EncodeRequest, *, sources: Sequence[Source], stdin: PeekableStream | None) -> Fields:
    """Resolve which field of a row is what, from the options and the first rows of the corpus."""
    return resolve_fields(
        sources,
        id_field=request.id_field,
        text_field=request.text_field,
        title_field=request.title_field,
        keep_fields=request.keep_fields or (),
        reserved=RESERVED_COLUMNS,
        stdin=stdin,
    )


def auto_shard_size(device: str) -> int:
    """Return the bytes of text of a shard: enough to keep the device busy, little enough to lose in a crash.

    The first shard is tokenised before the device has work, so a large one delays it.
    """
    return AUTO_SHARD_SIZE[device.partition(":")[0]]


def check_outputs(outputs: Sequence[Output], checkpoint: Checkpoint) -> None:
    """Raise ModelError for an output that the checkpoint has no head for."""
    missing = [output for output in outputs if output not in checkpoint.outputs]
    if missing:
        raise ModelError(
            f"{checkpoint.folder} has no head for {' and '.join(missing)} (no {missing[0]}_linear.pt); "
            f"name the outputs that it gives with --outputs {','.join(checkpoint.outputs)}, "
            "or use a checkpoint such as BAAI/bge-m3"
        )


def check_colbert(request: EncodeRequest, checkpoint: Checkpoint) -> None:
    """Raise UsageError for a form of ColBERT vectors that needs what this checkpoint lacks."""
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


def check_ranges(request: EncodeRequest) -> None:
    """Raise UsageError for a number that arrays and run.json cannot hold."""
    for name in ("mcls", "colbert_pool", "colbert_top_k"):
        value = getattr(request, name)
        if value is not None and not value <= MAX_INT32:
            raise UsageError(f"{format_option(name)} {value}: at most {MAX_INT32}")


def check_needed_outputs(request: EncodeRequest, outputs: Sequence[Output]) -> None:
    """Raise UsageError for an option about an output that the folder will not have."""
    for name, output in REQUIRED_OUTPUT.items():
        value = getattr(request, name)
        if value is not None and output not in outputs:
            raise UsageError(
                f"{format_option(name)} {value} needs {output} among the outputs {','.join(outputs)}; "
                f"leave the option out, or add {output} to --outputs"
            )


def check_lengths(max_length: int, request: EncodeRequest, checkpoint: Checkpoint, *, longest: int) -> None:
    """Raise UsageError for a length that exceeds the positions, and for options that have no effect."""
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
        added = f" next to the <s> that --mcls {request.mcls} adds" if request.mcls else ""
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
    """Describe what the folder's own options leave out, with the command that encodes it; None: nothing.

    An option that was typed again is not mentioned. A complete folder of fewer `rows` than its limit has all of them.
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
    command = format_increment(request, out) if limited and len(left) == 1 else format_command(run, request)
    return f"{out} was begun with {' and '.join(left)} and has no more than that; for the rest: {command}"


def format_command(run: RunConfig, request: EncodeRequest) -> str:
    """Return the command that encodes all outputs of the same input, with the same options but without the limit."""
    config = run.config
    words = ["m3", "encode", *request.input_words, "--out", "NEW.m3"]
    if (model := name_model(request)) is not None or run.checkpoint.name != DEFAULT_MODEL:
        words += ["--model", model or run.checkpoint.path]
    options: dict[str, Any] = {
        "max_length": config.max_length if config.max_length != MAX_LENGTH_CEILING else None,
        "dtype": config.dtype if config.dtype in ("float32", "int8", "nf4") else None,
        "format": config.format if config.format != "parquet" else None,
        **list_field_options(config.fields),
        **list_non_defaults(config.to_json()),
        "limit": None,
    }
    for name, value in options.items():
        if value is not None:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [format_option(name), *([] if value is True else [shown])]
    return shlex.join(words)


def format_increment(request: EncodeRequest, old: str) -> str:
    """Return the command that encodes the same input and takes over the vectors and options of a folder."""
    return shlex.join(["m3", "encode", *request.input_words, "--out", "NEW.m3", "--since-run", old])


def describe_increment(request: EncodeRequest, out: str) -> str:
    """Describe how input that has changed is encoded."""
    if not request.inputs:  # the input is read again for its text
        return "use another --out to encode what it is now"
    return f"to encode what is new and take over the rest: {format_increment(request, request.out or out)}"


def resume_run(run: RunConfig, request: EncodeRequest, *, sources: tuple[Source, ...], out: str) -> RunConfig:
    """Return the folder's config with the current sources and the typed batch budget.

    Raises:
        ForeignFolder: a typed option or the input differs from the folder's.
    """
    check_needed_outputs(request, request.outputs or run.config.outputs)
    if request.limit is not None and run.config.limit not in (None, request.limit):
        raise ForeignFolder(
            f"{out} was made with --limit {run.config.limit}, this run asks for {request.limit}; for more rows: "
            f"{format_increment(request, request.out or out)} --limit {request.limit}"
        )
    for flag in COMPARED_OPTIONS:
        _check_same_option(flag, getattr(request, flag), getattr(run.config, flag), out)
    for flag, member in _FLAGS.items():
        typed = getattr(request, flag)
        _check_same_option(flag, typed, getattr(run.config.fields, member) or "", out)
    _check_same_option("keep_fields", request.keep_fields, run.config.fields.kept, out)
    _check_same_sources(run.sources, sources, out, describe_increment(request, out))
    runtime = replace(run.runtime, max_batch_tokens=request.max_batch_tokens or run.runtime.max_batch_tokens)
    return replace(run, sources=sources, runtime=runtime)


def _check_same_option(flag: str, typed: object, stored: object, out: str) -> None:
    if typed is None or typed == stored:
        return
    made = f"without {format_option(flag)}" if stored is None else f"with {format_option(flag)} {_format(stored)}"
    raise ForeignFolder(
        f"{out} was made {made}, this run asks for {_format(typed)}; "
        "leave the option out to resume the folder, or use another --out"
    )


def format_option(name: str) -> str:
    """Return an option as it is typed."""
    return f"--{name.replace('_', '-')}"


def _format(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "(none)"
    return repr(value) if isinstance(value, str) and (not value or not value.isprintable()) else str(value)


def _check_same_sources(before: Sequence[Source], now: Sequence[Source], out: str, remedy: str) -> None:
    if before[0].format == "files" != now[0].format:
        raise ForeignFolder(f"{out} was made with --per-file: give it again, or use another --out")
    names = [source.name for source in before], [source.name for source in now]
    if names[0] != names[1]:
        lost = next((name for name in names[0] if name not in names[1]), None)
        new = next((name for name in names[1] if name not in names[0]), None)
        change = "; ".join([*([f"no {lost} now"] if lost else []), *([f"{new} is new"] if new else [])])
        raise ForeignFolder(f"{out} was made from other input ({change or 'another order'}); {remedy}")
    for old, new_source in zip(before, now, strict=True):
        if (old.format, old.compression) != (new_source.format, new_source.compression):
            raise ForeignFolder(
                f"{out} read {old.name} as {old.format}, this run reads it as {new_source.format}; use another --out"
            )
        if old.size != new_source.size:
            raise ForeignFolder(
                f"{old.name} has {new_source.size:,} bytes, it had {old.size:,} when {out} was made from it; {remedy}"
            )


def find_changed(before: Sequence[Source], now: Sequence[Source]) -> frozenset[int]:
    """Return the sources of the same size with another mtime; the input of their done shards is compared."""
    pairs = enumerate(zip(before, now, strict=True))
    return frozenset(number for number, (old, new) in pairs if old.mtime_ns != new.mtime_ns)


def check_same_checkpoint(run: RunConfig, checkpoint: Checkpoint, *, out: str) -> None:
    """Raise ForeignFolder if the checkpoint's content differs from that of the folder's."""
    if (other := find_other_file(run.checkpoint, checkpoint)) is not None:
        raise ForeignFolder(
            f"{out} was made with model {run.checkpoint.name}, this run has {checkpoint.name}, and their {other} "
            "differ; pass the same checkpoint with --model, or use another --out"
        )


def find_other_file(made: CheckpointConfig, checkpoint: Checkpoint) -> str | None:
    """Return the name of the first checkpoint file whose content differs; None: all are equal."""
    hashes = hash_checkpoint(checkpoint)
    return next((name for name in sorted({*hashes, *made.hashes}) if hashes.get(name) != made.hashes.get(name)), None)


def check_same_tokenizer(run: RunConfig, tokenizer_hash: str, *, out: str) -> None:
    """Raise ForeignFolder if the tokenizer's serialisation differs from that of the folder's."""
    made = run.checkpoint.tokenizer_hash
    if tokenizer_hash != made:
        raise ForeignFolder(
            f"{out} was made with tokenizer {made[:7]}, this version of transformers builds "
            f"{tokenizer_hash[:7]} from the same files; install the version that began the folder, or use another --out"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """A run before its folder is open, with what encoding needs."""

    run: RunConfig
    form: RowForm
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    estimate: Estimate | None = None
    "of the complete corpus; None: unknown, or not asked for"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRun:
    """A locked folder with its config, its plan and its done shards."""

    folder: RunFolder
    name: str
    run: RunConfig
    form: RowForm
    plan: Plan
    done: dict[int, DoneEntry]
    selector: ShardSelector
    resumed: bool
    checkpoint: Checkpoint | None
    "named by --model or M3_MODEL, and equal to the folder's; None: none is named"

    @property
    def shown_path(self) -> str:
        """The folder's path, relative to the working directory where it is below it."""
        path, here = self.folder.path, Path.cwd()
        return str(path.relative_to(here) if path.is_relative_to(here) else path)

    @property
    def counts(self) -> ShardCounts:
        """Counts of the shards that were done when the folder was opened."""
        return sum((entry.counts for entry in self.done.values()), start=ShardCounts())

    @property
    def num_shards(self) -> int | None:
        """Number of shards of the folder; None: unknown until the input is read."""
        if (manifest := self.folder.manifest()) is not None:
            return manifest.num_shards
        return len(self.plan.shards) if self.plan.complete else None

    def read(self, stdin: PeekableStream | None) -> Iterator[ShardText]:
        """Read the shards that this run encodes; compare the input of done shards that may have changed."""
        config = self.run.config
        texts = read_shards(
            self.run.sources,
            plan=self.plan,
            fields=config.fields,
            schema=self.form.kept,
            title_sep=config.title_sep,
            max_row_bytes=config.max_row_bytes,
            ask=self.selector.action_for,
            stdin=stdin,
        )
        return (text for text in texts if self.selector.is_to_encode(text))


def resolve_new_run(request: EncodeRequest, sources: tuple[Source, ...], stdin: PeekableStream | None) -> NewRun:
    """Resolve a new run; every error of corpus and model is raised before a folder is made."""
    # torch, a second: only for a new folder
    from m3cli.encoder.chunker import check_chunk_space, cutting_of  # noqa: PLC0415
    from m3cli.encoder.tokenizer import load_tokenizer  # noqa: PLC0415

    previous = None if request.since_run is None else open_folder(Path(request.since_run))
    if previous is None:
        checkpoint = open_checkpoint(request.model, request.revision)
    else:
        request = inherit_options(request, previous.run, sources)
        checkpoint = open_checkpoint_of(request, previous.run)
    tokenizer = load_tokenizer(checkpoint)
    run = resolve_config(
        request, sources=sources, checkpoint=checkpoint, tokenizer_hash=tokenizer.serialisation_hash, stdin=stdin
    )
    check_chunk_space(tokenizer, cutting_of(run.config))
    form = make_form(run)
    if previous is not None:
        run = resolve_increment(run, previous, typed=request.since_run)
    return NewRun(run=run, form=form, checkpoint=checkpoint, tokenizer=tokenizer)


def make_form(run: RunConfig, *, kept: bool = True) -> RowForm:
    """Return what all shards of a folder have in common; the types of kept fields come from the input."""
    config = run.config
    return RowForm(
        format=config.format,
        outputs=config.outputs,
        dim=run.checkpoint.dim,
        vocabulary=run.checkpoint.vocabulary,
        dense_dtype=config.dense_dtype,
        colbert=config.colbert_form,
        compression=config.compression,
        exact_vectors=config.exact_vectors,
        keep_text=config.keep_text,
        kept=kept_schema(run.sources, config.fields) if kept and config.fields.kept else None,
    )


def open_run(
    folder: RunFolder,
    fresh: RunConfig | None,
    request: EncodeRequest,
    sources: tuple[Source, ...],
    wants: Callable[[int], bool] | None = None,
) -> OpenRun:
    """Write run.json, or resume the folder; of workers that start together one writes."""
    name = folder.path.name
    with folder.lock.initialising():
        before = folder.run()
        if before is None:
            if fresh is None:
                raise ForeignFolder(f"{folder.path} lost its run.json while this run started; run the command again")
            folder.write_run(fresh)
    checkpoint = None
    if before is None:
        assert fresh is not None
        run, changed = fresh, frozenset[int]()
    else:
        run = resume_run(before, request, sources=sources, out=name)
        changed = find_changed(before.sources, sources)
        if request.verify_input:
            changed = frozenset(range(len(sources)))
        if name_model(request) is not None:
            checkpoint = open_checkpoint(request.model, request.revision)
            check_same_checkpoint(run, checkpoint, out=name)
    done = folder.done()
    folder.check_lengths(done.values())
    share = (request.worker, request.num_workers) if wants is None else (0, 1)
    return OpenRun(
        folder=folder,
        name=name,
        run=run,
        form=make_form(run),
        plan=plan_run(run),
        done=done,
        selector=ShardSelector(
            done, share=share, changed=changed, out=name, remedy=describe_increment(request, name), wants=wants
        ),
        resumed=before is not None,
        checkpoint=checkpoint,
    )


def plan_run(run: RunConfig) -> Plan:
    """Plan the shards of a run, as far as they are known before the input is read."""
    config = run.config
    return plan_shards(
        run.sources,
        fields=config.fields,
        shard_size=config.shard_size,
        limit=config.limit,
        max_row_bytes=config.max_row_bytes,
    )


class ShardSelector:
    """Decides what a run does with each shard.

    `wants(index)` decides which shards are this run's. It is called once for each shard that is not done, in order. By
    default every N-th shard is, beginning with the I-th, for a `share` (I, N).
    """

    def __init__(
        self,
        done: Mapping[int, DoneEntry],
        *,
        share: tuple[int, int],
        changed: frozenset[int] = frozenset(),
        out: str,
        remedy: str,
        wants: Callable[[int], bool] | None = None,
    ) -> None:
        self.num_shards = 0
        "seen by `action_for` so far; the number of the folder's shards once the input is read"
        self._done = done
        self._worker, self._num_workers = share
        self._wants = wants or self._is_in_stripe
        self._wanted: set[int] = set()
        self._changed = changed
        self._out, self._remedy = out, remedy

    def count_todo(self, num_shards: int) -> int:
        """Count the shards of this worker that are not done, of all there are."""
        return sum(self._is_in_stripe(index) and index not in self._done for index in range(num_shards))

    def action_for(self, shard: Shard) -> Action:
        """Return what the reader does with a shard; it asks once for each, in order."""
        self.num_shards += 1
        if shard.index in self._done:
            return "hash" if shard.source in self._changed and self._is_in_stripe(shard.index) else "skip"
        if not self._wants(shard.index):
            return "skip"
        self._wanted.add(shard.index)
        return "read"

    def is_to_encode(self, text: ShardText) -> bool:
        """Return whether a shard that was read is encoded; a done one is compared with its entry.

        Raises:
            ForeignFolder: the input of a done shard has changed.
        """
        entry = self._done.get(text.shard.index)
        if entry is not None and entry.input_hash != text.input_hash:
            raise ForeignFolder(
                f"{entry.source} has changed since shard {entry.shard.index} of {self._out} was made from it; "
                f"{self._remedy}"
            )
        return text.shard.index in self._wanted

    def _is_in_stripe(self, index: int) -> bool:
        return index % self._num_workers == self._worker
