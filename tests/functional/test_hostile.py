"""Input and checkpoints made to do harm: nothing of them is run, nor reaches terminal, disk or memory."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from tests.conftest import Completed
from tests.functional.test_bad_rows import read_ids, read_skipped

M3 = Callable[..., Completed]
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m\r\b\x9b1m\u202e"


class _Bomb:
    """Pickled, this says: run a command."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._trace}",)


@pytest.mark.parametrize("name", ["colbert_linear.pt", "sparse_linear.pt", "pytorch_model.bin"])
def test_a_checkpoint_that_carries_code_is_refused(m3_here: M3, tmp_path: Path, tiny_m3: Path, name: str) -> None:
    model, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(tiny_m3, model)
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    torch.save({"weight": _Bomb(trace)}, model / name)
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    done = m3_here("encode", "c.jsonl", "--model", model, "--dtype", "float32")
    assert done.returncode == 5
    assert "contains code, which m3 never runs" in done.stderr.splitlines()[-1]
    assert not trace.exists()


def test_code_next_to_a_tokenizer_is_never_run(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    model, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(tiny_m3, model)
    (model / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Tokenizer: pass\n", encoding="utf-8")
    for name in ("tokenizer_config.json", "config.json"):
        settings = json.loads((model / name).read_text(encoding="utf-8"))
        settings["auto_map"] = {"AutoTokenizer": [None, "evil.Tokenizer"], "AutoModel": "evil.Tokenizer"}
        (model / name).write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    done = m3_here("encode", "c.jsonl", "--model", model, "--dtype", "float32")
    assert done.returncode in {0, 5}
    assert not trace.exists()


def test_escapes_in_ids_fields_and_names_reach_no_terminal_and_no_other_place(
    m3_here: M3, tmp_path: Path, tiny_m3: Path
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    name = f"c{ESCAPES}.jsonl"
    field = f"meta{ESCAPES}"
    rows: list[dict[str, str | None]] = [
        {"id": f"../../{ESCAPES}", "text": "one", field: f"../{ESCAPES}"},
        {"id": f"/etc/{ESCAPES}", "text": None, field: "x"},
        {"id": "nul\0byte", "text": f"{ESCAPES} text", field: None},
        {"id": "..", "text": "four", field: "y"},
    ]
    (inside / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ("--model", tiny_m3, "--dtype", "float32", "--keep-fields", field)
    out = f"inside/out{ESCAPES}.m3"
    shown = [m3_here("encode", f"inside/{name}", *flags, "--out", out)]
    assert shown[0].returncode == 3, shown[0].stderr
    shown += [
        m3_here("encode", f"inside/{name}", "--out", out),
        m3_here("encode", f"inside/{name}", "--out", out, "--max-skipped", "0"),
        m3_here("encode", f"inside/{name}", "--out", out, "--keep-fields", "text"),
        m3_here("encode", f"inside/{name}", "--out", "other.m3", "--text-field", ESCAPES),
        m3_here("plan", f"inside/{name}", *flags),
        m3_here("info", out),
        m3_here("info", ESCAPES),
        m3_here("check", out),
    ]
    for done in shown:
        said = (done.stdout + done.stderr).replace("\n", "")
        assert said
        assert [char for char in said if not char.isprintable()] == []
    table = pq.read_table(tmp_path / out / "rows")
    assert table.column("id").to_pylist() == [row["id"] for row in rows if row["text"]]
    assert table.column(field).to_pylist() == [row[field] for row in rows if row["text"]]
    assert [row["id"] for row in read_skipped(tmp_path / out)] == [f"/etc/{ESCAPES}"]
    assert {path.name for path in inside.iterdir()} == {name, Path(out).name}
    assert {path.name for path in tmp_path.iterdir()} == {"inside"}
    raw = b"".join(path.read_bytes() for path in (tmp_path / out / "_m3" / "skipped").iterdir())
    assert b"\x1b" not in raw


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_line_that_unpacks_to_320_mib_does_not_take_the_memory(
    m3: M3, tmp_path: Path, tiny_m3: Path, ending: str
) -> None:
    pack = gzip.compress if ending == ".gz" else zstandard.ZstdCompressor().compress
    good = [json.dumps({"id": str(n), "text": f"text {n}"}).encode() + b"\n" for n in range(2)]
    sixteen = pack(b"a" * (16 << 20))
    bomb = pack(b'{"id": "x", "text": "') + sixteen * 20 + pack(b'"}\n')
    flags = ["--model", str(tiny_m3), "--dtype", "float32", "--outputs", "dense", "--max-row-bytes", "1M"]
    flags += ["--shard-size", "64M", "--progress", "none"]
    peaks = []
    for name, content in (("flat", pack(good[0]) + pack(good[1])), ("bomb", pack(good[0]) + bomb + pack(good[1]))):
        (tmp_path / f"{name}.jsonl{ending}").write_bytes(content)
        done = m3("encode", f"{name}.jsonl{ending}", *flags)
        assert done.returncode == (3 if name == "bomb" else 0), done.stderr
        assert read_ids(tmp_path / f"{name}.m3") == ["0", "1"]
        metrics = json.loads((tmp_path / f"{name}.m3/_m3/metrics.json").read_text(encoding="utf-8"))
        peaks.append(metrics["peak_memory_bytes"])
    assert peaks[1] - peaks[0] < 100 << 20
    (skipped,) = read_skipped(tmp_path / "bomb.m3")
    assert skipped["reason"] == "row longer than --max-row-bytes"


@pytest.mark.parametrize("place", ["before", "in_prefix", "in_query"])
def test_what_is_no_utf8_on_the_command_line_is_refused(m3_here: M3, tmp_path: Path, place: str) -> None:
    """Python hands bytes that are no UTF-8 over as lone surrogates, which no tokenizer and no JSON takes."""
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    arguments = {
        "before": ("encode", "\udcff.jsonl"),
        "in_prefix": ("encode", "c.jsonl", "--prefix", "q\udcff"),
        "in_query": ("search", "c.m3", "--queries", "caf\udce9"),
    }[place]
    done = m3_here(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert r"\udc" in done.stderr
    assert "is not UTF-8: rename the file, or type it in a UTF-8 terminal" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_files_whose_names_are_no_utf8_are_refused(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    (tmp_path / "corpus").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "corpus") + b"/caf\xe9.jsonl")).write_text('{"text": "one"}\n')
    done = m3_here("encode", "corpus", "--model", tiny_m3, "--progress", "none")
    assert (done.returncode, done.stdout) == (4, "")
    assert r"caf\udce9.jsonl has a name that is not UTF-8: rename it" in done.stderr
