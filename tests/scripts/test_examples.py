"""The examples for schedulers, run as those run them; a folder stands for the bucket, scripts for the commands."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.crash import folder_bytes
from tests.functional.corpora import SETTINGS, write_corpus

EXAMPLES = ROOT / "scripts" / "examples"
AWS = """\
words=()
for word in "$@"; do
  case $word in --only*) ;; --*) break ;; *) words+=("${word/s3:\\/\\//$BUCKETS/}") ;; esac
done
from=${words[2]} to=${words[3]}
if [ "${words[1]}" = cp ]; then mkdir -p "$(dirname "$to")"; cp "$from" "$to"; exit; fi
[ -d "$from" ] || exit 0
mkdir -p "$to"; cp -R "$from/." "$to"
"""


class Scheduler:
    """Runs scripts with the commands that they call."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        settings = " ".join(map(str, ("--model", model, *SETTINGS, "--outputs", "dense")))
        scripts = {
            "m3": f'if [ $1 = load ]; then echo "$@" >>{self.calls}; exit "${{LOAD_CODE:-0}}"; fi\n'
            f'exec {sys.executable} -m m3cli "$@" {settings}',
            "scontrol": f'echo "$@" >>{self.calls}',
            "aws": AWS,
        }
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{script}\n", encoding="utf-8")
            (folder / name).chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "BUCKETS": str(folder / "buckets")}

    def run(self, *command: object, cwd: Path | None = None, given: dict[str, str] | None = None) -> int:
        """Run a command with some variables given; return its exit code."""
        done = subprocess.run(
            [*map(str, command)],
            cwd=cwd or self.folder,
            env={**self.environment, **(given or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        print(done.stderr)  # noqa: T201  shown if a test fails
        return done.returncode


@pytest.fixture
def scheduler(tmp_path: Path, tiny_m3: Path) -> Scheduler:
    write_corpus(tmp_path / "corpus.jsonl")
    return Scheduler(tmp_path, tiny_m3)


def read(name: str) -> Any:
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_slurm_queues_a_task_again_that_has_work_left(scheduler: Scheduler, tmp_path: Path) -> None:
    def task(number: int, **environment: str) -> int:
        ids = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "2"}
        return scheduler.run(EXAMPLES / "slurm.sbatch", "corpus.jsonl", "--out", "o.m3", given={**ids, **environment})

    assert task(0, M3_MAX_RUNTIME="0.1s") == 0
    assert scheduler.calls.read_text() == "requeue 17_0\n"
    assert task(0) == task(1) == 0
    assert (tmp_path / "o.m3/_m3/manifest.json").exists()
    assert scheduler.calls.read_text() == "requeue 17_0\n"
    (tmp_path / "corpus.jsonl").unlink()
    assert task(0) == 4


@pytest.mark.slow
def test_every_night_encodes_and_loads_what_is_new(scheduler: Scheduler, tmp_path: Path) -> None:
    corpus, current = tmp_path / "corpus.jsonl", tmp_path / "current.m3"
    line = corpus.read_text(encoding="utf-8").splitlines()[0].replace('"id": "', '"id": "new ') + "\n"

    def night() -> int:
        return scheduler.run(EXAMPLES / "nightly.sh", "corpus.jsonl", "qdrant:http://localhost")

    assert night() == 0
    first = {path.name: path.stat().st_ino for path in (current / "rows").iterdir()}
    with corpus.open("a", encoding="utf-8") as file:
        file.write(line)
    # A night that did not end: its folder is of a corpus that has changed since then.
    words = ("m3", "encode", "corpus.jsonl", "--out", "next.m3", "--since-run", "current.m3", "--max-runtime", "0.01s")
    assert scheduler.run(*words) == 75
    with corpus.open("a", encoding="utf-8") as file:
        file.write(line.replace("new", "newer"))
    assert night() == night() == 0
    assert sorted(path.name for path in tmp_path.glob("*.m3")) == ["current.m3"]
    second = {path.name: path.stat().st_ino for path in (current / "rows").iterdir()}
    assert set(first.values()) & set(second.values())
    assert scheduler.run("m3", "encode", "corpus.jsonl", "--out", "current.m3") == 3  # complete; rows are bad
    load = "load ready.m3 --to qdrant:http://localhost --name corpus"
    assert scheduler.calls.read_text().splitlines() == [load, *[f"{load} --since current.m3"] * 2]
    corpus.unlink()
    assert night() == 4
    assert current.exists()


@pytest.mark.slow
def test_a_load_that_failed_is_done_before_the_next_night(scheduler: Scheduler, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    load = "load ready.m3 --to qdrant:http://localhost --name corpus"

    def night(text: str, **environment: str) -> int:
        corpus.write_text(text, encoding="utf-8")
        scheduler.calls.write_text("")
        return scheduler.run(EXAMPLES / "nightly.sh", "corpus.jsonl", "qdrant:http://localhost", given=environment)

    def folders() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("*.m3"))

    assert night("".join(lines), LOAD_CODE="3") == 0  # rows that the database cannot hold
    assert folders() == ["current.m3"]
    first = folder_bytes(tmp_path / "current.m3")
    assert night("".join(lines[:30]), LOAD_CODE="7") == 7
    assert folders() == ["current.m3", "ready.m3"]
    assert folder_bytes(tmp_path / "current.m3") == first
    (tmp_path / "current.m3").rename(tmp_path / "previous.m3")  # as if it had ended right there
    assert night("".join(lines[5:])) == 0
    assert scheduler.calls.read_text().splitlines() == [f"{load} --since current.m3"] * 2
    assert folders() == ["current.m3"]


@pytest.mark.slow
def test_the_pods_of_the_job_write_one_folder(scheduler: Scheduler, tmp_path: Path) -> None:
    job = read("indexed-job.yaml")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = [*container["command"], container["args"][0].replace("/8", "/2")]
    assert f'"$JOB_COMPLETION_INDEX/{job["spec"]["completions"]}"' in container["args"][0]
    for index in ("0", "1"):
        environment = {"M3_INPUT": "corpus.jsonl", "M3_OUT": "o.m3", "JOB_COMPLETION_INDEX": index}
        assert scheduler.run(*command, given=environment) == 0
    assert (tmp_path / "o.m3/_m3/manifest.json").exists()
    missing = {"M3_INPUT": "none.jsonl", "M3_OUT": "n.m3", "JOB_COMPLETION_INDEX": "0"}
    assert scheduler.run(*command, given=missing) == 4


@pytest.mark.slow
def test_spot_machines_go_on_from_the_bucket(scheduler: Scheduler, tmp_path: Path) -> None:
    task = read("sky.yaml")
    folders = []
    for rank in range(2):
        machine = tmp_path / f"machine-{rank}"
        (machine / "scripts").mkdir(parents=True)
        (machine / "scripts/examples").symlink_to(EXAMPLES)
        environment = {"INPUT": str(tmp_path / "corpus.jsonl"), "TO": "s3://bucket/encoded"}
        ids = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_NODES": "2"}
        assert scheduler.run("bash", "-c", task["run"], cwd=machine, given={**environment, **ids}) == 0
        folders.append(tmp_path / f"buckets/bucket/encoded/{rank}.m3")
    for folder in folders:
        subprocess.run(["cp", "-R", f"{folder}/.", tmp_path / "merged.m3"], check=True)
    assert scheduler.run("m3", "encode", "corpus.jsonl", "--out", "merged.m3") == 3
    assert scheduler.run("m3", "encode", "corpus.jsonl", "--out", "plain.m3") == 3
    assert folder_bytes(tmp_path / "merged.m3") == folder_bytes(tmp_path / "plain.m3")


@pytest.mark.live
def test_the_job_is_one_of_kubernetes() -> None:
    if find_spec("kubernetes_validate") is None:
        pytest.skip("the Job is not validated: kubernetes-validate is not installed")
    import kubernetes_validate  # noqa: PLC0415

    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(read("indexed-job.yaml"), version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**read("indexed-job.yaml"), "spec": {"completions": "x"}}, version, strict=True)
