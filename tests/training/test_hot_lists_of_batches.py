"""Which hot queries training really reads, against a count of the training pairs by hand."""

from collections import Counter
from datetime import date

import numpy as np
import pyarrow.parquet as pq
import pytest

from acebert.config import Settings
from acebert.data.partitions import Plan
from acebert.data.tokens import Ragged
from acebert.models.encoder import HOT_QUERY
from acebert.training.pairs import PairBatches, StagePaths
from acebert.training.validation import ValidationSample

Tokens = tuple[int, ...]


class Clicks:
    """Training clicks of each product, from pairs.parquet alone."""

    def __init__(self, paths: StagePaths) -> None:
        self.rows = pq.read_table(paths.ingest / "pairs.parquet").to_pylist()
        self.of_product: dict[int, list[dict]] = {}
        for row in self.rows:
            self.of_product.setdefault(row["product"], []).append(row)

    def ranking(self, product: int, without: date | None, top: int) -> list[int]:
        clicks: Counter[int] = Counter()
        for row in self.of_product.get(product, []):
            if row["day"] != without:
                clicks[row["query"]] += row["clicks"]
        return [q for q, _ in sorted(clicks.items(), key=lambda item: (-item[1], item[0]))][:top]


@pytest.fixture(scope="module")
def clicks(paths: StagePaths) -> Clicks:
    return Clicks(paths)


def with_hot_queries(settings: Settings, kind: str, dropout: float = 0.0) -> Settings:
    model = settings.model.model_copy(update={"hot_queries": kind, "hot_query_dropout": dropout})
    return settings.model_copy(update={"model": model})


def read_by_the_model(settings: Settings, paths: StagePaths, step: int) -> list[list[Tokens]]:
    """The hot queries behind each pair's title, as tokens."""
    text_settings = settings.model_copy()
    side = PairBatches(text_settings, paths, rank=0, world_size=1).batch(step).product
    sep = side.text.input_ids[0][side.text.attention_mask[0]][-1].item()
    found = []
    for row in side.pair_row:
        hot = (side.text.segment_ids[row] == HOT_QUERY) & side.text.attention_mask[row]
        spans: list[Tokens] = []
        now: list[int] = []
        for token in side.text.input_ids[row][hot].tolist():
            if token == sep:
                spans.append(tuple(now))
                now = []
            else:
                now.append(token)
        assert not now
        found.append(spans)
    return found


def pairs_of(paths: StagePaths, step: int) -> np.ndarray:
    assert paths.plan is not None
    return Plan(paths.plan).batch(0, step)["pair"].to_numpy()


@pytest.mark.parametrize("kind", ["other_days", "as_is", "off"])
def test_a_pair_reads_the_hot_queries_of_the_days_that_the_setting_says(
    settings: Settings, paths: StagePaths, clicks: Clicks, kind: str
) -> None:
    tokens = Ragged.load(paths.tokens, "queries")
    top, lengths = settings.data.hot_queries, set()
    for step in range(5):
        found = read_by_the_model(with_hot_queries(settings, kind), paths, step)
        for pair, read in zip(pairs_of(paths, step), found, strict=True):
            own = clicks.rows[pair]
            without = own["day"] if kind == "other_days" else None
            listed = [] if kind == "off" else clicks.ranking(own["product"], without, top)
            assert read == [tuple(tokens[query].tolist()) for query in listed]
            lengths.add(len(listed))
    assert kind == "off" or max(lengths) > 2


def test_a_query_clicked_on_its_own_day_alone_is_read_as_it_is_and_never_from_other_days(
    settings: Settings, paths: StagePaths, clicks: Clicks
) -> None:
    """The leak of the paper's lists, found in what the encoder is given."""
    tokens = Ragged.load(paths.tokens, "queries")
    leaked = {"as_is": 0, "other_days": 0}
    for kind in leaked:
        for step in range(10):
            found = read_by_the_model(with_hot_queries(settings, kind), paths, step)
            for pair, read in zip(pairs_of(paths, step), found, strict=True):
                own = clicks.rows[pair]
                days = {
                    row["day"]
                    for row in clicks.of_product[own["product"]]
                    if tuple(tokens[row["query"]]) == tuple(tokens[own["query"]])
                }
                leaked[kind] += days == {own["day"]} and tuple(tokens[own["query"]]) in read
    assert leaked["other_days"] == 0
    assert leaked["as_is"] > 20


def test_lists_are_left_out_for_the_share_of_pairs_that_the_setting_says(
    settings: Settings, paths: StagePaths
) -> None:
    whole, some = (
        [
            bool(read)
            for step in range(20)
            for read in read_by_the_model(with_hot_queries(settings, "as_is", p), paths, step)
        ]
        for p in (0.0, 0.3)
    )
    kept = sum(some) / sum(whole)
    assert abs(kept - 0.7) < 4 * np.sqrt(0.3 * 0.7 / sum(whole))


def test_validation_reads_the_lists_of_all_training_days_and_no_later_clicks(
    settings: Settings, paths: StagePaths, clicks: Clicks
) -> None:
    sample = ValidationSample.draw(settings, paths)
    lists = pq.read_table(paths.ingest / "hot_lists.parquet").sort_by("hot_list")["queries"]
    for product, hot_list in zip(sample.products, sample.hot_lists, strict=True):
        expected = clicks.ranking(int(product), None, settings.data.hot_queries)
        assert lists[int(hot_list)].as_py() == expected
