"""The click model against the demo's own, which is known, and against scipy."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import approx_fprime, minimize

from acebert.config import DemoSettings
from acebert.data import demo_log
from acebert.errors import UserError
from acebert.experiment import click_model
from acebert.experiment.click_model import Products, Shown, fit, position_bias

QUERIES = ["red shoe", "blue shoe", "red hat", "blue hat"]
IDS = [f"{colour}-{kind}-{i}" for kind in "sh" for colour in ("red", "blue") for i in range(10)]
TITLES = [f"Classic {i.split('-')[0]}" for i in IDS]
CATALOGUE = Products(IDS, TITLES, ["shoe"] * 20 + ["hat"] * 20)


def world(searches: int, seed: int = 0) -> tuple[Shown, np.ndarray, np.ndarray]:
    """A log of lists of 6 with looks 1/k, the engine blind to colours; and the relevance [4, 40]
    that its clicks come from."""
    rng = np.random.default_rng(seed)
    kind, colour = np.arange(40) // 20, np.arange(40) // 10 % 2
    relevance = np.full((4, 40), 0.02)
    for q, wanted in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        relevance[q, kind == wanted[0]] = 0.1
        relevance[q, (kind == wanted[0]) & (colour == wanted[1])] = 0.6
    query = rng.integers(0, 4, searches)
    lists = np.stack([rng.choice(40, 6, replace=False) for _ in query])
    clicked = rng.random(lists.shape) < relevance[query[:, None], lists] / np.arange(1, 7)
    shown = Shown(
        QUERIES,
        np.repeat(query, 6),
        lists.ravel(),
        np.tile(np.arange(1, 7), searches),
        clicked.ravel(),
    )
    return shown, relevance, query


def cells(shown: Shown) -> tuple[Any, ...]:
    found, counts, clicks = click_model._cells(shown)
    pair = np.unique(found[:, :2], axis=0, return_inverse=True)[1].ravel()
    return pair, found[:, 2], counts, clicks


def test_the_demos_position_bias_is_found_though_most_pairs_are_shown_once_or_twice() -> None:
    demo = DemoSettings(products=1000, searches_per_day=6000, days=3)
    tables = [demo_log.impressions(demo, *at) for at in demo_log.blocks(demo)]
    log = pa.concat_tables([t.set_column(3, "query", t["query"].cast("string")) for t in tables])
    log = log.filter(pa.compute.not_equal(log["user_id"], "robot"))
    _, query = np.unique(log["query"].to_numpy(False), return_inverse=True)
    _, product = np.unique(log["product_id"].to_numpy(False), return_inverse=True)
    shown = Shown(
        [], query, product, log["position"].to_numpy().astype(np.int64), log["clicked"].to_numpy()
    )
    pair, place, counts, clicks = cells(shown)
    assert np.median(np.bincount(pair, counts)) <= 2
    found = position_bias(pair, place, counts, clicks)
    truth = np.arange(1, 17) ** -demo_log.LOOK_POWER
    np.testing.assert_allclose(found[1:].mean(), truth[1:].mean(), rtol=0.06)
    np.testing.assert_allclose(found, truth, rtol=0.2)


def test_position_bias_is_the_maximum_of_the_conditional_likelihood() -> None:
    """Given a pair's clicks, where they fall is multinomial, free of its relevance."""
    pair, place, counts, clicks = cells(world(20_000)[0])

    def minus_log_likelihood(free: np.ndarray) -> float:
        share = counts * np.concatenate([[1.0], np.exp(free)])[place]
        return -float((clicks * np.log(share / np.bincount(pair, share)[pair])).sum())

    best = np.exp(minimize(minus_log_likelihood, np.zeros(5)).x)
    np.testing.assert_allclose(position_bias(pair, place, counts, clicks)[1:], best, rtol=2e-3)


def test_no_round_lowers_the_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, place, counts, clicks = cells(world(500)[0])
    raw = np.bincount(place, clicks) / np.bincount(place, counts)
    raw = raw / raw[0]
    found = []
    for rounds in range(1, 12):
        monkeypatch.setattr(click_model, "ROUNDS", rounds)
        look = position_bias(pair, place, counts, clicks)
        relevance = np.bincount(pair, clicks) / np.bincount(pair, counts * look[place])
        expected = counts * look[place] * relevance[pair]
        some = clicks > 0
        prior = click_model.SMOOTH * (raw * np.log(look) - look).sum()
        found.append((clicks[some] * np.log(expected[some])).sum() - expected.sum() + prior)
    assert (np.diff(found) >= -1e-9).all()
    assert found[-1] > found[0]


def test_the_gradient_is_that_of_the_posterior() -> None:
    pair, place, counts, clicks = cells(world(50)[0])
    rng = np.random.default_rng(1)
    keys, X = click_model._design(
        CATALOGUE, QUERIES, np.unique(click_model._cells(world(50)[0])[0][:, :2], axis=0)
    )
    posterior = click_model._Posterior(X, pair, 1 / (1 + place), counts, clicks)
    at = rng.normal(0, 0.2, len(keys))
    some = rng.choice(len(keys), 20, replace=False)

    def along(x: np.ndarray) -> float:
        full = at.copy()
        full[some] = x
        return posterior(full)[0]

    np.testing.assert_allclose(
        posterior(at)[1][some], approx_fprime(at[some], along, 1e-6), rtol=1e-3, atol=1e-3
    )


def test_relevance_is_found_also_of_pairs_that_were_never_shown() -> None:
    shown, relevance, _ = world(6000)
    hidden = (shown.query < 2) & (shown.product % 10 == 9)  # these products, when shoes are wanted
    seen = Shown(
        QUERIES,
        *(
            column[~hidden]
            for column in (shown.query, shown.product, shown.position, shown.clicked)
        ),
    )
    model = fit(CATALOGUE, seen)
    found = np.stack([model.relevance(query, np.arange(40)) for query in QUERIES])
    others = np.ones_like(relevance, bool)
    others[:2, 9::10] = False
    assert np.corrcoef(found[others], relevance[others])[0, 1] > 0.97
    assert found[0, 9] > 2 * found[0, 19]  # red shoes before blue ones
    assert found[1, 19] > 2 * found[1, 9]
    assert found[0, 9] > 2 * found[0, 29]  # red shoes before red hats
    np.testing.assert_allclose(model.look, 1 / np.arange(1, 7), rtol=0.15)
    chances = model.chances("red shoe", np.array([3, 30]))
    np.testing.assert_allclose(chances, model.look[:2] * found[0, [3, 30]])
    assert 0 < model.relevance("words of no query", np.array([0]))[0] < 1


@pytest.mark.parametrize(
    ("clicked", "positions", "says"),
    [
        ([False] * 4, [1, 2, 2, 1], "4 impressions with 0 clicks"),
        ([True] * 4, [1, 2, 2, 1], "4 impressions with 4 clicks"),
        ([], [], "0 impressions with 0 clicks"),
        ([True, False, False, True], [1, 1, 1, 1], "at two positions"),
        ([True, False, False, True], [1, 2, 1, 2], "at two positions"),
    ],
)
def test_a_log_that_cannot_tell_says_so(
    clicked: list[bool], positions: list[int], says: str
) -> None:
    n = len(clicked)
    shown = Shown(
        ["q"],
        np.zeros(n, np.int64),
        np.array([0, 1, 0, 1][:n], np.int64),
        np.array(positions, np.int64),
        np.array(clicked, bool),
    )
    with pytest.raises(UserError, match=says):
        fit(CATALOGUE, shown)
