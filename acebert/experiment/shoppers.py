"""Who searches in a rehearsal, for what, and what they would click: a world whose truth is known.

* `demo_searches`: the demo's own shoppers, with wants that the catalogue's log came from, by its
  very functions (`acebert.data.demo_log`).
* `log_searches`: the queries of a log's test day, as often as they were asked; clicks by a click
  model fitted on that day. No arm was trained on it, and no hot list has its clicks: a world fitted
  on other days would take their chance clicks for taste, and favour arms that know them by heart.

A purchase follows a click as often as in the demo, whatever was clicked.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.config import DemoSettings
from acebert.data import demo_log
from acebert.data.demo_catalogue import Catalogue, catalogue, product_id
from acebert.errors import UserError
from acebert.experiment.click_model import ClickModel, Products, Shown, fit
from acebert.workdir import Stage, run_stage

PURCHASE = demo_log.PURCHASE
MOST_SHOWN = 100  # products on a page, however deep the log's lists go


@dataclass(frozen=True)
class Search:
    """One search to be sent."""

    user: str
    query: str
    chances: Callable[[Sequence[str]], NDArray[np.float64]]
    """ids of an answer, best first → P(click) of each; UserError for one that is no product"""


def demo_searches(demo: DemoSettings, users: int, n: int, seed: int) -> tuple[int, list[Search]]:
    """Products on a page, and n searches of as many users."""
    rng = np.random.default_rng([seed, 5])
    asked = demo_log.draw_wants(demo.seed, n + n // 100 + 10, rng)
    texts, text = demo_log.queries(asked, rng)
    worded = np.flatnonzero(np.array([bool(t) for t in texts])[text])[:n]  # no service takes ''
    chances = partial(_demo_chances, catalogue(demo))
    return demo_log.SHOWN, [
        Search(f"shopper-{user}", texts[text[i]], partial(chances, asked[i]))
        for user, i in zip(demo_log.shoppers(users, n, rng).tolist(), worded, strict=True)
    ]


def _demo_chances(
    cat: Catalogue, asked: NDArray[np.int64], ids: Sequence[str]
) -> NDArray[np.float64]:
    rows = [int(name[1:]) if name[1:].isdigit() else len(cat) for name in ids]
    for name, row in zip(ids, rows, strict=True):
        if row >= len(cat) or product_id(row) != name:
            raise UserError(
                f"the service found a product {name}, which the demo catalogue of these settings "
                "does not have: give the settings that its catalogue was made with"
            )
    chances = demo_log.click_chances(cat, asked[None], np.array([rows], np.int64))[0]
    return chances.astype(np.float64)


def log_searches(
    workdir: Path, ingested: Stage, users: int, n: int, seed: int
) -> tuple[int, list[Search]]:
    """Products on a page, and n searches of as many users. Fits the click model where it is
    missing: the stage `click_model`.

    Raises:
        UserError: the test day's log has no positions, or cannot tell them from relevance.
    """
    table = (
        ds.dataset(ingested.path / "products")
        .to_table(columns=["product", "product_id", "title", "category"])
        .sort_by("product")
    )
    ids, titles, categories = (
        table[name].to_pylist() for name in ("product_id", "title", "category")
    )
    products = Products(ids, titles, categories)
    log = pq.read_table(ingested.path / "test_impressions.parquet")
    queries = pq.read_table(ingested.path / "queries.parquet")["text"].to_pylist()

    def build(out: Path) -> None:
        positioned = log.filter(log["position"].is_valid())
        if not positioned.num_rows:
            raise UserError(
                "the test day's impressions have no position, which a click model is fitted to. "
                "Say which column holds it: --data.columns position=NAME"
            )
        position = positioned["position"].to_numpy()
        log_of_page = positioned.filter(pa.array(position < position.min() + MOST_SHOWN))
        query, product, position = (
            log_of_page[name].to_numpy().astype(np.int64)
            for name in ("query", "product", "position")
        )
        shown = Shown(queries, query, product, position, log_of_page["clicked"].to_numpy())
        _write(fit(products, shown), shown, out)

    stage = run_stage(workdir, "click_model", {"version": 1, "ingest": ingested.digest}, build)
    arrays = (np.load(stage.path / f"{name}.npy") for name in ("look", "keys", "weights"))
    model = ClickModel(products, *arrays)

    rng = np.random.default_rng([seed, 5])
    searched = np.unique(np.column_stack([log["search"], log["query"]]), axis=0)[:, 1]
    chosen = rng.choice(searched, n).tolist()
    row_of = {name: row for row, name in enumerate(ids)}
    return len(model.look), [
        Search(f"shopper-{user}", queries[query], partial(_chances, model, row_of, queries[query]))
        for user, query in zip(demo_log.shoppers(users, n, rng).tolist(), chosen, strict=True)
    ]


def _write(model: ClickModel, shown: Shown, out: Path) -> None:
    for name, array in (("look", model.look), ("keys", model.keys), ("weights", model.weights)):
        np.save(out / f"{name}.npy", array)
    report = {
        "impressions": len(shown.clicked),
        "clicks": int(shown.clicked.sum()),
        "weights": len(model.weights),
        "look": {str(place): float(p) for place, p in enumerate(model.look, start=1)},
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def _chances(
    model: ClickModel, row_of: dict[str, int], query: str, ids: Sequence[str]
) -> NDArray[np.float64]:
    for name in ids:
        if name not in row_of:
            raise UserError(
                f"the service found a product {name}, which --data.products does not have: give "
                "the catalogue that its bundles were made from"
            )
    return model.chances(query, np.array([row_of[name] for name in ids], np.int64))
