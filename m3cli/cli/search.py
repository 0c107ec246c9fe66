"""`m3 search` and `m3 rerank`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import typer

from m3cli.cli.options import takes
from m3cli.cli.terminal import open_results, open_stdin, show_run
from m3cli.requests import RerankRequest, SearchRequest


@takes(SearchRequest)
def search(request: SearchRequest) -> None:
    """Search an encoded folder, exactly: every row is scored, in one pass; documents by their best chunk.

    Without a query on a terminal it asks for one query after the other.

    Texts are encoded with the checkpoint of the folder. Rows that are not queries are counted; then the exit code is 3.
    """
    request = replace(request, out=None) if request.out == "-" else request
    show = _print_hits if sys.stdout.isatty() else None
    ask = _ask if show is not None and sys.stdin.isatty() else None
    with show_run(request.progress, note=f"opening {request.folder}") as shown:
        from m3cli.jobs.search.command import search_corpus  # noqa: PLC0415  pyarrow, not for --help

        stdin = open_stdin([request.queries or "", *request.corpus_inputs])
        code = search_corpus(request, progress=shown, stdout=open_results(shown), stdin=stdin, show=show, ask=ask)
    raise typer.Exit(code)


def _ask() -> str | None:
    """Return the next line that is typed; None at its end."""
    with suppress(ImportError):
        import readline  # noqa: F401, PLC0415  for `input`: the cursor keys, and lines that were typed before
    try:
        return input("query> ")
    except EOFError:
        print()  # noqa: T201  the shell's prompt begins a line
        return None


def _print_hits(hits: Sequence[Any]) -> None:
    from m3cli.tables import hits_table, open_console  # noqa: PLC0415  rich is slow

    console = open_console(sys.stdout)
    for found in hits:
        console.print(hits_table(found))


@takes(RerankRequest)
def rerank(request: RerankRequest) -> None:
    """Sort the best documents of a run again, by a cross-encoder that reads query and passage together.

    Only they are in the new run. A document whose text is not found is left out and counted; then the exit code is 3.
    """
    from m3cli.jobs.rerank import rerank_run  # noqa: PLC0415  torch, not for --help

    with show_run(request.progress) as shown:
        code = rerank_run(request, progress=shown, stdout=open_results(shown), stdin=open_stdin([request.run]))
    raise typer.Exit(code)
