"""The page of all parts, opened in Chromium as a reader would."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acebert.evaluation.tables import Row
from acebert.report import report
from acebert.report.gains import value_of
from acebert.report.page import duration
from acebert.report.parts import (
    CLICK_LOOKUP,
    PARTS,
    TABLES,
    WITH_ADVERSARY,
    WITHOUT_ADVERSARY,
    systems_of,
)
from acebert.report.report import Given, report_stage
from acebert.report.rows import RIVAL
from acebert.report.rows_figure import rows_panel
from acebert.report.run import Results
from acebert.report.style import Panel
from acebert.workdir import Stage

COMMAND = ("reproduce.py", "--seeds", "0", "1", "--model.backbone", "my bert")
GIVEN = Given(PARTS, dict.fromkeys(PARTS, (0, 1)), COMMAND)


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
    assert page.title() == "ACE-BERT: the paper's tables on this data"
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
    """Every row and column of each, no empty cell, and a number wherever there is one."""
    page, _ = opened
    tables = [table for part in PARTS for table in TABLES.get(part, ())]
    for table in tables:
        names = [table.aliases.get(s.name, s.name) for s in table.systems]
        after = page.locator(f"#{table.key} ~ .scroll").first
        rows = [row.split("\t") for row in after.locator("tbody tr").all_inner_texts()]
        shown = [row[0].strip() for row in rows]
        assert shown[-len(names) :] == names
        columns = len(table.metrics)
        beyond = 0 if table.paper else 2  # the validation day's
        assert {len(row) for row in rows} == {4 + columns + beyond}
        assert all(cell.strip() for row in rows for cell in row)
        own = {table.aliases.get(s.name, s.name): s.name for s in table.systems}
        for first, *cells in rows:
            measured = made.results.rows[own.get(first.strip(), first.strip())]
            there = [measured.row.measured(metric) is not None for metric in table.metrics]
            there += [bool(measured.valid)] * beyond + [measured.seconds is not None] * 3
            assert ["–" not in cell.split("\n")[0] for cell in cells] == there, first
        gains = page.locator(f"#{table.key} ~ .scroll").nth(1).locator("tbody tr")
        for text in gains.all_inner_texts():
            # A fusion has no GAUC; nothing is so many times a look-up's zero on unseen queries.
            missing = 3 if "+ BM25" in text else 1 if text.split("\n")[1] == CLICK_LOOKUP else 0
            assert text.count("–") == missing, text
    everything = page.locator("body").inner_text()
    summary = json.loads((_path(page) / "numbers.json").read_text())["summary"]
    for sentence in summary:
        assert sentence in everything
    assert any("number of partitions" in sentence for sentence in summary)
    assert "no model <is> given" in everything  # escaped, not swallowed
    assert "Figure 5, point n/(P·W) = 1 (seeds 2 of 3): out of memory" in everything
    assert "reproduce.py --seeds 0 1 --model.backbone 'my bert'" in everything
    for code in ("c0de0", "c0de1"):
        assert everything.count(f"an abacus, 2 CPUs, code {code}") == 1
    assert "unseen queries, n = 4" in everything
    assert "one seed, 1 of" in everything  # the rival's
    departures = page.locator("#departures").inner_text()
    assert "train.lr: 0.001 (paper: 5e-05)" in departures
    assert "TwinBERT + MLM: " in departures
    page.locator("details summary").first.click()
    assert "model=mini-lm" in page.locator("details").first.inner_text()


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
    assert null["count"] == 48
    bad, as_bad = (value_of(Row("", made.rows[level]), "gauc") for level in ("bad", "as bad"))
    assert null["difference"]["value"] == pytest.approx(as_bad - bad)
    assert null["difference"]["low"] < 0 < null["difference"]["high"]
    assert numbers["seeds"]["ACE-BERT"] == [0, 1]
    assert numbers["seeds"]["BM25, titles"] == []
    (unseen,) = [
        group
        for group in numbers["tables"]["table1"]["groups"]
        if (group["queries"], group["metric"]) == ("unseen", "gauc")
    ]
    assert unseen["count"] == 4
    told = value_of(Row("", made.rows["good"]), "gauc", "unseen")
    assert unseen["rows"]["ACE-BERT"] == pytest.approx(told)
    beside_rival = [g for g in numbers["tables"]["table1"]["gains"] if g["beside"] == RIVAL]
    assert {gain["verdict"] for gain in beside_rival} == {
        "the other alone is pre-trained: not claimed"  # the rows of the page start from nothing
    }
    assert numbers["validation_day"]["ACE-BERT"] == {"gauc": 0.625, "recall_100": 0.875}
    assert numbers["data"]["products"]["rows_kept"] == 144
    losses = numbers["final_losses"]["ACE-BERT"]
    # By seed, the mean of the last six of 60 steps: 8 - 4 * 56.5 / 59 and noise of 0.1.
    assert losses == pytest.approx([8 - 4 * 56.5 / 59] * 2, abs=0.2)
    assert [point["seeds"] for point in numbers["partitions"]] == [[0, 1]] * 3
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
    given = Given(("fig6", "fig7"), {"fig6": (0,), "fig7": (0,)}, COMMAND)
    page = report_stage(made.settings, made.ingested, given, Results(rows), None)
    text = (page.path / "report.html").read_text()
    assert "Figure 7: CE-BERT + hot queries: fewer than 20 distinct vectors" in text
    assert '<h2 id="fig6">' in text
    assert '<h2 id="fig7">' not in text


def test_a_figure_that_cannot_be_drawn_costs_itself_alone_and_is_named(
    made, tmp_path: Path
) -> None:
    """A history, an evaluation and vectors that are broken, and a table's row without a number."""
    broken = _broken_vectors(made.results.rows["ACE-BERT"].embedded[0], tmp_path / "vectors")
    rows = {
        system.name: replace(
            made.results.rows[system.name], models=(tmp_path,) * 2, embedded=(broken,) * 2
        )
        for system in (WITHOUT_ADVERSARY, WITH_ADVERSARY)
    }
    for name in ("report.json", "stage.json"):
        shutil.copy(made.results.rows["ACE-BERT"].models[0] / name, tmp_path)
    trials = pq.read_table(made.swept / "trials.parquet").to_pylist()
    gone = [{**trial, "test_row": str(tmp_path / "gone")} for trial in trials]
    pq.write_table(pa.Table.from_pylist(gone), tmp_path / "trials.parquet")
    parts = ("table4", "fig5", "fig6", "fig7")
    given = Given(parts, dict.fromkeys(parts, (0, 1)), COMMAND)
    page = report_stage(made.settings, made.ingested, given, Results(rows), tmp_path)
    left_out = json.loads((page.path / "numbers.json").read_text())["left_out"]
    assert "is missing" in left_out.pop("Figure 5")
    assert "history.parquet" in left_out.pop("Figure 6")
    assert left_out.pop("Figure 7").startswith("ValueError: ")
    assert list(left_out) == ["Figure 5, point n/(P·W) = 1 (seeds 2 of 3)"]
    text = (page.path / "report.html").read_text()
    assert '<h2 id="table4">' in text
    assert not [number for number in (5, 6, 7) if f'<h2 id="fig{number}">' in text]


def _broken_vectors(whole: Path, out: Path) -> Path:
    """Queries with one dimension less than the products."""
    out.mkdir()
    shutil.copy(whole / "products.parquet", out)
    queries = pq.read_table(whole / "queries.parquet")
    vectors = np.array(queries["embedding"].to_pylist(), np.float32)[:, :-1]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = pa.table({"query": queries["query"], "embedding": vectors.tolist()})
    pq.write_table(table, out / "queries.parquet")
    return out


def test_a_panel_that_cannot_be_drawn_leaves_the_table_its_others(
    made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(key: str, metric: str, *of: Any) -> Panel:
        if metric == "gauc":
            raise RuntimeError("no such font")
        return rows_panel(key, metric, *of)

    monkeypatch.setattr(report, "rows_panel", draw)
    given = Given(("table3",), {"table3": (0, 1)}, COMMAND)
    page = report_stage(made.settings, made.ingested, given, made.results, None)
    left_out = json.loads((page.path / "numbers.json").read_text())["left_out"]
    told = left_out["Table 3: what the model reads of a photo, figure of GAUC"]
    assert told == "RuntimeError: no such font"
    assert [f.name for f in (page.path / "figures").iterdir()] == ["table3_recall_100.png"]


def test_rows_of_one_seed_claim_nothing_on_the_page_and_it_says_what_gives_more(made) -> None:
    rows = {
        name: replace(measured, row=replace(measured.row, seeds=measured.row.seeds[:1]))
        for name, measured in made.results.rows.items()
    }
    given = Given(("table4",), {"table4": (0,)}, COMMAND)
    page = report_stage(made.settings, made.ingested, given, Results(rows), None)
    numbers = json.loads((page.path / "numbers.json").read_text())
    verdicts = {gain["verdict"] for gain in numbers["tables"]["table4"]["gains"]}
    assert verdicts == {"one seed: not claimed"}
    (told,) = [sentence for sentence in numbers["summary"] if "--seeds 0 1 2" in sentence]
    assert told.startswith("Nothing is claimed of rows that were trained with one seed, ")
    text = unescape((page.path / "report.html").read_text())
    assert told in text
    assert set(re.findall(r'<span class="tag (\w+)">', text)) == {"open"}


def test_figures_of_rows_without_a_common_seed_are_told_to_be_left_out(made) -> None:
    rows = dict(made.results.rows)
    rows["ACE-BERT"] = replace(rows["ACE-BERT"], seeds=(7, 8))
    parts = ("table1", "fig6", "fig7")
    given = Given(parts, dict.fromkeys(parts, (0, 1)), COMMAND)
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
