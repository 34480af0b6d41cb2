from pathlib import Path

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import RR, R, nDCG

from acebert.errors import UserError
from acebert.evaluation.ranking import ndcg, reciprocal_rank
from acebert.evaluation.recall import DotProduct, recall, search_catalogue
from acebert.evaluation.trec import (
    Judgement,
    product_no,
    query_id,
    read_qrels,
    write_qrels,
    write_run,
)


def test_a_query_is_its_text_with_spaces_as_plus():
    assert query_id("red shoes") == "red+shoes"
    assert query_id("50% off + more") == "50%25+off+%2B+more"


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_query_and_product_id_read_back_as_they_were(tmp_path_factory, query, product_id):
    assert not any(c.isspace() for c in query_id(query) + product_no(product_id))
    path = tmp_path_factory.mktemp("trec") / "qrels.trec"
    write_qrels(path, [Judgement(query, product_id, 2)])
    assert read_qrels(path) == [Judgement(query, product_id, 2)]


def test_ordinary_product_ids_stay_as_they_are():
    for product_id in ("10001", "sku-7/blue:XL", "größe_1".encode("ascii", "ignore").decode()):
        assert product_no(product_id) == product_id


def test_metrics_equal_those_of_ir_measures_on_the_files(tmp_path: Path):
    rng = np.random.default_rng(0)
    queries, products = (rng.standard_normal((n, 16)).astype(np.float32) for n in (50, 400))
    texts = [f"query no {i}" for i in range(50)]
    ids = [f"p/{i}" for i in range(400)]
    pairs = np.unique(rng.integers(0, 50 * 400, 300))
    query, product = np.divmod(pairs, 400)
    grade = rng.integers(1, 4, len(pairs))
    found = search_catalogue(DotProduct(queries, products), 50, query, product, 100)
    write_run(tmp_path / "run", texts, ids, found.top, found.top_score, "ours")
    write_qrels(
        tmp_path / "qrels",
        [
            Judgement(texts[q], ids[p], int(g))
            for q, p, g in zip(query, product, grade, strict=True)
        ],
    )

    measures = [R @ 10, R @ 100, nDCG @ 10, nDCG @ 100, RR @ 100]
    theirs: dict = {measure: {} for measure in measures}
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "qrels")))
    run = list(ir_measures.read_trec_run(str(tmp_path / "run")))
    for metric in ir_measures.iter_calc(measures, qrels, run):
        theirs[metric.measure][metric.query_id] = metric.value

    def check(measure, ours):
        for q in np.unique(query):
            assert ours[q] == pytest.approx(theirs[measure][query_id(texts[q])], abs=1e-6)

    ranks = (found.greater, found.equal)
    for k in (10, 100):
        check(R @ k, recall(*ranks, query, 50, k))
        check(nDCG @ k, ndcg(*ranks, grade.astype(float), query, 50, k))
    check(RR @ 100, reciprocal_rank(*ranks, query, 50, 100))


def test_a_run_leaves_out_the_places_that_hold_nothing(tmp_path: Path):
    top = np.array([[1, 0], [0, -1]], np.int32)
    score = np.array([[0.5, 0.25], [2.0, -np.inf]], np.float32)
    write_run(tmp_path / "run", ["red shoes", "hat"], ["a", "b c"], top, score, "my model")
    assert (tmp_path / "run").read_text().splitlines() == [
        "red+shoes Q0 b%20c 1 0.5 my%20model",
        "red+shoes Q0 a 2 0.25 my%20model",
        "hat Q0 a 1 2 my%20model",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("red shoes 0 p1 1\n", "line 1: 5 columns instead of 4"),
        ("red+shoes 0 p1 1\nhat 0 p2 good\n", "line 2: the grade must be a whole number"),
        ("\n", "holds no judgement"),
    ],
)
def test_a_bad_qrels_file_is_refused_with_its_line(tmp_path: Path, text: str, says: str):
    (tmp_path / "qrels").write_text(text)
    with pytest.raises(UserError, match=says):
        read_qrels(tmp_path / "qrels")


@pytest.mark.parametrize("where", ["{}/nowhere", "file://{}/nowhere", "nosuch://bucket/qrels"])
def test_a_missing_qrels_file_is_named(where: str, tmp_path: Path):
    where = where.format(tmp_path)
    with pytest.raises(UserError, match=f"^{where}: cannot be read"):
        read_qrels(where)


def test_qrels_are_read_from_a_uri(tmp_path: Path):
    (tmp_path / "qrels").write_text("red+shoes 0 p1 1\n")
    assert read_qrels(f"file://{tmp_path}/qrels") == [Judgement("red shoes", "p1", 1)]
