import json

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from acebert.evaluation.evaluate import BASELINES, evaluate_baselines
from acebert.evaluation.figures import KNOWN, MODELS, breakdown_figure, curves_figure, rows_figure
from acebert.evaluation.tables import Row


def has_colour(path, colour: str) -> bool:
    rgb = cv2.imread(str(path))[:, :, ::-1]
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(rgb.astype(int) - wanted).max(axis=2) <= 2).sum() > 20)


def test_every_row_is_drawn_in_its_own_colour(world, tmp_path):
    stage = evaluate_baselines(world.settings, world.ingested)
    rows_figure([Row.of(stage.path / name) for name in BASELINES], tmp_path / "rows.png")
    for name in BASELINES:
        assert has_colour(tmp_path / "rows.png", KNOWN[name]), name
    assert not has_colour(tmp_path / "rows.png", KNOWN["hybrid_bm25"])


def test_the_breakdown_leaves_out_a_row_without_recall(world, tmp_path):
    stage = evaluate_baselines(world.settings, world.ingested)
    rows = [stage.path / "bm25_titles", stage.path / "position"]
    breakdown_figure(rows, tmp_path / "breakdown.png")
    assert has_colour(tmp_path / "breakdown.png", KNOWN["bm25_titles"])
    assert not has_colour(tmp_path / "breakdown.png", KNOWN["position"])


def test_each_model_has_curves_in_its_own_colour(tmp_path):
    models = {}
    for name in ("one", "other"):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "report.json").write_text(json.dumps({"pairs": 320, "steps": 10}))
        steps = np.arange(1, 11)
        pq.write_table(
            pa.table({"step": steps, "loss": 9.0 / steps}), directory / "history.parquet"
        )
        valid = pa.table({"step": [5, 10], "gauc": [0.6, 0.7], "recall_100": [0.1, 0.3]})
        pq.write_table(valid, directory / "valid.parquet")
        models[name] = [directory]
    curves_figure(models, tmp_path / "both.png")
    curves_figure({"one": models["one"]}, tmp_path / "one.png")
    assert has_colour(tmp_path / "both.png", MODELS[0])
    assert has_colour(tmp_path / "both.png", MODELS[1])
    assert not has_colour(tmp_path / "one.png", MODELS[1])
