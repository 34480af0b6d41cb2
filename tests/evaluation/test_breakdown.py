import numpy as np
import pyarrow.parquet as pq
import pytest

from acebert.evaluation.baselines import clicks_before
from acebert.evaluation.breakdown import breakdown, head_queries, make_groups
from acebert.evaluation.gauc import auc_by_group
from acebert.evaluation.testset import load_test_set


def test_the_head_is_the_fewest_queries_that_reach_the_share():
    impressions = np.array([1, 50, 9, 30, 10])
    np.testing.assert_array_equal(np.flatnonzero(head_queries(impressions, 0.5)), [1])
    np.testing.assert_array_equal(np.flatnonzero(head_queries(impressions, 0.51)), [1, 3])


def test_groups_say_what_they_are_named_for(world):
    test = load_test_set(world.settings, world.ingested)
    groups = make_groups(test, 0.5)
    before = set(world.queries[:16])  # the last four are the test day's alone
    for query, seen in zip(test.queries, groups.of_query["seen"], strict=True):
        assert seen == (query in before)
    for name, mask in groups.of_target.items():
        assert mask.any(), name
    for target, (query, product) in enumerate(
        zip(test.target_query, test.target_product, strict=True)
    ):
        title, words = world.titles[product].split(), test.queries[query].split()
        assert groups.of_target["title_lacks"][target] == (not set(words) <= set(title))
        assert groups.of_target["with_image"][target] == (product % 10 != 0)


def test_no_unseen_query_stands_in_a_hot_list_or_in_the_clicks_that_are_looked_up(world):
    """Those of the validation day are in both at test time, and in no training pair."""
    test = load_test_set(world.settings, world.ingested)
    unseen = make_groups(test, 0.5).of_query["unseen"]
    root = world.ingested.path
    lists = pq.read_table(root / "hot_lists.parquet")["queries"].to_pylist()
    rows = pq.read_table(root / "product_hot_lists.parquet")["test"].to_pylist()
    in_lists = {query for row in rows for query in lists[row]}
    looked_up = clicks_before(root, test)[0]
    assert unseen.sum() == 4
    assert in_lists.isdisjoint(test.log_query[unseen].tolist())
    assert not np.isin(np.flatnonzero(unseen), looked_up).any()


def test_cold_targets_are_products_without_a_click_before_the_test_day(world):
    test = load_test_set(world.settings, world.ingested)
    before = {
        product
        for name in ("pairs", "valid_pairs")
        for product in pq.read_table(world.ingested.path / f"{name}.parquet")["product"].to_pylist()
    }
    cold = make_groups(test, 0.5).of_target["cold"]
    np.testing.assert_array_equal(cold, [p not in before for p in test.target_product.tolist()])


def test_recall_of_a_group_counts_its_own_targets_alone(world):
    test = load_test_set(world.settings, world.ingested)
    groups = make_groups(test, 0.5)
    rank = np.arange(len(test.target_query)) % 7
    searches = auc_by_group(test.search, -test.position, test.clicked)
    search_query = np.array([test.shown_query[test.search == s][0] for s in searches.group])
    rows = breakdown(groups, test, rank, np.ones_like(rank), searches, search_query, (3,))

    lacks = groups.of_target["title_lacks"]
    per_query = [
        (rank[lacks & (test.target_query == q)] < 3).mean()
        for q in np.unique(test.target_query[lacks])
    ]
    assert rows["title_lacks"]["recall_3"] == pytest.approx(np.mean(per_query))
    assert rows["title_lacks"]["targets"] == lacks.sum()
    assert "gauc" not in rows["title_lacks"]

    seen = groups.of_query["seen"][search_query] & ~np.isnan(searches.auc)
    expected = np.average(searches.auc[seen], weights=searches.impressions[seen])
    assert rows["seen"]["gauc"] == pytest.approx(expected)
    assert rows["seen"]["searches"] == seen.sum()
