from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from m3cli.encoder import tokenizer
from m3cli.encoder.checkpoint import find_checkpoint, hash_checkpoint, read_checkpoint
from m3cli.encoder.model import load_model
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.errors import ModelError


@pytest.fixture
def copy(tiny_m3: Path, tmp_path: Path) -> Path:
    """A copy whose small files may be changed; the weights are linked."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_m3, folder, copy_function=lambda a, b: Path(b).hardlink_to(a))
    return folder


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def test_a_checkpoint_is_what_its_files_say(tiny_m3: Path) -> None:
    checkpoint = read_checkpoint(tiny_m3)
    assert (checkpoint.num_layers, checkpoint.hidden_size, checkpoint.num_positions) == (2, 64, 8194)
    assert checkpoint.outputs == ("dense", "sparse", "colbert")
    assert checkpoint.pooling == "cls"
    assert checkpoint.max_length == checkpoint.default_max_length == 8192


def test_without_heads_a_checkpoint_gives_dense_only(copy: Path) -> None:
    (copy / "sparse_linear.pt").unlink()
    (copy / "colbert_linear.pt").unlink()
    assert read_checkpoint(copy).outputs == ("dense",)


def test_without_a_pooling_file_pooling_is_cls(copy: Path) -> None:
    shutil.rmtree(copy / "1_Pooling")
    assert read_checkpoint(copy).pooling == "cls"


@pytest.mark.parametrize("config", [{"pooling_mode": "mean"}, {"pooling_mode_mean_tokens": True}])
def test_both_forms_of_pooling_are_read(copy: Path, config: dict[str, object]) -> None:
    rewrite(copy / "1_Pooling" / "config.json", orjson.dumps({"word_embedding_dimension": 64, **config}))
    assert read_checkpoint(copy).pooling == "mean"


def test_unknown_pooling_is_named(copy: Path) -> None:
    rewrite(copy / "1_Pooling" / "config.json", orjson.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ModelError, match="max_tokens"):
        read_checkpoint(copy)


def test_another_architecture_is_named(copy: Path) -> None:
    rewrite(copy / "config.json", orjson.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="'bert'"):
        read_checkpoint(copy)


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_checkpoint(tmp_path)


def test_a_folder_without_weights_is_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        read_checkpoint(copy)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ModelError, match=r"\./nowhere"):
        find_checkpoint("./nowhere")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2271064456\n"
PAGE = b"\n<!DOCTYPE html><html><title>Not Found</title></html>"


@pytest.mark.parametrize(
    ("content", "words"), [(LFS_POINTER, "Git LFS pointer.*git lfs pull"), (PAGE, "HTML page.*hf download")]
)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "sparse_linear.pt", "tokenizer.json", "config.json", "1_Pooling/config.json"]
)
def test_what_stands_in_for_a_file_is_named(copy: Path, name: str, content: bytes, words: str) -> None:
    rewrite(copy / name, content)
    with pytest.raises(ModelError, match=f"{re.escape(name)} is an? {words}"):
        read_checkpoint(copy)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        *(("num_attention_heads", value) for value in (7, 0, None, "12", 2.5, True)),
        *(("num_hidden_layers", value) for value in (0, -1)),
        *(("max_position_embeddings", value) for value in (4, 1 << 70)),
        *(("layer_norm_eps", value) for value in ("x", -1.0)),
        *(("pad_token_id", value) for value in ("x", -1)),
    ],
)
def test_a_wrong_number_in_the_config_is_named(copy: Path, member: str, value: object) -> None:
    config = json.loads((copy / "config.json").read_bytes())
    rewrite(copy / "config.json", json.dumps({**config, member: value}).encode())
    with pytest.raises(ModelError, match=rf"config\.json: {member} is .*; download the checkpoint again"):
        read_checkpoint(copy)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"{}", b"[]", b"null", b"7", b'{"weight_map": {}}', b'{"weight_map": {"a": 7}}'),
        *(b'{"weight_map": {"a": "../model.safetensors"}}', b'{"weight_map": {"a": "/etc/passwd"}}'),
        b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
    ],
)
def test_a_damaged_index_is_named(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json .*; (download|get) the checkpoint"):
        read_checkpoint(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7"])
def test_a_damaged_pooling_file_is_named(copy: Path, content: bytes) -> None:
    rewrite(copy / "1_Pooling" / "config.json", content)
    with pytest.raises(ModelError, match=r"1_Pooling/config\.json .*; download the checkpoint again"):
        read_checkpoint(copy)


@pytest.mark.parametrize("content", [b"hello world", b"\x80\x02hello", b"PK\x03\x04", bytes(100)])
def test_a_damaged_head_is_named(copy: Path, content: bytes) -> None:
    rewrite(copy / "sparse_linear.pt", content)
    with pytest.raises(ModelError, match=r"sparse_linear\.pt .*; download the checkpoint again"):
        load_model(read_checkpoint(copy), device="cpu", dtype="float32")


def test_a_tokenizer_with_more_tokens_than_embeddings_is_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_bytes())
    rewrite(copy / "config.json", json.dumps({**config, "vocab_size": 250001}).encode())
    with pytest.raises(ModelError, match=r"has 250,002 tokens, and config\.json says vocab_size 250,001;"):
        load_tokenizer(read_checkpoint(copy))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "folder", "link"])
def test_a_damaged_tokenizer_cache_is_built_again(
    tiny_m3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    words = Tokenizer(WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    words.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    monkeypatch.setattr(tokenizer, "_build_backend", lambda _: words.to_str())  # the real one takes seconds
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = read_checkpoint(tiny_m3)
    first = load_tokenizer(checkpoint)
    (cached,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    usual, target = cached.read_bytes(), tmp_path / "target"
    target.write_bytes(b"precious")
    cached.unlink()
    if damage == "folder":
        cached.mkdir()
    elif damage == "link":
        cached.symlink_to(target)
    else:
        cached.write_bytes({"truncated": usual[:50], "empty": b"", "text": b"hello world"}[damage])
    assert load_tokenizer(checkpoint).serialisation_hash == first.serialisation_hash
    assert target.read_bytes() == b"precious"
    assert damage == "folder" or cached.read_bytes() == usual


COMMIT = "c0ffee" * 6 + "0123"
WEIGHTS = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"}
SMALL = {name: name.encode() for name in ("1_Pooling/config.json", "sparse_linear.pt", "colbert_linear.pt")}
SHARDS = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}',
    "model-1.safetensors": b"first",
    "model-2.safetensors": b"second",
}
FIND = """
import logging, sys
logging.basicConfig(format="%(message)s")
from m3cli.encoder.checkpoint import find_checkpoint
from m3cli.errors import ModelError
try:
    print(find_checkpoint("org/tiny", download="stay" not in sys.argv, heads="weights" not in sys.argv))
except ModelError as error:
    sys.exit(str(error))
"""


class Hub:
    """A hub with one repository on this machine, a cache, and what is asked of it."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.files, self.asked, self.home = files, list[str](), folder
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815  the server's own name

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        status, body = 200, b""
        if path.startswith("/api/models/org/tiny/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": sha256(content).hexdigest()[:40]}
                for name, content in self.files.items()
            ]
            body = json.dumps(listed).encode()
        elif path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        elif (name := path.removeprefix("/org/tiny/resolve/").partition("/")[2]) in self.files:
            self.asked.append(name)
            body = self.files[name]
            headers["ETag"] = f'"{sha256(body).hexdigest()[:40]}"'
        else:
            self.asked.append(name)
            status, headers["X-Error-Code"] = 404, "EntryNotFound"
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def cache(self, *names: str) -> None:
        """Put files into the cache as libraries do that load a model file by file."""
        repository = self.home / "hub" / "models--org--tiny"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        for name in names:
            path = repository / "snapshots" / COMMIT / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[name])

    def find(self, *words: str, **environment: str) -> tuple[dict[str, bytes], str]:
        """Find the checkpoint in a process of its own; return its files and what was said."""
        self.asked.clear()
        address = f"http://127.0.0.1:{self.server.server_port}"
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(self.home), "HF_HUB_OFFLINE": "0", **environment}
        command = [sys.executable, "-c", FIND, *words]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
        if done.returncode:
            return {}, done.stderr
        folder = Path(done.stdout.strip())
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}, (
            done.stderr
        )


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    result = Hub(tmp_path, {**WEIGHTS, **SMALL, "README.md": b"read me"})
    threading.Thread(target=result.server.serve_forever, daemon=True).start()
    yield result
    result.server.shutdown()
    result.server.server_close()


def test_a_checkpoint_is_downloaded_once_without_what_is_not_read(hub: Hub) -> None:
    assert hub.find()[0] == {**WEIGHTS, **SMALL}
    assert hub.find()[0] == {**WEIGHTS, **SMALL}
    assert hub.asked == []


def test_small_files_that_another_library_did_not_cache_are_asked_for(hub: Hub) -> None:
    hub.cache(*WEIGHTS)
    assert hub.find("stay")[0] == WEIGHTS
    assert hub.find("weights")[0] == WEIGHTS
    assert hub.asked == []
    assert hub.find()[0] == {**WEIGHTS, **SMALL}
    assert set(hub.asked) == set(SMALL)


def test_that_the_hub_has_no_heads_is_asked_once(hub: Hub) -> None:
    hub.files = dict(WEIGHTS)
    hub.cache(*WEIGHTS)
    assert hub.find()[0] == WEIGHTS
    assert set(hub.asked) == set(SMALL)
    assert hub.find() == (WEIGHTS, "")
    assert hub.asked == []


def test_without_the_hub_a_cached_checkpoint_is_used_and_the_gap_is_told(hub: Hub) -> None:
    hub.cache(*WEIGHTS)
    for environment, words in (
        ({"HF_HUB_OFFLINE": "1"}, "the hub is not asked (HF_HUB_OFFLINE is set)"),
        ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "the hub cannot be reached"),
    ):
        found, said = hub.find(**environment)
        assert found == WEIGHTS
        assert said.splitlines() == [f"org/tiny: the hub's cache lacks {', '.join(SMALL)}, and {words}"]


def test_a_part_of_the_weights_that_is_not_cached_is_downloaded(hub: Hub) -> None:
    hub.files = SHARDS
    hub.cache(*(name for name in SHARDS if name != "model-2.safetensors"))
    assert hub.find()[0] == SHARDS


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "the hub is not asked (HF_HUB_OFFLINE is set)"),
        ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "the hub cannot be reached"),
    ],
)
def test_without_hub_one_line_says_what_to_do(hub: Hub, environment: dict[str, str], reason: str) -> None:
    _, said = hub.find(**environment)
    assert said.splitlines() == [
        f"org/tiny is neither a folder nor in the hub's cache, and {reason}; where the hub can be reached: "
        "hf download org/tiny --local-dir tiny, then --model tiny"
    ]


JSON_FILES = (
    "config.json",
    "1_Pooling/config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "cut by one": lambda content: content[:-1],
    "empty": lambda _: b"",
    "object": lambda _: b"{}",
    "list": lambda _: b"[]",
    "null": lambda _: b"null",
    "text": lambda _: b"hello world",
    "zeros": lambda content: bytes(min(len(content), 1 << 20)),
    "pointer": lambda _: LFS_POINTER,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "1_Pooling/config.json", "model.safetensors", "sparse_linear.pt", "colbert_linear.pt"),
        "pytorch_model.bin",
        *(pytest.param(name, marks=pytest.mark.slow) for name in JSON_FILES if "token" in name),
    ],
)
def test_a_damaged_file_is_a_model_error_or_does_no_harm(
    copy: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if name == "pytorch_model.bin":
        torch.save(load_file(copy / "model.safetensors"), copy / name)
        (copy / "model.safetensors").unlink()
    rewrite(copy / name, DAMAGES[damage]((copy / name).read_bytes()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = f"{copy}; "
    try:
        checkpoint = read_checkpoint(copy)
        if "token" in name:
            load_tokenizer(checkpoint)
        else:
            load_model(checkpoint, device="cpu", dtype="float32")
    except ModelError as error:
        told = str(error)
    assert re.fullmatch(rf".*{copy}.*; .*", told), "one line, the file, the remedy"


def test_identity_is_the_same_for_a_copy_and_another_for_other_heads(tiny_m3: Path, copy: Path) -> None:
    hashes = hash_checkpoint(read_checkpoint(tiny_m3))
    assert hash_checkpoint(read_checkpoint(copy)) == hashes
    rewrite(copy / "sparse_linear.pt", b"other")
    changed = hash_checkpoint(read_checkpoint(copy))
    assert [name for name in changed if changed[name] != hashes[name]] == ["sparse_linear.pt"]
