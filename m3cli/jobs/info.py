"""`m3 info`: what is in a folder. Nothing is locked."""

from __future__ import annotations

from pathlib import Path

from m3cli.store.describe import FolderDescription, describe
from m3cli.store.reader import open_folder


def describe_folder(folder: str) -> FolderDescription:
    """Describe a finished or unfinished folder."""
    return describe(open_folder(Path(folder)))
