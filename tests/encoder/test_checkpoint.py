from __future__ import annotations

import shutil
from pathlib import Path

import orjson
import pytest

from m3cli.encoder.checkpoint import find_checkpoint, hash_checkpoint, read_checkpoint
from m3cli.errors import ModelError


@pytest.fixture
def copy(tiny_m3: Path, tmp_path: Path) -> Path:
    """A copy whose small files may be changed; the weights are linked."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_m3, folder, copy_function=lambda a, b: Path(b).hardlink_to(a))
    return folder


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def test_a_checkpoint_is_what_its_files_say(tiny_m3: Path) -> None:
    checkpoint = read_checkpoint(tiny_m3)
    assert (checkpoint.num_layers, checkpoint.hidden_size, checkpoint.num_positions) == (2, 64, 8194)
    assert checkpoint.outputs == ("dense", "sparse", "colbert")
    assert checkpoint.pooling == "cls"
    assert checkpoint.max_length == checkpoint.default_max_length == 8192


def test_without_heads_a_checkpoint_gives_dense_only(copy: Path) -> None:
    (copy / "sparse_linear.pt").unlink()
    (copy / "colbert_linear.pt").unlink()
    assert read_checkpoint(copy).outputs == ("dense",)


def test_without_a_pooling_file_pooling_is_cls(copy: Path) -> None:
    shutil.rmtree(copy / "1_Pooling")
    assert read_checkpoint(copy).pooling == "cls"


@pytest.mark.parametrize("spelled", [{"pooling_mode": "mean"}, {"pooling_mode_mean_tokens": True}])
def test_both_spellings_of_pooling_are_read(copy: Path, spelled: dict[str, object]) -> None:
    rewrite(copy / "1_Pooling" / "config.json", orjson.dumps({"word_embedding_dimension": 64, **spelled}))
    assert read_checkpoint(copy).pooling == "mean"


def test_unknown_pooling_is_named(copy: Path) -> None:
    rewrite(copy / "1_Pooling" / "config.json", orjson.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ModelError, match="max_tokens"):
        read_checkpoint(copy)


def test_another_architecture_is_named(copy: Path) -> None:
    rewrite(copy / "config.json", orjson.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="'bert'"):
        read_checkpoint(copy)


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_checkpoint(tmp_path)


def test_a_folder_without_weights_is_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        read_checkpoint(copy)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ModelError, match=r"\./nowhere"):
        find_checkpoint("./nowhere")


def test_without_hub_one_line_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"--model, or set M3_MODEL") as caught:
        find_checkpoint("BAAI/bge-m3-that-nobody-has")
    assert "\n" not in str(caught.value)


def test_identity_is_the_same_for_a_copy_and_another_for_other_heads(tiny_m3: Path, copy: Path) -> None:
    hashes = hash_checkpoint(read_checkpoint(tiny_m3))
    assert hash_checkpoint(read_checkpoint(copy)) == hashes
    rewrite(copy / "sparse_linear.pt", b"other")
    changed = hash_checkpoint(read_checkpoint(copy))
    assert [name for name in changed if changed[name] != hashes[name]] == ["sparse_linear.pt"]
