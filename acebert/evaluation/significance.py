"""Bootstrap intervals: over queries, and nested over seeds and queries.

A row of the results is one system trained with S seeds and measured on the same Q queries. Its
value is the mean over seeds of a ratio of sums over queries, m_s = Σ_q num[s, q] / Σ_q den[q]:
Recall has num = the query's Recall, den = 1; GAUC has num = Σ n_g·AUC_g and den = Σ n_g over the
query's searches. Queries are drawn, not searches, because searches for one query are alike.

A bootstrap sample draws queries with replacement, the same for all seeds and for both rows of a
difference, and then seeds with replacement, for each row on its own, or for both at once where they
are of the same models. Intervals are percentiles.

Few seeds make a bootstrap too sure: S drawn of S spread by the factor sqrt((S-1)/S) too little, and
the normal's 1.96 is not the quantile of so few. So the drawn seeds' deviation from the mean of all
is stretched by sqrt(S/(S-1)) · t/z, with Student's t for the degrees of freedom of the seeds. With
one seed there is nothing to draw, and the interval speaks of that seed's model alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from acebert.errors import UserError

LEVEL = 0.95
CHUNK = 50  # samples drawn at a time: bounds memory to CHUNK · Q counts


LEAST_QUERIES = 30
"""fewer than these are no sample: the bootstrap's intervals are too narrow"""


@dataclass(frozen=True)
class Ratios:
    """A metric of one row: a ratio of sums over the same Q queries, for S seeds."""

    numerator: NDArray[np.float64]
    """[S, Q]"""
    denominator: NDArray[np.float64]
    """not negative; 0 for a query that the metric leaves out [Q]"""
    models: tuple[Path, ...] = ()
    """by seed: what tells that two rows are of the same models, as one with past clicks and one
    without (none: not known)"""

    def __post_init__(self) -> None:
        if self.numerator.ndim != 2 or self.numerator.shape[1:] != self.denominator.shape:
            raise ValueError(
                f"numerator [S, Q] and denominator [Q] do not fit: {self.numerator.shape}, "
                f"{self.denominator.shape}"
            )
        if not self.denominator.sum() > 0:
            raise ValueError("no query counts: the denominators are all 0")

    @property
    def value(self) -> float:
        return float((self.numerator.sum(axis=1) / self.denominator.sum()).mean())

    @property
    def queries(self) -> int:
        """that count"""
        return int((self.denominator > 0).sum())


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float
    seeds: int
    """the fewest seeds of a row that went in; with 1 the interval knows no training noise"""

    @property
    def excludes_zero(self) -> bool:
        """Of a difference: it may be claimed."""
        return self.low > 0 or self.high < 0


def mean_of_queries(per_query: NDArray[np.float64]) -> Ratios:
    """Ratios of a metric that is a mean over queries; NaN: the query has no value [S, Q]."""
    values: NDArray[np.float64] = np.atleast_2d(per_query)
    return Ratios(np.nan_to_num(values), np.where(np.isnan(values[0]), 0.0, 1.0))


def weighted_by_query(
    auc: NDArray[np.float64],
    impressions: NDArray[np.int64],
    query: NDArray[np.int64],
    queries: int,
) -> Ratios:
    """Ratios of GAUC, searches summed by query.

    Args:
        auc: of each search, NaN where it has none [S, G].
        impressions, query: of each search [G].
        queries: Q.
    """
    auc = np.atleast_2d(auc)
    usable = ~np.isnan(auc[0])
    weight = np.where(usable, impressions, 0).astype(np.float64)
    return Ratios(
        np.stack([np.bincount(query, weight * np.nan_to_num(a), minlength=queries) for a in auc]),
        np.bincount(query, weight, minlength=queries).astype(np.float64),
    )


def interval(row: Ratios, samples: int = 1000, seed: int = 0) -> Interval:
    """95 % interval of a row's value."""
    return intervals([row], samples, seed)[0]


def intervals(rows: Sequence[Ratios], samples: int = 1000, seed: int = 0) -> list[Interval]:
    """95 % interval of each of several metrics of one row, on the same drawn queries."""
    freedom = len(rows[0].numerator) - 1
    drawn = _draw(rows, freedom, samples, np.random.default_rng(seed))
    return [_percentiles(r.value, d, freedom + 1) for r, d in zip(rows, drawn, strict=True)]


def difference(a: Ratios, b: Ratios, samples: int = 1000, seed: int = 0) -> Interval:
    """95 % interval of a − b, paired by query.

    Raises:
        UserError: the rows were not measured on the same queries.
    """
    drawn_a, drawn_b = _draw_both(a, b, samples, seed)
    return _percentiles(a.value - b.value, drawn_a - drawn_b, _fewest_seeds(a, b))


def relative_gain(
    a: Ratios, b: Ratios, samples: int = 1000, seed: int = 0
) -> tuple[Interval, Interval]:
    """95 % intervals of a / b − 1, paired by query, and of a − b on the same samples, which says
    what may be claimed; b's value is above 0.

    A sample in which b is not above 0 has no ratio: it counts as infinite, on the side of a − b.
    An end of the interval may so be infinite.

    Raises:
        UserError: the rows were not measured on the same queries.
    """
    drawn_a, drawn_b = _draw_both(a, b, samples, seed)
    apart = drawn_a - drawn_b
    infinite = np.where(apart > 0, np.inf, np.where(apart < 0, -np.inf, 0.0))
    gain = np.divide(apart, drawn_b, out=infinite, where=~(drawn_b <= 0))
    seeds = _fewest_seeds(a, b)
    of_gain = _percentiles(a.value / b.value - 1, gain, seeds)
    return of_gain, _percentiles(a.value - b.value, apart, seeds)


def paired_by_seed(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """Student's 95 % interval of the mean of a − b over seeds, for what has no queries to draw;
    None with one seed."""
    d = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    if len(d) < 2:
        return None
    half = stats.t.ppf(1 - (1 - LEVEL) / 2, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    return Interval(float(d.mean()), float(d.mean() - half), float(d.mean() + half), len(d))


def _draw_both(
    a: Ratios, b: Ratios, samples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if a.denominator.shape != b.denominator.shape or not np.allclose(a.denominator, b.denominator):
        raise UserError("the two rows were not measured on the same test queries")
    rows = (a,) if a.models and a.models == b.models else (a, b)
    trained = [len(row.numerator) for row in rows if len(row.numerator) > 1]
    freedom = len(trained) * (min(trained) - 1) if trained else 0
    drawn_a, drawn_b = _draw([a, b], freedom, samples, np.random.default_rng(seed))
    return drawn_a, drawn_b


def _fewest_seeds(a: Ratios, b: Ratios) -> int:
    return min(len(a.numerator), len(b.numerator))


def _draw(
    rows: Sequence[Ratios], freedom: int, samples: int, rng: np.random.Generator
) -> list[NDArray[np.float64]]:
    """Bootstrap values of each row [samples], on the same queries."""
    queries = len(rows[0].denominator)
    out: list[list[NDArray[np.float64]]] = [[] for _ in rows]
    for start in range(0, samples, CHUNK):
        size = min(CHUNK, samples - start)
        counts = _counts(queries, size, rng)
        picked: dict[tuple[Path, ...], NDArray[np.int64]] = {}
        for row, values in zip(rows, out, strict=True):
            total = counts @ row.denominator
            by_seed = (counts @ row.numerator.T) / np.where(total > 0, total, np.nan)[:, None]
            seeds = picked.get(row.models)
            if seeds is None:
                seeds = rng.integers(by_seed.shape[1], size=by_seed.shape)
            if row.models:
                picked[row.models] = seeds
            values.append(_of_seeds(by_seed, seeds, freedom))
    return [np.concatenate(values) for values in out]


def _counts(queries: int, samples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each query was drawn [samples, queries]."""
    drawn = rng.integers(queries, size=(samples, queries))
    drawn += np.arange(samples)[:, None] * queries
    counts = np.bincount(drawn.ravel(), minlength=samples * queries)
    return counts.reshape(samples, queries).astype(np.float64)


def _of_seeds(
    by_seed: NDArray[np.float64], drawn_seeds: NDArray[np.int64], freedom: int
) -> NDArray[np.float64]:
    """Values over drawn seeds [samples] from values by seed; both [samples, S]."""
    seeds = by_seed.shape[1]
    mean = by_seed.mean(axis=1)
    if seeds == 1:
        return mean
    drawn = np.take_along_axis(by_seed, drawn_seeds, 1).mean(axis=1)
    tail = 1 - (1 - LEVEL) / 2
    stretch = np.sqrt(seeds / (seeds - 1)) * stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)
    return mean + stretch * (drawn - mean)


def _percentiles(value: float, drawn: NDArray[np.float64], seeds: int) -> Interval:
    tail = 100 * (1 - LEVEL) / 2
    if np.isinf(drawn).any():  # between a finite and an infinite value lies none: the outer one
        low = np.nanpercentile(drawn, tail, method="lower")
        high = np.nanpercentile(drawn, 100 - tail, method="higher")
    else:
        low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return Interval(value, float(low), float(high), seeds)
