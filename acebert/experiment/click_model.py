"""A click model fitted on a search log: what shoppers do with a list that no engine showed them.

    model = fit(products, shown)
    model.chances("red shoe", rows)     # P(click) of these products in this order

The position-based model (Craswell et al., An Experimental Comparison of Click Position-Bias Models,
WSDM 2008): a click needs a look, which depends on the position alone, and relevance, which depends
on query and product alone. Looks first (`position_bias`), then relevance.

Most products are shown once or twice for a query, so relevance is a regression, as in Wang et al.,
Position Bias Estimation for Unbiased Learning to Rank in Personal Search (WSDM 2018): its logit is
a sum of weights, one for each token of the query together with each token of the product. Tokens
of a query are its words and the whole of it, those of a product its title's words, its category
and its id; each side has an empty token too. So a pair that was never shown is judged by what
became of the query's words on this product, on its category and on the words of its title. What a
photo alone tells is known of products that were shown for such words.

The weights have a normal prior, and the most probable ones are taken (L-BFGS). Looks and relevances
fitted together that way would be wrong: pairs shown once or twice explain each click by relevance,
and looks come out near 1 everywhere.

The model is a world to rehearse an experiment in. Never train on what it clicks: a model would
learn this model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit

from acebert.data.schema import normalize_query
from acebert.errors import UserError

PRECISION = 10.0
"""of the prior of a weight, 1/variance"""
SMOOTH = 1.0
"""clicks that the share of clicks by position, whatever was shown there, counts for"""
ROUNDS = 1000
MIX = np.uint64(0x9E3779B97F4A7C15)

Tokens = NDArray[np.uint64]


@dataclass(frozen=True)
class Shown:
    """What a log shows of m impressions."""

    queries: Sequence[str]
    """normalised texts"""
    query: NDArray[np.int64]
    """row of `queries` [m]"""
    product: NDArray[np.int64]
    """row of the catalogue [m]"""
    position: NDArray[np.int64]
    """place in the list, the first is the smallest there is [m]"""
    clicked: NDArray[np.bool_]
    """[m]"""


class Products:
    """The tokens of a catalogue's products."""

    def __init__(
        self, ids: Sequence[str], titles: Sequence[str], categories: Sequence[str | None]
    ) -> None:
        known: dict[str, int] = {}
        rows = [
            _tokens([*_words(title), *([f"c:{name}"] if name else []), f"p:{product}"], known)
            for product, title, name in zip(ids, titles, categories, strict=True)
        ]
        self._flat = np.concatenate(rows)
        self._start = np.cumsum([0, *map(len, rows)])

    def tokens(self, rows: NDArray[np.int64]) -> tuple[Tokens, NDArray[np.int64]]:
        """Tokens of one product after the other, and how many each has [n]."""
        start, sizes = self._start[rows], self._start[rows + 1] - self._start[rows]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self._flat[np.repeat(start, sizes) + within], sizes


@dataclass(frozen=True)
class ClickModel:
    """See the module's docstring."""

    products: Products
    look: NDArray[np.float64]
    """P(look) at the first position, 1, and those after it"""
    keys: NDArray[np.uint64]
    """pairs of tokens that have a weight, ascending; the first is that of the empty tokens [f]"""
    weights: NDArray[np.float64]
    """[f]"""

    def relevance(self, query: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """P(click | look) of catalogue rows [n] for a normalised query; float64 [n]."""
        found, sizes = _pairs(_query_tokens(query), *self.products.tokens(rows))
        at = np.searchsorted(self.keys, found).clip(max=len(self.keys) - 1)
        weights = np.where(self.keys[at] == found, self.weights[at], 0.0)
        ends = np.cumsum(sizes)
        sums = np.concatenate([[0.0], np.cumsum(weights)])
        return expit(sums[ends] - sums[ends - sizes])

    def chances(self, query: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """P(click) of the products of a list, best first, at most as long as `look` [n]."""
        return self.look[: len(rows)] * self.relevance(query, rows)


def fit(products: Products, shown: Shown) -> ClickModel:
    """
    Raises:
        UserError: the log cannot tell position from relevance: there are no clicks, nothing but
            clicks, or no product at two positions for one query.
    """
    _check(shown)
    cells, counts, clicks = _cells(shown)
    pairs, pair = np.unique(cells[:, :2], axis=0, return_inverse=True)
    look = position_bias(pair.ravel(), cells[:, 2], counts, clicks)
    keys, X = _design(products, shown.queries, pairs)
    posterior = _Posterior(X, pair.ravel(), look[cells[:, 2]], counts, clicks)
    start = np.zeros(len(keys))
    start[0] = logit(clicks.sum() / (look[cells[:, 2]] * counts).sum())
    found = minimize(posterior, start, jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return ClickModel(products, look, keys, found.x)


def position_bias(
    pair: NDArray[np.int64],
    place: NDArray[np.int64],
    counts: NDArray[np.int64],
    clicks: NDArray[np.int64],
) -> NDArray[np.float64]:
    """P(look) by place, 1 at the first: each pair is compared with itself alone.

    The Poisson likelihood of clicks with expectation count · look(place) · relevance(pair), a
    relevance for each pair of its own, maximised in turn over looks and relevances. It needs no
    more than that expectation to be right, and many pairs with few showings each do no harm, as
    they do to an estimate by Bernoulli's likelihood (Wooldridge, Distribution-free estimation of
    some nonlinear panel data models, 1999). The comparison within pairs is that of Agarwal et al.,
    Estimating Position Bias without Intrusive Interventions (WSDM 2019).

    Args:
        pair, place: of each cell, dense from 0 [c].
        counts, clicks: showings and clicks of each cell [c].
    """
    raw = np.bincount(place, clicks) / np.bincount(place, counts)
    raw = raw / raw[0] if raw[0] else np.ones(len(raw))
    by_place, by_pair = np.bincount(place, clicks), np.bincount(pair, clicks)
    look = raw
    for _ in range(ROUNDS):
        relevance = by_pair / np.bincount(pair, counts * look[place])
        expected = np.bincount(place, counts * relevance[pair])
        before, look = look, (by_place + SMOOTH * raw) / (expected + SMOOTH)
        look[0] = 1
        if np.abs(look - before).max() < 1e-6:
            break
    return look


class _Posterior:
    """Minus the log posterior of the weights, and its gradient."""

    def __init__(
        self,
        X: sp.csr_matrix,
        pair: NDArray[np.int64],
        look: NDArray[np.float64],
        counts: NDArray[np.int64],
        clicks: NDArray[np.int64],
    ) -> None:
        self._X, self._pair, self._look = X, pair, look
        self._clicks, self._others = clicks, counts - clicks
        self._precision = np.full(X.shape[1], PRECISION)
        self._precision[0] = 0  # of the empty tokens: the overall level

    def __call__(self, weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        of_pair = (self._X @ weights)[self._pair]
        relevance = expit(of_pair)
        missed = 1 - self._look * relevance
        log_likelihood = self._clicks * log_expit(of_pair) + self._others * np.log(missed)
        unclicked = self._others * self._look * relevance / missed
        by_pair = np.bincount(
            self._pair, (self._clicks - unclicked) * (1 - relevance), self._X.shape[0]
        )
        prior = (self._precision * weights**2).sum() / 2
        gradient = self._X.T @ by_pair - self._precision * weights
        return float(prior - log_likelihood.sum()), -gradient


def _check(shown: Shown) -> None:
    clicks = int(shown.clicked.sum())
    if not 0 < clicks < len(shown.clicked):
        raise UserError(
            f"{len(shown.clicked):,} impressions with {clicks:,} clicks: a click model needs "
            "products that were clicked and others that were shown and not clicked"
        )
    pairs = np.stack([shown.query, shown.product], axis=1)
    with_place = np.column_stack([pairs, shown.position])
    if len(np.unique(with_place, axis=0)) == len(np.unique(pairs, axis=0)):
        raise UserError(
            "no product of the log stands at two positions for one query, so what a position does "
            "to clicks cannot be told from what the product does"
        )


def _cells(shown: Shown) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Distinct (query, product, place from 0), how often each was shown, and clicked."""
    _, place = np.unique(shown.position, return_inverse=True)
    rows = np.column_stack([shown.query, shown.product, place.ravel()])
    cells, cell, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    clicks = np.bincount(cell.ravel(), shown.clicked, len(cells)).astype(np.int64)
    return cells, counts, clicks


def _design(
    products: Products, queries: Sequence[str], pairs: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], sp.csr_matrix]:
    """Distinct pairs of tokens, and which of them each pair (sorted by query) has."""
    of_query = np.flatnonzero(np.diff(pairs[:, 0], prepend=-1))
    found: list[Tokens] = []
    sizes: list[NDArray[np.int64]] = []
    for block in np.split(pairs, of_query[1:]):
        tokens = _query_tokens(queries[block[0, 0]])
        keys, size = _pairs(tokens, *products.tokens(block[:, 1]))
        found.append(keys)
        sizes.append(size)
    keys, column = np.unique(np.concatenate(found), return_inverse=True)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    ones = np.ones(len(column), np.float32)
    return keys, sp.csr_matrix((ones, column.ravel(), starts), shape=(len(pairs), len(keys)))


def _pairs(
    query: Tokens, flat: Tokens, sizes: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Every token of the query with every token of each product, and how many pairs that makes."""
    return (flat[:, None] * MIX + query[None, :]).ravel(), sizes * len(query)


def _query_tokens(query: str) -> Tokens:
    return _tokens([*_words(query), f"q:{query}"], {})


def _words(text: str) -> list[str]:
    return [f"w:{word}" for word in re.findall(r"\w+", normalize_query(text))]


def _tokens(names: list[str], known: dict[str, int]) -> Tokens:
    """Hashes of the empty token and these, each once; `known` remembers them."""
    for name in names:
        if name not in known:
            digest = blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
            known[name] = int.from_bytes(digest, "big")
    return np.array([0, *dict.fromkeys(known[name] for name in names)], np.uint64)
