"""Team-draft interleaving: two rankings in one list, each pick on the team of who made it.

Radlinski, Kurup and Joachims, How Does Clickthrough Data Reflect Retrieval Quality? (CIKM 2008),
algorithm 2. Rounds of two picks: a coin says who picks first, each takes the best product of its
ranking that is not in the list yet. A click counts for the team of its product. Each user sees both
rankings, so that differences between users cancel: it takes far fewer searches than a split.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple


class Pick(NamedTuple):
    """One place of the list: item `row` of ranking `team` (0 or 1)."""

    team: int
    row: int


def team_draft(first: Sequence[str], second: Sequence[str], k: int, seed: str) -> list[Pick]:
    """At most k picks, the best place first; it ends early where a ranking has nothing left to add.

    Args:
        first, second: ids, best first, each id at most once in a ranking.
        seed: of the coins; the same rankings and seed give the same list.
    """
    coins = random.Random(seed)
    rankings, at, taken = (first, second), [0, 0], set[str]()
    picks: list[Pick] = []
    while len(picks) < k:
        leads = coins.getrandbits(1)
        for team in (leads, 1 - leads):
            ranking = rankings[team]
            while at[team] < len(ranking) and ranking[at[team]] in taken:
                at[team] += 1
            if at[team] == len(ranking) or len(picks) == k:
                return picks
            taken.add(ranking[at[team]])
            picks.append(Pick(team, at[team]))
    return picks
