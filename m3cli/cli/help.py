"""The help of a command: options by heading, the common ones with --help and all with --help-all."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

PANELS = ("Input", "Queries", "Model", "Output", "Scores", "Ranking", "Long documents", "Run")
"headings in their order; others follow"
_COLUMN = 20
"characters of the names of options, unless they are longer"


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        for each in context.command.params:
            setattr(each, "hidden", False)  # noqa: B010  arguments and options have it, their base does not
        typer.echo(context.get_help())
        raise typer.Exit


HelpAll = Annotated[
    bool,
    typer.Option(
        "--help-all",
        is_eager=True,
        callback=_show_all,
        help="Show all options and exit.",
        rich_help_panel="Run",
    ),
]


class Command(TyperCommand):
    """A command whose help is plain text; its epilog is a list of examples, one in a line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        params: list[Any] = self.params
        rows = [(each, *_describe(each)) for each in params if not each.hidden]
        arguments = [typed for each, typed, _ in rows if each.param_type_name == "argument"]
        formatter.write_usage(ctx.command_path, " ".join(("[OPTIONS]", *arguments)))
        self.format_help_text(ctx, formatter)
        panels: dict[str, list[tuple[str, str]]] = {name: [] for name in PANELS}
        for each, typed, words in rows:
            panels.setdefault(each.rich_help_panel or "Options", []).append((typed.ljust(_COLUMN), words))
        for name, lines in panels.items():
            if lines:
                with formatter.section(name):
                    formatter.write_dl(lines, col_max=_COLUMN)
        if self.epilog:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in self.epilog.splitlines()))


def _describe(option: Any) -> tuple[str, str]:
    """Return what is typed, and what it does with its default."""
    if option.param_type_name == "argument":
        return f"{option.metavar}{'' if option.nargs == 1 or '...' in option.metavar else '...'}", option.help
    names = ", ".join(sorted(option.opts, key=len))
    default = f" [default: {option.show_default}]" if isinstance(option.show_default, str) else ""
    metavar = "" if option.is_flag else f" {option.metavar}"
    return f"{names}{metavar}", f"{option.help}{' [required]' if option.required else default}"
