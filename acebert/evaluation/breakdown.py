"""Where a system is good: Recall by kind of query and of product, GAUC by kind of query.

Of queries: `seen` (clicked on some day before the test day) or `unseen`; `head` (the most frequent
queries that make up `eval.head_share` of the test day's impressions) or `tail`.
Of targets: `cold` (products never clicked before the test day) or `warm`; `with_image` or
`without_image`; `title_lacks` (some word of the query is not in the title, Fig. 1a) or
`title_has`. Words are those that BM25 matches, without stemming: a synonym, a plural and a
misspelling count as lacking.

Recall of a group of targets takes T to be the query's clicked products that belong to the group.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acebert.evaluation.baselines import words
from acebert.evaluation.gauc import GroupAuc, weighted_mean
from acebert.evaluation.recall import recall
from acebert.evaluation.testset import TestSet


@dataclass(frozen=True)
class Groups:
    of_query: dict[str, NDArray[np.bool_]]
    """name → which queries belong to it [Q]"""
    of_target: dict[str, NDArray[np.bool_]]
    """name → which targets belong to it [T]"""


def make_groups(test: TestSet, head_share: float) -> Groups:
    head = head_queries(test.impressions, head_share)
    cold = ~test.warm[test.target_product]
    image = test.has_image[test.target_product]
    lacks = title_lacks(test)
    return Groups(
        of_query={"seen": test.seen, "unseen": ~test.seen, "head": head, "tail": ~head},
        of_target={
            "cold": cold,
            "warm": ~cold,
            "with_image": image,
            "without_image": ~image,
            "title_lacks": lacks,
            "title_has": ~lacks,
        },
    )


def head_queries(impressions: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """The fewest most frequent queries that reach `share` of all impressions [Q]."""
    order = np.argsort(-impressions, kind="stable")
    before = np.cumsum(impressions[order]) - impressions[order]
    head = np.zeros(len(impressions), bool)
    head[order] = (before < share * impressions.sum()) & (impressions[order] > 0)
    return head


def title_lacks(test: TestSet) -> NDArray[np.bool_]:
    """Some word of the target's query is not in the target's title [T]."""
    products, which = np.unique(test.target_product, return_inverse=True)
    titles = [set(w) for w in words([test.titles[product] for product in products.tolist()])]
    queries = [set(w) for w in words(test.queries)]
    pairs = zip(test.target_query.tolist(), which.tolist(), strict=True)
    return np.array([not queries[query] <= titles[title] for query, title in pairs], bool)


def breakdown(
    groups: Groups,
    test: TestSet,
    greater: NDArray[np.int64],
    equal: NDArray[np.int64],
    searches: GroupAuc | None,
    search_query: NDArray[np.int64],
    ks: tuple[int, ...],
) -> dict[str, dict[str, Any]]:
    """Recall of each group, and GAUC of each group of queries.

    Args:
        greater, equal: ranks of the targets [T] (see `recall.Found`); T = 0 where the system only
            scores what was shown.
        searches: AUC of each search, None where the system scores no impressions [G].
        search_query: query row of each search [G].

    Returns:
        {group: {queries, targets, recall_K…, searches, gauc}}; absent what is not measured.
    """
    queries = len(test.queries)
    out: dict[str, dict[str, Any]] = {}
    masks = {name: mask[test.target_query] for name, mask in groups.of_query.items()}
    for name, mask in (masks | groups.of_target).items():
        of = test.target_query[mask]
        row: dict[str, Any] = {"queries": len(np.unique(of)), "targets": int(mask.sum())}
        if len(greater) and len(of):
            for k in ks:
                per_query = recall(greater[mask], equal[mask], of, queries, k)
                row[f"recall_{k}"] = float(np.nanmean(per_query))
        if searches is not None and name in groups.of_query:
            inside = groups.of_query[name][search_query]
            part = GroupAuc(
                searches.group[inside],
                searches.auc[inside],
                searches.impressions[inside],
                searches.clicks[inside],
            )
            result = weighted_mean(part)
            row |= {"searches": result.groups, "gauc": result.value}
        out[name] = row
    return out
