from collections import Counter
from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from acebert.experiment.interleaving import team_draft

rankings = st.lists(st.sampled_from("abcdefghij"), unique=True, max_size=10)


@given(rankings, rankings, st.integers(1, 12), st.integers())
def test_a_list_has_no_product_twice_and_teams_of_one_size(first, second, k, seed) -> None:
    picks = team_draft(first, second, k, str(seed))
    shown = [(first, second)[team][row] for team, row in picks]
    assert len(set(shown)) == len(shown) <= k
    sizes = Counter(team for team, _ in picks)
    assert abs(sizes[0] - sizes[1]) <= 1
    if len(first) >= k and len(second) >= k:
        assert len(picks) == k


@given(rankings, rankings, st.integers())
def test_each_pick_is_the_best_of_its_ranking_that_was_left(first, second, seed) -> None:
    taken: set[str] = set()
    for team, row in team_draft(first, second, 10, str(seed)):
        ranking = (first, second)[team]
        assert set(ranking[:row]) <= taken
        assert ranking[row] not in taken
        taken.add(ranking[row])


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
        tuple(("abcd"[row] if team == 0 else "badc"[row], team) for team, row in picks)
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
        teams = np.array([team for team, _ in team_draft("abcdefghij", "abcdefghij", 10, f"{i}")])
        clicked = rng.random(10) < 0.3 * look
        score.append(np.sign(clicked[teams == 1].sum() - clicked[teams == 0].sum()))
    assert abs(np.mean(score)) < 3 * np.std(score) / np.sqrt(len(score))
