"""The report's job, as its user runs it."""

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from acebert.job import model_arguments
from acebert.report.rows import TWINBERT_MLM

ROOT = Path(__file__).parents[2]
JOB = str(ROOT / "ray_jobs" / "reproduce.py")
TINY = [
    *["--demo.products", "120", "--demo.searches_per_day", "300", "--demo.days", "4"],
    *["--demo.image_side", "64", "--model.width", "32", "--model.heads", "2"],
    *["--model.layers", "1", "--text.vocab_size", "400", "--image.pixel_side", "35"],
    *["--train.batch_size", "32", "--train.max_steps", "8", "--train.validate_every", "4"],
    *["--train.precision", "fp32", "--train.valid_products", "100", "--eval.bootstrap", "50"],
]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model.pixels=true"], "--model.pixels: rows are told apart by it"),
        (["--seed", "3"], "each row's own: give --size and --seeds"),
        (["--pretrain.seed=3"], "each row's own: give --size and --seeds"),
        (["--rows_at_once", "0"], "--rows_at_once 0: at least one"),
        (["--seeds", "1", "1"], "--seeds 1 1: a seed is given twice"),
        (["--sentence_transformer", "/no/such"], "--sentence_transformer /no/such: no such"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_trained(
    given: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", [JOB, "--workdir", str(tmp_path / "work"), *given])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(JOB, run_name="__main__")
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_each_seed_of_a_pre_trained_row_has_a_pre_training_of_its_own() -> None:
    arguments = argparse.Namespace(settings=[], size="tiny")
    make = runpy.run_path(JOB)["row_settings"]
    of = [make(arguments, TWINBERT_MLM, seed) for seed in (0, 7)]
    assert {settings.model.start for settings in of} == {"pretrain"}
    assert [(settings.seed, settings.pretrain.seed) for settings in of] == [(0, 0), (7, 7)]


def test_a_model_that_a_failed_job_did_not_name_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        model_arguments().parse_known_args(["--model", ""])
    assert "argument --model: an empty path" in capsys.readouterr().err


def test_an_option_is_its_whole_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        model_arguments().parse_known_args(["--mod", "directory"])
    assert "the following arguments are required: --model" in capsys.readouterr().err


def reproduce(workdir: Path, *parts: str) -> subprocess.CompletedProcess[str]:
    given = ["--parts", *parts, "--seeds", "0", "--workdir", str(workdir), *TINY]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return subprocess.run(
        [sys.executable, JOB, *given], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
def test_the_job_ends_with_the_path_of_a_page_that_says_what_it_did(tmp_path: Path) -> None:
    done = reproduce(tmp_path, "fig6", "table4")
    assert done.returncode == 0, done.stderr[-3000:]
    page = Path(done.stdout.splitlines()[-1])
    numbers = json.loads((page.parent / "numbers.json").read_text())
    assert numbers["left_out"] == {}
    systems = ["CE-BERT-Finetune", "CE-BERT + hot queries", "ACE-BERT"]
    assert numbers["seeds"] == {name: [0] for name in systems}
    assert list(numbers["tables"]["table4"]["rows"]["recall_100"]) == systems
    assert numbers["cost"]["ACE-BERT"]["pairs"] == 8 * 32
    gains = numbers["tables"]["table4"]["gains"]
    assert {gain["verdict"] for gain in gains} == {"one seed: not claimed"}
    assert set(numbers["final_losses"]) == {"CE-BERT + hot queries", "ACE-BERT"}
    assert "model.layers: 1 (paper: 4)" in numbers["departures"]
    text = page.read_text()
    assert len(re.findall(r'<img id="(?:table4|fig6)_', text)) == 4
    assert "--parts fig6 table4 --seeds 0 --workdir" in text

    # A part that cannot be had costs the job its exit code, and the page is there all the same.
    done = reproduce(tmp_path, "fig6", "fig5")
    assert done.returncode == 2
    assert "error: left out of the page, which says why: Figure 5" in done.stderr
    (why,) = re.findall(
        r"Figure 5 is left out: (metric: recall_100 of 100 products.*)", done.stdout
    )
    page = Path(done.stdout.splitlines()[-1])
    assert json.loads((page.parent / "numbers.json").read_text())["left_out"] == {"Figure 5": why}
