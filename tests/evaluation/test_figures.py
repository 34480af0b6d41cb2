import cv2
import numpy as np

from acebert.evaluation.evaluate import BASELINES, evaluate_baselines
from acebert.evaluation.figures import KNOWN, breakdown_figure, rows_figure


def has_colour(path, colour: str) -> bool:
    rgb = cv2.imread(str(path))[:, :, ::-1]
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(rgb.astype(int) - wanted).max(axis=2) <= 2).sum() > 20)


def test_every_row_is_drawn_in_its_own_colour(world, tmp_path):
    stage = evaluate_baselines(world.settings, world.ingested)
    rows_figure([stage.path / name for name in BASELINES], tmp_path / "rows.png")
    for name in BASELINES:
        assert has_colour(tmp_path / "rows.png", KNOWN[name]), name
    assert not has_colour(tmp_path / "rows.png", KNOWN["hybrid_bm25"])


def test_the_breakdown_leaves_out_a_row_without_recall(world, tmp_path):
    stage = evaluate_baselines(world.settings, world.ingested)
    rows = [stage.path / "bm25_titles", stage.path / "position"]
    breakdown_figure(rows, tmp_path / "breakdown.png")
    assert has_colour(tmp_path / "breakdown.png", KNOWN["bm25_titles"])
    assert not has_colour(tmp_path / "breakdown.png", KNOWN["position"])
