"""Paths of a command before it reads or writes: those that are also read, the output folder, options without effect."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from glob import has_magic
from pathlib import Path

from m3cli.config import EncodeRequest
from m3cli.corpus.remote import is_remote
from m3cli.corpus.sources import COMPRESSIONS, FORMATS, list_files
from m3cli.errors import CorpusError, OutputError, UsageError, check_reachable
from m3cli.paths import check_local, is_output_folder
from m3cli.records import Source
from m3cli.store.layout import RUN_NAME

Identity = tuple[int, int]

_LOGS = re.compile(r"_m3/(?:[^/]+\.log|logs/.+)")
"files of an output folder that --log-file may name"
_WRITTEN_BY_M3 = {
    "--log-file": re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d |\Z"),
    "--metrics": re.compile(rb"# HELP m3_|\Z"),
    "--gone": re.compile(rb'\{"id":"[^"]*"\}\n|\Z'),
}
"start of files of earlier runs, which may be in an input folder"
_ENDINGS = {*FORMATS, *COMPRESSIONS}
_OF_CHECKPOINTS = {".json", ".safetensors", ".bin", ".pt", ".model"}


def check_paths(
    written: Mapping[str, str | None], read: Mapping[str, Sequence[str | None]], *, model: str | None = None
) -> None:
    """Compare the paths that are written with each other and with all files that are read.

    Args:
        written: path by option; None and '-' are not paths.
        read: files, folders and globs by option or argument.
        model: the value of --model; None: M3_MODEL.

    Raises:
        UsageError: two paths are the same file, or one is inside an output folder or a URL.
    """
    paths = {option: path for option, path in written.items() if path is not None and path != "-"}
    for option, path in paths.items():
        check_local(path, option)
        _check_outside(path, option)
    _check_distinct(paths)
    existing = {found: option for option, path in paths.items() if (found := _identify(path)) is not None}
    below = any(Path(paths[option]).is_file() for option in existing.values())
    for what, file, is_named in _list_read(read, model, below=below) if existing else ():
        found = _identify(file)
        writing = existing.get(found) if found is not None else None
        if writing is not None and (is_named or not _is_written_by_m3(writing, paths[writing])):
            raise UsageError(
                f"{writing} {paths[writing]} would overwrite what is read: it is {what} {file}; choose another name"
            )


def list_own(inputs: Sequence[str], written: Sequence[str | None]) -> frozenset[str]:
    """Return the real paths of written files, which are not read if they are in an input folder."""
    named = {os.path.realpath(name) for name in inputs}
    return frozenset(os.path.realpath(path) for path in written if path is not None) - named


def _check_outside(path: str, option: str) -> None:
    real = Path(os.path.realpath(path))
    folder = next((parent for parent in real.parents if is_output_folder(parent)), None)
    if folder is None or (option == "--log-file" and _LOGS.fullmatch(real.relative_to(folder).as_posix())):
        return
    raise UsageError(
        f"{option} {path} is inside {folder.name}, an output folder of m3, which holds nothing else; "
        "choose another path"
    )


def _check_distinct(paths: Mapping[str, str]) -> None:
    seen: dict[object, str] = {}
    for option, path in paths.items():
        key = _identify(path) or os.path.realpath(path)
        if key in seen and not _is_special(path):
            raise UsageError(f"{seen[key]} {paths[seen[key]]} and {option} {path} are the same: give each its own name")
        seen[key] = option


def _list_read(
    read: Mapping[str, Sequence[str | None]], model: str | None, *, below: bool
) -> Iterator[tuple[str, Path, bool]]:
    """Yield option, file, and whether the file was named itself; with `below` also files in folders."""
    for what, names in read.items():
        for name in names:
            if name is None or name == "-":
                continue
            yield what, Path(name), True
            yield from ((what, file, False) for file in (list_files(name) if below else ()))
    if below and (model := model or os.environ.get("M3_MODEL")):
        folder = Path(model).expanduser()
        files = (*folder.glob("*"), *folder.glob("*/*"))
        yield from (("--model", file, True) for file in files if file.suffix in _OF_CHECKPOINTS)


def _identify(path: str | Path) -> Identity | None:
    """Return the identity of a file or folder; None for a missing one, a device or a pipe."""
    try:
        status = os.stat(path)  # noqa: PTH116  follows links
    except (OSError, ValueError):
        return None
    known = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return (status.st_dev, status.st_ino) if known else None


def _is_special(path: str) -> bool:
    return os.path.exists(path) and _identify(path) is None  # noqa: PTH110  False if it cannot be read


def _is_written_by_m3(option: str, path: str) -> bool:
    pattern = _WRITTEN_BY_M3.get(option)
    if pattern is None:
        return False
    try:
        with Path(path).open("rb") as file:
            return pattern.match(file.readline(1 << 20)) is not None
    except OSError:
        return False


def check_ignored_options(typed: Mapping[str, object], *, other: str, reason: str) -> None:
    """Raise UsageError for the first option that was given and has no effect with another option.

    Args:
        typed: values by option; None and '' are those of an option that was not given.
        other: the other option and its value.
        reason: why there is no effect.
    """
    for flag, value in typed.items():
        if value not in (None, ""):
            raise UsageError(f"{flag} {value} with {other}: {reason}; leave {flag} out")


def choose_out(request: EncodeRequest, sources: tuple[Source, ...]) -> Path:
    """Return the output folder: `--out`, or the one input's name with .m3 in the current folder.

    Raises:
        UsageError: neither gives a name, or it is not on this machine.
        OutputError: the system refuses to look at it.
    """
    out = _name_out(request, sources)
    check_reachable(out / RUN_NAME, OutputError)
    return out


def _name_out(request: EncodeRequest, sources: tuple[Source, ...]) -> Path:
    if request.out:
        check_local(request.out, "--out")
        return Path(request.out)
    if len(request.inputs) != 1 or request.inputs[0] == "-":
        what = "standard input" if "-" in request.inputs else f"{len(request.inputs)} inputs"
        raise UsageError(f"{what}: name the output folder with --out DIR")
    given = Path(request.inputs[0])
    if is_remote(request.inputs[0]):
        if request.inputs[0] != sources[0].path and not has_magic(request.inputs[0]):
            return Path(f"{given.name}.m3")
    else:
        check_reachable(given, CorpusError)
        if given.is_dir():
            return Path(f"{given.resolve().name}.m3")
    if len(sources) != 1:
        raise UsageError(f"{request.inputs[0]!r} names {len(sources)} files: name the output folder with --out DIR")
    name = Path(sources[0].path).name
    while (stem := Path(name)).suffix in _ENDINGS and stem.stem:
        name = stem.stem
    return Path(f"{name}.m3")
