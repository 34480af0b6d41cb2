from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acebert.experiment.interleaving import team_draft

rankings = st.lists(st.sampled_from("abcdefghij"), unique=True, max_size=10)


@given(rankings, rankings, st.integers(1, 12), st.integers())
def test_a_list_is_as_long_as_it_can_be_with_teams_of_one_size(first, second, k, seed) -> None:
    picks = team_draft(first, second, k, str(seed))
    shown = [(first, second)[pick.ranking][pick.row] for pick in picks]
    assert len(set(shown)) == len(shown) == min(k, len({*first, *second}))
    sizes = Counter(pick.team for pick in picks)
    assert abs(sizes[0] - sizes[1]) <= (len(picks) == k and k % 2)
    assert all(pick.team in (pick.ranking, None) for pick in picks)


@given(rankings, rankings, st.integers())
def test_each_pick_is_the_best_of_its_ranking_that_was_left(first, second, seed) -> None:
    taken: set[str] = set()
    for pick in team_draft(first, second, 10, str(seed)):
        ranking = (first, second)[pick.ranking]
        assert set(ranking[: pick.row]) <= taken
        assert ranking[pick.row] not in taken
        taken.add(ranking[pick.row])


@pytest.mark.parametrize(("few", "counted"), [("", 0), ("a", 0), ("e", 2), ("ef", 4)])
def test_what_fills_up_the_list_of_a_ranking_with_few_hits_counts_for_nobody(
    few: str, counted: int
) -> None:
    for seed in range(20):
        for one, other in ((few, "abcdef"), ("abcdef", few)):
            teams = [pick.team for pick in team_draft(one, other, 6, f"{seed}")]
            assert len(teams) == 6
            assert Counter(teams[:counted]) == Counter([0, 1] * (counted // 2))
            assert teams[counted:] == [None] * (6 - counted)


@pytest.mark.parametrize("few", ["a", "ab", "ba", "gb", "bg"])
def test_a_short_ranking_wins_as_often_as_a_long_one_when_all_products_are_alike(few: str) -> None:
    """Under clicks that fall with the place: neither its place nor its length is a merit."""
    score = []
    for seed in range(4000):
        teams = np.array([pick.team for pick in team_draft(few, "abcdef", 6, f"{seed}")])
        look = np.arange(1, 7) ** -1.0
        score.append(look[teams == 1].sum() - look[teams == 0].sum())
    assert abs(np.mean(score)) <= 3 * np.std(score) / np.sqrt(len(score))


def test_lists_come_as_often_as_all_coins_by_hand_say() -> None:
    def by_hand(coins: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        left, out = [list("abcd"), list("badc")], []
        for lead in coins:
            for team in (lead, 1 - lead):
                item = left[team][0]
                out.append((item, team))
                left = [[x for x in some if x != item] for some in left]
        return tuple(out)

    expected = Counter(by_hand(coins) for coins in product((0, 1), repeat=2))
    drawn = Counter(
        tuple((("abcd", "badc")[ranking][row], team) for ranking, row, team in picks)
        for picks in (team_draft("abcd", "badc", 4, str(i)) for i in range(8000))
    )
    assert set(drawn) == set(expected)
    for shown, times in expected.items():
        assert abs(drawn[shown] / 8000 - times / 4) < 0.03


def test_two_equal_rankings_win_as_often_under_clicks_that_fall_with_the_place() -> None:
    rng = np.random.default_rng(0)
    look = np.arange(1, 11) ** -1.0
    score = []
    for i in range(4000):
        teams = np.array([p.team for p in team_draft("abcdefghij", "abcdefghij", 10, f"{i}")])
        clicked = rng.random(10) < 0.3 * look
        score.append(np.sign(clicked[teams == 1].sum() - clicked[teams == 0].sum()))
    assert abs(np.mean(score)) < 3 * np.std(score) / np.sqrt(len(score))
