import json
from pathlib import Path

import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from ir_measures import RR, R, nDCG
from sklearn.metrics import roc_auc_score
from small_world import World, make_world, random_vectors, write_vectors

from acebert.errors import UserError
from acebert.evaluation import tables
from acebert.evaluation.evaluate import BASELINES, evaluate_baselines, evaluate_embeddings
from acebert.evaluation.tables import (
    Row,
    compare,
    differences_table,
    interval_of_seeds,
    read_metrics,
    rows_table,
)
from acebert.evaluation.testset import evaluation_queries
from acebert.evaluation.trec import query_id


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A world, random vectors and their evaluation."""
    root = tmp_path_factory.mktemp("world")
    world = make_world(root)
    products = random_vectors(world.product_ids, 1)
    queries = random_vectors(world.queries, 2)
    embedded = write_vectors(root / "embedded", products, queries)
    stage = evaluate_embeddings(world.settings, world.ingested, embedded, "random")
    return world, products, queries, stage


def by_query(directory: Path, measures) -> dict:
    qrels = list(ir_measures.read_trec_qrels(str(directory / "qrels.trec")))
    run = list(ir_measures.read_trec_run(str(directory / "run.trec")))
    values: dict = {measure: {} for measure in measures}
    for metric in ir_measures.iter_calc(measures, qrels, run):
        values[metric.measure][metric.query_id] = metric.value
    return values


def test_recall_ndcg_and_mrr_are_those_of_ir_measures_on_the_trec_files(evaluated):
    _, _, _, stage = evaluated
    columns = {R @ 10: "recall_10", R @ 50: "recall_50", nDCG @ 10: "ndcg_10", RR @ 100: "rr"}
    theirs = by_query(stage.path, list(columns))
    rows = pq.read_table(stage.path / "per_query.parquet").to_pylist()
    for measure, column in columns.items():
        values = {query_id(row["query"]): row[column] for row in rows if row["n_targets"]}
        assert values == pytest.approx(theirs[measure], abs=1e-6)
        name = "mrr" if column == "rr" else column
        overall = read_metrics(stage.path)["overall"][name]
        assert overall == pytest.approx(np.mean(list(theirs[measure].values())))


def test_gauc_is_sklearns_auc_of_each_search_weighted_by_impressions(evaluated):
    world, products, queries, stage = evaluated
    searches: dict = {}
    for search, query, product, clicked in world.shown:
        score = float(queries[query].astype(np.float32) @ products[product].astype(np.float32))
        searches.setdefault(search, []).append((clicked, score))
    aucs, weights = [], []
    for rows in searches.values():
        clicked, score = zip(*rows, strict=True)
        if 0 < sum(clicked) < len(clicked):
            aucs.append(roc_auc_score(clicked, score))
            weights.append(len(rows))
    metrics = read_metrics(stage.path)
    assert metrics["overall"]["gauc"] == pytest.approx(np.average(aucs, weights=weights), abs=1e-6)
    assert metrics["counts"]["groups"] == len(aucs)
    low, high = metrics["interval"]["gauc"].values()
    assert low < metrics["overall"]["gauc"] < high


def test_the_run_is_the_exact_order_of_the_dot_products(evaluated):
    _, products, queries, stage = evaluated
    lists = pq.read_table(stage.path / "top.parquet").to_pylist()
    matrix = np.stack(list(products.values()))
    for row in lists:
        order = np.argsort(-(matrix @ queries[row["query"]]))
        assert [p for p in row["product"] if p >= 0] == order.tolist()


def test_what_the_model_and_bm25_find_adds_up_to_all_targets(evaluated):
    world, _, _, stage = evaluated
    beyond = read_metrics(stage.path)["beyond_bm25"]
    shares = [beyond[name] for name in ("model_only", "bm25_only", "both", "neither")]
    assert sum(shares) == pytest.approx(1)
    bm25 = evaluate_baselines(world.settings, world.ingested).path / "bm25_titles_hot"
    table = pq.read_table(bm25 / "per_target.parquet")
    found = table["greater"].to_numpy() < 100  # 60 products: what is returned at all is found
    assert beyond["bm25_only"] + beyond["both"] == pytest.approx(found.mean())


def test_the_index_that_is_kept_finds_what_exact_search_finds(evaluated):
    from acebert.index import ProductIndex

    world, products, queries, stage = evaluated
    index = ProductIndex.load(stage.path / "index")
    query = np.stack(list(queries.values())).astype(np.float32)
    _, rows = index.search(query, 1)
    best = (query @ np.stack(list(products.values())).T.astype(np.float32)).argmax(axis=1)
    assert [index.product_ids[r] for r in rows[:, 0]] == [world.product_ids[b] for b in best]


def test_perfect_vectors_reach_the_top(tmp_path: Path):
    world = make_world(tmp_path)
    # Products are unit axes; a query is the sum of what was clicked for it.
    products = dict(zip(world.product_ids, np.eye(len(world.product_ids)), strict=True))
    queries = {}
    for query in world.queries:
        own = [products[p] for q, p in world.clicked if q == query]
        queries[query] = np.sum(own, axis=0) / np.sqrt(len(own))
    embedded = write_vectors(tmp_path / "embedded", products, queries)
    stage = evaluate_embeddings(world.settings, world.ingested, embedded, "perfect")
    overall = read_metrics(stage.path)["overall"]
    assert overall["recall_50"] == overall["mrr"] == 1.0
    assert overall["ndcg_50"] == pytest.approx(1.0)


def test_the_row_with_clicks_is_that_of_all_products_scores_raised_by_past_clicks(evaluated):
    world, products, queries, stage = evaluated
    weight = world.settings.serve.click_weight
    clicks: dict[tuple[str, int], int] = {}
    for day in ("pairs", "valid_pairs"):
        for row in pq.read_table(world.ingested.path / f"{day}.parquet").to_pylist():
            key = world.queries[row["query"]], row["product"]
            clicks[key] = clicks.get(key, 0) + row["clicks"]
    matrix = np.stack(list(products.values()))

    def scores(query: str) -> np.ndarray:
        past = [clicks.get((query, row), 0) for row in range(len(matrix))]
        return matrix @ queries[query] + weight * np.log1p(past)

    own = stage.path / "with_clicks"
    hits = {query: [] for query, _ in world.clicked}
    for query, product in world.clicked:
        order = np.argsort(-scores(query))[:10]
        hits[query].append(world.product_ids.index(product) in order)
    recall_10 = read_metrics(own)["overall"]["recall_10"]
    assert recall_10 == pytest.approx(np.mean([np.mean(found) for found in hits.values()]))
    assert recall_10 != read_metrics(stage.path)["overall"]["recall_10"]
    searches: dict = {}
    for search, query, product, clicked in world.shown:
        score = scores(query)[world.product_ids.index(product)]
        searches.setdefault(search, []).append((clicked, score))
    usable = [list(zip(*rows, strict=True)) for rows in searches.values()]
    usable = [(clicked, score) for clicked, score in usable if 0 < sum(clicked) < len(clicked)]
    aucs = [roc_auc_score(clicked, score) for clicked, score in usable]
    expected = np.average(aucs, weights=[len(clicked) for clicked, _ in usable])
    assert read_metrics(own)["overall"]["gauc"] == pytest.approx(expected, abs=1e-6)


def test_clicks_that_count_nothing_leave_a_models_row_as_it_is_ties_and_all(tmp_path: Path):
    world = make_world(tmp_path)
    products = random_vectors(world.product_ids, 1)
    for twin, product in (("sku-001", "sku-000"), ("sku-003", "sku-000"), ("sku-031", "sku-030")):
        products[twin] = products[product]
    embedded = write_vectors(tmp_path / "e", products, random_vectors(world.queries, 2))
    serve = world.settings.serve.model_copy(update={"click_weight": 0.0})
    settings = world.settings.model_copy(update={"serve": serve})
    stage = evaluate_embeddings(settings, world.ingested, embedded, "random")
    with_clicks = read_metrics(stage.path / "with_clicks")["overall"]
    assert with_clicks == pytest.approx(read_metrics(stage.path)["overall"])


def test_baselines_are_a_directory_a_row_of_the_same_layout(evaluated):
    world, _, _, model = evaluated
    stage = evaluate_baselines(world.settings, world.ingested)
    assert stage.reused  # the model's evaluation made it
    own = {"per_query.parquet", "per_target.parquet", "per_search.parquet", "run.trec"}
    own |= {"qrels.trec", "top.parquet", "metrics.json"}
    assert own <= {path.name for path in model.path.iterdir()}
    for name in BASELINES[:-1]:
        assert {path.name for path in (stage.path / name).iterdir()} == own
    position = read_metrics(stage.path / "position")
    assert "recall_100" not in position["overall"]
    ranks: dict = {}
    table = pq.read_table(world.ingested.path / "test_impressions.parquet").to_pylist()
    for row in table:
        ranks.setdefault(row["search"], []).append((row["clicked"], -row["position"]))
    usable = [list(zip(*r, strict=True)) for r in ranks.values() if 0 < sum(c for c, _ in r) < 8]
    expected = np.mean([roc_auc_score(clicked, score) for clicked, score in usable])
    assert position["overall"]["gauc"] == pytest.approx(expected)


def test_searches_without_a_position_are_left_out_of_the_engines_row(tmp_path: Path):
    world = make_world(tmp_path)
    path = world.ingested.path / "test_impressions.parquet"
    table = pq.read_table(path)
    position = [None, *table["position"].to_pylist()[1:]]
    first = table["search"][0].as_py()
    column = pa.array(position, table.schema.field("position").type)
    at = table.column_names.index("position")
    pq.write_table(table.set_column(at, "position", column), path)
    metrics = read_metrics(evaluate_baselines(world.settings, world.ingested).path / "position")
    aucs = []
    for search in set(table["search"].to_pylist()) - {first}:
        rows = table.filter(pc.field("search") == search)
        clicked = rows["clicked"].to_pylist()
        if 0 < sum(clicked) < len(clicked):
            aucs.append(roc_auc_score(clicked, [-p for p in rows["position"].to_pylist()]))
    assert metrics["overall"]["gauc"] == pytest.approx(np.mean(aucs))
    assert metrics["notes"] == ["1 searches with a row that has no position are left out"]


def test_a_bare_click_log_has_no_gauc_and_says_why(tmp_path: Path):
    world = make_world(tmp_path, negatives=False)
    stage = evaluate_baselines(world.settings, world.ingested)
    metrics = read_metrics(stage.path / "bm25_titles")
    assert metrics["overall"]["gauc"] is None
    assert metrics["overall"]["recall_100"] > 0
    assert "GAUC needs negatives" in metrics["notes"][0]
    assert "GAUC needs negatives" in rows_table([Row.of(stage.path / "bm25_titles")])


def test_judgements_are_measured_beside_the_clicks(tmp_path: Path):
    world = make_world(tmp_path)
    # 'red shirt' was searched; 'Zenith  HAT' never was; one product has left the catalogue.
    qrels = tmp_path / "judged.qrels"
    qrels.write_text(
        "red+shirt 0 sku-000 2\nred+shirt 0 gone 1\nred+shirt 0 sku-001 0\n"
        "Zenith++HAT 0 sku-024 1\n"
    )
    settings = world.settings.model_copy(
        update={"eval": world.settings.eval.model_copy(update={"qrels": f"file://{qrels}"})}
    )
    assert "zenith hat" in evaluation_queries(settings, world.ingested)
    stage = evaluate_baselines(settings, world.ingested)
    judged = read_metrics(stage.path / "bm25_titles")["judged"]
    assert judged["queries"] == 2
    assert judged["left_out_unknown_products"] == 1
    assert world.titles[24] == "zenith red hat"
    assert world.titles[0] == "acme red shirt"
    assert judged["recall_50"] == 1.0
    counts = read_metrics(stage.path / "bm25_titles")["counts"]
    assert counts["queries_with_targets"] == 20  # judgements are no clicks


def spoil(world: World, root: Path, products=None, queries=None) -> Path:
    own = random_vectors(world.product_ids, 1), random_vectors(world.queries, 2)
    return write_vectors(root / "bad", own[0] | (products or {}), own[1] | (queries or {}))


@pytest.mark.parametrize(
    ("products", "queries", "says"),
    [
        ({"sku-007": np.full(16, np.nan)}, None, "product 'sku-007' is not finite"),
        (None, {"red hat": np.full(16, np.inf)}, "query 'red hat' is not finite"),
        ({"sku-007": np.ones(16)}, None, "product 'sku-007' is not of length 1"),
        ({"sku-007": np.ones(3)}, None, "lists of one length"),
    ],
)
def test_bad_vectors_are_refused_by_name(world, tmp_path, products, queries, says):
    embedded = spoil(world, tmp_path, products, queries)
    with pytest.raises(UserError, match=says):
        evaluate_embeddings(world.settings, world.ingested, embedded, "bad")


def test_missing_products_queries_files_and_columns_are_named(world, tmp_path):
    products, queries = random_vectors(world.product_ids, 1), random_vectors(world.queries, 2)

    def evaluate(products, queries):
        embedded = write_vectors(tmp_path / "bad", products, queries)
        evaluate_embeddings(world.settings, world.ingested, embedded, "bad")

    with pytest.raises(UserError, match="no embedding of product 'sku-003'"):
        evaluate({k: v for k, v in products.items() if k != "sku-003"}, queries)
    with pytest.raises(UserError, match=r"no embedding of query 'blue bag' \(1 of 20"):
        evaluate(products, {k: v for k, v in queries.items() if k != "blue bag"})
    with pytest.raises(UserError, match="one model"):
        evaluate(products, random_vectors(world.queries, 2, dimensions=8))
    with pytest.raises(UserError, match=r"nowhere/products\.parquet: cannot be read"):
        evaluate_embeddings(world.settings, world.ingested, tmp_path / "nowhere", "bad")
    pq.write_table(pa.table({"id": ["sku-000"]}), tmp_path / "bad" / "products.parquet")
    with pytest.raises(UserError, match="columns product_id and embedding"):
        evaluate_embeddings(world.settings, world.ingested, tmp_path / "bad", "bad")


def test_rows_of_several_seeds_are_compared_over_seeds_and_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    world = make_world(tmp_path)
    perfect = dict(zip(world.product_ids, np.eye(len(world.product_ids)), strict=True))
    queries = {}
    for query in world.queries:
        own = [perfect[p] for q, p in world.clicked if q == query]
        queries[query] = np.sum(own, axis=0) / np.sqrt(len(own))

    def row(name: str, noise: float, seed: int) -> Path:
        rng = np.random.default_rng(seed)
        moved = {}
        for product, vector in perfect.items():
            own = vector + noise * rng.standard_normal(len(vector))
            moved[product] = own / np.linalg.norm(own)
        embedded = write_vectors(tmp_path / f"{name}{seed}", moved, queries)
        return evaluate_embeddings(world.settings, world.ingested, embedded, name).path

    good = [row("good", 0.05, seed) for seed in (1, 2, 3)]
    bad = [row("bad", 1.0, seed) for seed in (4, 5, 6)]
    worse = [row("worse", 1.0, seed) for seed in (7, 8, 9)]
    for metric, group in (
        ("recall_10", None),
        ("gauc", None),
        ("recall_10", "title_lacks"),
        ("gauc", "unseen"),
    ):
        assert compare(good, bad, metric, group).low > 0, (metric, group)
        assert not compare(bad, worse, metric, group).excludes_zero, (metric, group)
    assert interval_of_seeds(good, "recall_10").value == pytest.approx(
        np.mean(
            [json.loads((d / "metrics.json").read_text())["overall"]["recall_10"] for d in good]
        )
    )
    value = compare(good, bad, "recall_10", "title_lacks").value
    parts = [
        np.mean([read_metrics(d)["breakdown"]["title_lacks"]["recall_10"] for d in seeds])
        for seeds in (good, bad)
    ]
    assert value == pytest.approx(parts[0] - parts[1])
    mean = interval_of_seeds(good, "gauc").value
    cells = [line.split() for line in rows_table([Row("good", tuple(good))]).splitlines()]
    assert ["3", f"{mean:.3f}"] in [[c[3], c[5]] for c in cells if c[1:2] == ["good"]]
    of_20 = differences_table(Row("good", tuple(good)), Row("bad", tuple(bad)))
    assert "] *" not in of_20
    assert "of 30 queries or more" in " ".join(of_20.split())
    monkeypatch.setattr(tables, "LEAST_QUERIES", 1)  # to see what else decides
    lines = differences_table(Row("good", tuple(good)), Row("bad", tuple(bad))).splitlines()
    found = compare(good, bad, "gauc")
    (overall,) = [line for line in lines if line.startswith("│ all ")]
    assert f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}] *" in overall
    noise = differences_table(Row("worse", tuple(worse)), Row("bad", tuple(bad)))
    assert "*" not in noise.split("title lacks")[1].split("\n")[0]
    once = differences_table(Row("good", tuple(good[:1])), Row("bad", tuple(bad)))
    assert compare(good[:1], bad, "gauc").excludes_zero
    assert "*" not in once
    assert "one seed: not claimed" in once
    baselines = evaluate_baselines(world.settings, world.ingested).path
    untrained = differences_table(Row("good", tuple(good)), Row.of(baselines / "bm25_titles"))
    assert " *" in untrained
    assert "one seed" not in untrained
    with pytest.raises(UserError, match="no group 'odd'"):
        compare(good, bad, "gauc", "odd")
    with pytest.raises(UserError, match="Recall only"):
        compare(good, bad, "gauc", "cold")
    with pytest.raises(UserError, match="no metric 'recall_7'"):
        compare(good, bad, "recall_7")


def test_the_table_shows_a_dash_for_what_a_row_does_not_have(evaluated):
    world, _, _, model = evaluated
    baselines = evaluate_baselines(world.settings, world.ingested).path
    directories = [model.path, model.path / "hybrid_bm25", baselines / "position"]
    table = rows_table([Row.of(directory) for directory in directories])
    lines = {line.split("│")[1].strip(): line for line in table.splitlines() if "│" in line}
    gauc = read_metrics(model.path)["overall"]["gauc"]
    assert f"{gauc:.3f} ±" in lines["random"]
    cells = [cell.strip() for cell in lines["position"].split("│")[2:-1]]
    assert cells[0] != "-"
    assert cells[1:] == ["-"] * 4
    assert lines["hybrid_bm25"].split("│")[2].strip() == "-"


def test_a_directory_that_is_no_row_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"has no metrics\.json"):
        Row.of(tmp_path)
