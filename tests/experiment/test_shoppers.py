"""Shoppers of a rehearsal: what they ask and click, by the demo's formula and by a log."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from acebert.config import DemoSettings, Settings, load_settings
from acebert.data import demo_log
from acebert.data.demo import build_demo
from acebert.data.demo_catalogue import KINDS, catalogue
from acebert.data.ingest import ingest
from acebert.errors import UserError
from acebert.experiment.shoppers import demo_searches, log_searches
from acebert.workdir import Stage

DEMO = DemoSettings(products=80, searches_per_day=1500, days=3, image_side=64)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Stage, Path]:
    settings = load_settings(["--workdir", str(tmp_path_factory.mktemp("shoppers"))])
    settings = settings.model_copy(update={"demo": DEMO})
    made = build_demo(settings, processes=1).path
    return (
        settings,
        ingest(settings, str(made / "products.parquet"), str(made / "impressions")),
        made,
    )


def test_the_demos_shoppers_click_as_its_log_says() -> None:
    shown, searches = demo_searches(DEMO, 50, 4000, seed=3)
    assert (shown, len(searches)) == (16, 4000)
    assert all(search.query for search in searches)
    assert len({search.user for search in searches}) <= 50
    cat = catalogue(DEMO)
    kinds = {word: k for k, kind in enumerate(KINDS.values()) for word in kind.query_words}
    search = next(s for s in searches if s.query in kinds)  # neither colour nor brand is asked
    fits = cat.kind == kinds[search.query]
    rows = np.array([*np.flatnonzero(fits)[:2], *np.flatnonzero(~fits)[:2]])
    chances = search.chances([f"P{row:07d}" for row in rows])
    by_hand = (0.9 * cat.appeal[rows] * [1, 1, 0.03, 0.03] + 0.005) / np.sqrt([1, 2, 3, 4])
    np.testing.assert_allclose(chances, by_hand, rtol=1e-6)


def test_equal_seeds_make_equal_shoppers_and_others_do_not() -> None:
    def asked(seed: int) -> list[tuple[str, str]]:
        return [(s.user, s.query) for s in demo_searches(DEMO, 50, 100, seed)[1]]

    assert asked(1) == asked(1)
    assert asked(1) != asked(2)


@pytest.mark.parametrize("name", ["P0000080", "P80", "sku-7", "P"])
def test_a_product_of_another_catalogue_is_named(name: str) -> None:
    _, searches = demo_searches(DEMO, 5, 5, seed=0)
    with pytest.raises(UserError, match=f"found a product {name}"):
        searches[0].chances([name])


def test_a_logs_shoppers_ask_what_its_test_day_asked_and_as_often(
    demo: tuple[Settings, Stage, Path],
) -> None:
    settings, ingested, made = demo
    shown, searches = log_searches(settings.workdir, ingested, 30, 20_000, seed=0)
    assert shown == demo_log.SHOWN
    last = pq.read_table(sorted((made / "impressions").glob("*.parquet"))[-1])
    texts = dict(zip(last["search_id"].to_pylist(), last["query"].to_pylist(), strict=True))
    of_day = [text for text in texts.values() if text]
    found = [search.query for search in searches]
    assert set(found) <= set(of_day)
    for text in set(of_day):
        share = of_day.count(text) / len(of_day)
        deviation = np.sqrt(share * (1 - share) / len(found))
        assert abs(found.count(text) / len(found) - share) < 5 * deviation


def test_a_logs_click_model_is_fitted_once_and_knows_good_from_bad(
    demo: tuple[Settings, Stage, Path],
) -> None:
    settings, ingested, _ = demo
    _, searches = log_searches(settings.workdir, ingested, 30, 100, seed=1)
    (stage,) = (settings.workdir / "click_model").glob("[!.]*")
    made = stage.stat().st_mtime_ns
    log_searches(settings.workdir, ingested, 30, 100, seed=2)
    assert stage.stat().st_mtime_ns == made
    cat = catalogue(DEMO)
    kinds = ["shirt", "shoe", "dress", "bag"]
    good, bad = [], []
    for search in searches:
        for kind, name in enumerate(kinds):
            if name in search.query:
                for row in range(len(cat)):
                    chance = search.chances([f"P{row:07d}"])[0]
                    (good if cat.kind[row] == kind else bad).append(chance)
    assert np.mean(good) > 2 * np.mean(bad)
    with pytest.raises(UserError, match=r"P9999999.*--data.products"):
        searches[0].chances(["P9999999"])
