from __future__ import annotations

from dataclasses import replace

import pytest

from m3cli.errors import ForeignFolder
from m3cli.jobs.run import parse_run


def test_a_run_of_another_version_is_refused_by_name() -> None:
    with pytest.raises(ForeignFolder, match=r"written by m3cli 0\.0\.9"):
        parse_run({"m3cli_version": "0.0.9", "meaning": {}})


def test_a_member_that_this_version_does_not_know_is_refused() -> None:
    with pytest.raises(ForeignFolder, match="cannot read it"):
        parse_run(
            {"m3cli_version": "9", "meaning": {"fields": {"kept": [], "tsv_columns": [], "new": 1}, "outputs": []}}
        )


def test_folders_from_before_compression_keep_their_fingerprint() -> None:
    """What 0.1.0 wrote, by that version's own hand."""
    fields = {"text": "text", "id": "id", "title": "title", "kept": [], "tsv_columns": [], "tsv_header": False}
    meaning = {
        "fields": fields,
        "outputs": ["dense", "sparse", "colbert"],
        "max_length": 40,
        "dtype": "bfloat16",
        "shard_size": 8192,
        "format": "parquet",
        "long_docs": "chunk",
        "overlap": 0,
        "dense_dtype": "float16",
        "title_sep": "\n",
        "prefix": "",
        "keep_text": False,
        "limit": None,
        "max_row_bytes": 67108864,
        "dedupe": False,
        "since": None,
    }
    hashes = {
        "1_Pooling/config.json": "85adeac32d137787cc2397ebd3400e2f",
        "colbert_linear.pt": "3932c0c1edae5996d4116f4342a19f0f",
        "config.json": "dc90e0b43407ccd05a8337b294bd63b3",
        "model.safetensors": "3fea4ed0432d85e52ee39d07ec4d7cf9",
        "sparse_linear.pt": "eed2e11729646c5421987d1ee8a86b06",
        "special_tokens_map.json": "3a1a4bf96d086cd5f26e864eae632c5f",
        "tokenizer.json": "3d1a749ddb676463c2b3f5c0466458f2",
        "tokenizer_config.json": "637c66d7f350a66d7787ad82f2f67cbd",
    }
    tokenizer_hash = "bb1717ff38fc5aed7a4d8e938347fa8e"
    source = {"name": "t.jsonl", "path": "t.jsonl", "format": "jsonl", "compression": "none", "size": 38345}
    run = parse_run(
        {
            "meaning": meaning,
            "checkpoint": {
                "name": "r2",
                "dim": 64,
                "vocabulary": 250002,
                "hashes": hashes,
                "tokenizer_hash": tokenizer_hash,
            },
            "sources": [{**source, "mtime_ns": 0}],
            "since_path": None,
            "pace": {"max_batch_tokens": 4096, "threads": 1},
        }
    )
    assert run.fingerprint == "cfd1eeccc34b29aaf595b915fa654e63"
    assert run.meaning.colbert_form.plain
    other = replace(run, meaning=replace(run.meaning, colbert_pool=2))
    assert other.fingerprint != run.fingerprint
