"""Fig. 7: who is on the picture, and a probe that finds what is there and nothing else."""

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acebert.errors import UserError
from acebert.evaluation.domain_probe import domain_probe
from acebert.report import words
from acebert.report.alignment import draw_sample
from acebert.report.alignment_figure import alignment_panels, short


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_probe_is_a_coin_on_one_cloud_and_sure_on_two() -> None:
    rng = np.random.default_rng(0)
    cloud = unit(rng.standard_normal((2000, 16)))
    same = domain_probe(cloud[:1000], cloud[1000:])
    assert same["linear"] == pytest.approx(0.5, abs=0.06)
    assert same["mlp"] == pytest.approx(0.5, abs=0.06)
    apart = domain_probe(cloud[:1000], unit(cloud[1000:] + 0.5))
    assert apart["linear"] > 0.9


def test_only_the_curved_probe_sees_a_shell_around_the_products() -> None:
    """Queries and products with one mean: no plane parts them, a hidden layer does."""
    rng = np.random.default_rng(0)
    axis = np.eye(8)[0]
    products = unit(rng.standard_normal((1500, 8)))
    queries = unit(rng.standard_normal((1500, 8)) + 4 * axis * rng.choice([-1, 1], (1500, 1)))
    found = domain_probe(queries, products)
    assert found["linear"] < 0.6
    assert found["mlp"] > 0.8


def test_equal_vectors_are_not_held_out_and_trained_on() -> None:
    """Two products with a thousand copies each would be recalled, not told."""
    rng = np.random.default_rng(0)
    products = np.repeat(unit(rng.standard_normal((20, 16))), 100, axis=0)
    queries = unit(rng.standard_normal((2000, 16)))
    assert domain_probe(queries, products)["points"] == 20  # half of twenty of either


@pytest.mark.parametrize(
    ("with_adversary", "said"),
    [
        ((0.71, 0.72, 0.73), "brings the two closer: -20.0 points"),
        ((0.97, 0.98, 0.99), "drives the two apart: +6.0 points"),
        ((0.85, 0.93, 0.97), "is not shown"),
        ((0.71,), "With one seed nothing may be claimed."),
    ],
)
def test_words_on_the_probe_follow_the_interval_over_seeds(
    with_adversary: tuple[float, ...], said: str
) -> None:
    without = (0.91, 0.92, 0.93)[: len(with_adversary)]
    assert said in words.probe_words(without, with_adversary)


def test_the_sample_is_of_the_categories_clicked_most_and_a_query_of_its_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "products").mkdir()
    category = ["hat", "hat", "bag", None, "shoe", "bag"]
    pq.write_table(
        pa.table(
            {
                "product": pa.array(range(6), pa.int32()),
                "product_id": [f"p{i}" for i in range(6)],
                "category": category,
            }
        ),
        tmp_path / "products" / "part-0.parquet",
    )
    pq.write_table(pa.table({"text": ["a", "b", "c", "d"]}), tmp_path / "queries.parquet")
    pairs = [(0, 0, 5), (0, 2, 1), (1, 2, 2), (1, 5, 2), (1, 0, 3), (2, 3, 9)]
    query, product, clicks = (pa.array(column, pa.int32()) for column in zip(*pairs, strict=True))
    pq.write_table(
        pa.table({"query": query, "product": product, "clicks": clicks}),
        tmp_path / "test_pairs.parquet",
    )
    sample = draw_sample(tmp_path)
    assert sample.categories == ["hat", "bag"]  # 8 clicks, 5; nobody clicked a shoe
    asked = zip(sample.queries, sample.of_query, strict=True)
    assert [(q, sample.categories[c]) for q, c in asked] == [("a", "hat"), ("b", "bag")]
    shown = zip(sample.products, sample.of_product, strict=True)
    assert [(p, sample.categories[c]) for p, c in shown] == [
        *(("p0", "hat"), ("p1", "hat"), ("p2", "bag"), ("p5", "bag"))
    ]
    assert len(draw_sample(tmp_path, points=1).products) == 1


def test_a_test_day_without_a_category_is_told_and_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "products").mkdir()
    products = {
        "product": pa.array([0, 1], pa.int32()),
        "product_id": ["p0", "p1"],
        "category": pa.array([None, None], pa.string()),
    }
    pq.write_table(pa.table(products), tmp_path / "products" / "part-0.parquet")
    pair = {name: pa.array([0], pa.int32()) for name in ("query", "product", "clicks")}
    pq.write_table(pa.table(pair), tmp_path / "test_pairs.parquet")
    with pytest.raises(UserError, match="no product that was clicked on the test day has a cat"):
        draw_sample(tmp_path)


def drawn_points(path: Path, names: list[str]) -> Path:
    """Three queries and three products of each category, in one system."""
    rows = [(side, name) for name in names for side in ("query", "product") for _ in range(3)]
    rng = np.random.default_rng(0)
    table = {
        "system": ["ACE-BERT"] * len(rows),
        "side": [side for side, _ in rows],
        "category": [name for _, name in rows],
        "x": rng.standard_normal(len(rows)),
        "y": rng.standard_normal(len(rows)),
    }
    pq.write_table(pa.table(table), path)
    return path


def test_a_category_with_dollars_is_drawn_as_it_is_written(tmp_path: Path) -> None:
    """As a formula it would not end."""
    panels = alignment_panels(drawn_points(tmp_path / "points.parquet", [r"$ \frac{1 $", "bag"]))
    assert [panel.name for panel in panels] == ["fig7_0", "fig7_legend"]
    assert all(panel.png.startswith(b"\x89PNG") for panel in panels)


def test_long_names_are_cut_where_they_are_alike_and_stay_inside_the_legend(
    tmp_path: Path,
) -> None:
    paths = [
        f"Apparel and Accessories > Women > Sleepwear and {last}" for last in ("Robes", "Caps")
    ]
    assert [short(name) for name in paths] == [
        "Apparel a… and Robes",
        "Apparel a…r and Caps",
    ]
    assert short("Women's shoes") == "Women's shoes"
    names = [*paths, paths[0].upper(), paths[1].upper()]
    legend = alignment_panels(drawn_points(tmp_path / "points.parquet", names))[-1]
    pixels = plt.imread(io.BytesIO(legend.png))[:, :, :3]
    assert pixels.min() < 0.5
    for edge in (pixels[:, :4], pixels[:, -4:], pixels[:4], pixels[-4:]):
        assert edge.min() == 1.0
