"""Input from a bucket, of a real S3 server on the loopback interface, and output copied to one."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from m3cli.corpus import remote
from m3cli.corpus.sources import count_unread, find_sources
from m3cli.errors import CorpusError, UsageError
from tests import s3
from tests.conftest import ROOT, Completed
from tests.crash import folder_bytes
from tests.functional.conftest import EncodeWith
from tests.functional.corpora import SETTINGS, WORDS, write_corpus
from tests.functional.test_bad_rows import read_ids

M3 = Callable[..., Completed]
BUCKET = f"s3://{s3.BUCKET}"
KEYS = ("set/a.jsonl", "set/b.txt.gz", "set/deep/c.jsonl", "set/notes.md", "set/.hidden.jsonl", "set/old.m3/rows.jsonl")


@pytest.fixture(scope="session")
def server() -> Iterator[int]:
    with s3.run_server() as port:
        line = b'{"text": "one"}\n'
        for key in KEYS:
            s3.put(port, key, gzip.compress(line) if key.endswith(".gz") else line)
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Proxy]:
    """What the environment names as the endpoint; it breaks nothing unless its share is set."""
    passing = s3.Proxy(server, share=0)
    with passing.run() as port:
        for name, value in s3.environment(port).items():
            monkeypatch.setenv(name, value)
        remote._connect.cache_clear()
        yield passing
    remote._connect.cache_clear()


def names(*inputs: str) -> list[str]:
    return [source.name for source in find_sources([f"{BUCKET}/{each}" for each in inputs])]


@pytest.mark.usefixtures("proxy")
def test_files_folders_and_globs_are_found_as_on_a_disk() -> None:
    assert names("set/a.jsonl") == ["a.jsonl"]
    assert names("set") == names("set/") == ["a.jsonl", "b.txt.gz", "deep/c.jsonl"]
    assert names("set/*.jsonl") == names("set/[a-b].jsonl") == ["a.jsonl"]
    assert names("set/**/*.jsonl") == ["a.jsonl", "deep/c.jsonl"]
    assert names("set/*/c.jsonl") == ["deep/c.jsonl"]
    assert names("set/deep", "set/a.jsonl") == ["deep/c.jsonl", "a.jsonl"]
    assert names("") == [f"set/{name}" for name in ("a.jsonl", "b.txt.gz", "deep/c.jsonl")]
    assert count_unread([f"{BUCKET}/set"]) == {".md": 1}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("s3://nobody-has-this/a.jsonl", "no such bucket"),
        (f"{BUCKET}/set/none.jsonl", "no such object or folder"),
        (f"{BUCKET}/set/*.parquet", "there is no object"),
        (f"{BUCKET}/set/*.md", "no object of these can be read"),
        ("s3://denied/a.jsonl", "access is denied"),
    ],
)
def test_what_cannot_be_read_is_one_line(m3_here: M3, proxy: s3.Proxy, tiny_m3: Path, given: str, said: str) -> None:
    done = m3_here("encode", given, "--model", tiny_m3, "--out", "o.m3")
    assert done.returncode == 4
    assert done.stderr.startswith(f"m3: {given}")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not any(secret in done.stderr for secret in (s3.ACCESS_KEY, s3.SECRET_KEY, "127.0.0.1"))


def test_an_unreachable_server_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment(1).items():
        monkeypatch.setenv(name, value)
    remote._connect.cache_clear()
    monkeypatch.setattr(remote, "PAUSES", ())
    with pytest.raises(CorpusError, match="the server cannot be reached") as caught:
        find_sources([f"{BUCKET}/set"])
    remote._connect.cache_clear()
    assert "127.0.0.1" not in str(caught.value)


def test_a_password_in_an_address_is_not_shown_again() -> None:
    with pytest.raises(UsageError, match="credentials in the environment only") as caught:
        find_sources(["s3://me:hidden@bucket/a.jsonl"])
    assert "hidden" not in str(caught.value)
    with pytest.raises(UsageError, match="the other inputs are in a bucket"):
        find_sources([f"{BUCKET}/set", "corpus.jsonl"])


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_the_files_are_those_of_a_local_input(
    encode_with: EncodeWith, proxy: s3.Proxy, tmp_path: Path, ending: str
) -> None:
    lines = write_corpus(tmp_path / "lines.jsonl", bad_every=1000).read_bytes()
    local = tmp_path / f"corpus.{ending}"
    if ending == "parquet":
        rows = [json.loads(line) for line in lines.splitlines()]
        pq.write_table(pa.Table.from_pylist(rows), local, row_group_size=10)
    else:
        packed = {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "jsonl.zst": zstandard.compress(lines)}
        local.write_bytes(packed[ending])
    s3.put(proxy.server, f"same/corpus.{ending}", local.read_bytes())
    outs = [tmp_path / "local.m3", tmp_path / "remote.m3"]
    for given, out in zip((str(local), f"{BUCKET}/same/corpus.{ending}"), outs, strict=True):
        assert encode_with(given, out=out) == 0
    found = [folder_bytes(out) for out in outs]
    for files in found:  # run.json names the input, and the manifest has its hash
        files.pop("_m3/run.json"), files.pop("_m3/manifest.json")
    assert found[0] == found[1]
    everything = b"".join(path.read_bytes() for path in outs[1].rglob("*") if path.is_file())
    assert not any(secret.encode() in everything for secret in (s3.ACCESS_KEY, s3.SECRET_KEY, "127.0.0.1"))


def test_an_object_is_known_by_its_etag(m3_here: M3, proxy: s3.Proxy, tmp_path: Path, tiny_m3: Path) -> None:
    lines = write_corpus(tmp_path / "lines.jsonl", bad_every=1000).read_bytes()
    s3.put(proxy.server, "tagged/corpus.jsonl", lines)
    command = ("encode", f"{BUCKET}/tagged/corpus.jsonl", "--model", tiny_m3, *SETTINGS, "--outputs", "dense")
    assert m3_here(*command).returncode == 0
    assert len(set(read_ids(tmp_path / "corpus.m3"))) == 24
    s3.put(proxy.server, "tagged/corpus.jsonl", lines)
    again = m3_here(*command)
    assert "nothing to do" in again.stderr, again.stderr
    s3.put(proxy.server, "tagged/corpus.jsonl", lines.replace(b"doc-1", b"dog-1"))
    changed = m3_here(*command)
    assert changed.returncode == 10
    assert "corpus.jsonl has changed since shard 0" in changed.stderr
    shown = m3_here("plan", f"{BUCKET}/tagged", "--model", tiny_m3, "--json")
    assert json.loads(shown.stdout)["out"] == "tagged.m3"


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_one_request_in_five_fails_and_no_row_is_lost(
    encode_with: EncodeWith, proxy: s3.Proxy, tmp_path: Path, ending: str
) -> None:
    draw = random.Random(5)
    rows = [{"id": f"d{n}", "text": " ".join(draw.choices(WORDS, k=9)), "more": "x" * 3000} for n in range(720)]
    if ending == "parquet":
        local = tmp_path / "corpus.parquet"
        pq.write_table(pa.Table.from_pylist(rows), local, row_group_size=12, compression="none", use_dictionary=False)
        content = local.read_bytes()
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        content = gzip.compress(content) if ending.endswith("gz") else content
    s3.put(proxy.server, f"failing/corpus.{ending}", content)
    proxy.share = 0.2
    size = {"parquet": 1 << 20}.get(ending, 12 * 3100)
    out = tmp_path / "o.m3"
    assert encode_with(f"{BUCKET}/failing/corpus.{ending}", out=out, shard_size=size, outputs=("dense",)) == 0
    assert sorted(read_ids(out)) == sorted(row["id"] for row in rows)
    assert len(list((out / "rows").iterdir())) >= 60
    assert sum(proxy.broken.values()) > 10, proxy.broken
    assert {"500", "503", "reset", "half"} <= proxy.broken.keys()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("aws") is None, reason="the command aws is not installed")
def test_a_folder_is_copied_to_a_bucket_at_any_moment(
    m3_here: M3, encode_with: EncodeWith, proxy: s3.Proxy, tmp_path: Path
) -> None:
    corpus, out, back = write_corpus(tmp_path / "c.jsonl"), tmp_path / "o.m3", tmp_path / "back.m3"
    assert encode_with(corpus, out=out) == 3
    target = f"{BUCKET}/out.m3"
    environment = {**os.environ, **s3.environment(proxy.server)}

    def run(*command: object, check: bool = True, port: int | None = None) -> int:
        more = {} if port is None else s3.environment(port)
        words = [str(word) for word in command]
        return subprocess.run(words, env={**environment, **more}, check=check, capture_output=True).returncode

    class Ending(s3.Proxy):
        """Answers nothing more after some objects have been written, of those that are sent at once any of them."""

        left = 0

        def choose(self, request: str) -> str:
            with self._lock:
                self.left -= request.startswith("PUT")
                return "reset" if self.left < 0 else ""

    ending = Ending(proxy.server, share=0)
    for ending.left in (1, 6):
        with ending.run() as port:
            assert run(ROOT / "scripts/examples/sync.sh", out, target, check=False, port=port) != 0
        run("aws", "s3", "sync", target, back)
        assert m3_here("check", back).returncode == 75
    run(ROOT / "scripts/examples/sync.sh", out, target)
    run("aws", "s3", "sync", target, back)
    assert m3_here("check", back).returncode == 3
    assert folder_bytes(back) == folder_bytes(out)
