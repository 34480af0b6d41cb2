"""Mined negatives: who they are, how often each is drawn, and what a batch makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acebert.config import load_settings
from acebert.data.hard_negatives import HardNegatives
from acebert.data.tokens import Ragged
from acebert.errors import UserError
from acebert.evaluation import mine
from acebert.evaluation.embed import MODEL_FILES
from acebert.evaluation.mine import nearest_unclicked
from acebert.workdir import Stage


def unit(rows: int, seed: int) -> np.ndarray:
    v = np.random.default_rng(seed).standard_normal((rows, 16)).astype(np.float32)
    return v / np.linalg.norm(v, axis=1, keepdims=True)


@pytest.fixture
def clicked() -> Ragged:
    """Eight queries, the second of which was never clicked, the last a hundred times."""
    rng = np.random.default_rng(2)
    counts = [3, 0, 1, 7, 2, 5, 4, 100]
    return Ragged.from_rows([sorted(rng.choice(400, n, replace=False)) for n in counts])


@pytest.mark.parametrize("ann_from", [100, 1000], ids=["ivf", "hnsw"])
def test_mined_are_the_ranks_asked_for_among_the_products_never_clicked(
    clicked: Ragged, ann_from: int
) -> None:
    """The index is approximate: nearly all of what brute force finds, and never a click."""
    asked = np.array([0, 2, 3, 4, 5, 6, 7])
    queries, products = unit(7, 0), unit(400, 1)
    settings = load_settings(["--eval.ann_from", str(ann_from)])
    found = nearest_unclicked(queries, products, clicked, asked, (3, 22), settings)
    same = 0
    for row, query in enumerate(asked):
        order = np.argsort(-products @ queries[row])
        free = [p for p in order.tolist() if p not in set(clicked[query].tolist())]
        assert not set(found[row].tolist()) & set(clicked[query].tolist())
        assert len(set(found[row].tolist())) == 20
        same += len(set(found[row].tolist()) & set(free[2:22]))
    assert same / found.size > 0.85


def test_too_few_products_are_refused_by_the_setting(clicked: Ragged) -> None:
    with pytest.raises(UserError, match=r"hard_negative_ranks 3 350.*up to 100 were clicked"):
        nearest_unclicked(
            unit(1, 0), unit(400, 1), clicked, np.array([7]), (3, 350), load_settings([])
        )


def test_share_is_how_often_a_product_is_drawn(tmp_path: Path) -> None:
    mined = np.array([[0, 1], [0, 0], [1, 2]], np.int32)  # the second query has no pair
    HardNegatives.save(tmp_path, mined, np.array([3, 0, 1]), products=4)
    negatives = HardNegatives.open(tmp_path)
    np.testing.assert_allclose(negatives.share, [3 / 8, 3 / 8 + 1 / 8, 1 / 8, 0])
    query = np.array([0, 0, 0, 2] * 2000)
    drawn = negatives.draw(query, 3, (0, 5))
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=4) / len(drawn), negatives.share, atol=0.02
    )
    for q, products in zip(query[:40], drawn.reshape(-1, 3), strict=False):
        assert set(products.tolist()) <= set(mined[q].tolist())


def test_other_weights_of_the_same_size_in_the_miners_directory_mine_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[dict[str, Any]] = []
    monkeypatch.setattr(mine, "run_stage", lambda *of: keys.append(of[2]))
    model = tmp_path / "model"
    (model / "tokenizer").mkdir(parents=True)
    for name in MODEL_FILES:
        (model / name).write_text("same")
    stage = Stage("ingest", tmp_path, "d", 0.0, reused=True)
    settings = load_settings(["--workdir", str(tmp_path)])
    for weights in ("first", "first", "other"):
        (model / "model.safetensors").write_text(weights)
        mine.mine(settings, model, stage, stage, None, (11, 50))
    assert keys[0] == keys[1] != keys[2]
    assert [key["model"][0] for key in keys] == ["model"] * 3  # which the report reads
