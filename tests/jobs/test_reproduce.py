"""The report's job, as its user runs it."""

import runpy
from pathlib import Path

import pytest

from acebert.job import model_arguments

ROOT = Path(__file__).parents[2]
JOB = str(ROOT / "ray_jobs" / "reproduce.py")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seed", "3"], "--recipe and --seed are each row's own: give --size and --seeds"),
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


def test_an_option_is_its_whole_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        model_arguments().parse_known_args(["--mod", "directory"])
    assert "the following arguments are required: --model" in capsys.readouterr().err
