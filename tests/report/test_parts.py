"""What the report consists of: parts, seeds, rows and steps."""

import pytest

from acebert.config import load_settings
from acebert.errors import UserError
from acebert.report import rows
from acebert.report.parts import BEYOND, PARTS, TABLES, seeds_by_part, systems_of


def test_parts_come_in_their_own_order_and_once_whatever_the_command_line_says() -> None:
    given = ["fig6", "table4", "table1", "table4"]
    found = seeds_by_part(given, [1, 2], [3, 4, 5])
    assert list(found.items()) == [("table1", (3, 4, 5)), ("table4", (1, 2)), ("fig6", (1, 2))]
    assert list(systems_of(given)) == ["table1", "table4", "fig6"]
    assert list(systems_of(set(PARTS))) == list(PARTS)


def test_a_seed_that_is_given_twice_is_refused_by_its_option() -> None:
    with pytest.raises(UserError, match="--seeds 0 1 0: a seed is given twice"):
        seeds_by_part(["table3"], [0, 1, 0], None)
    with pytest.raises(UserError, match="--table1_seeds 4 4: a seed is given twice"):
        seeds_by_part(["table1"], [0], [4, 4])


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
        ("Matryoshka, cut to 64", "Matryoshka, 128 dimensions"),
        ("Matryoshka, cut to 32", "Matryoshka, 128 dimensions"),
    ],
)
def test_beyond_the_paper_a_row_is_set_beside_what_it_differs_from_in_one_thing(
    row: str, beside: str
) -> None:
    assert (row, beside) in {(s.row, s.beside) for table in BEYOND for s in table.steps}
