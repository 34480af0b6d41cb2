"""Fig. 6: the loss at the end, paired by seed, against scipy's t-test."""

import numpy as np
import pytest
from scipy import stats

from acebert.report import words
from acebert.report.loss_figure import final_difference, loss_panels


def test_the_final_difference_is_the_paired_t_interval() -> None:
    rng = np.random.default_rng(0)
    without = rng.normal(3, 0.2, (5, 100))
    with_adversary = without - 0.3 + rng.normal(0, 0.01, (5, 1))
    found = final_difference(with_adversary, without)
    ends = with_adversary[:, 90:].mean(axis=1), without[:, 90:].mean(axis=1)
    expected = stats.ttest_rel(*ends).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert words.loss_words(found, (2.7, 3.0)).endswith(
        f"Reproduced: {found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]."
    )


def test_one_seed_claims_nothing() -> None:
    curve = np.linspace(8, 3, 50)[None]
    assert final_difference(curve - 1, curve) is None
    assert words.loss_words(None, (2.0, 3.0)).endswith("With one seed nothing may be claimed.")


def test_curves_are_drawn_however_few_steps_there_are() -> None:
    panels = loss_panels(
        {"ACE-BERT": np.array([[8.0, 7.5, 7.0]]), "x": np.array([[8.0, 7.0, 6.0]])}
    )
    assert all(panel.png.startswith(b"\x89PNG") for panel in panels)
    assert "ACE-BERT ends at 7.00" in panels[0].alt
