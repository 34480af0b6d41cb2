"""The table of what a rehearsal sent."""

import math

import pytest

from acebert.experiment.simulate import Sent, sent_text


def sent(clicks: int, expected: float) -> Sent:
    """4,000 users who see a product each."""
    of = Sent()
    for user in range(4000):
        of.add(f"u{user}", shown=1, clicks=int(user < clicks), purchases=0, expected=expected)
    return of


def test_a_rehearsal_tells_the_searches_that_the_expected_lift_takes() -> None:
    """Not the lift of the clicks, which is -5 % here. By hand: 7.849 (q1/p1 + q2/p2) / ln(1.1)^2
    with the clicks' p1 = 0.2 and p2 = 0.19."""
    of = {"new": sent(760, 0.22), "best": sent(1000, 0.231), "old": sent(800, 0.2)}
    lines = sent_text(of, ("old", "new", "best")).splitlines()
    old, new, best = ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines[-4:-1])
    assert old == ["old", "4,000", "800", "0", "20.00%", "20.00%", "-", "-", "-"]
    assert new[:7] == ["new", "4,000", "760", "0", "19.00%", "22.00%", "+10.00%"]
    by_hand = 7.849 * (0.8 / 0.2 + 0.81 / 0.19) / 0.09531**2
    assert int(new[7].replace(",", "")) == pytest.approx(by_hand, rel=0.01)
    assert new[8] == new[7]
    to_tell_them = 7.849 * (0.75 / 0.25 + 0.81 / 0.19) / math.log(1.05) ** 2
    assert int(best[8].replace(",", "")) == pytest.approx(to_tell_them, rel=0.01)


def test_what_is_interleaved_has_no_lift() -> None:
    (line,) = (
        line for line in sent_text({None: sent(800, 0.2)}, ()).splitlines() if "inter" in line
    )
    assert [cell.strip() for cell in line.split("│")[-4:-1]] == ["-", "-", "-"]
