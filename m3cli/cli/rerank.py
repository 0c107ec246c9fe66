"""`m3 rerank`."""

from __future__ import annotations

import typer

from m3cli.cli.options import takes
from m3cli.cli.terminal import open_results, open_stdin, show_run
from m3cli.requests import RerankRequest


@takes(RerankRequest)
def rerank(request: RerankRequest) -> None:
    """Sort the best documents of a run again, by a cross-encoder that reads query and passage together.

    Only they are in the new run. A document whose text is not found is left out and counted; then the exit code is 3.
    """
    from m3cli.jobs.rerank import rerank_run  # noqa: PLC0415  torch, not for --help

    with show_run(request.progress) as shown:
        code = rerank_run(request, progress=shown, stdout=open_results(shown), stdin=open_stdin([request.run]))
    raise typer.Exit(code)
