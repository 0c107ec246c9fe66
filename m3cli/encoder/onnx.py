"""A checkpoint as an ONNX model with the three outputs of BGE-M3, for padded batches in float32."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

from m3cli.encoder.checkpoint import HEAD_FILES, POSITION_OFFSET, Checkpoint
from m3cli.encoder.model import read_pickled
from m3cli.records import Output

OUTPUT_NAMES: dict[Output, str] = {"dense": "dense_vecs", "sparse": "sparse_vecs", "colbert": "colbert_vecs"}
MODEL_NAME = "model.onnx"
TOKENIZER_NAME = "tokenizer.json"


class _PaddedModel(torch.nn.Module):
    """XLM-RoBERTa with the checkpoint's heads; B texts of L tokens, the shorter ones with padding at their end."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from transformers import XLMRobertaModel  # noqa: PLC0415

        super().__init__()
        self.pooling = checkpoint.pooling
        self.encoder = XLMRobertaModel.from_pretrained(
            checkpoint.folder,
            add_pooling_layer=False,
            attn_implementation="eager",
            dtype=torch.float32,
            local_files_only=True,
        )
        self.heads = torch.nn.ModuleDict()
        for output in ("sparse", "colbert"):
            if output in checkpoint.outputs:
                head = read_pickled(checkpoint.folder / HEAD_FILES[output])
                self.heads[output] = torch.nn.Linear(head["weight"].shape[1], head["weight"].shape[0])
                self.heads[output].load_state_dict({name: head[name].float() for name in ("weight", "bias")})

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return dense_vecs [B, C], sparse_vecs [B, L, 1] and colbert_vecs [B, L - 1, C], 0 at padding."""
        # By the mask, not by the ids: the text may have the token <pad> in it.
        position_ids = torch.cumsum(attention_mask, 1) * attention_mask + (POSITION_OFFSET - 1)
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        ).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        if self.pooling == "mean":
            pooled = (states * mask).sum(1) / mask.sum(1)
        elif self.pooling == "lasttoken":
            last = (attention_mask.sum(1) - 1)[:, None, None].expand(-1, 1, states.shape[-1])
            pooled = states.gather(1, last).squeeze(1)
        else:
            pooled = states[:, 0]
        outputs = [F.normalize(pooled, dim=-1)]
        if "sparse" in self.heads:
            outputs.append(torch.relu(self.heads["sparse"](states)) * mask)
        if "colbert" in self.heads:
            outputs.append(F.normalize(self.heads["colbert"](states[:, 1:]), dim=-1) * mask[:, 1:])
        return tuple(outputs)


def export_onnx(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `model.onnx`, and its weights in `model.onnx.data`, into a folder."""
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model = _PaddedModel(checkpoint)
    model.train(mode=False)
    input_ids = torch.full((3, 17), 5)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        torch.onnx.export(
            model,
            (input_ids, torch.ones_like(input_ids)),
            str(folder / MODEL_NAME),
            input_names=["input_ids", "attention_mask"],
            output_names=[OUTPUT_NAMES[output] for output in checkpoint.outputs],
            dynamic_shapes=(axes, axes),
            dynamo=True,
            external_data=True,
            verbose=False,
        )


class OnnxSession:
    """An exported folder in onnxruntime, on the CPU."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        import onnxruntime  # noqa: PLC0415  an extra

        self._session = onnxruntime.InferenceSession(folder / MODEL_NAME, providers=["CPUExecutionProvider"])
        self._names = [OUTPUT_NAMES[output] for output in checkpoint.outputs]
        self._tokenizer = Backend.from_file(str(folder / TOKENIZER_NAME))
        self._tokenizer.enable_padding(pad_id=checkpoint.pad_token_id)

    def run(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """Return the token ids [B, L] of texts with padding, and the outputs by name."""
        encoded = self._tokenizer.encode_batch(list(texts))
        input_ids = np.array([each.ids for each in encoded], np.int64)
        mask = np.array([each.attention_mask for each in encoded], np.int64)
        made = self._session.run(self._names, {"input_ids": input_ids, "attention_mask": mask})
        return input_ids, dict(zip(self._names, made, strict=True))
