"""Random weights of any size for the encoder and its heads, spread so that a parity test has something to see.

Embeddings and biases are normal with BERT's 0.02, layer norms vary by that about one: none is zero or one, so a
weight left out or put in the wrong place shows. The matrices are normal with ``fan_in ** -0.5``, not with BERT's 0.02:
with that a narrow model hardly looks around, and the state of ``<s>``, which is the dense vector, is nearly the same
for every text.

The sparse head is scaled and shifted by a forward pass over random tokens: about half of all tokens get a weight
above zero.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from demo_model.encoder import hidden_states, load_model
from demo_model.layout import EncoderShape, Heads

STANDARD_DEVIATION = 0.02
# Of all lengths, as a deep random model's states say more of the text than of the token.
SAMPLE_LENGTHS = (3, 4, 6, 8, 12, 16, 24, 32, 64) * 4


def random_state(shape: EncoderShape, *, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a random state dict of the encoder, the same numbers for the same shape and seed."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, size in _parameter_shapes(shape):
        is_matrix = name.startswith(("encoder", "pooler")) and len(size) == 2
        values = torch.empty(size).normal_(generator=generator)
        values *= size[1] ** -0.5 if is_matrix else STANDARD_DEVIATION
        if name.endswith("LayerNorm.weight"):
            values += 1
        state[name] = values.to(dtype)
    return state


def random_heads(folder: Path, shape: EncoderShape, *, seed: int) -> Heads:
    """Return random heads for the encoder that lies in ``folder``."""
    generator = torch.Generator().manual_seed(seed + 1)
    direction = torch.empty(1, shape.hidden).normal_(generator=generator)
    rows = [
        [0, *torch.randint(4, shape.vocabulary - 1, (length - 2,), generator=generator).tolist(), 2]
        for length in SAMPLE_LENGTHS
        if length <= shape.max_length
    ]
    states = torch.cat(hidden_states(load_model(folder), rows))
    responses = (states @ direction.T).flatten()
    # Rounded, so that the last bits of the forward pass, which depend on the machine, do not reach the file.
    scale = float(f"{0.25 / responses.std().item():.2g}")
    weight = (direction * scale).half().float()
    bias = -(states @ weight.T).median()
    return Heads(
        colbert_weight=torch.empty(shape.hidden, shape.hidden).normal_(generator=generator) * shape.hidden**-0.5,
        colbert_bias=torch.empty(shape.hidden).normal_(generator=generator) * STANDARD_DEVIATION,
        sparse_weight=weight,
        sparse_bias=torch.tensor([round(bias.item(), 2)]),
    )


def _parameter_shapes(shape: EncoderShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate = shape.hidden, shape.intermediate
    yield "embeddings.word_embeddings.weight", (shape.vocabulary, hidden)
    yield "embeddings.position_embeddings.weight", (shape.positions, hidden)
    yield "embeddings.token_type_embeddings.weight", (1, hidden)
    yield from _named("embeddings.LayerNorm", hidden)
    for layer in range(shape.layers):
        prefix = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            yield from _named(f"{prefix}.attention.self.{part}", hidden, hidden)
        yield from _named(f"{prefix}.attention.output.dense", hidden, hidden)
        yield from _named(f"{prefix}.attention.output.LayerNorm", hidden)
        yield from _named(f"{prefix}.intermediate.dense", intermediate, hidden)
        yield from _named(f"{prefix}.output.dense", hidden, intermediate)
        yield from _named(f"{prefix}.output.LayerNorm", hidden)
    yield from _named("pooler.dense", hidden, hidden)


def _named(prefix: str, *size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.weight", size
    yield f"{prefix}.bias", size[:1]
