"""The files of a checkpoint folder, worded as ``BAAI/bge-m3`` words them; the tokenizer's have their own module.

The encoder's weights have bare names (``embeddings...``, ``encoder.layer.N...``) and the dtype asked for (BGE-M3's
own are float32). The heads are float16 whatever the encoder's dtype, as BGE-M3's are.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from demo_model.folder import WEIGHT_FILES, Weights, write_json

Pooling = Literal["cls", "mean"]
State = Mapping[str, torch.Tensor]

RESERVED_POSITIONS = 2  # XLM-R numbers positions from pad_token_id + 1


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
    """Write the four files by which sentence-transformers knows pooling, length and prompts."""
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
