"""Train the demo model's two heads and write them to scripts/demo_model/heads.json, which make_demo_model.py reads.

    scripts/quality train-heads CHECKPOINT [--out FILE] [--cache DIR]

CHECKPOINT is a demo model with any heads: its encoder is frozen. The texts are titles and bodies in some 30 languages
from two Debian packages, GNOME's help and Debian's install guide, fetched by `apt-get download` into --cache. The
retrieval set is from another package, LibreOffice's help. Takes a few minutes on a CPU.

ColBERT head: the identity minus the mean state, 384 numbers. The states of e5 all point much the same way; without
their common part their cosines separate texts better.

Sparse head, 385 numbers, trained contrastively: of all texts in its language, a title's own must score highest.

1. Direction. The lexical score of every title with every text of its language is the sum over shared tokens of the
   products of their weights, relu(w . h + b), the largest for a token that occurs more than once, as in BGE-M3. The
   loss is the cross entropy of the own text among all (InfoNCE with the language as the batch), and SPLADE's FLOPS
   penalty (Paria et al. 2020): the square of each token's mean weight over the texts, mostly paid by function words.
   Titles have hardly any punctuation, so the loss cannot learn its weight: it is penalised too.
2. Scale. Multiplying w and b by s multiplies the score by s^2 and changes no ranking by it alone. s serves the plain
   average of dense and sparse score, in languages that the direction was not trained on: the smallest whose nDCG is
   within one standard error (of the paired difference) of the best, Breiman's rule. Small, because e5's cosines are
   close together, and lexical scores of other kinds of text, which are less certain, must not drown them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree as ET

import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoTokenizer

from demo_model import checkpoint
from demo_model.folder import HEADS_FILE
from evaluation.debian import CACHE, SourceError, fetch_packages, read_members, read_version

PAIRS_PER_LANGUAGE = 100
HELD_OUT = 4  # every fourth language is for the sparse head's scale, not for its direction
HELP, GUIDE = PACKAGES = ("gnome-user-docs", "installation-guide-amd64")
ENGLISH = "en"
MIN_BYTES, MAX_BYTES = 200, 700  # of a body
MALLARD = "{http://projectmallard.org/1.0/}"
NUMBER = re.compile(r"^[A-Z0-9]+(\.\d+)*\.\s+")  # of a section: "2.1.3. "
NUM_SPECIAL = 4
STEPS, LEARNING_RATE = 80, 0.02
FLOPS, PUNCTUATION = 1.0, 10.0  # shares of the penalties in the loss
START_BIAS = 0.3  # every token alike
TEMPERATURE = 0.135  # logits are scores divided by this
SCALES = [0.05 * step for step in range(1, 41)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A title and the beginning of the text below it."""

    lang: str
    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section as its package has it, in any language."""

    lang: str
    title: str
    paragraphs: tuple[str, ...]


def choose_pairs(sections: Iterable[Section], *, per_language: int) -> list[Pair]:
    """Return up to `per_language` pairs of each language that has as many as half of that, in a mixed, fixed order."""
    found = list(sections)
    english = {text for section in found if section.lang == ENGLISH for text in (section.title, *section.paragraphs)}
    by_lang: dict[str, dict[str, Pair]] = {}
    for section in found:
        pair = _to_pair(section, frozenset() if section.lang == ENGLISH else english)
        if pair is not None:
            by_lang.setdefault(pair.lang, {}).setdefault(pair.title, pair)
    chosen: list[Pair] = []
    for _, pairs in sorted(by_lang.items()):
        if len(pairs) >= per_language / 2:
            chosen += sorted(pairs.values(), key=_mixing_key)[:per_language]
    return chosen


def read_sections(packages: dict[str, Path]) -> Iterator[Section]:
    """Yield the sections of both packages."""
    for path, xml in read_members(packages[HELP], suffix=".page"):
        lang = path.split("/help/")[1].split("/")[0]
        section = read_help_page("en" if lang == "C" else _plain(lang), xml)
        if section is not None:
            yield section
    for path, html in read_members(packages[GUIDE], suffix=".html"):
        yield from read_guide_page(_plain(path.split("/")[-2]), html)


def read_help_page(lang: str, xml: str) -> Section | None:
    """Read one page of GNOME's help; None for a stub or a page that cannot be parsed alone."""
    try:
        page = ET.fromstring(xml)
    except ET.ParseError:  # an entity that another file declares
        return None
    for parent in list(page.iter()):
        for child in list(parent):
            if child.tag in {f"{MALLARD}comment", f"{MALLARD}info"}:
                parent.remove(child)
    title = page.find(f"{MALLARD}title")
    if title is None:
        return None
    paragraphs = [_join(paragraph.itertext()) for paragraph in page.iter(f"{MALLARD}p")]
    return Section(lang=lang, title=_join(title.itertext()), paragraphs=tuple(text for text in paragraphs if text))


def read_guide_page(lang: str, html: str) -> list[Section]:
    """Read one page of the install guide, several sections."""
    reader = _GuideReader()
    reader.feed(html)
    reader.close()
    return [
        Section(lang=lang, title=NUMBER.sub("", title), paragraphs=tuple(paragraphs))
        for title, paragraphs in reader.sections
    ]


class _GuideReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sections: list[tuple[str, list[str]]] = []
        self._block: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p" or (tag in {"h2", "h3", "h4"} and ("class", "title") in attrs):
            self._block = []

    def handle_data(self, data: str) -> None:
        if self._block is not None:
            self._block.append(data)

    def handle_endtag(self, tag: str) -> None:
        if self._block is None or tag not in {"p", "h2", "h3", "h4"}:
            return
        text, self._block = _join(self._block), None
        if tag != "p":
            self.sections.append((text, []))
        elif text and self.sections:
            self.sections[-1][1].append(text)


def _to_pair(section: Section, english: frozenset[str] | set[str]) -> Pair | None:
    """Return the pair of a section, or None where there is too little text or it is not translated."""
    if not section.title or section.title in english:
        return None
    text = ""
    for paragraph in section.paragraphs:
        longer = f"{text} {paragraph}".lstrip()
        if paragraph in english or len(longer.encode()) > MAX_BYTES:
            break
        text = longer
    if len(text.encode()) < MIN_BYTES:
        return None
    return Pair(lang=section.lang, title=section.title, text=text)


def _join(pieces: Iterable[str]) -> str:
    return " ".join("".join(pieces).split())


def _plain(lang: str) -> str:
    """Return `pt` for `pt_BR`."""
    return lang.split("_", maxsplit=1)[0]


def _mixing_key(pair: Pair) -> bytes:
    return hashlib.blake2b(f"{pair.lang} {pair.title}".encode(), digest_size=8).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStates:
    """States of one text of n tokens."""

    token_ids: list[int]
    "[n], with <s> and </s>"
    states: torch.Tensor
    "[n, H] float32"
    is_word: list[bool]
    "[n], whether the token has a letter or a digit"


def compute_states(folder: Path, texts: Sequence[str]) -> list[TextStates]:
    """Run the texts through the encoder on the CPU in float32 and return their states in order."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = checkpoint.tokenize(folder, texts)
    states = checkpoint.hidden_states(checkpoint.load_model(folder), rows)
    tokens = {token_id: tokenizer.convert_ids_to_tokens(token_id) for row in rows for token_id in row}
    is_word = {token_id: any(map(str.isalnum, token)) for token_id, token in tokens.items()}
    return [
        TextStates(token_ids=row, states=own.clone(), is_word=[is_word[token_id] for token_id in row])
        for row, own in zip(rows, states, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The tokens of some texts, special ones left out, one after the other."""

    states: torch.Tensor
    "[tokens, H]"
    cells: torch.Tensor
    "[tokens], text x vocabulary + token: cell of a token's weight in the texts' matrix"
    shape: tuple[int, int]
    "texts, vocabulary"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The titles and texts of one language; title i belongs to text i."""

    titles: Side
    texts: Side
    punctuation: torch.Tensor
    "[tokens, H], the texts' tokens that have no letter and no digit"
    dense_scores: torch.Tensor
    "[titles, texts]"
    colbert_scores: torch.Tensor
    "[titles, texts]"


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseHead:
    """`sparse_linear`."""

    weight: torch.Tensor
    "[H]"
    bias: torch.Tensor
    "[1]"


def measure_mean(texts: Sequence[TextStates]) -> torch.Tensor:
    """Return the mean state of all tokens, [H]."""
    return torch.cat([text.states for text in texts]).mean(0)


def make_group(titles: Sequence[TextStates], texts: Sequence[TextStates], *, mean: torch.Tensor) -> Group:
    """Lay out one language for training; the ColBERT head subtracts `mean`."""
    found = {token_id for text in (*titles, *texts) for token_id in text.token_ids}
    vocabulary = sorted(token_id for token_id in found if token_id >= NUM_SPECIAL)
    columns = {token_id: column for column, token_id in enumerate(vocabulary)}
    return Group(
        titles=_lay_out(titles, columns),
        texts=_lay_out(texts, columns),
        punctuation=torch.cat([text.states[[not word for word in text.is_word]][1:-1] for text in texts]),
        dense_scores=score_dense(titles, texts),
        colbert_scores=score_colbert(titles, texts, mean=mean),
    )


def _lay_out(texts: Sequence[TextStates], columns: dict[int, int]) -> Side:
    states, cells = [], []
    for row, text in enumerate(texts):
        kept = [place for place, token_id in enumerate(text.token_ids) if token_id in columns]
        states.append(text.states[kept])
        cells += [row * len(columns) + columns[text.token_ids[place]] for place in kept]
    return Side(states=torch.cat(states), cells=torch.tensor(cells), shape=(len(texts), len(columns)))


def score_dense(titles: Sequence[TextStates], texts: Sequence[TextStates]) -> torch.Tensor:
    """Return the cosines of the mean states, [titles, texts]."""
    left, right = (torch.stack([text.states.mean(0) for text in side]) for side in (titles, texts))
    return normalize(left, dim=1) @ normalize(right, dim=1).T


def score_colbert(titles: Sequence[TextStates], texts: Sequence[TextStates], *, mean: torch.Tensor) -> torch.Tensor:
    """Return the mean over a title's tokens of the best cosine, [titles, texts]; `<s>` is left out."""
    rows = normalize(torch.cat([title.states[1:] for title in titles]) - mean, dim=1)
    best = torch.stack([(rows @ normalize(text.states[1:] - mean, dim=1).T).amax(1) for text in texts], dim=1)
    return torch.stack([part.mean(0) for part in torch.split(best, [len(title.states) - 1 for title in titles])])


def score_sparse(group: Group, head: SparseHead) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lexical scores, [titles, texts], and the texts' weights, [texts, vocabulary]."""
    titles, texts = (
        torch.zeros(side.shape[0] * side.shape[1])
        .scatter_reduce(0, side.cells, torch.relu(side.states @ head.weight + head.bias), "amax")
        .view(side.shape)
        for side in (group.titles, group.texts)
    )
    return titles @ texts.T, texts


def sum_scores(group: Group, head: SparseHead, weights: tuple[float, float, float]) -> torch.Tensor:
    """Return the sum of dense, sparse and ColBERT scores with these weights, [titles, texts]."""
    dense, sparse, colbert = weights
    return dense * group.dense_scores + sparse * score_sparse(group, head)[0] + colbert * group.colbert_scores


def fit_direction(groups: Sequence[Group]) -> SparseHead:
    """Train weight and bias; their scale is arbitrary."""
    mean = torch.stack([group.texts.states.mean(0) for group in groups]).mean(0)
    weight = torch.zeros(len(mean), requires_grad=True)
    bias = torch.full((1,), START_BIAS, requires_grad=True)  # of the mean state, so that the two do not fight
    optimiser = torch.optim.Adam([weight, bias], lr=LEARNING_RATE)
    for _ in range(STEPS):
        optimiser.zero_grad()
        for group in groups:
            scores, texts = score_sparse(group, SparseHead(weight=weight, bias=bias - mean @ weight))
            loss = (
                cross_entropy(scores / TEMPERATURE, torch.arange(len(scores)))
                + FLOPS * texts.mean(0).square().sum()
                + PUNCTUATION * torch.relu((group.punctuation - mean) @ weight + bias).mean()
            )
            (loss / len(groups)).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return SparseHead(weight=weight.detach(), bias=(bias - mean @ weight).detach())


def fit_scale(groups: Sequence[Group], head: SparseHead) -> SparseHead:
    """Return the head, scaled for the plain average of dense and sparse score."""
    sparse = [score_sparse(group, head)[0] for group in groups]
    gains = torch.stack(
        [
            torch.cat(
                [
                    measure_gains(group.dense_scores + scale**2 * scores)
                    for group, scores in zip(groups, sparse, strict=True)
                ]
            )
            for scale in SCALES
        ]
    )  # [scales, titles]
    losses = gains[gains.mean(1).argmax()] - gains
    errors = losses.std(1) / losses.shape[1] ** 0.5
    chosen = SCALES[int((losses.mean(1) <= errors).nonzero()[0])]
    return SparseHead(weight=chosen * head.weight, bias=chosen * head.bias)


def measure_gains(scores: torch.Tensor) -> torch.Tensor:
    """Return each title's nDCG for its own text, without a cut."""
    ranks = (scores > scores.diagonal()[:, None]).sum(1)
    return 1 / torch.log2(ranks + 2.0)


def train(folder: Path, *, out: Path, cache: Path) -> None:
    """Fetch, encode, fit, write."""
    packages = fetch_packages(PACKAGES, cache)
    pairs = choose_pairs(read_sections(packages), per_language=PAIRS_PER_LANGUAGE)
    _say(f"{len(pairs):,} titles and texts, {len({pair.lang for pair in pairs})} languages: encoding")
    titles = compute_states(folder, [pair.title for pair in pairs])
    texts = compute_states(folder, [pair.text for pair in pairs])
    mean = measure_mean(texts)
    groups = []
    for _, members in groupby(range(len(pairs)), key=lambda index: pairs[index].lang):
        own = list(members)
        groups.append(make_group([titles[index] for index in own], [texts[index] for index in own], mean=mean))
    held_out, fitted = groups[::HELD_OUT], [group for place, group in enumerate(groups) if place % HELD_OUT]
    _say("fitting")
    head = fit_scale(held_out, fit_direction(fitted))
    for name, weights in {"dense": (1, 0, 0), "sparse": (0, 1, 0), "colbert": (0, 0, 1), "all": (1, 1, 1)}.items():
        gains = torch.cat([measure_gains(sum_scores(group, head, weights)) for group in held_out])
        _say(f"nDCG in the languages held out, {name}: {gains.mean():.3f}")
    written = {
        "trained_on": {name: read_version(path) for name, path in packages.items()},
        "colbert_bias": [round(-value, 5) for value in mean.tolist()],
        "sparse_weight": [round(value, 5) for value in head.weight.tolist()],
        "sparse_bias": round(float(head.bias), 5),
    }
    out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    _say(f"{out} is written")


def main(argv: Sequence[str] | None = None) -> int:
    """Train the heads of the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description="Train the demo model's heads on texts of other packages.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--out", type=Path, default=HEADS_FILE, metavar="FILE")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="where packages are kept")
    options = parser.parse_args(argv)
    try:
        train(options.checkpoint, out=options.out, cache=options.cache)
    except (SourceError, OSError) as error:
        _say(f"error: {error}")
        return 1
    return 0


def _say(text: str) -> None:
    print(f"train-heads: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
