"""What the report consists of: parts, seeds, rows and steps."""

import pytest

from acebert.config import flatten, load_settings
from acebert.errors import UserError
from acebert.report import rows
from acebert.report.parts import (
    BEYOND,
    PARTS,
    TABLES,
    seeds_by_part,
    systems_of,
    told_apart_by,
)
from acebert.report.rows import WHAT_A_ROW_IS


def test_parts_come_in_their_own_order_and_once_whatever_the_command_line_says() -> None:
    given = ["fig6", "table4", "table1", "table4"]
    found = seeds_by_part(given, [1, 2], [2, 3, 4])
    assert list(found.items()) == [("table1", (2, 3, 4)), ("table4", (1, 2)), ("fig6", (1, 2))]
    assert list(systems_of(given)) == ["table1", "table4", "fig6"]
    assert list(systems_of(set(PARTS))) == list(PARTS)


def test_a_seed_that_is_given_twice_is_refused_by_its_option() -> None:
    with pytest.raises(UserError, match="--seeds 0 1 0: a seed is given twice"):
        seeds_by_part(["table3"], [0, 1, 0], None)
    with pytest.raises(UserError, match="--table1_seeds 4 4: a seed is given twice"):
        seeds_by_part(["table1"], [0], [4, 4])


def test_seeds_of_table_1_that_fig_6_and_7_share_none_of_are_refused_before_any_training() -> None:
    for figure in ("fig6", "fig7"):
        with pytest.raises(UserError, match="--table1_seeds 3 4: none is among --seeds"):
            seeds_by_part(["table1", figure], [0, 1], [3, 4])
    assert seeds_by_part(["table1", "table4"], [0, 1], [3, 4])["table1"] == (3, 4)


def test_what_a_part_tells_its_rows_apart_by_is_no_setting_of_all_rows() -> None:
    of_the_paper = told_apart_by(["table1", "table3", "table4"])
    assert of_the_paper == set(WHAT_A_ROW_IS)
    assert told_apart_by(["beyond"]) - of_the_paper == {
        *("loss.hard_negatives", "loss.gamma_learned", "loss.matryoshka_dims"),
        *("eval.dimensions", "image.pixel_source"),
    }


def test_the_confusion_row_has_the_adversary_of_acebert_plus() -> None:
    row = load_settings(["--recipe", "acebert", *rows.CONFUSION.changed])
    assert row.adversary == load_settings(["--recipe", "acebert_plus"]).adversary


def test_every_step_is_between_rows_of_its_table() -> None:
    for tables in TABLES.values():
        for table in tables:
            shown = {*table.untrained, *(system.name for system in table.systems)}
            assert {name for s in table.steps for name in (s.row, s.beside)} <= shown, table.key


@pytest.mark.parametrize(
    ("row", "beside"),
    [
        ("acebert_plus + BM25", "acebert_plus"),
        ("ACE-BERT + BM25", "BM25, titles + hot queries"),
        ("the same, clicks of the log masked", "one mined negative a pair"),
        ("Matryoshka, cut to 64", "Matryoshka, all dimensions"),
        ("Matryoshka, cut to 32", "Matryoshka, all dimensions"),
    ],
)
def test_beyond_the_paper_a_row_is_set_beside_what_it_differs_from_in_one_thing(
    row: str, beside: str
) -> None:
    assert (row, beside) in {(s.row, s.beside) for table in BEYOND for s in table.steps}


@pytest.mark.parametrize("size", ["", "_tiny"])
def test_what_tells_the_papers_systems_apart_is_no_setting_of_all_rows(size: str) -> None:
    """Of the settings in which their recipes differ the others are no system's own: which crop
    pixels are of, pooling, decay; and a start for all rows may be given."""
    names = ("twinbert", "twinbert_mlm", "fashionbert", "cebert", "acebert", "acebert_plus")
    recipes = [flatten(load_settings(["--recipe", f"{name}{size}"]).model_dump()) for name in names]
    differ = {leaf for leaf in recipes[0] if len({str(recipe[leaf]) for recipe in recipes}) > 1}
    allowed = {
        *("recipe", "model.start", "image.pixel_source", "image.max_megapixels"),
        *("model.pooling", "train.weight_decay", "train.decay"),
    }
    assert differ - allowed == set(WHAT_A_ROW_IS)
