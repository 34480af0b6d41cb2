"""Whether a number of partitions inside the range is best."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from acebert.evaluation.tables import compare
from acebert.report.partitions_figure import Best, best_points
from acebert.report.words import partitions_words


def test_a_point_inside_that_is_above_both_ends_is_told_to_be_shown(made) -> None:
    best = best_points(made.swept)["gauc"]
    assert best.batches_per_partition == 8
    assert best.above_ends is not None
    for found, end in zip(best.above_ends, ("fair", "bad"), strict=True):
        assert found == compare(made.rows["good"], made.rows[end], "gauc")
        assert found.low > 0
    told = partitions_words({"gauc": best})
    assert "by GAUC the best n/(P·W), 8, is inside, +" in told
    assert told.endswith(" above the hard end: shown.")


def test_one_seed_of_a_point_inside_claims_nothing(made, tmp_path: Path) -> None:
    trials = pq.read_table(made.swept / "trials.parquet").to_pylist()
    once = [trial for trial in trials if trial["seed"] == 0]
    pq.write_table(pa.Table.from_pylist(once), tmp_path / "trials.parquet")
    told = partitions_words({"gauc": best_points(tmp_path)["gauc"]})
    assert told.endswith("above the hard end: one seed: not claimed.")


def test_a_best_point_at_an_end_is_told_as_none_inside() -> None:
    end = "by Recall@100 the best n/(P·W), 1, is an end of the range: "
    told = partitions_words({"recall_100": Best(1.0, None, 500, seeds=2)})
    assert told.endswith(f"{end}none was found inside.")
    told = partitions_words({"recall_100": Best(1.0, None, 500, seeds=1)})
    assert told.endswith(f"{end}one seed: not claimed.")
