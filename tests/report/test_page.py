"""The page of all parts, opened in Chromium as a reader would."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acebert.report.page import duration
from acebert.report.parts import PARTS, TABLES, WITH_ADVERSARY, WITHOUT_ADVERSARY, systems_of
from acebert.report.report import Given, report_stage
from acebert.report.run import Results
from acebert.workdir import Stage

GIVEN = Given(PARTS, dict.fromkeys(PARTS, (0, 1)), ("--train.max_steps", "8"))


@pytest.fixture(scope="module")
def stage(made) -> Stage:
    return report_stage(made.settings, made.ingested, GIVEN, made.results, made.swept)


@pytest.fixture(scope="module", params=[1280, 390], ids=["desktop", "phone"])
def opened(stage: Stage, request: pytest.FixtureRequest) -> Iterator[tuple[Any, list[str]]]:
    """The page, and what went wrong while it was opened."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on the PATH (apt-get install chromium)")
    wrong: list[str] = []
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": request.param, "height": 900})
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda asked: (
                wrong.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None
            ),
        )
        page.goto((stage.path / "report.html").as_uri())
        yield page, wrong
        browser.close()


def test_it_opens_without_an_error_and_asks_no_other_host(opened) -> None:
    page, wrong = opened
    assert page.title() == "ACE-BERT, reproduced"
    assert wrong == []


def test_all_pictures_are_there(opened) -> None:
    page, _ = opened
    widths = page.eval_on_selector_all("img", "all => all.map(i => [i.id, i.naturalWidth, i.alt])")
    names = {name for name, _, _ in widths}
    assert {"fig5_gauc", "fig6_loss", "fig7_0", "fig7_1", "table1_recall_100"} <= names
    assert all(width > 500 and alt for _, width, alt in widths)


def test_the_page_itself_never_scrolls_sideways(opened) -> None:
    page, _ = opened
    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]


def test_the_tables_are_complete(opened, made) -> None:
    """Every row and column of each, and no empty cell."""
    page, _ = opened
    tables = [table for part in PARTS for table in TABLES.get(part, ())]
    for table in tables:
        names = [table.aliases.get(s.name, s.name) for s in table.systems]
        after = page.locator(f"#{table.key} ~ .scroll").first
        rows = [row.split("\t") for row in after.locator("tbody tr").all_inner_texts()]
        shown = [row[0].strip() for row in rows]
        assert shown[-len(names) :] == names
        assert {len(row) for row in rows} == {4 + len(table.metrics)}
        assert all(cell.strip() for row in rows for cell in row)
    everything = page.locator("body").inner_text()
    for sentence in json.loads((_path(page) / "numbers.json").read_text())["summary"]:
        assert sentence in everything
    assert "no model <is> given" in everything  # escaped, not swallowed


def _path(page: Any) -> Path:
    return Path(page.url.removeprefix("file://")).parent


def test_numbers_of_the_page_are_there_for_programs(stage: Stage, made) -> None:
    numbers = json.loads((stage.path / "numbers.json").read_text())
    row = made.rows["good"]
    measured = [json.loads((d / "metrics.json").read_text())["overall"]["gauc"] for d in row]
    told = numbers["tables"]["table1"]["rows"]["gauc"]["ACE-BERT"]["value"]
    assert told == pytest.approx(sum(measured) / len(measured))
    (null,) = [
        gain
        for gain in numbers["tables"]["table1"]["gains"]
        if (gain["row"], gain["beside"]) == ("FashionBERT-Finetune", "TwinBERT")
        and (gain["metric"], gain["queries"]) == ("gauc", "all")
    ]
    assert null["verdict"] == "not shown"
    assert [point["partitions"] for point in numbers["partitions"]] == [64, 8, 1]
    figures = {path.stem for path in (stage.path / "figures").glob("*.png")}
    assert {"fig5_hard_share", "fig6_loss_end", "fig7_legend"} <= figures


def test_a_training_that_rows_share_is_paid_for_once(stage: Stage) -> None:
    systems = {system for of in systems_of(PARTS).values() for system in of}
    models = 2 * len({(system.recipe, system.changed) for system in systems})
    seconds = 90 * (models + 1) + 1000 + 60  # Figure 5's, the pre-training, the rival's
    assert f"{duration(seconds)} in all" in (stage.path / "report.html").read_text()


def test_the_same_results_are_the_same_page(stage: Stage, made) -> None:
    again = report_stage(made.settings, made.ingested, GIVEN, made.results, made.swept)
    assert again.reused
    assert again.path == stage.path


def test_vectors_too_few_to_probe_cost_figure_7_alone(made, tmp_path: Path) -> None:
    """All products have one vector, as those of one title have."""
    directory = made.results.rows["ACE-BERT"].embedded[0]
    products = pq.read_table(directory / "products.parquet")
    one = pa.array([products["embedding"][0].as_py()] * len(products))
    pq.write_table(
        pa.table({"product_id": products["product_id"], "embedding": one}),
        tmp_path / "products.parquet",
    )
    shutil.copy(directory / "queries.parquet", tmp_path)
    rows = {
        system.name: replace(made.results.rows[system.name], seeds=(0,), embedded=(tmp_path,))
        for system in (WITHOUT_ADVERSARY, WITH_ADVERSARY)
    }
    given = Given(("fig6", "fig7"), {"fig6": (0,), "fig7": (0,)}, ())
    page = report_stage(made.settings, made.ingested, given, Results(rows), None)
    text = (page.path / "report.html").read_text()
    assert "Figure 7: CE-BERT + hot queries: fewer than 20 distinct vectors" in text
    assert '<h2 id="fig6">' in text
    assert '<h2 id="fig7">' not in text


def test_figures_of_rows_without_a_common_seed_are_told_to_be_left_out(made) -> None:
    rows = dict(made.results.rows)
    rows["ACE-BERT"] = replace(rows["ACE-BERT"], seeds=(7, 8))
    parts = ("table1", "fig6", "fig7")
    given = Given(parts, dict.fromkeys(parts, (0, 1)), ())
    page = report_stage(made.settings, made.ingested, given, Results(rows), None)
    why = "CE-BERT + hot queries and ACE-BERT have no seed in common"
    left_out = json.loads((page.path / "numbers.json").read_text())["left_out"]
    assert left_out == {"Figure 6": why, "Figure 7": why}


def test_no_credentials_of_an_address_are_on_the_page_or_beside_it(made) -> None:
    address = "s3://me:pa@ss@bucket/products"
    data = made.settings.data.model_copy(update={"products": address})
    settings = made.settings.model_copy(update={"data": data})
    rows = {"ACE-BERT": replace(made.results.rows["ACE-BERT"], settings=settings)}
    arguments = ("--data.products", address, f"--data.impressions={address}")
    given = Given(("table4",), {"table4": (0, 1)}, arguments)
    page = report_stage(made.settings, made.ingested, given, Results(rows), None)
    for name in ("report.html", "numbers.json", "stage.json"):
        text = (page.path / name).read_text()
        assert "ss@" not in text
        assert ("s3://bucket/products" in text) == (name != "numbers.json")
