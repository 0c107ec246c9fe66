"""`m3 convert`."""

from __future__ import annotations

from m3cli.cli.options import takes
from m3cli.cli.terminal import show_run
from m3cli.requests import ConvertRequest


@takes(ConvertRequest)
def convert(request: ConvertRequest) -> None:
    """Write a checkpoint as an ONNX model, for queries online with the very model that encoded the corpus.

    Nothing is written unless onnxruntime gives m3's numbers. It needs pip install 'm3cli[onnx]'.
    """
    from m3cli.jobs.convert import convert_checkpoint  # noqa: PLC0415  torch, not for --help

    with show_run(request.progress) as shown:
        convert_checkpoint(request, progress=shown)
