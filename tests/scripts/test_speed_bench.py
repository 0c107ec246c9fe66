"""The pure parts of the benches: operations and padding counted, texts cut and mixed, tables and pictures drawn."""

from __future__ import annotations

import itertools
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import orjson
import pytest
from bench_documents import write_shard
from bench_speed import REFERENCE, draw, list_contenders, pick_best
from hypothesis import given
from hypothesis import strategies as st
from speed_bench.counting import Shape, count_flops, group_padded, idle_share, padding_share
from speed_bench.plot import LogPlot, find_ticks, scale, spread
from speed_bench.records import Found
from speed_bench.running import find_missing
from speed_bench.table import draw_table, show_bytes, show_share
from speed_bench.texts import cut_texts, mix_rows, read_texts, split_sentences
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.conftest import ROOT


def test_flops_are_those_of_the_matmuls() -> None:
    shape = Shape(layers=3, width=8, inner=32)
    length = 5
    matmuls = [
        *[(length, 8, 8)] * 4,  # query, key, value, output
        (length, 8, 32),
        (length, 32, 8),
        (length, 8, length),  # scores over all heads
        (length, length, 8),  # sums of values
    ]
    one = 3 * sum(2 * rows * inner * columns for rows, inner, columns in matmuls)
    assert count_flops(shape, [length]) == one
    assert count_flops(shape, [length, length]) == 2 * one
    assert count_flops(shape, [2 * length]) > 2 * one


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_padded_groups_hold_each_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = group_padded(lengths, budget=budget)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[place] for place in group)
        assert lengths[group[0]] == longest
        assert len(group) == 1 or len(group) * longest <= budget


@pytest.mark.parametrize(("run", "real", "share"), [(100, 100, 0.0), (200, 100, 0.5), (0, 0, 0.0)])
def test_padding_share(run: int, real: int, share: float) -> None:
    assert padding_share(run=run, real=real) == share


def test_idle_share_is_all_but_encoding() -> None:
    assert idle_share({"tokenising": 1.0, "encoding": 3.0}) == 0.25


def _make_backend() -> Tokenizer:
    words = [f"w{number}" for number in range(50)]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(["?", *words])}, unk_token="?"))
    backend.pre_tokenizer = Whitespace()
    return backend


@given(st.integers(3, 40), st.integers(1, 9))
def test_pieces_have_the_length_asked_for(length: int, count: int) -> None:
    backend = _make_backend()
    pieces = cut_texts(["w1 w2 w3", "w4 w5 w6 w7 w8", "w9"], backend, length=length, count=count)
    assert [len(backend.encode(piece).ids) for piece in pieces] == [length - 2] * count
    assert " ".join(pieces).startswith("w1 w2 w3 w4 w5 w6 w7 w8 w9 w1"[: len(" ".join(pieces))])


def test_mixed_rows_are_the_same_each_time_and_of_the_corpus() -> None:
    sentences = split_sentences(["One is here. Two is there.", "Three"])
    assert sentences == ["One is here.", "Two is there.", "Three."]
    rows = [orjson.loads(line) for line in mix_rows(sentences, count=50)]
    assert rows == [orjson.loads(line) for line in mix_rows(sentences, count=50)]
    assert [row["id"] for row in rows] == [str(number) for number in range(50)]
    left = [row["text"] for row in rows]
    for sentence in sentences:
        left = [text.replace(sentence, "").strip() for text in left]
    assert set(left) == {""}


def test_texts_are_spread_over_the_corpus_and_no_phrases(tmp_path: Path) -> None:
    texts = [f"{number} " + "a" * 50 for number in range(10)]
    rows = [{"text": "short"}, *({"title": "T", "text": text} for text in texts)]
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    assert read_texts(path) == [f"T\n{text}" for text in texts]
    assert read_texts(path, 5) == [f"T\n{text}" for text in texts[::2]]


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(150, 6000, [200, 500, 1000, 2000, 5000]), (1, 2, [1, 2]), (0.3, 0.9, [0.5])]
)
def test_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert find_ticks(low, high) == pytest.approx(ticks)


def test_scale_is_logarithmic() -> None:
    assert [scale(value, 1, 100, start=200, stop=0) for value in (1, 10, 100)] == pytest.approx([200, 100, 0])


@given(st.lists(st.floats(0, 500), max_size=8))
def test_names_stand_apart_in_their_order(places: list[float]) -> None:
    moved = spread(places, gap=15)
    order = sorted(range(len(places)), key=lambda number: places[number])
    for before, after in itertools.pairwise(order):
        assert moved[after] - moved[before] >= 15 - 1e-9
    assert all(new >= old for old, new in zip(places, moved, strict=True))


def test_a_plot_has_a_line_and_its_points_in_their_places() -> None:
    plot = LogPlot({"a < b": [(16, 100.0), (64, 1000.0)], "c": [(16, 50.0), (64, 70.0)]}, x_title="x", y_title="y")
    root = ET.fromstring(plot.draw())
    circles = [
        (float(each.attrib["cx"]), float(each.attrib["cy"])) for each in root.iter() if each.tag.endswith("circle")
    ]
    assert len(circles) == 4
    assert circles[0][0] == plot.left
    assert circles[1][0] == plot.width - plot.right
    assert circles[1][1] < circles[0][1] < circles[2][1]
    texts = [each.text for each in root.iter() if each.tag.endswith("text")]
    assert {"a < b", "c", "16", "64", "x", "y", "1,000"} <= set(texts)


def test_tables() -> None:
    assert draw_table(("", "b"), [("long", "1"), ("x", "22")], markdown=False) == "       b\nlong   1\nx     22"
    assert draw_table(("", "b"), [("x", "1")], markdown=True) == "|  | b |\n| --- | ---: |\n| x | 1 |"


def test_numbers_as_they_are_shown() -> None:
    assert [show_bytes(count) for count in (5e6, 1.25e9)] == ["5 MB", "1.25 GB"]
    assert [show_share(share) for share in (None, 0.0, 0.021, 0.876)] == ["-", "0%", "2.1%", "88%"]


def _find(seconds: float) -> list[Found]:
    return [Found(seconds=seconds, positions=1, stages={}, peak_bytes=1)]


def test_the_best_setting_counts_and_a_missing_one_says_why() -> None:
    reference = next(each for each in list_contenders("cpu") if each.label.startswith(REFERENCE))
    seconds = dict(zip(reference.settings, (4.0, 2.0, 3.0, 5.0), strict=True))
    best = pick_best(reference, {name: _find(spent) for name, spent in seconds.items()})
    assert isinstance(best, tuple)
    assert best[0] == reference.settings[1]
    failed = dict.fromkeys(reference.settings, "failed: no memory")
    assert pick_best(reference, failed) == "failed: no memory"
    assert pick_best(reference, {**failed, reference.settings[3]: _find(1.0)}) == (reference.settings[3], _find(1.0)[0])


def test_the_table_compares_with_flagembedding() -> None:
    row = {"outputs": "all", "share_of_matmul": 0.9, "padding_share": 0.0, "peak_bytes": 1e9}
    rows: dict[str, dict[str, Any] | str] = {
        "m3 int8": {**row, "setting": "m3 int8", "tokens_per_second": 800.0},
        REFERENCE: {**row, "setting": "FlagEmbedding 16", "tokens_per_second": 100.0},
        "OpenVINO float32": "skipped: openvino not installed",
    }
    lines = draw(rows, markdown=True).splitlines()[2:]
    assert lines[0] == "| m3 int8 | all | 800 | 8.00 | 90% | 0% | 1.00 GB |"
    assert lines[1].startswith(f"| {REFERENCE}, 16 | all | 100 | 1.00 |")
    assert lines[2].startswith("| OpenVINO float32 | skipped: openvino not installed |")


def test_a_gpu_has_contenders_of_its_own() -> None:
    labels = {each.label for each in list_contenders("cuda")}
    assert {"m3 float16", "m3 float16, two", "FlagEmbedding float16"} <= labels
    assert not any(word in label for label in labels for word in ("int8", "OpenVINO"))


def test_a_peer_that_is_absent_is_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speed_bench.running.find_spec", lambda package: None if package == "openvino" else package)
    assert find_missing("OpenVINO float32 2048") == ["openvino"]
    assert find_missing("m3 int8") == []


def test_a_long_document_has_its_size_and_one_without_blanks_stands_beside_it(tmp_path: Path) -> None:
    texts = ["A first text of some words. And a second sentence.", "山路を登りながら、こう考えた。" * 4]
    lines = write_shard(tmp_path / "a.jsonl", texts, size=10_001, rows=10).read_bytes().splitlines()
    rows = [orjson.loads(line) for line in lines]
    assert [row["id"] for row in rows] == [*"01234", "long", "joined", *"56789"]
    assert 10_001 - 3 <= len(rows[5]["text"].encode()) <= 10_001
    assert 5_000 - 3 <= len(rows[6]["text"].encode()) <= 5_000
    assert rows[6]["text"].split() == [rows[6]["text"]]
    assert len(write_shard(tmp_path / "b.jsonl", texts, size=0, rows=10).read_bytes().splitlines()) == 10


def test_bench_names_what_there_is() -> None:
    done = subprocess.run([ROOT / "scripts" / "bench", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no 'nothing'" in done.stderr
    assert {"speed", "lengths", "growth", "host", "score"} <= set(done.stderr.split())
