"""The CUDA path on fake tensors, without a GPU: devices, dtypes, shapes, and what flash attention asks for.

Not seen here are numbers, pinned memory, streams, and what kernels check themselves: tests/gpu/test_cuda.py sees them.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m3cli.encoder import attention, heads
from m3cli.encoder import encode as encoding
from m3cli.encoder import model as models
from m3cli.encoder import reranker as rerankers
from m3cli.encoder.checkpoint import Checkpoint, read_checkpoint
from m3cli.encoder.device import ALIGNMENT
from m3cli.encoder.encode import BatchEncoder
from m3cli.encoder.heads import OutputOptions
from m3cli.encoder.model import Model, load_model
from m3cli.encoder.reranker import Reranker, score_batches
from m3cli.records import Batch, Output
from m3cli.retrieval import scan as scans
from m3cli.retrieval.scan import open_scan
from tests.encoder.test_model import SPECIALS
from tests.retrieval.test_scan import VOCABULARY, make_embeddings

ALL: tuple[Output, ...] = ("dense", "sparse", "colbert")
LENGTHS = [300, 200, 200, 30, 5]
GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""


@pytest.fixture(scope="module", autouse=True)
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Register a guard for CUDA devices that does nothing: a CPU build of torch has none, and indexing asks for it."""
    if torch.version.cuda is not None:
        pytest.skip("torch is a CUDA build: on a GPU tests/gpu/test_cuda.py sees more")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++, which compiles a device guard for torch")
    folder, root = tmp_path_factory.mktemp("guard"), Path(torch.__file__).parent
    (folder / "guard.cpp").write_text(GUARD)
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib", "-lc10"]
    subprocess.run(["g++", "guard.cpp", "-o", "guard.so", *flags], cwd=folder, check=True)
    ctypes.CDLL(str(folder / "guard.so"))


@pytest.fixture(scope="module")
def tensors(tiny_m3: Path) -> tuple[Checkpoint, dict[str, torch.Tensor], dict[Path, dict[str, torch.Tensor]]]:
    checkpoint = read_checkpoint(tiny_m3)
    return (
        checkpoint,
        models._read_weights(checkpoint),
        {path: models.read_pickled(path) for path in tiny_m3.glob("*_linear.pt")},
    )


@pytest.fixture
def checkpoint(tensors: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkpoint]:
    """A checkpoint with fake weights, and fake tensors until the test ends."""
    checkpoint, weights, pickled = tensors
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def lift(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}

    for module in (models, heads):
        monkeypatch.setattr(module, "send", send)
    monkeypatch.setattr(models, "_read_weights", lambda _: lift(weights))
    monkeypatch.setattr(models, "read_pickled", lambda path: lift(pickled[path]))
    monkeypatch.setattr(encoding, "fetch", lambda tensors, _: tensors)
    monkeypatch.setattr(encoding, "open_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(attention, "flash_attention", flash_attention)
    with mode:
        yield checkpoint


def send(device: torch.device, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    """As the real one, without the copy."""
    begins = np.cumsum([0, *(-(-len(array) // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
    packed = torch.empty(begins[-1], dtype=torch.int32, device=device)
    return tuple(packed[begin : begin + len(array)] for begin, array in zip(begins[:-1], arrays, strict=True))


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *rest: Any,
) -> Any:
    """Check what the kernel checks (mha_varlen_fwd in torch's flash_api.cpp), and return its output's layout."""
    assert rest == (0.0, False, False), "no dropout, no causal mask, no mask for debugging"
    for each in (q, k, v):
        assert each.dtype in (torch.float16, torch.bfloat16)
        assert each.dtype == q.dtype
        assert each.device == q.device
        assert each.shape == q.shape
        assert each.dim() == 3
        assert each.stride(-1) == 1
        assert each.shape[-1] % 8 == 0
        assert each.shape[-1] <= 256
    for each in (cu_seq_q, cu_seq_k):
        assert each.dtype == torch.int32, "borders are int32"
        assert each.device == q.device
        assert each.is_contiguous()
        assert 1 < len(each) <= 65_536
    assert type(max_q) is int
    assert type(max_k) is int
    assert max_q > 0
    return torch.ops.aten._flash_attention_forward.default(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *rest)


class Strict(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fail where a tensor is on the host or on another device, which a copy or a wait would need."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.append(str(func))
        devices = {each.device for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)}
        assert devices <= {self._device}, f"{func} on {devices}"
        return out


def pack(lengths: list[int]) -> Batch:
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return Batch(
        rows=np.arange(len(lengths)),
        input_ids=np.arange(4, 4 + cu_seqlens[-1], dtype=np.int64),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
    )


def launch(model: Model, *, every: int = 0, quantise: Any = None) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the outputs of one batch on the device, and the operators that ran."""
    options = OutputOptions(outputs=ALL, special_ids=SPECIALS, quantise=quantise, vector_weights=True)
    encoder = BatchEncoder(model, options, mcls=every)
    device = model.word_embeddings.device
    with Strict(device) as strict:
        launched = encoder._launch(model, pack(LENGTHS))
    assert launched is not None
    outputs: Any = launched.outputs
    assert {tensor.device for tensor in outputs.values()} == {device}
    return outputs, strict.operators


@pytest.mark.parametrize("every", [0, 64])
@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_batch_is_launched_without_a_copy_or_a_wait(
    checkpoint: Checkpoint, dtype: Any, pooling: Any, every: int
) -> None:
    model = load_model(replace(checkpoint, pooling=pooling), device="cuda:1", dtype=dtype)
    outputs, operators = launch(model, every=every)
    tokens, rows = sum(LENGTHS), len(LENGTHS)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in outputs.items()} == {
        "finite": ((tokens,), torch.bool),
        "dense_vecs": ((rows, 64), torch.float16),
        "lexical_keys": ((tokens,), torch.int64),
        "lexical_values": ((tokens,), torch.float32),
        "vector_weights": ((tokens - rows,), torch.float32),
        "colbert_vecs": ((tokens - rows, 64), torch.float16),
    }
    # Attention by blocks has matmuls of its own; variable-length attention is one call.
    assert ("aten.baddbmm.default" in operators) == (dtype == "float32")
    # In 16 bits gelu and the addition are part of the matmul.
    assert ("aten.gelu.default" in operators) == (dtype == "float32")
    assert operators.count("aten.addmm_.default") == (0 if dtype == "float32" else 2 * checkpoint.num_layers)


@pytest.mark.parametrize(("kind", "dtype", "width"), [("int8", torch.int8, 64), ("binary", torch.uint8, 8)])
def test_vectors_are_quantised_without_a_copy_or_a_wait(
    checkpoint: Checkpoint, kind: Any, dtype: torch.dtype, width: int
) -> None:
    outputs, _ = launch(load_model(checkpoint, device="cuda:1", dtype="float16"), quantise=kind)
    count = sum(LENGTHS) - len(LENGTHS)
    assert (outputs["colbert_vecs"].shape, outputs["colbert_vecs"].dtype) == ((count, width), dtype)
    assert (outputs["colbert_errors"].shape, outputs["colbert_errors"].dtype) == ((count,), torch.uint8)
    assert ("colbert_scales" in outputs) == (kind == "int8")


def test_the_default_gpu_is_the_first(checkpoint: Checkpoint) -> None:
    launch(model := load_model(checkpoint, device="cuda", dtype="float16"))
    assert model.word_embeddings.device == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("owner", "name", "answer"),
    [(torch.cuda, "get_device_capability", (7, 5)), (torch.backends.cuda, "is_flash_attention_available", False)],
)
def test_without_flash_attention_there_are_blocks(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, answer: Any
) -> None:
    monkeypatch.setattr(owner, name, lambda *_: answer)
    _, operators = launch(load_model(checkpoint, device="cuda", dtype="float16"))
    assert "aten.baddbmm.default" in operators


def wrap(owner: Any, name: str, change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what plants a fault: the result of a function is changed."""
    real = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda *args, **kwargs: change(real(*args, **kwargs)))


def send_nothing(device: torch.device, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.from_numpy, arrays))


def attend_by_columns(qkv: torch.Tensor, layout: attention.SequenceLayout) -> torch.Tensor:
    return attention._attend_varlen(qkv.transpose(0, 3), layout)


FAULTS = {
    "a wait for a number": (
        "_local_scalar_dense",
        wrap(heads, "weigh_positions", lambda weights: weights * float(weights.max())),
    ),
    "a wait for a count": ("nonzero", wrap(heads, "weigh_positions", lambda weights: weights[weights > 0])),
    "a copy to the host": ("'cpu'", wrap(heads, "pool_rows", lambda pooled: pooled.cpu())),
    "a copy from the host": (
        "'cpu'",
        wrap(heads, "pool_rows", lambda pooled: pooled * torch.ones(64).to(pooled.device)),
    ),
    "a tensor on the host": ("'cpu'", wrap(heads, "project_tokens", lambda vectors: vectors + torch.zeros(64))),
    "a number on the host": ("'cpu'", wrap(heads, "project_tokens", lambda vectors: vectors * torch.tensor(2.0))),
    "another GPU": (
        "index=0",
        wrap(heads, "project_tokens", lambda vectors: vectors + torch.zeros(64, device="cuda:0")),
    ),
    "ids that stay on the host": ("'cpu'", lambda patch: patch.setattr(heads, "send", send_nothing)),
    "borders of 64 bits": (
        "borders are int32",
        wrap(models, "lay_out", lambda layout: replace(layout, cu_seqlens=layout.cu_seqlens.long())),
    ),
    "queries in columns": ("stride", lambda patch: patch.setattr(models, "attend", attend_by_columns)),
}
"""what is raised, and what plants the fault"""


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(checkpoint: Checkpoint, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(checkpoint, device="cuda:1", dtype="float16")
    launch(model)
    raised, plant = FAULTS[fault]
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError), match=raised):
        launch(model)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("output", ["dense", "colbert"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_search_scores_on_the_gpu(
    checkpoint: Checkpoint, dtype: Any, output: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, passages = make_embeddings(1, 20, dtype), make_embeddings(2, 2000, dtype)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(scans, "_select", lambda scores, above, first_row: seen.append(scores))
    scan = open_scan(output, queries, vocabulary=VOCABULARY, device=device)
    for block in scan.cut(passages, 0):
        scan.score(passages, block, np.zeros(20, np.float32))
    assert sum(scores.shape[1] for scores in seen) == 2000
    assert passages.colbert_vecs is not None
    assert len(passages.colbert_vecs.vectors) > 2 * scans.ROW_VECTORS["cpu"]
    if output == "colbert":
        assert len(seen) == 1, "a few launches and a wait cost as much as 2,048 vectors"
    assert {(scores.shape[0], str(scores.device), scores.dtype) for scores in seen} == {(20, device, torch.float32)}


def test_the_next_pairs_are_launched_before_logits_are_collected(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    device = torch.device("cuda:1")

    class Fetched:
        def __init__(self, tensors: dict[str, torch.Tensor], stream: object) -> None:
            assert {(tensor.device, tensor.dtype) for tensor in tensors.values()} == {(device, torch.float32)}
            self._shape = tensors["logits"].shape
            events.append("launch")

        def wait(self) -> dict[str, np.ndarray]:
            events.append("collect")
            return {"logits": np.zeros(self._shape, np.float32)}

    def run_model(model: Model, batch: Batch) -> Any:
        with Strict(device):
            return models.run_model(model, batch)

    monkeypatch.setattr(rerankers, "fetch", Fetched)
    monkeypatch.setattr(rerankers, "open_stream", lambda _: None)
    monkeypatch.setattr(rerankers, "run_model", run_model)
    model = load_model(checkpoint, device="cuda:1", dtype="float16")
    head = [torch.zeros(shape, device=device) for shape in ((64, 64), (64,), (1, 64), (1,))]
    reranker = Reranker(model=model, dense=(head[0], head[1]), out_proj=(head[2], head[3]))
    batches = [pack([30, 20]), pack([10, 9, 8]), pack([5]), pack([4]), pack([3])]
    made = list(score_batches(reranker, iter(batches)))
    assert [logits.values.shape for logits in made] == [(2,), (3,), (1,), (1,), (1,)]
    assert events == ["launch", "launch", "launch", "launch", "collect", "launch", *["collect"] * 4]
