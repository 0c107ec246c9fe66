"""Read text from Debian packages, fetched by apt and not installed; write rows and judgements in BEIR's layout."""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "packages"


class SourceError(Exception):
    """An error that the user can fix; its text is the one line that is shown."""


def fetch_packages(names: Sequence[str], cache: Path) -> dict[str, Path]:
    """Return each package's file in ``cache``; missing ones are fetched by ``apt-get download``."""
    cache.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if _find(cache, name) is None]
    if missing:
        _download(missing, cache)
    return {name: path for name in names if (path := _find(cache, name)) is not None}


def read_version(package: Path) -> str:
    """Return the version that a package states."""
    return _run(["dpkg-deb", "--field", str(package), "Version"]).decode().strip()


def read_members(package: Path, *, suffix: str) -> Iterator[tuple[str, str]]:
    """Yield path and text of a package's regular files whose path ends with ``suffix``, in the archive's order."""
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            file = archive.extractfile(member) if member.isfile() and member.name.endswith(suffix) else None
            if file is not None:
                yield member.name, file.read().decode("utf-8")


def _find(cache: Path, name: str) -> Path | None:
    return next(iter(sorted(cache.glob(f"{name}_*.deb"))), None)


def _download(names: Sequence[str], cache: Path) -> None:
    # Into a folder of its own, so that a file under its final name is complete.
    arriving = cache / ".arriving"
    shutil.rmtree(arriving, ignore_errors=True)
    arriving.mkdir()
    _run(["apt-get", "download", *names], folder=arriving)
    for path in arriving.glob("*.deb"):
        path.rename(cache / path.name)
    arriving.rmdir()


def _run(command: Sequence[str], *, folder: Path | None = None) -> bytes:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout
    except FileNotFoundError as error:
        raise SourceError(f"{command[0]} is missing: the texts come from Debian packages (Debian, Ubuntu)") from error
    except subprocess.CalledProcessError as error:
        faults = error.stderr.decode(errors="replace").strip().splitlines()
        reason = next((line for line in faults if line.startswith("E: ")), faults[-1] if faults else "no reason given")
        raise SourceError(f"{' '.join(command[:2])} failed: {reason} (try 'apt-get update' first)") from error


def write_rows(path: Path, rows: Iterable[Mapping[str, str | None]]) -> None:
    """Write JSON lines."""
    with path.open("w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_judgements(folder: Path, judgements: Iterable[tuple[str, str]]) -> None:
    """Write qrels/test.tsv from pairs of query and document id."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *(f"{query_id}\t{document_id}\t1" for query_id, document_id in judgements)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
