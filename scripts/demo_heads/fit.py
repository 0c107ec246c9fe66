"""Trains the demo model's two heads on titles and texts; the states that they read are frozen.

ColBERT head: the identity less the mean state, 384 numbers. The states of e5 all point much the same way, and without
what they have in common their cosines tell more.

Sparse head, 385 numbers, contrastively: of all texts in its language, a title's own must score highest.

1. Direction. The lexical score of every title with every text of its language is the sum over shared tokens of the
   products of their weights, relu(w . h + b), the largest where a token stands more than once, as BGE-M3 has it. The
   loss is the cross entropy of the own text among all (InfoNCE with the whole language as the batch), and SPLADE's
   FLOPS penalty (Paria et al. 2020): the square of each token's mean weight over the texts, which function words pay
   most. Titles hardly have punctuation, so that the loss would not find out what it is worth: its weights are
   penalised too.
2. Scale. Multiplying w and b by s multiplies the score by s^2 and changes no ranking by it alone. s is for the plain
   average of dense and sparse score, in languages that the direction was not trained on: the smallest whose nDCG is
   within one standard error (of the paired difference) of the best, which is Breiman's rule. Small, because e5's
   cosines lie close together, and lexical scores of other kinds of text, which are less sure, must not drown them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, normalize

from demo_heads.states import TextStates

NUM_SPECIAL = 4
STEPS, LEARNING_RATE = 80, 0.02
FLOPS, PUNCTUATION = 1.0, 10.0  # shares of the penalties in the loss
START_BIAS = 0.3  # every token alike
TEMPERATURE = 0.135  # logits are scores divided by this
SCALES = [0.05 * step for step in range(1, 41)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The tokens of some texts, special ones left out, one after the other."""

    states: torch.Tensor
    "[tokens, H]"
    cells: torch.Tensor
    "[tokens], text x vocabulary + token: where in the texts' matrix a token's weight belongs"
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
    """Lay out one language for training; `mean` is what the ColBERT head takes off."""
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
    """Return the mean over a title's tokens of the best cosine, [titles, texts]; `<s>` takes no part."""
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
    """Train weight and bias; their scale means nothing yet."""
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
    """Return the head multiplied by the number that serves the plain average of dense and sparse score."""
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
