"""Parameters of commands, made from the fields of a request or declared here, and the help that shows them.

The help lists options by heading: the common ones with --help, all with --help-all.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import wraps
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from m3cli.config import EncodeConfig, EncodeRequest, Option, list_options
from m3cli.errors import UsageError
from m3cli.requests import Weights

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


Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.", rich_help_panel="Run")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel="Run")]


def takes(request: type, *, without: Container[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a request; its function gets the request, then its own parameters.

    Args:
        request: a dataclass whose fields are options.
        without: names of fields that the command has no option for.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        made = [each for each in _make_parameters(request) if each.name not in without]
        hides = any(each.annotation.__metadata__[0].hidden for each in made)
        more = [inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=HelpAll)]
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        @wraps(command)
        def run(**typed: Any) -> None:
            check_numbers(typed)
            if typed.pop("quiet", False):
                if typed["progress"] not in (None, "none"):
                    raise UsageError(
                        f"--quiet is --progress none; leave one of it and --progress {typed['progress']} out"
                    )
                typed["progress"] = "none"
            rest = {each.name: typed.pop(each.name) for each in own}
            typed.pop("help_all", None)
            command(make_request(request, typed), **rest)

        if any(each.name == "progress" for each in made):
            made.append(inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet))
        run.__signature__ = inspect.Signature([*made, *own, *(more if hides else [])])  # type: ignore[attr-defined]
        return run

    return decorate


def make_request(request: type, typed: Mapping[str, Any]) -> Any:
    """Return a request with the typed values; a field whose value is None has its default."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}
    for each in fields(request):
        if each.default is True and values.get(each.name):
            values[each.name] = False  # typed as --no-name
    return request(**{name: value for name, value in values.items() if value is not None})


def _make_parameters(request: type) -> Iterator[inspect.Parameter]:
    """Yield a parameter for each option of a request; its default is None, which stands for that of the field."""
    hints, stored = get_type_hints(request), {each.name: each.default for each in fields(EncodeConfig)}
    defaults = {each.name: each.default for each in fields(request)}
    for name, option in list_options(request).items():
        default = defaults[name] if defaults[name] is not None or request is not EncodeRequest else stored.get(name)
        words = option.default or (str(default) if isinstance(default, (int, str)) else "")
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING and name not in stored else None,
            annotation=_annotate(name, option, hints[name], default=words, inverted=default is True),
        )


def _annotate(name: str, option: Option, hint: Any, *, default: str, inverted: bool) -> Any:
    """Return the type of a parameter, with what typer needs to know of it."""
    kind = get_args(hint)[0] if NoneType in get_args(hint) else hint
    names = option.names or (f"--{'no-' if inverted else ''}{name.replace('_', '-')}",)
    about: dict[str, Any] = {"help": option.help, "rich_help_panel": option.panel, "hidden": not option.common}
    if kind is bool:
        return Annotated[bool | None, typer.Option(*names, **about)]
    about |= {"metavar": option.metavar or ("N" if kind is int else "TEXT"), "show_default": default or False}
    choices = ("auto",) * (option.read == "auto") + _list_choices(kind)
    if option.read == "each":
        kind = list[str]
    elif option.read or get_origin(kind) in (Literal, tuple):
        about["parser"] = _make_parser(option, kind, names[0], choices)
        about["metavar"] = option.metavar or "|".join(choices) or "SIZE"
        completed = ("auto", "cpu", "cuda") if name == "device" else choices
        several, kind = get_origin(kind) is tuple, str
        about["autocompletion"] = _make_completer(completed, several=several)
    elif kind is int:
        about["min"] = option.least
    elif "|" in about["metavar"] and about["metavar"].islower():
        about["autocompletion"] = _make_completer(about["metavar"].split("|"))
    if option.argument:
        return Annotated[kind | None, typer.Argument(**about)]
    return Annotated[kind | None, typer.Option(*names, **about)]


def _make_completer(choices: Sequence[str], *, several: bool = False) -> Callable[[str], list[str]]:
    """Return what completes a word to the choices; with `several` after the last comma."""

    def complete(incomplete: str) -> list[str]:
        before, comma, _ = incomplete.rpartition(",") if several else ("", "", "")
        typed = before.split(",")
        return [f"{before}{comma}{choice}" for choice in choices if choice not in typed]

    return complete


def _list_choices(kind: Any) -> tuple[str, ...]:
    """Return the words of a Literal, or of a tuple of Literals; other types have none."""
    inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return get_args(inner) if get_origin(inner) is Literal else ()


def _make_parser(option: Option, kind: Any, flag: str, choices: Sequence[str]) -> Callable[[str], Any]:
    """Return what parses the text of an option, by the form it declares or else by its type."""

    def parse(text: str) -> Any:
        if option.read in _PARSERS:
            return _PARSERS[option.read](flag, text)
        if get_origin(kind) is tuple:
            return parse_choices(flag, text, choices) if choices else parse_names(text)
        if len(choices) > 1:
            return parse_choice(flag, text, choices)
        return None if text == "auto" else re.sub(r"^gpu(?=:|$)", "cuda", text)

    return parse


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_LARGEST = 1 << 53
"of any number: JSON and float64 hold it exactly, and 64 bits hold products of it"
_LONGEST = 100 * 365 * 86400.0
"seconds"
_HEAVIEST = 1_000_000
"weight; sums of scores stay far below the largest float32"


def check_numbers(typed: Mapping[str, Any]) -> None:
    """Raise UsageError for a number beyond what JSON and float64 hold; `typed` has values by the names of options."""
    for name, value in typed.items():
        if isinstance(value, int) and value > _LARGEST:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected a number up to {_LARGEST:,}")


def parse_size(flag: str, text: str) -> int | None:
    """Parse '512K', '8 MiB', '1.5G' or plain bytes; 'auto' is None."""
    if text == "auto":
        return None
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * _FACTORS[match[2].lower()] if match else 0
    if not 1 <= size <= _LARGEST:
        most = f"at most {_LARGEST >> 40:,}T, " if size > _LARGEST else ""
        raise UsageError(f"{flag} {_shorten(text)}: expected a size {most}such as 512K, 8M or 1G")
    return int(size)


def _shorten(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}..."


def parse_share(flag: str, text: str) -> tuple[int, int]:
    """Parse 'I/N' with I from 0."""
    match = re.fullmatch(r"(\d{1,15})/(\d{1,15})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"{flag} {_shorten(text)}: expected I/N with I from 0 to N - 1, such as 0/3, 1/3 and 2/3")
    return int(match[1]), int(match[2])


def parse_row_limit(flag: str, text: str) -> int | float:
    """Parse a number of rows to an int, and '2.5%' to a part of all rows, a float."""
    match = re.fullmatch(r"(\d{1,15})|(\d+(?:\.\d+)?)\s*%", text.strip())
    if not match or (match[2] and float(match[2]) > 100):
        raise UsageError(f"{flag} {_shorten(text)}: expected a number of rows such as 100, or a part such as 0.5%")
    return int(match[1]) if match[1] else float(match[2]) / 100


def parse_duration(flag: str, text: str | None) -> float | None:
    """Parse '55m', '7h30m', '90s' or '90' to seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    units = (86400, 3600, 60, 1)
    seconds = sum(float(part or 0) * unit for part, unit in zip(match.groups(), units, strict=True)) if match else 0.0
    if seconds > _LONGEST:
        raise UsageError(f"{flag} {_shorten(text)}: more than a hundred years; without {flag} there is no limit")
    if not seconds:
        raise UsageError(f"{flag} {_shorten(text)}: expected a time such as 55m, 7h30m or 90s")
    return seconds


def parse_weights(flag: str, text: str) -> Weights:
    """Parse three weights, of dense,sparse,colbert."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(0 <= number <= _HEAVIEST for number in numbers):
        raise UsageError(
            f"{flag} {text!r}: expected three numbers from 0 to {_HEAVIEST:,}, of dense,sparse,colbert, such as "
            "0.4,0.2,0.4"
        )
    if sum(numbers) == 0:
        raise UsageError(f"{flag} {text!r}: they sum to 0, and an average is divided by their sum")
    return numbers[0], numbers[1], numbers[2]


def parse_names(text: str) -> tuple[str, ...]:
    """Parse 'a,b'."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_choices(flag: str, text: str, choices: Sequence[str]) -> tuple[str, ...]:
    """Parse 'b,a' to the order of the choices."""
    names = parse_names(text)
    if not names or not set(names) <= set(choices):
        raise UsageError(f"{flag} {text!r}: expected some of {', '.join(choices)}, with commas between them")
    return tuple(choice for choice in choices if choice in names)


def parse_choice(flag: str, text: str, choices: Sequence[str]) -> str | None:
    """Check that a word is one of the choices, or another name of one; 'auto' is None."""
    if _OTHER_NAMES.get(text) in choices:
        text = _OTHER_NAMES[text]
    if text not in choices:
        raise UsageError(f"{flag} {text!r}: expected {', '.join(choices)}")
    return None if text == "auto" else text


_OTHER_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "size": parse_size,
    "share": parse_share,
    "row limit": parse_row_limit,
    "weights": parse_weights,
}
"of each form of text that an option names"
