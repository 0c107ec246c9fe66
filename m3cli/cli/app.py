"""The `m3` command line: its commands, and how they end.

Every error a user can cause is one line on stderr that names the value and the remedy, and an exit code of
`m3cli.errors`; `--debug` shows the traceback. stdout carries results only.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import m3cli
from m3cli.cli.encode import ENCODE_EXAMPLES, PLAN_EXAMPLES, encode, plan
from m3cli.cli.export import convert, export, load
from m3cli.cli.folders import check, doctor, info
from m3cli.cli.options import Command
from m3cli.cli.search import eval_runs, rerank, score, search
from m3cli.cli.terminal import OneLine, catch_sigterm, describe_end, prepare_streams, tell_end
from m3cli.errors import EXIT_DONE, EXIT_INTERRUPTED, OutputError, UsageError, is_utf8

app = typer.Typer(
    name="m3",
    help="Encode whole corpora with BGE-M3: dense vectors, lexical weights and ColBERT matrices in one pass.",
    epilog="Exit codes: 0 done; 1 error; 2 usage; 3 done, rows skipped; 4 corpus; 5 model; 6 output; 10 folder of "
    "another run; 11 locked; 12 damage; 75 stopped, run again; 130 Ctrl-C.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command("encode", cls=Command, epilog=ENCODE_EXAMPLES)(encode)
app.command("plan", cls=Command, epilog=PLAN_EXAMPLES)(plan)
app.command("info", cls=Command)(info)
app.command("check", cls=Command)(check)
app.command("score", cls=Command)(score)
app.command("search", cls=Command)(search)
app.command("eval", cls=Command)(eval_runs)
app.command("rerank", cls=Command)(rerank)
app.command("export", cls=Command)(export)
app.command("load", cls=Command)(load)
app.command("convert", cls=Command)(convert)
app.command("doctor", cls=Command)(doctor)


@app.command("help", cls=Command)
def show_help(
    context: typer.Context,
    command: Annotated[str | None, typer.Argument(metavar="[COMMAND]", help="Such as encode.")] = None,
) -> None:
    """Show the help of m3 or of a command."""
    group: Any = context.parent
    found = group.command.get_command(group, command) if command else group.command
    if found is None:
        raise UsageError(f"there is no command {command!r}, only {', '.join(group.command.list_commands(group))}")
    typer.echo(found.get_help(typer.Context(found, info_name=command, parent=group) if command else group))


# typer brings its own copy of click since 0.16; this is the base of its errors in every version.
_TyperError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


_HINTS = (
    (("--resume", "--continue"), "--since-run", "the same command again resumes, without an option"),
    (
        ("--overwrite", "--force"),
        "--since-run",
        "a folder is never overwritten: give another --out, or remove the folder first",
    ),
    (("--batch-size", "--batch_size"), "--max-batch-tokens", "--max-batch-tokens N limits the tokens of a batch"),
    (("--gpu", "--cuda", "--use-gpu"), "--device", "--device cuda does it; a GPU is used by default if there is one"),
    (("--fp16", "--use-fp16"), "--dtype", "--dtype float16 does it"),
    (("--workers",), "--worker", "--worker I/N encodes the part I of N"),
    (("--append",), "--since-run", "--out NEW --since-run OLD encodes only what OLD does not hold"),
)
"names of other programs, the option of a command that they are about, and what does the same"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"m3 {m3cli.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
    version: Annotated[  # noqa: ARG001  both are seen before any command is
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


def run(arguments: Sequence[str]) -> int:
    """Run a command line.

    Returns:
        the exit code.
    """
    prepare_streams()
    catch_sigterm()
    try:
        _check_surroundings(arguments)
        # Removed here, so that it may come before or after the command.
        code = app(
            args=[argument for argument in arguments if argument != "--debug"], standalone_mode=False, prog_name="m3"
        )
        sys.stdout.flush()  # the interpreter would end with its own message and code
        if code != EXIT_INTERRUPTED:
            return int(code or EXIT_DONE)
        text, code = describe_end(KeyboardInterrupt())  # which typer turns into this exit code
    except (BrokenPipeError, SystemExit) as leaving:
        # typer turns a closed pipe into SystemExit(1) of its own.
        if not isinstance(leaving.__context__ or leaving, BrokenPipeError):
            raise
        _release_stdout()
        return EXIT_DONE
    except (KeyboardInterrupt, Exception) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        text, code = _describe_end(error, arguments)
    if text:
        tell_end(text, code, arguments)
    return code


def _check_surroundings(arguments: Sequence[str]) -> None:
    """Check the arguments and the working folder.

    Raises:
        UsageError: an argument is not UTF-8, or the working folder has been removed.
    """
    for argument in arguments:
        if not is_utf8(argument):
            raise UsageError(f"{argument!r} is not UTF-8: rename the file, or type it in a UTF-8 terminal")
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UsageError("the working folder has been removed: cd to one that exists and run again") from error


def _describe_end(error: BaseException, arguments: Sequence[str]) -> tuple[str, int]:
    """Return the message and the exit code of an error; no message if the help was shown."""
    if isinstance(error, _TyperError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "m3"
        message = (
            _describe_value(error, arguments) or _describe_option(error) or cast(Any, error).format_message().strip()
        )
        if message.startswith("Usage: "):  # the help of a command line without a command
            sys.stdout.write(f"{message}\n")
            return "", UsageError.exit_code
        return f"{message.removesuffix('.')}. See '{command} --help'.", UsageError.exit_code
    # Errors of files carry a name; one without is of standard output.
    if isinstance(error, OSError) and error.filename is None and error.errno in _FULL:
        _release_stdout()
        words = f"cannot write standard output: {error.strerror}; free some space and run the same command again"
        return words, OutputError.exit_code
    return describe_end(error)


def _describe_option(error: Any) -> str | None:
    """Return the message for an option that other programs have; None for other errors."""
    name, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    known = {option for each in context.command.params for option in each.opts} if context else ()
    for names, needed, remedy in _HINTS:
        if name in names and needed in known:
            return f"No such option: {name}; {remedy}"
    return None


def _describe_value(error: Any, arguments: Sequence[str]) -> str | None:
    """Return the message for a value that typer rejects; None for other errors."""
    names = getattr(getattr(error, "param", None), "opts", [])
    words = [part for each in arguments for part in each.split("=", 1)]
    typed = next((value for name, value in pairwise(words) if name in names), None)
    if typed is None:
        return None
    reason = str(error.message)
    return f"{names[0]} {typed[:80]!r}: {reason[:1].lower()}{reason[1:]}"


def _release_stdout() -> None:
    """Point standard output at the null device, so that the interpreter does not flush it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
