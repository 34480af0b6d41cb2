"""Pictures of a sweep in the MLflow UI, taken in Chromium from a real server.

    python docs/mlflow_pictures.py --uri sqlite:///W/mlflow.db --table fig5_partitions

`mlflow_runs.png`: the runs that carry the tag `table`. `mlflow_compare.png`: these runs after
Compare, as parallel coordinates of what was varied and of Recall@100 on the validation day, above
the table of their params and metrics. Chromium is the
system's (`apt-get install chromium`), else the one that `playwright install chromium` brings.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from playwright.sync_api import Page, sync_playwright

SIZE = {"width": 1500, "height": 900}
START_SECONDS = 120
METRIC = "best/recall_100"


@contextmanager
def mlflow_ui(uri: str) -> Iterator[str]:
    """Address of an `mlflow ui` on 127.0.0.1 that ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--workers", "1"],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # no job queues
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(2 * START_SECONDS):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit(f"mlflow ui ended with {server.returncode}")
                time.sleep(0.5)
        else:
            sys.exit(f"mlflow ui does not answer after {START_SECONDS} s")
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # with its workers; it only ever read
        server.wait()


def take_pictures(uri: str, table: str, out: Path) -> list[Path]:
    """Write both pictures into `out`; their paths.

    Raises:
        ValueError: fewer than two runs carry the tag.
    """
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.table = '{table}'")
    if len(runs) < 2:
        raise ValueError(f"--table {table}: {len(runs)} runs in {uri} carry this tag, 2 are needed")
    nested = MLFLOW_PARENT_RUN_ID in runs[0].data.tags
    out.mkdir(parents=True, exist_ok=True)
    with mlflow_ui(uri) as address, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport=SIZE)  # type: ignore[arg-type]
        page.set_default_timeout(1000 * START_SECONDS)
        wanted = quote(f"tags.table = '{table}'")
        page.goto(
            f"{address}/#/experiments/{runs[0].info.experiment_id}/runs?searchFilter={wanted}"
        )
        taken = _photograph(page, [str(run.info.run_name) for run in runs], nested, out)
        browser.close()
    return taken


def _photograph(page: Page, names: list[str], nested: bool, out: Path) -> list[Path]:
    """The list of runs, and what Compare shows of those called by `names`."""
    pictures = [out / "mlflow_runs.png", out / "mlflow_compare.png"]
    run_names = page.locator("[role='gridcell'][col-id*='Run Name']")
    run_names.first.wait_for()
    close = page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
    if close.count():
        close.click()
    if nested:
        run_names.first.get_by_role("button").first.click()  # the sweep's row opens
    page.get_by_text(names[0]).first.wait_for()
    boxes = page.get_by_role("checkbox", name="Press Space to toggle row")
    for cell, box in zip(run_names.all(), boxes.all(), strict=True):
        if cell.inner_text().splitlines()[-1] in names:  # below its colour; a trial, not a sweep
            box.check()
    _settle(page)
    page.screenshot(path=pictures[0])
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Parallel Coordinates Plot").wait_for()
    _settle(page)
    _show(page, METRIC)
    page.screenshot(path=pictures[1])
    return pictures


def _show(page: Page, metric: str) -> None:
    """This metric in the plot, and no other."""
    box = page.get_by_role("combobox").nth(1)  # the first is of parameters
    chosen = box.locator("xpath=ancestor::*[contains(@class, 'select-selector')]")
    names = chosen.locator("[class*='selection-item-content']").all_inner_texts()
    for name in {*names, metric} - ({*names} & {metric}):
        box.click()
        box.fill(name)
        box.press("Enter")  # chosen, or chosen no more
        box.press("Escape")
    _settle(page)


def _settle(page: Page) -> None:
    page.wait_for_timeout(4000)  # the page polls its server, so it is never idle


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uri", required=True, help="MLflow's backend store")
    parser.add_argument("--table", required=True, help="value of the tag `table`")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    for path in take_pictures(**vars(arguments)):
        print(path)
