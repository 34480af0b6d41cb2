"""Distillation as a job does it: targets by Ray Data, students by Ray Train, ONNX, the table."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from acebert.config import Settings
from acebert.data.unlabelled import unlabelled_texts
from acebert.errors import UserError
from acebert.evaluation.embed import embed
from acebert.evaluation.teach import teach
from acebert.models.dual import DualEncoder
from acebert.serving.onnx_export import export
from acebert.serving.query_encoder import QueryEncoder
from acebert.serving.student_table import RUNTIMES, TEACHER, students_table
from acebert.tracking import client
from acebert.training.distill import distill
from acebert.training.finetune import new_model
from acebert.training.pairs import StagePaths
from acebert.training.teacher_targets import TeacherTargets
from acebert.workdir import Stage


def log_queries(ingested: Stage) -> tuple[set[str], set[str]]:
    """Clicked on training days, and seen on validation and test days alone."""
    table = pq.read_table(ingested.path / "queries.parquet").to_pylist()
    train = {row["text"] for row in table if row["clicks"] > 0}
    return train, {row["text"] for row in table} - train


def test_queries_of_validation_and_test_days_alone_are_never_trained_on(
    stages: dict[str, Stage], tmp_path: Path
) -> None:
    ingested = stages["ingested"]
    train, kept_back = log_queries(ingested)
    assert kept_back
    given = [*sorted(kept_back), "  A new  TEXT", None, "", "a new text"]
    pq.write_table(pa.table({"text": given}), tmp_path / "texts.parquet")
    texts = unlabelled_texts(ingested.path, True, str(tmp_path / "texts.parquet"))
    assert len(set(texts)) == len(texts)
    assert kept_back.isdisjoint(texts)
    assert set(texts) >= train
    assert texts[-1] == "a new text"
    assert unlabelled_texts(ingested.path, True, f"file://{tmp_path}/texts.parquet") == texts
    assert set(unlabelled_texts(ingested.path, False, None)) == train


def test_a_file_of_texts_that_is_none_is_named(stages: dict[str, Stage], tmp_path: Path) -> None:
    path = tmp_path / "texts.parquet"
    with pytest.raises(UserError, match=r"--distill\.texts .*texts\.parquet: cannot be read"):
        unlabelled_texts(stages["ingested"].path, True, str(path))
    pq.write_table(pa.table({"query": ["a"]}), path)
    with pytest.raises(UserError, match="no column 'text', only: query"):
        unlabelled_texts(stages["ingested"].path, True, str(path))
    latin = pa.array([b"a", "café".encode("latin-1")]).view(pa.string())
    pq.write_table(pa.table({"text": latin}), path)
    with pytest.raises(UserError, match=r"texts\.parquet: row 1 is no UTF-8"):
        unlabelled_texts(stages["ingested"].path, True, str(path))


@pytest.fixture(scope="module")
def own(settings: Settings) -> Settings:
    """Text alone, two layers, one short student."""
    model = {"patches": False, "pixels": False, "layers": 2}
    short = {"batch_size": 64, "max_steps": 6, "validate_every": 4, "layers": (1,)}
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update=model),
            "distill": settings.distill.model_copy(update=short),
        }
    )


@pytest.fixture(scope="module")
def teacher(
    own: Settings, stages: dict[str, Stage], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """At its start weights: what it says is as good to learn as anything."""
    directory = tmp_path_factory.mktemp("teacher")
    paths = StagePaths(stages["ingested"].path, stages["tokens"].path, None)
    new_model(own, paths).save(directory)
    shutil.copytree(stages["tokens"].path / "tokenizer", directory / "tokenizer")
    (directory / "settings.yaml").write_text(yaml.safe_dump(own.model_dump(mode="json")))
    return directory


def test_a_file_of_texts_that_is_not_there_is_named_before_anything_is_made(
    own: Settings, teacher: Path, stages: dict[str, Stage]
) -> None:
    distill = own.distill.model_copy(update={"texts": "/nowhere/t.parquet"})
    settings = own.model_copy(update={"distill": distill})
    with pytest.raises(UserError, match=r"--distill\.texts /nowhere/t\.parquet: there is no such"):
        teach(settings, teacher, stages["ingested"], stages["tokens"])


@pytest.fixture(scope="module")
def targets(own: Settings, teacher: Path, stages: dict[str, Stage]) -> Stage:
    ingested = stages["ingested"]
    embedded = embed(own, teacher, ingested, stages["tokens"], None, ["anything"])
    return teach(own, teacher, ingested, embedded)


@pytest.fixture(scope="module")
def student(own: Settings, teacher: Path, targets: Stage) -> Stage:
    return distill(own, teacher, 1, targets)


def test_targets_are_the_teachers_vectors_and_its_first_products(
    targets: Stage, teacher: Path, stages: dict[str, Stage]
) -> None:
    opened = TeacherTargets.open(targets.path)
    texts = unlabelled_texts(stages["ingested"].path, True, None)
    assert opened.n == len(texts)
    vectors = QueryEncoder.load(teacher).encode(texts)
    np.testing.assert_allclose(opened.vectors[: opened.n], vectors, atol=1e-5)
    scores = vectors @ opened.products.T
    least = np.sort(scores, axis=1)[:, -100]
    found = np.take_along_axis(scores, opened.best[: opened.n].astype(np.int64), axis=1)
    assert (found >= least[:, None] - 1e-5).all()
    clicked = pq.read_table(stages["ingested"].path / "valid_pairs.parquet")
    assert len(opened.valid_pairs) == clicked.num_rows
    assert len(opened.valid_new) == len(set(clicked["query"].to_pylist()))


def test_a_student_keeps_its_teachers_product_side_and_is_tracked(
    student: Stage, teacher: Path, own: Settings
) -> None:
    ours, its = DualEncoder.load(student.path), DualEncoder.load(teacher)
    for name, tensor in its.tower.state_dict().items():
        assert torch.equal(tensor, ours.tower.state_dict()[name]), name
    assert QueryEncoder.load(student.path).version == QueryEncoder.load(teacher).version
    report = json.loads((student.path / "report.json").read_text())
    assert report["steps"] == 6
    logged = client(own).get_metric_history(report["mlflow_run"], "train/kl")
    assert sorted(metric.step for metric in logged) == [1, 2, 3, 4, 5, 6]
    logged = client(own).get_metric_history(report["mlflow_run"], "valid/kept_100")
    assert sorted(metric.step for metric in logged) == [4, 6]


def test_the_same_student_is_not_trained_twice_and_a_deeper_one_is_refused(
    student: Stage, own: Settings, teacher: Path, targets: Stage
) -> None:
    assert distill(own, teacher, 1, targets).reused
    with pytest.raises(UserError, match=r"--distill\.layers 3: the teacher has 2 layers"):
        distill(own, teacher, 3, targets)


@pytest.mark.slow
def test_the_table_has_every_model_in_every_runtime_and_the_student_is_registered(
    student: Stage, own: Settings, teacher: Path, targets: Stage, stages: dict[str, Stage]
) -> None:
    exports = {TEACHER: export(own, teacher), "1 layer": export(own, student.path, "small")}
    table = students_table(own, stages["ingested"], targets, exports)
    report = json.loads((table.path / "report.json").read_text())
    assert list(report) == [TEACHER, "1 layer"]
    for runtimes in report.values():
        assert tuple(runtimes) == RUNTIMES
        assert runtimes["onnx"]["max_difference_to_torch"] < 1e-5
        assert runtimes["onnx_int8"]["least_cosine_to_torch"] > 0.97
        # Three of four bytes of nearly all weights; the graph itself is not small beside these few.
        saved = runtimes["onnx"]["megabytes"] - runtimes["onnx_int8"]["megabytes"]
        assert 0.7 < saved / runtimes["torch"]["megabytes"] < 0.8
    assert report[TEACHER]["torch"]["kept_100"] == pytest.approx(1, abs=1e-3)
    text = (table.path / "table.txt").read_text()
    assert text.count("onnx_int8") >= 2
    assert (table.path / "students.png").stat().st_size > 10_000
    version = client(own).get_model_version_by_alias("acebert", "small")
    assert version.run_id
