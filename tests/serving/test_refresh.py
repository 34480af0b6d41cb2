"""A new day's catalogue and log taken into a bundle, against one made from scratch."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from untrained import untrained

from acebert.config import Settings, load_settings
from acebert.data.demo import build_demo
from acebert.data.earlier import Earlier, stage_key
from acebert.data.ingest import ingest
from acebert.data.tokens import tokenize
from acebert.errors import UserError
from acebert.pipeline import Refresh, bundle_stage, refreshed_bundle_stage
from acebert.serving.bundle import Bundle, publish, published
from acebert.training.pairs import StagePaths

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

SMALL = [
    *["--demo.products", "60", "--demo.searches_per_day", "100", "--demo.days", "4"],
    *["--demo.image_side", "64", "--model.width", "32", "--model.heads", "2"],
    *["--model.layers", "1", "--text.vocab_size", "400", "--train.precision", "fp32"],
    *["--serve.hot_queries", "30", "--eval.batch_size", "8"],
]
GONE, NEW, RETITLED, NEW_PHOTO = {3, 17, 40}, {5, 20}, {8}, {11, 30}
LOST_PHOTO, FIRST_PHOTO, REPRICED, MOVED = 33, 44, 50, 51
"""rows of the first day's catalogue; NEW: those that come again under another id; MOVED: to another
category"""


@dataclass(frozen=True)
class Days:
    settings: Settings
    """of the second day"""
    model: Path
    first: Path
    """bundle of the first day"""
    second: Path
    """of the second, from the first"""
    scratch: Path
    """of the second, from nothing"""
    emptied: str
    """product whose clicks are not in the second day's log any more"""


def first_catalogue(products: pa.Table) -> pa.Table:
    rows = products.to_pylist()
    rows[FIRST_PHOTO]["image"] = None
    return pa.Table.from_pylist(rows, schema=products.schema)


def second_catalogue(products: pa.Table) -> pa.Table:
    rows = products.to_pylist()
    rows[LOST_PHOTO]["image"] = None
    rows[REPRICED]["price"] += 10
    other = next(r["category"] for r in rows if r["category"] != rows[MOVED]["category"])
    rows[MOVED]["category"] = other
    photos = {i: rows[i]["image"] for i in NEW_PHOTO}
    for i, other in zip(NEW_PHOTO, reversed(list(NEW_PHOTO)), strict=True):
        rows[i]["image"] = photos[other]
    for i in RETITLED:
        rows[i]["title"] += " deluxe"
    new = [rows[i] | {"product_id": f"new-{i}"} for i in sorted(NEW)]
    kept = [row for i, row in enumerate(rows) if i not in GONE]
    return pa.Table.from_pylist([*new, *kept], schema=products.schema)  # all rows move


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[Days]:
    work = tmp_path_factory.mktemp("refresh")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{work / 'mlflow.db'}")
        argv = ["--recipe", "acebert_tiny", "--workdir", str(work / "w"), *SMALL]
        demo = build_demo(load_settings(argv), processes=1).path
        products = pq.read_table(demo / "products.parquet")
        pq.write_table(first_catalogue(products), work / "products1.parquet")
        pq.write_table(second_catalogue(products), work / "products2.parquet")
        ids = products["product_id"].to_pylist()
        logs = sorted((demo / "impressions").glob("*.parquet"))
        shown = pa.concat_tables([pq.read_table(file) for file in logs[:3]])
        clicks = Counter(shown.filter(shown["clicked"])["product_id"].to_pylist())
        touched = GONE | NEW | RETITLED | NEW_PHOTO | {LOST_PHOTO, FIRST_PHOTO, REPRICED, MOVED}
        emptied = next(
            name for name, _ in clicks.most_common() if ids.index(name) not in touched | {*range(6)}
        )
        for day, files in ((1, logs[:3]), (2, logs)):
            (work / f"log{day}").mkdir()
            for file in files:
                table = pq.read_table(file)
                if day == 2:
                    table = table.filter(pc.not_equal(table["product_id"], emptied))
                if file == logs[3]:  # a day on which few products were seen
                    few = pa.array(ids[:6])
                    table = table.filter(pc.is_in(table["product_id"], few))
                pq.write_table(table, work / f"log{day}" / file.name)

        def on(day: int, workdir: str) -> Settings:
            files = ["--data.products", str(work / f"products{day}.parquet")]
            log = ["--data.impressions", str(work / f"log{day}")]
            return load_settings([*argv, *files, *log, "--workdir", str(work / workdir)])

        settings = on(1, "w")
        model = model_of(settings, work / "model")
        first = bundle_stage(settings, model, model, Refresh(None)).path
        publish(settings.workdir, first)
        settings = on(2, "w")
        earlier = Earlier.of_bundle(published(settings.workdir))
        second = bundle_stage(settings, model, model, Refresh(earlier)).path
        scratch = bundle_stage(on(2, "scratch"), model, model, Refresh(None)).path
        yield Days(settings, model, first, second, scratch, emptied)


def model_of(settings: Settings, directory: Path) -> Path:
    data = settings.data
    assert data.products is not None
    assert data.impressions is not None
    ingested = ingest(settings, data.products, data.impressions, hold_out=False)
    paths = StagePaths(ingested.path, tokenize(settings, ingested).path, None)
    return untrained(settings, paths, directory, seed=0)


def stage_of(bundle: Path, *names: str) -> Path:
    """The stage that a bundle was made of: embed, then features or ingest of that."""
    for name in names:
        bundle = bundle.parents[1] / name / stage_key(bundle)[name]
    return bundle


def read_by_the_model(bundle: Path) -> dict[str, tuple[Any, ...]]:
    """product id → title, photo and texts of the hot queries, from ingest's tables."""
    ingested = stage_of(bundle, "ingest")
    texts = pq.read_table(ingested / "queries.parquet")["text"].to_pylist()
    hot = pq.read_table(ingested / "hot_lists.parquet")["queries"].to_pylist()
    lists = pq.read_table(ingested / "product_hot_lists.parquet")["test"].to_pylist()
    columns = ["product_id", "title", "image"]
    rows = pq.read_table(ingested / "products", columns=columns).to_pylist()
    return {
        row["product_id"]: (row["title"], row["image"], [texts[q] for q in hot[number]])
        for row, number in zip(rows, lists, strict=True)
    }


def test_a_model_that_is_evaluated_cut_has_a_bundle_of_whole_vectors(days: Days) -> None:
    cut = days.settings.eval.model_copy(update={"dimensions": 16})
    settings = days.settings.model_copy(update={"eval": cut})
    made = bundle_stage(settings, days.model, days.model, Refresh(None))
    assert (made.path, made.reused) == (days.second, True)


def test_a_refreshed_bundle_equals_one_from_scratch(days: Days) -> None:
    refreshed, scratch = Bundle(days.second), Bundle(days.scratch)
    assert refreshed.index.product_ids == scratch.index.product_ids
    assert len(refreshed.index.product_ids) == 60 - len(GONE) + len(NEW)
    np.testing.assert_allclose(refreshed.vectors, scratch.vectors, atol=1e-5)
    assert refreshed.hot == scratch.hot
    np.testing.assert_allclose(refreshed.hot_vectors, scratch.hot_vectors, atol=1e-5)
    for row in range(len(scratch.vectors)):
        assert refreshed.products([row]) == scratch.products([row])
        name = scratch.index.product_ids[row]
        assert refreshed.photo_of(name) == scratch.photo_of(name)
        assert refreshed.hot_queries(name) == scratch.hot_queries(name)
    scores, rows = refreshed.index.search(np.array(scratch.hot_vectors), 10)
    expected, expected_rows = scratch.index.search(np.array(scratch.hot_vectors), 10)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    swapped = np.flatnonzero(rows != expected_rows)  # only products as good as each other
    gap = np.abs(np.diff(expected, axis=1, append=-9)).ravel()
    assert all(gap[swapped] < 1e-5)


def test_the_second_day_changes_all_that_a_catalogue_and_a_log_can_change(days: Days) -> None:
    """Or the test above would prove little."""
    before, now = read_by_the_model(days.first), read_by_the_model(days.second)
    ids = pq.read_table(days.settings.workdir.parent / "products1.parquet")["product_id"]
    assert before[days.emptied][2] != now[days.emptied][2] == []
    lost, came = ids[LOST_PHOTO].as_py(), ids[FIRST_PHOTO].as_py()
    assert [before[lost][1] is None, now[lost][1] is None] == [False, True]
    assert [before[came][1] is None, now[came][1] is None] == [True, False]
    first, second = Bundle(days.first), Bundle(days.second)
    for row, field in ((REPRICED, "price"), (MOVED, "category")):
        name = ids[row].as_py()
        was, became = (b.products([b.row_of(name)])[0] for b in (first, second))
        assert getattr(was, field) != getattr(became, field)


def test_only_what_changed_is_embedded_and_put_through_the_cnn(days: Days) -> None:
    before, now = read_by_the_model(days.first), read_by_the_model(days.second)
    common = before.keys() & now.keys()
    changed = sum(before[key] != now[key] for key in common)
    assert len(RETITLED | NEW_PHOTO) < changed < len(common) / 2  # hot lists changed, few of them
    embedded = yaml.safe_load((stage_of(days.second, "embed") / "report.json").read_text())
    assert embedded["products"] == {
        "new": len(NEW),
        "changed": changed,
        "as_before": len(common) - changed,
        "gone": len(GONE),
    }
    features = stage_of(days.second, "embed", "features")
    broken = set(pq.read_table(features / "broken_images.parquet")["product_id"].to_pylist())
    same_photos = sum(before[key][1] == now[key][1] is not None for key in common - broken)
    counts = yaml.safe_load((features / "report.json").read_text())
    assert counts["photos_as_before"] == same_photos
    assert same_photos > 0.8 * len(common)
    rois = stage_of(days.scratch, "embed", "features") / "report.json"
    assert counts["rois_found"] == yaml.safe_load(rois.read_text())["rois_found"]


def test_hot_lists_are_of_all_days_and_the_bundle_says_as_of_when_its_parts_are(
    days: Days,
) -> None:
    pairs = pq.read_table(stage_of(days.second, "ingest") / "pairs.parquet")
    last = pc.max(pairs["day"]).as_py()
    assert last == date.fromisoformat(
        sorted(p.stem for p in Path(days.settings.data.impressions or "").iterdir())[-1]
    )
    made = Bundle(days.second).made
    assert (made["hot_lists"].date() - last).days == 1
    written = Path(days.settings.data.products or "").stat().st_mtime
    assert made["catalogue"].timestamp() == pytest.approx(written, abs=1)


KILLED = """
import logging, os, runpy, sys

moment = sys.argv[1]

class Killer(logging.Handler):
    def emit(self, record):
        if moment in record.getMessage():
            os.kill(os.getpid(), 9)

logging.getLogger("acebert").addHandler(Killer())
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_refresh_that_is_killed_leaves_the_old_bundle_and_the_same_command_ends_well(
    days: Days, tmp_path: Path
) -> None:
    import ray

    root = days.settings.workdir.parent
    embedded = stage_of(days.first, "embed")
    of_vectors = (stage_of(embedded, name) for name in ("features", "ingest"))
    for stage in (days.first, embedded, *of_vectors):  # of the first day alone
        shutil.copytree(stage, tmp_path / stage.parent.name / stage.name)
    publish(tmp_path, tmp_path / "bundle" / days.first.name)
    job = str(Path(__file__).parents[2] / "ray_jobs" / "refresh.py")
    command = [job, "--workdir", str(tmp_path), "--model", str(days.model)]
    command += ["--data.products", str(root / "products2.parquet")]
    command += ["--data.impressions", str(root / "log2"), "--serve.hot_queries", "30"]
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": job.rsplit("/", 2)[0]}
    for moment in ("ingest: queries", "queries, ", "index: ", "bundle: done", None):
        argv = [sys.executable, "-c", KILLED, moment or "no such line", *command]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=400)
        if moment is None:
            assert done.returncode == 0, done.stdout + done.stderr
            assert "refresh: 2 products new" in done.stdout
            break
        assert done.returncode == -9, f"{moment}: {done.stdout}{done.stderr}"
        still = Bundle(published(tmp_path))
        assert still.directory.name == days.first.name
        assert still.index.product_ids == Bundle(days.first).index.product_ids
    now, expected = Bundle(published(tmp_path)), Bundle(days.second)
    assert now.index.product_ids == expected.index.product_ids
    np.testing.assert_allclose(now.vectors, expected.vectors, atol=1e-5)
    assert not list(tmp_path.glob("*/.*.partial"))


def test_a_catalogue_that_lacks_too_many_products_is_refused_before_a_bundle_is_made(
    days: Days, tmp_path: Path
) -> None:
    products = pq.read_table(days.settings.data.products)
    short = tmp_path / "products.parquet"
    pq.write_table(products.slice(0, 40), short)  # of the first day's 60: 2 new ones, 38 of them
    whole = {"max_bad_share": 1.0}  # or the log would be refused, for products that nobody knows
    data = days.settings.data.model_copy(update={"products": str(short), **whole})
    settings = days.settings.model_copy(update={"data": data})
    made = set((settings.workdir / "bundle").iterdir())
    with pytest.raises(UserError, match=r"22 of the 60 products, \d+ of .* clicks .* 0\.42 "):
        refreshed_bundle_stage(settings, days.model, days.model, days.first, 0.2)
    assert set((settings.workdir / "bundle").iterdir()) == made
    allowed = refreshed_bundle_stage(settings, days.model, days.model, days.first, 0.42)
    assert len(Bundle(allowed.path).index.product_ids) == 40


def test_an_export_that_lost_its_photos_or_its_clicks_is_refused_before_a_bundle_is_made(
    days: Days, tmp_path: Path
) -> None:
    given = days.settings.data
    products = pq.read_table(given.products)
    column = products.schema.get_field_index("image")
    nothing = pa.nulls(len(products), products.schema.field("image").type)
    pq.write_table(products.set_column(column, "image", nothing), tmp_path / "products.parquet")
    (tmp_path / "log").mkdir()
    shutil.copy(min(Path(given.impressions or "").iterdir()), tmp_path / "log")
    without_photos = {"products": str(tmp_path / "products.parquet")}
    without_clicks = {"impressions": str(tmp_path / "log")}
    made = set((days.settings.workdir / "bundle").iterdir())
    for changed, told in (
        (without_photos, r"products\.parquet, .*: (\d+) of the \1 photos behind .* 1\.01 "),
        (without_clicks, r"log: \d+ of the \d+ clicks behind .* --max_gone_share 0\."),
    ):
        data = given.model_copy(update=changed)
        settings = days.settings.model_copy(update={"data": data})
        with pytest.raises(UserError, match=told):
            refreshed_bundle_stage(settings, days.model, days.model, days.first, 0.2)
    assert set((days.settings.workdir / "bundle").iterdir()) == made


KILLED_BETWEEN = """
import os, runpy, sys
from pathlib import Path

moved = Path.replace

def replace(path, target):
    if Path(target).name == "arm-new.json":  # the second arm's
        os.kill(os.getpid(), 9)
    return moved(path, target)

Path.replace = replace
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_arms_are_refreshed_together_and_after_a_kill_by_the_same_command(
    days: Days, tmp_path: Path
) -> None:
    import ray

    workdir, root = tmp_path / "w", days.settings.workdir.parent
    shutil.copytree(days.settings.workdir, workdir)
    names = [stage.name for stage in (days.first, days.second)]
    first, second = (workdir / "bundle" / name for name in names)
    for arm in (None, "old", "new"):
        publish(workdir, first, arm)
    job = str(Path(__file__).parents[2] / "ray_jobs" / "refresh.py")
    command = [sys.executable, job, "--workdir", str(workdir), "--serve.hot_queries", "30"]
    command += ["--data.products", str(root / "products2.parquet")]
    command += ["--data.impressions", str(root / "log2"), "--arm", "old", "--model"]
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": job.rsplit("/", 2)[0]}

    def refresh(other: Path) -> subprocess.CompletedProcess[str]:
        argv = [*command, str(days.model), "--arm", "new", "--model", str(other)]
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=400)

    broken = tmp_path / "broken"
    shutil.copytree(days.model, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert refresh(broken).returncode != 0
    assert [published(workdir, arm) for arm in (None, "old", "new")] == 3 * [first]
    killed = [sys.executable, "-c", KILLED_BETWEEN, *command[1:]]
    killed += [str(days.model), "--arm", "new", "--model", str(days.model)]
    done = subprocess.run(killed, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == -9, done.stdout + done.stderr
    assert [published(workdir, arm) for arm in ("old", "new")] == [second, first]
    done = refresh(days.model)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [published(workdir, arm) for arm in (None, "old", "new")] == 3 * [second]
