"""`m3 doctor`: a report as tables or JSON."""

from __future__ import annotations

import sys
from typing import Any

import typer

from m3cli.cli.options import AsJson, takes
from m3cli.cli.terminal import print_json
from m3cli.config import ModelChoice
from m3cli.errors import EXIT_DONE, ModelError


@takes(ModelChoice)
def doctor(request: ModelChoice, *, as_json: AsJson = False) -> None:
    """Report what this machine and this checkpoint can do, and recompute the model card's published scores.

    The exit code is 5 if a published figure is not reached.
    """
    from m3cli.jobs.doctor import examine  # noqa: PLC0415  torch, not for --help

    report = examine(model=request.model, revision=request.revision, device=request.device)
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    failed = any(figure["status"] == "fail" for figure in report["card"])
    raise typer.Exit(ModelError.exit_code if failed else EXIT_DONE)


def _print_report(report: dict[str, Any]) -> None:
    from m3cli.tables import draw_table, open_console  # noqa: PLC0415  rich is slow

    console = open_console(sys.stdout)
    console.print(draw_table("machine", _machine_lines(report["machine"])))
    if report["checkpoint"] is None:
        console.print(draw_table("checkpoint", [("none", report["problem"])]))
        return
    console.print(draw_table("checkpoint", _checkpoint_lines(report["checkpoint"])))
    advice = report["recommendation"]
    console.print(
        draw_table(
            "recommendation",
            [
                (
                    "options",
                    f"--dtype {advice['dtype']} --max-batch-tokens {advice['max_batch_tokens']} (what auto takes)",
                ),
                ("expect", f"{advice['tokens_per_second']:,} tokens/s at {advice['passage_tokens']} tokens a passage"),
            ],
        )
    )
    console.print(_card_table(report["card"], judged=report["checkpoint"]["is_bge_m3"]))


def _machine_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    from m3cli.tables import format_bytes  # noqa: PLC0415

    lines = []
    for device in found["devices"]:
        cores = f", {device['cores']} cores, {device['threads']} threads" if "cores" in device else ""
        dtypes = ", ".join(device["hardware_dtypes"])
        memory = format_bytes(device["memory_bytes"])
        lines.append((device["device"], f"{device['name']}{cores}, {memory}; in hardware: {dtypes}"))
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in found["matmul_flops_per_second"].items())
    lines.append(("matmul", f"{rates} GFLOP/s on {found['device']}"))
    lines.append(("attention", found["attention"]))
    lines.append(("disk", f"{format_bytes(found['disk_bytes_per_second'])}/s written to {found['disk_folder']}"))
    return lines


def _checkpoint_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    revision = f", revision {found['revision']}" if found["revision"] else ""
    files = "; ".join(f"{name} ({kind})" for name, kind in found["files"].items())
    return [
        ("name", f"{found['name']}{revision}"),
        ("shape", f"{found['layers']} layers, {found['width']} wide, {found['attention_heads']} attention heads"),
        ("vocabulary", f"{found['vocabulary']:,}"),
        ("outputs", f"{', '.join(found['outputs'])}; pooling {found['pooling']}"),
        ("max length", f"{found['max_length']:,} tokens ({found['positions']:,} positions)"),
        ("files", files),
    ]


def _card_table(card: list[dict[str, Any]], *, judged: bool) -> Any:
    from m3cli.tables import draw_table  # noqa: PLC0415

    passed = sum(figure["status"] == "pass" for figure in card)
    count = sum(figure["status"] != "not this model" for figure in card)
    what = "" if judged else "; scores are BAAI/bge-m3's own and not judged for another model"
    rows = [[figure["name"], str(figure["published"]), _format(figure["found"]), figure["status"]] for figure in card]
    title = f"model card: {passed} of {count} pass{what}"
    return draw_table(title, rows, columns=["figure", "published", "here", "status"])


def _format(found: object) -> str:
    return "no such head" if found is None else str(found)
