"""`m3 check`: every damage is found and named, and a repair and a run later the folder is what it was."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from m3cli.cli.app import run
from m3cli.config import Format
from m3cli.errors import OutputError
from m3cli.jobs.check import FolderCheck, check_folder
from m3cli.progress import FileMeter
from m3cli.requests import CheckRequest
from m3cli.store.layout import RUN_NAME
from m3cli.store.lock import hold_lock
from tests.conftest import Completed
from tests.crash import folder_bytes
from tests.functional.conftest import EncodeWith
from tests.functional.corpora import FORMATS, Encode, write_corpus

FLIPS_A_FILE = 2
REPAIRS = 12
SLOW_REPAIRS = 100
"""Of all damages; with M3_KILLS set, all of them."""


def check(root: Path, **settings: Any) -> FolderCheck:
    return check_folder(CheckRequest(folder=str(root), **settings), meter=FileMeter(quiet=True))


@dataclass(frozen=True)
class Whole:
    """An undamaged folder, and how it was made."""

    root: Path
    encode: Encode
    bytes: dict[str, bytes]


@pytest.fixture(scope="module", params=FORMATS)
def whole(
    request: pytest.FixtureRequest, encoders: dict[Format, Encode], tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    root = tmp_path_factory.mktemp(request.param) / "out"
    assert encoders[request.param](root) == 3
    return Whole(root, encoders[request.param], folder_bytes(root))


@dataclass(frozen=True)
class Damage:
    """Something done to a folder, and the files that a check must name."""

    name: str
    do: Callable[[Path], object]
    files: tuple[str, ...]


def flip(name: str, offset: int) -> Damage:
    def do(root: Path) -> None:
        raw = bytearray((root / name).read_bytes())
        raw[offset] ^= 1 << offset % 8
        (root / name).write_bytes(raw)

    return Damage(f"flip {name} at {offset}", do, (name,))


def truncate(name: str) -> Damage:
    return Damage(f"truncate {name}", lambda root: (root / name).write_bytes((root / name).read_bytes()[:-7]), (name,))


def delete(name: str) -> Damage:
    return Damage(f"delete {name}", lambda root: (root / name).unlink(), (name,))


def swap(first: str, second: str) -> Damage:
    def do(root: Path) -> None:
        before = (root / first).read_bytes()
        (root / first).write_bytes((root / second).read_bytes())
        (root / second).write_bytes(before)

    return Damage(f"swap {first} and {second}", do, (first, second))


def copy(name: str, stray: str) -> Damage:
    return Damage(f"copy {name} to {stray}", lambda root: shutil.copyfile(root / name, root / stray), (stray,))


def every_damage(files: dict[str, bytes]) -> Iterator[Damage]:
    draw = random.Random(0)
    for name, content in files.items():
        yield from (flip(name, draw.randrange(len(content))) for _ in range(FLIPS_A_FILE))
        yield flip(name, len(content) - 1)
        yield truncate(name)
        if name != "_m3/manifest.json":  # without it a folder is unfinished, which is no damage
            yield delete(name)
        if "shard-" in name:
            yield copy(name, name.replace("shard-0000000", "shard-0000099").replace("shard-0000001", "shard-0000098"))
    kinds: dict[str, list[str]] = {}
    for name in files:
        kinds.setdefault(f"{name.rpartition('/')[0]}{name[name.find('.') :]}", []).append(name)
    for names in kinds.values():
        yield from (swap(first, second) for first, second in pairwise(names) if files[first] != files[second])
    yield swap("_m3/manifest.json", "_m3/done/shard-0000000.json")


def damages_of(whole: Whole) -> list[Damage]:
    found = [
        damage
        for damage in every_damage(whole.bytes)
        if damage.files[0] not in whole.bytes or "copy" not in damage.name
    ]
    assert len(found) > 90
    return found


def test_every_damage_is_found_and_its_file_and_shard_named(whole: Whole, tmp_path: Path) -> None:
    for damage in damages_of(whole):
        root = tmp_path / "out"
        shutil.copytree(whole.root, root)
        damage.do(root)
        found = check(root)
        assert found.exit_code == 12, damage.name
        named = {fault.file: fault for fault in found.faults}
        assert set(damage.files) <= named.keys(), damage.name
        for file in damage.files:
            if file.rpartition("/")[2].startswith("shard-"):
                assert named[file].shard == int(file.rpartition("/")[2][6:13]), damage.name
        damaged_shards = {
            int(file.rpartition("/")[2][6:13]) for file in damage.files if "/shard-" in file and file in whole.bytes
        }
        assert set(found.redo) == damaged_shards, damage.name
        shutil.rmtree(root)


def repair_and_encode(whole: Whole, damage: Damage, root: Path) -> None:
    shutil.copytree(whole.root, root)
    damage.do(root)
    found = check(root, repair=True)
    again = check(root)
    if RUN_NAME in damage.files:
        assert found.exit_code == again.exit_code == 12, damage.name
    else:
        assert again.faults == (), damage.name
        assert found.exit_code == again.exit_code, damage.name
        assert whole.encode(root) == 3
        assert folder_bytes(root) == whole.bytes, damage.name
    shutil.rmtree(root)


def test_repair_and_another_run_give_the_undamaged_folder(whole: Whole, tmp_path: Path) -> None:
    for damage in random.Random(1).sample(damages_of(whole), REPAIRS):
        repair_and_encode(whole, damage, tmp_path / "out")


@pytest.mark.slow
def test_repair_of_many_damages_and_another_run_give_the_undamaged_folder(whole: Whole, tmp_path: Path) -> None:
    damages = damages_of(whole)
    if "M3_KILLS" not in os.environ:
        damages = random.Random(2).sample(damages, min(SLOW_REPAIRS, len(damages)))
    for damage in damages:
        repair_and_encode(whole, damage, tmp_path / "out")
    sys.stdout.write(f"{len(damages)} damages repaired\n")


def test_repair_touches_nothing_but_the_damaged_shards(whole: Whole, tmp_path: Path) -> None:
    root = tmp_path / "out"
    shutil.copytree(whole.root, root)
    flip("rows/shard-0000001.parquet", 50).do(root)
    truncate("_m3/hashes/shard-0000000.npy").do(root)
    before = {name: (root / name).stat().st_mtime_ns for name in whole.bytes}
    found = check(root, repair=True)
    assert found.redo == (0, 1)
    assert found.exit_code == 75
    left = folder_bytes(root)
    assert {name for name in whole.bytes if "0000000." not in name and "0000001." not in name} == {
        *left,
        "_m3/manifest.json",
    }
    assert all((root / name).stat().st_mtime_ns == before[name] for name in left)


def test_undamaged_folders_give_the_code_that_describes_them(
    whole: Whole, tmp_path: Path, encode_with: EncodeWith
) -> None:
    assert check(whole.root).exit_code == 3
    clean = write_corpus(tmp_path / "clean.jsonl", bad_every=1000)
    assert encode_with(clean, out=tmp_path / "clean.m3") == 0
    found = check(tmp_path / "clean.m3")
    assert (found.exit_code, found.complete, found.documents) == (0, True, 24)


def test_files_of_others_are_listed_and_left(whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "out"
    shutil.copytree(whole.root, root)
    notes = ["rows/_SUCCESS", "rows/README.md", "_m3/done/shard-0000000.json.bak", "_m3/notes"]
    for name in notes:
        (root / name).write_text("mine")
    (root / "rows/.ipynb_checkpoints").mkdir()
    assert run(["check", str(root)]) == 3
    said = capsys.readouterr().out
    assert all(f"note: {name}: m3 did not write it" in said for name in [*notes, "rows/.ipynb_checkpoints"])
    assert "complete, no damage" in said
    flip("rows/shard-0000001.parquet", 50).do(root)
    copy("rows/shard-0000000.parquet", "rows/copy of shard-0000000.parquet").do(root)
    before = folder_bytes(root)
    found = check(root, repair=True)
    assert (found.exit_code, found.redo) == (12, (1,))
    faults = {fault.file: fault.cure for fault in found.faults}
    assert faults == {"rows/shard-0000001.parquet": "redo", "rows/copy of shard-0000000.parquet": "none"}
    left = folder_bytes(root)
    assert {name for name in before if name not in left} == set(found.removed)
    assert all("shard-0000001." in name or name == "_m3/manifest.json" for name in found.removed)
    (root / "rows/copy of shard-0000000.parquet").unlink()
    assert whole.encode(root) == 3
    assert {name: content for name, content in folder_bytes(root).items() if name in whole.bytes} == whole.bytes
    assert all((root / name).read_text() == "mine" for name in notes)


LINKED = (
    *("_m3", "_m3/lock", "_m3/lock.init", "_m3/tmp", "_m3/done", "_m3/skipped", "_m3/hashes", "_m3/metrics.json"),
    *("_m3/run.json", "rows", "lexical_weights", "colbert_vecs"),
)


def link_away(root: Path, name: str, target: Path) -> None:
    """Put a link in the place of a file or folder, as whoever made the folder could."""
    target.parent.mkdir(exist_ok=True)
    if (root / name).exists():
        shutil.move(root / name, target)
    elif Path(name).suffix or "lock" in name:
        target.write_text("mine")
    else:
        target.mkdir()
    if target.is_dir():
        (target / "thesis.txt").write_text("mine")
        (target / ".bashrc").write_text("mine")
        (target / "shard-0000042.npz").write_text("mine")
    (root / name).symlink_to(target)


@pytest.mark.parametrize("name", LINKED)
def test_nothing_is_deleted_or_written_through_a_link(
    whole: Whole, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], tiny_m3: Path
) -> None:
    root, target = tmp_path / "out", tmp_path / "home" / "target"
    shutil.copytree(whole.root, root)
    delete("_m3/done/shard-0000001.json").do(root)
    flip("_m3/hashes/shard-0000000.npy", 50).do(root)
    link_away(root, name, target)
    before, there = folder_bytes(tmp_path / "home"), folder_bytes(root)
    assert run(["check", str(root)]) == 12
    assert f"{name}: is a symbolic link, which m3 does not make" in capsys.readouterr().out.splitlines()
    assert run(["check", str(root), "--repair"]) == 12
    with pytest.raises(OutputError, match=f"{name} is a symbolic link"):
        whole.encode(root)
    assert folder_bytes(tmp_path / "home") == before
    assert folder_bytes(root) == there
    assert (root / name).is_symlink()


@pytest.mark.parametrize("name", ["rows/shard-0000001.parquet", "_m3/done/shard-0000001.json"])
def test_a_link_in_the_place_of_a_file_is_damage_and_only_the_link_is_removed(
    whole: Whole, tmp_path: Path, name: str
) -> None:
    root, target = tmp_path / "out", tmp_path / "home" / "target"
    shutil.copytree(whole.root, root)
    link_away(root, name, target)
    before = target.read_bytes()
    found = check(root)
    assert [(fault.file, fault.shard, fault.cure) for fault in found.faults] == [(name, 1, "redo")]
    with pytest.raises(OutputError, match=f"{name} is a symbolic link"):
        whole.encode(root)
    assert check(root, repair=True).exit_code == 75
    assert whole.encode(root) == 3
    assert folder_bytes(root) == whole.bytes
    assert target.read_bytes() == before


def test_a_lock_is_not_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "_m3").mkdir()
    (tmp_path / "home").write_text("mine")
    (tmp_path / "_m3/lock").symlink_to("../home")
    with pytest.raises(OutputError, match="remove the symbolic link"), hold_lock(tmp_path, worker=0, num_workers=1):
        pass
    assert (tmp_path / "home").read_text() == "mine"


def test_data_without_an_entry_is_no_damage_while_work_is_left(whole: Whole, tmp_path: Path) -> None:
    root = tmp_path / "out"
    shutil.copytree(whole.root, root)
    (root / "_m3/manifest.json").unlink()
    (root / "_m3/done/shard-0000001.json").unlink()
    (root / "_m3/tmp/0-of-1").mkdir(parents=True, exist_ok=True)
    (root / "_m3/tmp/0-of-1/half").write_bytes(b"half")
    found = check(root)
    assert (found.faults, found.exit_code) == ((), 75)


def test_damage_is_all_listed_on_stdout_with_what_to_do(
    whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    shutil.copytree(whole.root, root)
    flip("rows/shard-0000001.parquet", 50).do(root)
    delete("_m3/hashes/shard-0000000.npy").do(root)
    copy("_m3/run.json", "rows/\x1b[31mred\n.parquet").do(root)
    assert run(["check", str(root)]) == 12
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("rows/shard-0000001.parquet: has other bytes") and line.endswith("(shard 1)") for line in lines
    )
    assert "_m3/hashes/shard-0000000.npy: is missing (shard 0)" in lines
    assert r"rows/\x1b[31mred\n.parquet: is not a file of m3, and readers of rows/ take it for rows" in lines
    assert "shards to do again: 0, 1" in lines
    assert run(["check", str(root), "--json"]) == 12
    document = json.loads(capsys.readouterr().out)
    assert [document["redo"], len(document["faults"]), document["exit_code"]] == [[0, 1], 3, 12]


def test_damaged_run_json_is_said_to_be_past_repair(
    whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    shutil.copytree(whole.root, root)
    flip(RUN_NAME, 60).do(root)
    assert run(["check", str(root), "--repair"]) == 12
    assert "what --repair cannot fix: _m3/run.json; put it back from a copy" in capsys.readouterr().out
    assert set(folder_bytes(root)) == set(whole.bytes)


def test_duplicate_ids_are_reported_and_no_damage(
    tmp_path: Path, encode_with: EncodeWith, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "twice.jsonl"
    corpus.write_text("".join(f'{{"id": "d{row % 30}", "text": "some words {row}"}}\n' for row in range(40)))
    assert encode_with(corpus, out=tmp_path / "out") == 0
    assert run(["check", str(tmp_path / "out")]) == 0
    assert "note: 10 ids occur more than once, such as 'd" in capsys.readouterr().out


def test_folder_that_is_none_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(["check", str(tmp_path / "none")]) == 2
    assert run(["check", str(tmp_path)]) == 2
    assert "not an m3 folder" in capsys.readouterr().err


def test_sample_encodes_rows_again(
    whole: Whole, tiny_m3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", str(whole.root), "--sample", "15", "--model", str(tiny_m3), "--device", "cpu"]
    assert run(words) == 3
    assert "15 rows encoded again; complete, no damage" in capsys.readouterr().out
    found = check(whole.root, sample=10_000, model=str(tiny_m3), device="cpu")
    assert (found.sampled, found.exit_code) == (found.rows, 3)


def test_sample_finds_the_checkpoint_of_the_folder(
    tmp_path: Path, encode_with: EncodeWith, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode_with(write_corpus(tmp_path / "corpus.jsonl", bad_every=1000), out=tmp_path / "out") == 0
    assert run(["check", str(tmp_path / "out"), "--sample", "3", "--device", "cpu"]) == 0
    assert "3 rows encoded again; complete, no damage" in capsys.readouterr().out


def test_sample_finds_vectors_of_another_model(
    tmp_path: Path, encode_with: EncodeWith, tiny_m3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m3cli.encoder import heads  # noqa: PLC0415 - patched for one run

    corpus = write_corpus(tmp_path / "corpus.jsonl", bad_every=1000)
    pool = heads.pool_rows
    with monkeypatch.context() as patch:
        patch.setattr(heads, "pool_rows", lambda *given, **settings: pool(*given, **settings).roll(1, dims=-1))
        assert encode_with(corpus, out=tmp_path / "out") == 0
    assert check(tmp_path / "out").exit_code == 0
    found = check(tmp_path / "out", sample=8, model=str(tiny_m3), device="cpu")
    assert found.exit_code == 12
    assert len(found.faults) == 8
    assert all("its dense vector has cosine" in fault.what for fault in found.faults)


def test_sample_names_input_that_is_gone_or_another(
    tmp_path: Path, encode_with: EncodeWith, tiny_m3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    encode_with(corpus, out=tmp_path / "out")
    words = ["check", str(tmp_path / "out"), "--sample", "3", "--model", str(tiny_m3), "--device", "cpu"]
    text = corpus.read_bytes()
    corpus.write_bytes(text.replace(b"fox", b"cat"))
    assert run(words) == 10
    assert "corpus.jsonl has changed since shard" in capsys.readouterr().err
    corpus.unlink()
    assert run(words) == 4
    assert "corpus.jsonl is gone" in capsys.readouterr().err


def test_check_neither_locks_nor_loads_torch(whole: Whole, tmp_path: Path, m3: Callable[..., Completed]) -> None:
    from m3cli.store.folder import open_run_folder  # noqa: PLC0415

    root = tmp_path / "out"
    shutil.copytree(whole.root, root)
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    with open_run_folder(root):
        done = m3("check", root, PYTHONPATH=str(tmp_path))
        assert done.returncode == 3, done.stderr
        assert "no damage" in done.stdout
        locked = m3("check", root, "--repair")
        assert locked.returncode == 11
        assert "is in use: pid" in locked.stderr
