"""Objects in a bucket, `s3://bucket/key` and `gs://bucket/key`, through pyarrow's file systems.

Credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...) or from the files
and services that the cloud's own client reads. No message holds them: of an error of the client only its name is shown.
A request that fails for a passing reason is made again, and a read that breaks goes on from its offset.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from glob import has_magic
from typing import Any, NamedTuple, TypeVar

import pyarrow.fs as pafs
import xxhash

from m3cli.errors import CorpusError, UsageError

T = TypeVar("T")

PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
"seconds before each new attempt; the client itself has made three attempts before the first"
CONNECT_SECONDS, REQUEST_SECONDS = 10, 30
FIRST_BYTES, MOST_BYTES = 64 << 10, 8 << 20
"read at once: twice as much as before while reads are contiguous, as each request costs a round trip"
_ADDRESS = re.compile(r"(s3|gs)://([^/]+)/*(.*)", re.DOTALL)
_CODE = re.compile(r"AWS Error ([A-Z_]+)(?: \(HTTP status (\d+)\))?|HTTP status (\d+)|http_status_code=(\d+)")
_REMEDIES = {
    "NO_SUCH_BUCKET": "there is no such bucket; check its name, and the endpoint in AWS_ENDPOINT_URL",
    "ACCESS_DENIED": "access is denied; give credentials that may list the bucket and read it",
    "INVALID_ACCESS_KEY_ID": "the access key is unknown; check AWS_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID": "the access key is unknown; check AWS_ACCESS_KEY_ID and AWS_SESSION_TOKEN",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "416": "it has become shorter; put it back as it was, or encode it as it is into a new folder",
    "NETWORK_CONNECTION": "the server cannot be reached; check the network, AWS_ENDPOINT_URL and AWS_REGION",
}
"by the name of an error; those before the last are final"
_STATUS = {"403": "ACCESS_DENIED", "401": "ACCESS_DENIED"}
_FINAL = re.compile(r"(?!408|429)[34]\d\d")


class Version(NamedTuple):
    """What identifies the content of an object."""

    size: int
    "bytes"
    stamp: int
    "60 bits of the hash of its ETag"


def is_remote(path: str) -> bool:
    """Return whether a path is the address of an object or a folder in a bucket."""
    return path.startswith(("s3://", "gs://"))


def list_objects(address: str) -> tuple[list[str], str]:
    """Return the addresses of all objects of an input, and the folder that their names are relative to.

    Args:
        address: of an object, a folder or a glob, in which `**` stands for any folders.

    Returns:
        the address itself for an object; else the objects that are not hidden, sorted.

    Raises:
        UsageError: it is not s3://bucket/path, or has a password in it.
        CorpusError: there is no such object, folder or bucket, or it cannot be read.
    """
    scheme, bucket, key = _split(address)
    with remote_errors(address):
        found = _info(scheme, f"{bucket}/{key}".rstrip("/"))
        if found.type == pafs.FileType.File:
            return [address], address.rpartition("/")[0]
        pattern, folder = "", key.rstrip("/")
        if found.type == pafs.FileType.NotFound:
            if _info(scheme, bucket).type == pafs.FileType.NotFound:
                raise CorpusError(f"{address}: {_REMEDIES['NO_SUCH_BUCKET']}")
            if not has_magic(key):
                raise CorpusError(f"{address}: no such object or folder; check its name with aws s3 ls")
            pattern, folder = key, _fixed_folder(key)
        root = f"{bucket}/{folder}".rstrip("/")
        listed = _retry(lambda: _connect(scheme).get_file_info(_selector(root)))
    keys = [info.path[len(root) + 1 :] for info in listed if info.type == pafs.FileType.File]
    written = {path.removesuffix("_m3/run.json") for path in keys if f"/{path}".endswith("/_m3/run.json")}
    parts = pattern[len(folder) :].strip("/").split("/") if pattern else ["**"]
    chosen = [
        path
        for path in keys
        if _matches(path.split("/"), parts) and ".m3/" not in path and not path.startswith(tuple(written))
    ]
    return [f"{scheme}://{root}/{path}" for path in sorted(chosen)], f"{scheme}://{root}"


def read_version(address: str) -> Version:
    """Return size and ETag of an object, with one request; a missing one is a FileNotFoundError."""
    with remote_errors(address), _retry(lambda: _open(address)) as file:
        return _version_of(file)


class RemoteFile(io.RawIOBase):
    """An object opened for reading; it is read in ranges, each with its own attempts."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address
        with remote_errors(address):
            self._file = _retry(lambda: _open(address))
            self._size = _version_of(self._file).size
        self._offset = 0
        self._buffer, self._start = b"", 0
        self._span = FIRST_BYTES

    def read(self, size: int = -1, /) -> bytes:
        """Return the next `size` bytes (-1: all), fewer only at the end."""
        size = max(0, self._size - self._offset if size < 0 else min(size, self._size - self._offset))
        begin = self._offset - self._start
        if not 0 <= begin <= len(self._buffer):
            self._buffer, begin, self._span = b"", 0, FIRST_BYTES
        data = self._buffer[begin : begin + size]
        if len(data) < size:
            rest = size - len(data)
            self._start = self._offset + len(data)
            self._buffer = self._fetch(self._start, max(rest, min(self._span, self._size - self._start)))
            self._span = min(2 * self._span, MOST_BYTES)
            data += self._buffer[:rest]
        self._offset += size
        return data

    def _fetch(self, start: int, size: int) -> bytes:
        """Return the bytes [start, start + size), of which a broken response may give only the first."""
        parts: list[bytes] = []

        def fetch() -> None:
            while (known := sum(map(len, parts))) < size:
                part = self._file.read_at(size - known, start + known)
                if not part:
                    raise OSError("the response is cut off")
                parts.append(part)

        with remote_errors(self._address):
            _retry(fetch)
        return b"".join(parts)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to an offset."""
        self._offset = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._size}[whence]
        return self._offset

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._offset

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Close the object."""
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def remote_errors(address: str) -> Iterator[None]:
    """Turn an error of the client into a CorpusError of one line, without what the client says; missing ones pass."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, NotImplementedError) as error:
        code = _name_error(error)
        raise CorpusError(
            f"{address} cannot be read: "
            f"{_REMEDIES.get(code, f'the server answered {code}; try again later, the same command goes on')}"
        ) from None  # the client's message may name the endpoint


def _split(address: str) -> tuple[str, str, str]:
    """Return scheme, bucket and key of an address."""
    match = _ADDRESS.fullmatch(address)
    if match is None or "@" in match[2]:
        scheme = address[:2]
        raise UsageError(
            f"an input is not {scheme}://bucket/path; give it in this form, and credentials in the environment only"
        )
    return match[1], match[2], match[3]


def _info(scheme: str, path: str) -> Any:
    return _retry(lambda: _connect(scheme).get_file_info(path))


def _selector(root: str) -> Any:
    return pafs.FileSelector(root, recursive=True, allow_not_found=True)


def _fixed_folder(key: str) -> str:
    """Return the folders before the first wildcard of a glob."""
    parts = key.split("/")[:-1]
    fixed = next((number for number, part in enumerate(parts) if has_magic(part)), len(parts))
    return "/".join(parts[:fixed])


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Return whether the names of a path match those of a glob; `**` stands for any names, hidden ones match none."""
    if not pattern or not parts:
        return not parts and all(each == "**" for each in pattern)
    if pattern[0] == "**" and _matches(parts, pattern[1:]):
        return True
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    if hidden or not (pattern[0] == "**" or fnmatchcase(parts[0], pattern[0])):
        return False
    return _matches(parts[1:], pattern if pattern[0] == "**" else pattern[1:])


def _open(address: str) -> Any:
    scheme, bucket, key = _split(address)
    return _connect(scheme).open_input_file(f"{bucket}/{key}")


def _version_of(file: Any) -> Version:
    tags = [value for name, value in file.metadata().items() if name.lower() == "etag"]
    return Version(size=file.size(), stamp=xxhash.xxh3_64_intdigest(b"".join(tags)) >> 4)


@cache
def _connect(scheme: str) -> Any:
    """Return the file system of a scheme, with what the environment says."""
    if scheme == "gs":
        return pafs.GcsFileSystem()
    # pyarrow reads neither variable in all of its versions.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None
    return pafs.S3FileSystem(
        endpoint_override=endpoint, region=region, connect_timeout=CONNECT_SECONDS, request_timeout=REQUEST_SECONDS
    )


def _retry(call: Callable[[], T], pauses: tuple[float, ...] | None = None) -> T:
    """Call again after errors that may pass."""
    pauses = PAUSES if pauses is None else pauses
    try:
        return call()
    except FileNotFoundError:
        raise
    except OSError as error:
        name = _name_error(error)
        if not pauses or name in list(_REMEDIES)[:-1] or _FINAL.fullmatch(name):
            raise
    time.sleep(pauses[0])
    return _retry(call, pauses[1:])


def _name_error(error: Exception) -> str:
    """Return the name of a client's error, or the HTTP status."""
    found = _CODE.search(str(error))
    if found is None:
        return type(error).__name__
    status = found[2] or found[3] or found[4] or ""
    return _STATUS.get(status) or (found[1] if found[1] not in (None, "UNKNOWN") else status)
