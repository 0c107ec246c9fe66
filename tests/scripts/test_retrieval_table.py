"""`scripts/retrieval_table`: means, the table, the baseline, and the whole of it on a set small enough for a test."""

import json
from pathlib import Path

import numpy as np
import pytest
from retrieval_set.beir import Entry, write_set
from retrieval_set.table import OVERLAP, Measures, average, judge_claims, main, spell_table, write_overlap

from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.tokenizer import load_tokenizer

TOPICS = {
    "bike": (
        "How to repair a flat bicycle tyre",
        "Take the wheel off the bike, pull the tube out, find the hole and glue a patch on it.",
    ),
    "bread": (
        "Baking bread at home",
        "Mix flour, water, salt and yeast, let the dough rise for two hours, and put it into a hot oven.",
    ),
    "cat": ("Feeding a young cat", "A kitten eats small meals four times a day; never give it cow's milk."),
    "train": ("Train tickets to the capital", "A return ticket costs less when it is bought a week before the trip."),
}


def test_the_mean_counts_every_language_the_same() -> None:
    parts = [{"dense": {"nDCG@10": 0.5}}, {"dense": {"nDCG@10": 1.0}}]
    assert average(parts) == {"dense": {"nDCG@10": 0.75}}


def test_the_table_has_the_best_of_a_row_in_bold() -> None:
    table: dict[str, Measures] = {
        "de": {"dense": {"MAP": 0.5}, "all": {"MAP": 0.6}},
        "mean": {"dense": {"MAP": 1.0}, "all": {"MAP": 1.0}},
    }
    assert spell_table(table, "MAP").splitlines() == [
        "| MAP | dense | all |",
        "|---|---:|---:|",
        "| de | 0.500 | **0.600** |",
        "| mean | **1.000** | **1.000** |",
    ]


def test_what_is_claimed_is_held_against_the_numbers() -> None:
    values = {"dense": 0.8, "sparse": 0.6, "ColBERT": 0.81, "all": 0.82, OVERLAP: 0.5}
    mean = {mode: {"nDCG@10": value} for mode, value in values.items()}
    assert [holds for _, holds in judge_claims(mean)] == [True] * 4
    mean["ColBERT"] = mean["all"]
    claims = judge_claims({**mean, OVERLAP: {"nDCG@10": 0.7}})
    assert [holds for _, holds in claims] == [False, True, True, False]
    assert claims[0][0] == "sparse is above term overlap in mean nDCG@10: 0.6000, 0.7000"


def make_entries() -> list[Entry]:
    return [Entry(topic=topic, lang="en", text=text, query=query) for topic, (query, text) in TOPICS.items()]


def test_overlap_counts_distinct_shared_tokens(tiny_m3: Path, tmp_path: Path) -> None:
    entries = [
        Entry(topic="a", lang="en", text="red red red", query="red blue green"),
        Entry(topic="b", lang="en", text="green and blue", query=None),
        Entry(topic="c", lang="en", text="white", query=None),
    ]
    write_set(tmp_path, queries=entries, documents=entries)
    write_overlap(tmp_path, tmp_path / "run.trec", tokenizer=load_tokenizer(read_checkpoint(tiny_m3)))
    lines = [line.split() for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert [(line[2], line[3], line[4]) for line in lines] == [("en:b", "1", "2"), ("en:a", "2", "1")]


@pytest.mark.slow
def test_the_demo_model_answers_a_small_set(demo_m3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = make_entries()
    for name in ("en", "cross"):
        write_set(tmp_path / "set" / name, queries=entries, documents=entries)
    assert main([str(tmp_path / "set"), "--model", str(demo_m3), "--out", str(tmp_path)]) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table) == ["en", "mean", "cross (en)"]
    assert all(np.isclose(table["en"][mode]["nDCG@10"], 1) for mode in ("dense", "ColBERT", "all"))
    assert table["en"]["sparse"]["nDCG@10"] >= table["en"][OVERLAP]["nDCG@10"]
    shown = capsys.readouterr().out
    assert shown.startswith("| nDCG@10 | dense | sparse | ColBERT |")
    # All find everything here, so that none is above another.
    assert "DOES NOT HOLD: all is above dense in mean nDCG@10: 1.0000, 1.0000" in shown
    assert main([str(tmp_path / "set"), "--model", str(demo_m3), "--out", str(tmp_path), "--must-hold"]) == 1
