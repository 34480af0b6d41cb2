"""Team-draft interleaving: two rankings in one list, each pick on the team of who made it.

Radlinski, Kurup and Joachims, How Does Clickthrough Data Reflect Retrieval Quality? (CIKM 2008),
algorithm 2. Rounds of two picks: a coin says who picks first, each takes the best product of its
ranking that is not in the list yet. A click counts for the team of its product. Each user sees both
rankings, so that differences between users cancel.
"""

import random
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple


class Pick(NamedTuple):
    """One place of the list."""

    ranking: int
    """whose item it is, 0 or 1"""
    row: int
    """of that ranking"""
    team: int | None
    """whom a click on it counts for: `ranking`, or nobody"""


def team_draft(first: Sequence[str], second: Sequence[str], k: int, seed: str) -> list[Pick]:
    """At most k picks, the best place first: k, where the rankings have so many items.

    A round counts if both would pick in it whoever came first. When one ranking has nothing left
    to add, the other fills the list up, and nobody gets the clicks on that: its rival could not
    win any there.

    Args:
        first, second: ids, best first, each id at most once in a ranking.
        seed: of the coins; the same rankings and seed give the same list.
    """
    coins = random.Random(seed)
    rankings, taken = (first, second), set[str]()
    picks: list[Pick] = []

    def left(ranking: int) -> list[int]:
        """The two best rows that are not in the list, or as many as there are."""
        items = rankings[ranking]
        return list(islice((row for row in range(len(items)) if items[row] not in taken), 2))

    while len(picks) < k:
        a, b = left(0), left(1)
        if not a and not b:
            break
        want_the_same = bool(a and b) and first[a[0]] == second[b[0]]
        fair = min(len(a), len(b)) >= 1 + want_the_same
        leads = coins.getrandbits(1)
        for ranking in (leads, 1 - leads):
            for row in left(ranking)[:1]:
                taken.add(rankings[ranking][row])
                picks.append(Pick(ranking, row, ranking if fair else None))
    return picks[:k]
