"""`scripts/train_demo_heads.py`: what the heads are trained on, and that training them helps."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from demo_heads.fit import (
    SparseHead,
    fit_direction,
    fit_scale,
    make_group,
    measure_gains,
    measure_mean,
    score_sparse,
    sum_scores,
)
from demo_heads.states import TextStates
from demo_heads.texts import Section, choose_pairs, read_guide_page, read_help_page

WIDTH, NUM_TOPICS = 8, 12
COMMON = [4, 5, 6, 7]  # tokens that stand in most texts; the others are a topic's own

HELP = """<page xmlns="http://projectmallard.org/1.0/"><info><desc><p>Not this.</p></desc></info>
<title>Change your
 password</title><comment><p>Nor this.</p></comment><steps><item><p>Open <gui>Users</gui>.</p></item></steps></page>"""
GUIDE = """<h2 class="title"><a></a>2.1. Supported Hardware</h2><p>Debian runs  on much.</p><h3 class="other">No</h3>
<h3 class="title">2.1.1. Laptops</h3><p>These too.</p><p> </p>"""


def test_a_page_of_the_help_is_read_without_its_notes() -> None:
    assert read_help_page("en", HELP) == Section(lang="en", title="Change your password", paragraphs=("Open Users.",))
    assert read_help_page("en", "<page>&undefined;</page>") is None


def test_a_page_of_the_guide_is_several_sections_without_numbers() -> None:
    assert read_guide_page("en", GUIDE) == [
        Section(lang="en", title="Supported Hardware", paragraphs=("Debian runs on much.",)),
        Section(lang="en", title="Laptops", paragraphs=("These too.",)),
    ]


def test_pairs_are_translated_and_of_languages_with_enough() -> None:
    def section(lang: str, title: str, text: str) -> Section:
        return Section(lang=lang, title=title, paragraphs=(text * 30,))

    found = [
        *(section("en", f"Title {number}", f"english {number} ") for number in range(4)),
        *(section("de", f"Titel {number}", f"deutsch {number} ") for number in range(3)),
        section("de", "Title 1", "deutsch "),  # its title is English
        section("de", "Titel", "english 1 "),  # its text is
        section("fr", "Titre", "texte français "),  # the only one of its language
    ]
    pairs = choose_pairs(found, per_language=4)
    assert sorted((pair.lang, pair.title) for pair in pairs) == [
        *(("de", f"Titel {number}") for number in range(3)),
        *(("en", f"Title {number}") for number in range(4)),
    ]


def make_texts(draw: torch.Generator, *, num_common: Sequence[int]) -> list[TextStates]:
    """Texts of a world in which a state's first number says whether the token is common, and the rest says nothing."""
    made = []
    for topic in range(NUM_TOPICS):
        number = num_common[topic % len(num_common)]
        common = [COMMON[place] for place in torch.randperm(len(COMMON), generator=draw)[:number].tolist()]
        token_ids = [0, *common, 8 + topic, 2]
        states = 0.1 * torch.randn(len(token_ids), WIDTH, generator=draw)
        states[1 : 1 + number, 0] += 1
        made.append(TextStates(token_ids=token_ids, states=states, is_word=[True] * len(token_ids)))
    return made


@pytest.fixture
def world() -> tuple[list[TextStates], list[TextStates]]:
    draw = torch.Generator().manual_seed(5)
    # Some texts have no common token: plain overlap ranks others before them.
    return make_texts(draw, num_common=[4]), make_texts(draw, num_common=[0, 2, 4])


def test_training_finds_which_tokens_tell_texts_apart(world: tuple[list[TextStates], list[TextStates]]) -> None:
    titles, texts = world
    group = make_group(titles, texts, mean=measure_mean(texts))
    head = fit_direction([group])
    alike = SparseHead(weight=torch.zeros(WIDTH), bias=torch.ones(1))
    assert measure_gains(score_sparse(group, head)[0]).mean() > 0.99
    assert (
        measure_gains(score_sparse(group, head)[0]).mean() > measure_gains(score_sparse(group, alike)[0]).mean() + 0.05
    )
    common, own = torch.eye(WIDTH)[0], torch.zeros(WIDTH)
    assert torch.relu(common @ head.weight + head.bias) < 0.3 * torch.relu(own @ head.weight + head.bias)


def test_the_scale_makes_sparse_help_dense_and_changes_no_weight_against_another(
    world: tuple[list[TextStates], list[TextStates]],
) -> None:
    titles, texts = world
    group = make_group(titles, texts, mean=measure_mean(texts))
    head = fit_direction([group])
    scaled = fit_scale([group], head)
    ratio = scaled.bias / head.bias
    assert torch.allclose(scaled.weight, ratio * head.weight)
    dense, both = (measure_gains(sum_scores(group, scaled, (1, sparse, 0))).mean() for sparse in (0, 1))
    assert both > dense + 0.1


def test_a_title_finds_its_text_by_lexical_score_as_m3_has_it() -> None:
    draw = torch.Generator().manual_seed(1)
    titles, texts = make_texts(draw, num_common=[2]), make_texts(draw, num_common=[4])
    group = make_group(titles, texts, mean=torch.zeros(WIDTH))
    head = SparseHead(weight=torch.randn(WIDTH, generator=draw), bias=torch.tensor([0.2]))

    def weights(text: TextStates) -> dict[int, float]:
        made: dict[int, float] = {}
        for token_id, state in zip(text.token_ids, text.states, strict=True):
            if token_id >= 4:
                made[token_id] = max(made.get(token_id, 0.0), float(torch.relu(state @ head.weight + head.bias)))
        return made

    expected = [
        [sum(weights(title)[token] * weights(text).get(token, 0.0) for token in weights(title)) for text in texts]
        for title in titles
    ]
    assert torch.allclose(score_sparse(group, head)[0], torch.tensor(expected), atol=1e-6)


def test_the_committed_heads_are_the_size_of_the_demo_model() -> None:
    heads = json.loads((Path(__file__).parents[2] / "scripts" / "demo_model" / "heads.json").read_text())
    assert (len(heads["sparse_weight"]), len(heads["colbert_bias"])) == (384, 384)
