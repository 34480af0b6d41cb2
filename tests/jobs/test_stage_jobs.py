"""The jobs that make one stage, each as its user runs it, one after the other on one small demo."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    *["--demo.products", "60", "--demo.searches_per_day", "200", "--demo.days", "4"],
    *["--demo.image_side", "64", "--text.vocab_size", "300", "--train.batch_size", "16"],
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workdir")


@pytest.mark.parametrize(
    ("job", "stage", "file"),
    [
        ("make_demo", "demo", "products.parquet"),
        ("ingest", "ingest", "pairs.parquet"),
        ("preprocess", "features", "grid.png"),
        ("partition", "plan", "report.json"),
        ("draw_plan", "plan_figure", "plan.png"),
    ],
)
def test_a_stages_job_ends_with_the_path_of_what_it_made(
    job: str,
    stage: str,
    file: str,
    workdir: Path,
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("sys.argv", [f"{job}.py", "--workdir", str(workdir), *SMALL])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "ray_jobs" / f"{job}.py"), run_name="__main__")
    assert end.value.code == 0
    printed = Path(capsys.readouterr().out.splitlines()[-1])
    made = printed if printed.name == file else printed / file
    assert made.is_file()
    assert made.parents[1] == workdir / stage
