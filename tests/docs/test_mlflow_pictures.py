"""The docs' pictures, from a real MLflow server in a real Chromium."""

import shutil
from pathlib import Path

import mlflow_pictures
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A sweep of three trials as MLflow has it."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("acebert")
    parent = client.create_run(experiment, run_name="sweep toy").info.run_id
    for gamma in (10, 20, 40):
        tags = {"table": "toy", "mlflow.parentRunId": parent}
        run = client.create_run(experiment, run_name=f"gamma={gamma}", tags=tags).info.run_id
        client.log_param(run, "loss.gamma", gamma)
        client.log_metric(run, "best/recall_100", 0.4 - gamma / 1000)
        client.set_terminated(run)
    client.set_terminated(parent)
    return uri


def test_a_tag_that_no_run_carries_is_said_so(uri: str, tmp_path: Path):
    with pytest.raises(ValueError, match="--table other: 0 runs"):
        mlflow_pictures.take_pictures(uri, "other", tmp_path)


@pytest.mark.slow
def test_the_runs_of_a_sweep_and_their_comparison_are_photographed(uri: str, tmp_path: Path):
    """The script itself waits for the runs' names and for the plot of the compare page."""
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no Chromium on the PATH (apt-get install chromium)")
    pictures = mlflow_pictures.take_pictures(uri, "toy", tmp_path / "out")
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size == (mlflow_pictures.SIZE["width"], mlflow_pictures.SIZE["height"])
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100  # no blank page
    first, second = (Image.open(path).tobytes() for path in pictures)
    assert first != second
