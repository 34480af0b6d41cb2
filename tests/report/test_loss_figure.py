"""Fig. 6: the loss at the end, paired by seed, against scipy's t-test."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from acebert.config import load_settings
from acebert.evaluation.tables import Row
from acebert.report import words
from acebert.report.loss_figure import final_losses, loss_panels
from acebert.report.parts import WITH_ADVERSARY, WITHOUT_ADVERSARY
from acebert.report.report import _loss
from acebert.report.run import Measured


def test_the_final_difference_is_the_paired_t_interval() -> None:
    rng = np.random.default_rng(0)
    without = rng.normal(3, 0.2, (5, 100))
    with_adversary = without - 0.3 + rng.normal(0, 0.01, (5, 1))
    ends = with_adversary[:, 90:].mean(axis=1), without[:, 90:].mean(axis=1)
    interval = stats.ttest_rel(*ends).confidence_interval(0.95)
    value = np.mean(ends[0] - ends[1])
    told = words.loss_words(*final_losses(with_adversary, without))
    assert told.endswith(f"Reproduced: {value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}].")


def test_one_seed_claims_nothing() -> None:
    curve = np.linspace(8, 3, 50)[None]
    told = words.loss_words(*final_losses(curve - 1, curve))
    assert told.endswith("With one seed nothing may be claimed.")


def test_rows_that_stopped_at_different_steps_are_compared_where_both_were_trained() -> None:
    curve = np.linspace(8, 3, 100)[None]
    assert final_losses(curve, curve[:, :50]) == final_losses(curve[:, :50], curve[:, :50])
    # Of the 50 steps 45 to 49: 8 - 5 * 47 / 99.
    means = "loss is 5.626 with the adversary and 5.626 without"
    assert means in words.loss_words(*final_losses(curve, curve[:, :50]))


def test_curves_are_drawn_however_few_steps_there_are() -> None:
    panels = loss_panels(
        {"ACE-BERT": np.array([[8.0, 7.5, 7.0]]), "x": np.array([[8.0, 7.0, 6.0]])}
    )
    assert all(panel.png.startswith(b"\x89PNG") for panel in panels)
    assert "ACE-BERT ends at 7.00" in panels[0].alt


def made_model(directory: Path, steps: int) -> Path:
    directory.mkdir()
    pq.write_table(pa.table({"loss": np.linspace(8, 3, steps)}), directory / "history.parquet")
    return directory


@pytest.mark.parametrize(
    ("minutes", "said"),
    [
        ("5", "for 40, 60 steps with the adversary and 60, 60 without"),
        ("none", "Over the last tenth of the steps the loss is"),
    ],
)
def test_trainings_that_the_clock_ended_at_different_steps_are_not_compared(
    minutes: str, said: str, tmp_path: Path
) -> None:
    """With a budget of steps alone all have one learning rate at a step, and early stopping may
    end one before the other."""
    settings = load_settings(["--train.max_minutes", minutes])
    systems = {
        system.name: Measured(
            Row(system.name, ()),
            (0, 1),
            (
                made_model(tmp_path / f"{system.name}0", steps),
                made_model(tmp_path / f"{system.name}1", 60),
            ),
            settings=settings,
        )
        for system, steps in ((WITH_ADVERSARY, 40), (WITHOUT_ADVERSARY, 60))
    }
    told = _loss(systems, (0, 1))
    assert said in told["words"]
    assert (told["ends"] is None) == (minutes == "5")
