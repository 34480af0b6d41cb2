"""nDCG@k and MRR with ties, from the ranks that Recall uses.

    DCG@k = Σ_{rank r ≤ k} gain_r / log2(r + 1)      nDCG@k = DCG@k / DCG@k of the best order
    RR    = 1 / rank of the first relevant product

Where scores are equal both are expected values over random order (McSherry and Najork, ECIR 2008,
'Computing information retrieval performance measures efficiently in the presence of tied
scores'). Gains are linear, as in trec_eval: 1 for a click, the grade for a judgement.
"""

import numpy as np
from numpy.typing import NDArray


def ndcg(
    greater: NDArray[np.int64],
    equal: NDArray[np.int64],
    gain: NDArray[np.float64],
    target_query: NDArray[np.int64],
    queries: int,
    k: int,
) -> NDArray[np.float64]:
    """Expected nDCG@k of each query; NaN where it has no target [Q].

    Args:
        greater, equal: products above, and at, each target's score [T] (see `recall.Found`).
        gain: above zero [T].
        target_query: query row of each target [T].
    """
    discount = np.r_[0.0, np.cumsum(1 / np.log2(np.arange(2, k + 2)))]  # of the first r ranks
    first, last = np.minimum(greater, k), np.minimum(greater + equal, k)
    dcg = np.bincount(
        target_query, gain * (discount[last] - discount[first]) / equal, minlength=queries
    )
    order = np.lexsort((-gain, target_query))
    starts = np.searchsorted(target_query[order], np.arange(queries))
    best_rank = np.arange(len(order)) - starts[target_query[order]]
    ideal = np.where(best_rank < k, gain[order] / np.log2(best_rank + 2), 0.0)
    best = np.bincount(target_query[order], ideal, minlength=queries)
    return np.divide(dcg, best, out=np.full(queries, np.nan), where=best > 0)


def reciprocal_rank(
    greater: NDArray[np.int64],
    equal: NDArray[np.int64],
    target_query: NDArray[np.int64],
    queries: int,
    depth: int,
) -> NDArray[np.float64]:
    """Expected reciprocal rank of the first target, 0 beyond `depth`; NaN without target [Q].

    The best target's ties are `equal` products of which r are targets. In random order the first
    target is the j-th of them with probability C(equal − j, r − 1) / C(equal, r), built up by
    p_1 = r / equal, p_{j+1} = p_j · (equal − j − r + 1) / (equal − j).
    """
    best = np.full(queries, np.iinfo(np.int64).max)
    np.minimum.at(best, target_query, greater)
    is_best = greater == best[target_query]
    r = np.bincount(target_query[is_best], minlength=queries)
    e = np.ones(queries, np.int64)
    e[target_query[is_best]] = equal[is_best]
    has = r > 0
    out = np.where(has, 0.0, np.nan)
    e = np.maximum(e, r)
    p = np.divide(r, e, out=np.zeros(queries), where=has)
    for j in range(1, depth + 1):
        rank = np.where(has, best, depth) + j
        out += np.where(rank <= depth, p / rank, 0.0)
        left = e - j
        p = np.where(left > 0, p * np.maximum(left - r + 1, 0) / np.maximum(left, 1), 0.0)
    return out
