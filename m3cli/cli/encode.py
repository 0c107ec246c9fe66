"""`m3 encode` and `m3 plan`."""

from __future__ import annotations

import sys
from dataclasses import asdict

import typer

from m3cli.cli.options import AsJson, parse_duration, takes
from m3cli.cli.terminal import limit_runtime, open_stdin, print_json, show_run, stop
from m3cli.config import EncodeRequest

ENCODE_EXAMPLES = """\
m3 encode corpus.jsonl
m3 encode docs/ --outputs dense,sparse --keep-text --out docs.m3
zcat dump.jsonl.gz | m3 encode - --out dump.m3 --max-runtime 7h30m"""
PLAN_EXAMPLES = """\
m3 plan corpus.jsonl
m3 plan docs/ --outputs dense --max-length 512 --out docs.m3
m3 plan corpus.jsonl --limit 100000 --json"""
_NOT_IN_PLAN = {
    *("share", "max_batch_tokens", "max_skipped", "verify_input", "space_check", "gone"),
    *("max_runtime", "progress", "metrics", "log_file"),
    *("engine", "ray_workers", "gpus_per_worker", "cpus_per_worker", "address"),
}


@takes(EncodeRequest)
def encode(request: EncodeRequest) -> None:
    """Encode a corpus into a folder of vectors. The same command again resumes.

    An option that is not typed is taken from the folder, if it exists.
    """
    seconds = parse_duration("--max-runtime", request.max_runtime)
    note = f"reading {' '.join(request.inputs)}"
    with limit_runtime(seconds, typed=request.max_runtime or ""), show_run(request.progress, note=note) as shown:
        from m3cli.engines.ray import check_options, encode_on_ray  # noqa: PLC0415  pyarrow, not for --help
        from m3cli.jobs.encode.command import encode_corpus  # noqa: PLC0415

        check_options(request)
        if request.engine == "ray":
            raise typer.Exit(encode_on_ray(request, progress=shown, stop=stop))
        code = encode_corpus(request, progress=shown, stdin=open_stdin(request.inputs), stop=stop)
    raise typer.Exit(code)


@takes(EncodeRequest, without=_NOT_IN_PLAN)
def plan(request: EncodeRequest, *, as_json: AsJson = False) -> None:
    """Show what an encode would do: shards, documents, tokens, bytes on disk, time, and what is done already.

    Nothing is written. Documents and tokens are estimated from a sample of the input, the time by encoding some of it.
    """
    with show_run(request.progress, note=f"reading {' '.join(request.inputs)}"):
        from m3cli.jobs.plan import plan_corpus  # noqa: PLC0415  pyarrow and torch, not for --help
        from m3cli.tables import plan_panel, print_panel  # noqa: PLC0415

        found = plan_corpus(request, stdin=open_stdin(request.inputs))
    if as_json:
        print_json(asdict(found))
    else:
        print_panel(plan_panel(found, title="m3 plan"), sys.stdout)
