"""GAUC: the AUC of each group of impressions, weighted by impressions (paper section 4.2).

    GAUC = Σ_g n_g · AUC_g / Σ_g n_g

A group is a search: what one shopper saw at once, so that easy and hard queries are not ranked
against each other. AUC_g is the probability that a clicked product of the group scores above one
that was not clicked; equal scores count half. A group where everything or nothing was clicked has
no AUC: it is left out of both sums, and counted.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GroupAuc:
    """One entry a group, ascending by group id (G groups)."""

    group: NDArray[np.int64]
    """group ids [G]"""
    auc: NDArray[np.float64]
    """AUC of each group in [0, 1]; NaN where all or none were clicked [G]"""
    impressions: NDArray[np.int64]
    """rows of each group [G]"""
    clicks: NDArray[np.int64]
    """clicked rows of each group [G]"""


@dataclass(frozen=True)
class GaucResult:
    value: float | None
    """GAUC in [0, 1]; None where no group has both clicked and unclicked rows"""
    groups: int
    """groups that the value is over"""
    left_out_all_clicked: int
    """groups where every row was clicked"""
    left_out_none_clicked: int
    """groups without a click"""


def auc_by_group(
    search: NDArray[np.int64],
    score: NDArray[np.floating],
    clicked: NDArray[np.bool_],
    tie: float = 0.0,
) -> GroupAuc:
    """AUC of each group by the rank-sum formula (Mann-Whitney U).

    Args:
        search: group id of each impression [n], in any order.
        score: the system's score [n]; -inf is the lowest, +inf the highest.
        clicked: the label [n].
        tie: neighbours in score order that differ by no more than this are equal.

    Raises:
        ValueError: lengths differ, or a score is NaN.
    """
    if not len(search) == len(score) == len(clicked):
        raise ValueError(
            f"search, score and clicked differ in length: {len(search)}, {len(score)}, "
            f"{len(clicked)}"
        )
    if np.isnan(score).any():
        raise ValueError(f"score {int(np.isnan(score).argmax())} is NaN")
    n = len(search)
    if n == 0:
        empty = np.empty(0, np.int64)
        return GroupAuc(empty, np.empty(0), empty, empty)

    order = np.lexsort((score, search))
    search, clicked = search[order], clicked[order]
    limits = np.finfo(np.float64)
    score = np.clip(score[order].astype(np.float64), limits.min / 4, limits.max / 4)

    new_group = np.r_[True, search[1:] != search[:-1]]
    group_start = np.flatnonzero(new_group)
    group_size = np.diff(np.r_[group_start, n])

    # A row's rank is the mean rank, from 1, of the rows of its group that tie with it.
    class_start = np.flatnonzero(new_group | np.r_[True, np.diff(score) > tie])
    class_size = np.diff(np.r_[class_start, n])
    mean_position = class_start + (class_size - 1) / 2
    rank = np.repeat(mean_position, class_size) - np.repeat(group_start, group_size) + 1

    clicks = np.add.reduceat(clicked.astype(np.int64), group_start)
    rank_sum = np.add.reduceat(np.where(clicked, rank, 0.0), group_start)
    pairs = clicks * (group_size - clicks)
    u = rank_sum - clicks * (clicks + 1) / 2
    auc = np.divide(u, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return GroupAuc(search[group_start], auc, group_size, clicks)


def weighted_mean(groups: GroupAuc) -> GaucResult:
    """GAUC of groups whose AUC is known."""
    usable = ~np.isnan(groups.auc)
    value = None
    if usable.any():
        value = float(np.average(groups.auc[usable], weights=groups.impressions[usable]))
    return GaucResult(
        value=value,
        groups=int(usable.sum()),
        left_out_all_clicked=int((groups.clicks == groups.impressions).sum()),
        left_out_none_clicked=int((groups.clicks == 0).sum()),
    )


def gauc(
    search: NDArray[np.int64],
    score: NDArray[np.floating],
    clicked: NDArray[np.bool_],
    tie: float = 0.0,
) -> GaucResult:
    """GAUC of n impressions; arguments and errors as `auc_by_group`."""
    return weighted_mean(auc_by_group(search, score, clicked, tie))
