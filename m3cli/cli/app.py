"""The `m3` command line as a whole: its commands, and how each of them ends.

Every error a user can cause is one line on stderr that names the value and the remedy, and an exit code of
`m3cli.errors`; `--debug` shows the traceback. stdout carries results only.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import m3cli
from m3cli.cli.check import check
from m3cli.cli.doctor import doctor
from m3cli.cli.encode import encode
from m3cli.cli.eval import eval_runs
from m3cli.cli.export import export
from m3cli.cli.info import info
from m3cli.cli.load import load
from m3cli.cli.plan import plan
from m3cli.cli.rerank import rerank
from m3cli.cli.score import score
from m3cli.cli.search import search
from m3cli.cli.signals import catch_sigterm
from m3cli.errors import EXIT_DONE, EXIT_INTERRUPTED, M3Error, OutputError, UsageError, is_utf8, spell_printable

app = typer.Typer(
    name="m3",
    help="Encode whole corpora with BGE-M3: dense vectors, lexical weights and ColBERT matrices in one pass.",
    epilog="Exit codes: 0 done; 1 error; 2 usage; 3 done, rows skipped; 4 corpus; 5 model; 6 output; 10 folder of "
    "another run; 11 locked; 12 damage; 75 stopped, run again; 130 Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(encode)
app.command()(plan)
app.command()(info)
app.command()(check)
app.command()(score)
app.command()(search)
app.command("eval")(eval_runs)
app.command()(rerank)
app.command()(export)
app.command()(load)
app.command()(doctor)

# typer brings its own copy of click since 0.16; this is the base of its errors in every version.
_TyperError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


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
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    logging.basicConfig(format="m3: %(message)s", level=logging.WARNING)


def run(arguments: Sequence[str]) -> int:
    """Run a command line.

    Returns:
        the exit code.
    """
    _open_closed_streams()
    catch_sigterm()
    debug = "--debug" in arguments
    try:
        _refuse_other_encodings(arguments)
        # Taken out here, so that it may stand before or after the command.
        code = app(
            args=[argument for argument in arguments if argument != "--debug"], standalone_mode=False, prog_name="m3"
        )
        sys.stdout.flush()  # not left to the interpreter, which would end with words and a code of its own
    except KeyboardInterrupt:
        return _say("interrupted; run the same command again to go on", EXIT_INTERRUPTED)
    except (BrokenPipeError, SystemExit) as leaving:
        # typer turns a closed pipe into SystemExit(1) of its own.
        if not isinstance(leaving.__context__ or leaving, BrokenPipeError):
            raise
        return _let_stdout_go()
    except M3Error as error:
        if debug:
            raise
        return _say(str(error), error.exit_code)
    except OSError as error:
        # Whatever writes files tells their names; what is left is standard output.
        if debug or error.filename is not None or error.errno not in _FULL:
            raise
        _let_stdout_go()
        words = f"cannot write standard output: {error.strerror}; free some space and run the same command again"
        return _say(words, OutputError.exit_code)
    except Exception as error:
        if debug or not isinstance(error, _TyperError):
            raise
        return _say(f"{cast(Any, error).format_message()} See 'm3 --help'.", UsageError.exit_code)
    return int(code or 0)


def _open_closed_streams() -> None:
    """Give a standard stream that was closed (`>&-`) the null device, or the next file opened would be in its place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  to the end


def _refuse_other_encodings(arguments: Sequence[str]) -> None:
    """Refuse what is no UTF-8: no tokenizer reads it, and what a folder remembers could not be written."""
    for argument in arguments:
        if not is_utf8(argument):
            raise UsageError(f"{argument!r} is not UTF-8: rename the file, or type it in a UTF-8 terminal")


def _let_stdout_go() -> int:
    """Whoever read stdout has seen enough; the interpreter must not try to flush it once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_DONE


def _say(message: str, code: int) -> int:
    sys.stderr.write(f"m3: {spell_printable(message)}\n")
    return code
