"""What makes a pair's scores, on weights and vectors that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from m3cli.errors import UsageError
from m3cli.jobs.score.explain import explain_pairs
from m3cli.progress import Progress
from m3cli.requests import ScoreRequest


def test_shared_tokens_make_the_sparse_score_and_best_matches_the_colbert_score(tiny_m3: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_text("hello quick world\ta quick quick world, hello\nhello\t \n", encoding="utf-8")
    (tmp_path / "m").mkdir()
    for file in tiny_m3.iterdir():
        if file.name != "sparse_linear.pt":
            (tmp_path / "m" / file.name).symlink_to(file)
    import torch  # noqa: PLC0415

    # A head of nothing but a bias: every token has the weight 0.5.
    torch.save({"weight": torch.zeros(1, 64), "bias": torch.tensor([0.5])}, tmp_path / "m" / "sparse_linear.pt")
    request = ScoreRequest(pairs=str(path), model=str(tmp_path / "m"), dtype="float32", device="cpu")
    first, bad = explain_pairs(request, progress=Progress("none"))
    shared = first["shared_tokens"]
    assert {"quick", "world"} <= {each["token"] for each in shared}
    assert all(each["product"] == 0.25 for each in shared)
    assert sum(each["product"] for each in shared) == pytest.approx(first["scores"]["sparse"])
    similar = [match["similarity"] for match in first["best_matches"]]
    assert np.mean(similar) == pytest.approx(first["scores"]["colbert"], abs=1e-5)
    by_token = {match["query_token"]: match["passage_token"] for match in first["best_matches"]}
    assert by_token["</s>"] == "</s>"
    assert bad["fault"] == "empty passage"
    assert "shared_tokens" not in bad


@pytest.mark.parametrize("typed", [{"queries": "Q.m3", "corpus": "C.m3"}, {"out": "o.tsv"}])
def test_what_cannot_be_explained(typed: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="--explain"):
        next(explain_pairs(ScoreRequest(pairs="p.tsv", **typed), progress=Progress("none")))  # type: ignore[arg-type]
