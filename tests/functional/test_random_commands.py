"""Random commands with random options on random folders: each ends with a documented exit code and says why.

The options are those that the requests declare, so that a new one is tried as soon as it exists.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3cli.cli.app import run
from m3cli.config import EncodeRequest, Option, list_options
from m3cli.requests import CheckRequest, ExportRequest, ScoreRequest, SearchRequest

EXAMPLES = settings().max_examples // 2
"folders; pytest --hypothesis-profile=search tries 1,000"
EXIT_CODES = {0, 2, 3, 4, 5, 6, 10, 12, 75}
NOT_TRIED = {"model", "revision", "device", "dtype", "out", "progress", "engine", "ray_workers", "address"}
"of other tests, or slow to try, besides arguments"
WORDS = {
    "keep_fields": ["s", "n", "s,n", "text", "gone"],
    "fields": ["s", "text", "gone"],
    "title_field": ["", "s"],
    "id_field": ["", "s", "n"],
    "queries": ["c.m3", "q.jsonl", "a fox"],
    "corpus": ["c.m3"],
    "corpus_inputs": ["c.jsonl", "c.parquet"],
    "weights": ["1,0,0", "0.5,0.2,0.3", "0,0,0", "1,2"],
    "shard_size": ["40", "1M"],
    "max_row_bytes": ["40", "1K"],
    "max_skipped": ["0", "5", "100%"],
    "share": ["0/2", "1/2"],
    "max_runtime": ["9m", "0s"],
    "since_run": ["c.m3"],
    "to": ["parquet", "npy", "milvus", "pgvector", "elasticsearch", "opensearch", "vespa"],
}
"what else than letters an option of words takes"
IDS = st.sampled_from(["a", "b", "ü", "x" * 300])
TEXTS = st.sampled_from(["a red fox", "two dogs", "東京 🦊", "long words " * 40, "\x00", ""])
ROWS = st.lists(
    st.fixed_dictionaries({"id": IDS, "text": TEXTS, "s": st.sampled_from(["k", "", None]), "n": st.integers(0, 9)}),
    min_size=1,
    max_size=12,
)


def _draw_value(draw: Callable[[Any], Any], name: str, kind: Any, option: Option) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(each for each in get_args(kind) if each is not types.NoneType)
    if get_origin(kind) is Literal:
        return str(draw(st.sampled_from(get_args(kind))))
    if get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal:
        return ",".join(draw(st.lists(st.sampled_from(get_args(get_args(kind)[0])), min_size=1, max_size=3)))
    if kind is int and option.read is None:
        return str(draw(st.sampled_from([option.least or 0, (option.least or 0) - 1, 7, 16, 100, 9000])))
    return str(draw(st.sampled_from(WORDS.get(name, ["x"]))))


def _draw_options(draw: Callable[[Any], Any], request: type, *needed: str, most: int = 2) -> list[str]:
    kinds, made = get_type_hints(request), []
    declared = {name: each for name, each in list_options(request).items() if not each.argument}
    chosen = draw(st.lists(st.sampled_from(sorted(declared.keys() - NOT_TRIED)), max_size=most, unique=True))
    for name in dict.fromkeys((*needed, *chosen)):
        flag = (declared[name].names or (f"--{name.replace('_', '-')}",))[0]
        switches = kinds[name] in (bool, bool | None)
        made += [flag] if switches else [flag, _draw_value(draw, name, kinds[name], declared[name])]
    return made


def _write_corpus(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        columns = {name: [row[name] for row in rows] for name in ("id", "text", "s", "n")}
        types_of = {"id": pa.string(), "text": pa.string(), "s": pa.string(), "n": pa.int64()}
        pq.write_table(pa.table(columns, pa.schema(types_of.items())), path, row_group_size=3)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.usefixtures("_loaded_once")
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_command_ends_as_documented(
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_m3: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def call(*words: str) -> int:
        capfd.readouterr()
        code = run([*words])
        said = capfd.readouterr().err
        assert code in EXIT_CODES, (words, code, said)
        assert "Traceback" not in said, (words, said)
        assert code not in {2, 4, 5, 6, 10} or said.splitlines()[-1].startswith("m3: "), (words, code, said)
        return code

    corpus = data.draw(st.sampled_from(["c.jsonl", "c.parquet"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("random"))
        patch.setenv("M3_MODEL", str(tiny_m3))
        _write_corpus(Path(corpus), data.draw(ROWS))
        Path("q.jsonl").write_text('{"id": "1", "text": "a fox"}\n{"id": "2", "text": ""}\n')
        Path("p.tsv").write_text("query\tpassage\na\tb\nü\tgone\n")
        begun = call("encode", corpus, "--out", "c.m3", *_draw_options(data.draw, EncodeRequest, "shard_size", most=4))
        assert (begun in {0, 3}) <= (call("check", "c.m3") in {0, 3, 75})
        commands: dict[str, Callable[[], list[str]]] = {
            "encode": lambda: [corpus, "--out", "c.m3", *_draw_options(data.draw, EncodeRequest)],
            "plan": lambda: [corpus, *_draw_options(data.draw, EncodeRequest)],
            "search": lambda: ["c.m3", "red", *_draw_options(data.draw, SearchRequest)],
            "score": lambda: ["p.tsv", *_draw_options(data.draw, ScoreRequest)],
            "check": lambda: ["c.m3", *_draw_options(data.draw, CheckRequest)],
            "export": lambda: ["c.m3", "--out", "x", *_draw_options(data.draw, ExportRequest, "to")],
            "info": lambda: ["c.m3"],
        }
        for name in data.draw(st.lists(st.sampled_from(sorted(commands)), max_size=5)):
            call(name, *commands[name]())
