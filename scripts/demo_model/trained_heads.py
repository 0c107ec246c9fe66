"""The demo model's heads, 769 numbers in ``heads.json``, as scripts/train_demo_heads.py has trained them.

They are kept, not trained at each build: the build stays short, and the model is the same on every machine.
"""

import json

import torch

from demo_model.folder import HEADS_FILE
from demo_model.layout import Heads


def read_trained_heads() -> Heads:
    """Return the heads: ColBERT's is the identity and a bias that takes the mean state off."""
    trained = json.loads(HEADS_FILE.read_text(encoding="utf-8"))
    colbert_bias = torch.tensor(trained["colbert_bias"])
    return Heads(
        colbert_weight=torch.eye(len(colbert_bias)),
        colbert_bias=colbert_bias,
        sparse_weight=torch.tensor([trained["sparse_weight"]]),
        sparse_bias=torch.tensor([trained["sparse_bias"]]),
    )
