"""Fine-tuning through a real Ray Train, tracked by a real MLflow."""

import copy
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import mlflow
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from acebert.config import Settings
from acebert.data.earlier import Earlier
from acebert.data.image import crop_resize, find_roi
from acebert.data.patches import PatchCNN
from acebert.errors import UserError
from acebert.evaluation.embed import INPUTS, embed
from acebert.models.dual import DualEncoder
from acebert.models.encoder import ImageInputs, TextInputs
from acebert.tracking import client, default_server
from acebert.training.checkpoint import Progress
from acebert.training.finetune import finetune, new_model
from acebert.training.loop import run
from acebert.training.pairs import StagePaths
from acebert.training.steps import Rank
from acebert.workdir import Stage


def with_train(settings: Settings, **values: object) -> Settings:
    return settings.model_copy(update={"train": settings.train.model_copy(update=values)})


@pytest.fixture(scope="module")
def one_worker(settings: Settings, stages: dict[str, Stage]) -> Stage:
    return finetune(settings, **stages)


def test_the_model_directory_is_whole_and_loads(one_worker: Stage, settings: Settings):
    names = {path.name for path in one_worker.path.iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer", "settings.yaml"),
        *("history.parquet", "valid.parquet", "report.json", "stage.json"),
    }
    model = DualEncoder.load(one_worker.path)
    weights = load_file(one_worker.path / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not list((settings.workdir / "train").iterdir())  # checkpoints are gone


def test_the_model_has_the_weights_of_the_best_validation(
    one_worker: Stage, settings: Settings, paths: StagePaths
):
    saved: dict[int, dict[str, torch.Tensor]] = {}

    def save(tensors: Mapping[str, Any], progress: Progress) -> None:
        saved[progress.step] = copy.deepcopy(tensors["model"])

    run(settings, paths, new_model(settings, paths), Rank(0, 1, torch.device("cpu"), save))
    valid = pq.read_table(one_worker.path / "valid.parquet").to_pylist()
    best = max(valid, key=lambda row: row["recall_100"])  # the first of equal ones
    assert valid[0]["step"] < best["step"] < valid[-1]["step"]
    exported = load_file(one_worker.path / "model.safetensors")
    report = json.loads((one_worker.path / "report.json").read_text())
    assert report["best"] == best

    def distance(weights: dict[str, torch.Tensor]) -> float:
        return sum(float((exported[name] - w).square().sum()) for name, w in weights.items())

    apart = {step: distance(weights) for step, weights in saved.items()}
    nearest, next_one = sorted(apart, key=apart.__getitem__)[:2]
    assert nearest == best["step"]
    assert apart[nearest] < 1e-3 * apart[next_one]  # another thread count rounds otherwise


def test_every_step_is_in_mlflow_once(one_worker: Stage, settings: Settings):
    history = pq.read_table(one_worker.path / "history.parquet")
    mlflow = client(settings)
    (run,) = mlflow.search_runs(
        [mlflow.get_experiment_by_name(settings.tracking.experiment).experiment_id],
        f"tags.`acebert.digest` = '{one_worker.digest}'",
    )
    assert run.info.status == "FINISHED"
    logged = mlflow.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(m.step for m in logged) == history["step"].to_pylist()
    np.testing.assert_allclose(
        [m.value for m in sorted(logged, key=lambda m: m.step)], history["loss"].to_numpy()
    )
    valid = pq.read_table(one_worker.path / "valid.parquet")
    recall = mlflow.get_metric_history(run.info.run_id, "valid/recall_100")
    assert sorted(m.step for m in recall) == valid["step"].to_pylist()


def test_the_registered_model_encodes_queries_as_the_directory_does(
    one_worker: Stage, settings: Settings
):
    name, alias = settings.tracking.register_as, settings.tracking.alias
    with default_server(settings):
        loaded = mlflow.pyfunc.load_model(f"models:/{name}@{alias}")
    queries = ["Red  DRESS", "watch", "a query with words never seen"]
    got = loaded.predict(pd.DataFrame({"query": queries}))
    tokenizer = AutoTokenizer.from_pretrained(one_worker.path / "tokenizer")
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    plain = [
        [cls, *ids[: settings.text.query_tokens], sep]
        for ids in tokenizer([q.lower() for q in queries], add_special_tokens=False)["input_ids"]
    ]
    model = DualEncoder.load(one_worker.path).eval()
    for row, ids in zip(got, (torch.tensor([ids]) for ids in plain), strict=True):
        text = TextInputs(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids))
        with torch.inference_mode():
            expected = model.encode_queries(text)[0].numpy()
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_embedded_products_are_their_titles_hot_queries_and_photos_put_through_the_model_by_hand(
    one_worker: Stage, settings: Settings, stages: dict[str, Stage]
):
    of_products = (stages[name] for name in ("ingested", "tokens", "features"))
    embedded = embed(settings, one_worker.path, *of_products, ["red dress"])
    found = pq.read_table(embedded.path / "products.parquet").to_pylist()
    vectors = {row["product_id"]: row["embedding"] for row in found}
    ingested = stages["ingested"].path
    texts = pq.read_table(ingested / "queries.parquet")["text"].to_pylist()
    lists = pq.read_table(ingested / "hot_lists.parquet")["queries"].to_pylist()
    list_of = pq.read_table(ingested / "product_hot_lists.parquet")["test"].to_pylist()
    hot = [[texts[query] for query in lists[row]] for row in list_of]
    (file,) = (settings.workdir / "demo").glob("*/products.parquet")
    products = pq.read_table(file).to_pylist()

    model, image = DualEncoder.load(one_worker.path).eval(), settings.image
    tokenizer = AutoTokenizer.from_pretrained(one_worker.path / "tokenizer")
    cnn = PatchCNN(image.cnn, image.cnn_weights, image.cnn_side)

    def text_of(row: int) -> TextInputs:
        title = tokenizer(products[row]["title"].lower(), add_special_tokens=False)["input_ids"]
        ids = [tokenizer.cls_token_id, *title[: settings.text.title_tokens], tokenizer.sep_token_id]
        first = len(ids)
        for query in hot[row]:
            pieces = tokenizer(query, add_special_tokens=False)["input_ids"]
            ids += [*pieces[: settings.text.query_tokens], tokenizer.sep_token_id]
        segments = torch.tensor([[0] * first + [1] * (len(ids) - first)])
        return TextInputs(torch.tensor([ids]), torch.ones_like(segments).bool(), segments)

    def photo_of(row: int) -> ImageInputs:
        decoded = cv2.imdecode(np.frombuffer(products[row]["image"], np.uint8), cv2.IMREAD_COLOR)
        decoded = decoded[:, :, ::-1]
        roi, _ = find_roi(decoded)
        patches = cnn(crop_resize(decoded, roi, image.cnn_side)[None])
        whole = (0, 0, decoded.shape[1], decoded.shape[0])
        shown = {"roi": roi, "photo": whole}[image.pixel_source]
        pixels = crop_resize(decoded, shown, image.pixel_side)[None]
        return ImageInputs(
            torch.ones(1).bool(), torch.from_numpy(patches), torch.from_numpy(pixels)
        )

    with torch.inference_mode():
        listed = [row for row, queries in enumerate(hot) if queries and products[row]["image"]]
        for row in (listed[0], listed[-1]):
            expected = model.encode_products(text_of(row), photo_of(row))[0].numpy()
            vector = np.array(vectors[products[row]["product_id"]])
            np.testing.assert_allclose(vector, expected, atol=1e-4)
            other = model.encode_products(text_of(row), photo_of(listed[1]))[0].numpy()
            assert np.abs(vector - other).max() > 1e-3  # so another's photo would be seen


def test_a_driver_that_tells_what_changed_and_embeds_it_copies_no_features_for_its_node(
    one_worker: Stage, settings: Settings, stages: dict[str, Stage], tmp_path: Path
):
    of_products = [stages[name] for name in ("ingested", "tokens", "features")]
    embedded = embed(settings, one_worker.path, *of_products, ["red dress"])
    before = tmp_path / "before"
    shutil.copytree(embedded.path, before)
    inputs = np.load(before / INPUTS)
    inputs[7] += 1
    np.save(before / INPUTS, inputs)
    cache = {"feature_cache": "node_disk", "feature_cache_dir": tmp_path / "node"}
    image = settings.image.model_copy(update=cache)
    cached = settings.model_copy(update={"image": image})
    earlier = Earlier(bundle=tmp_path, embed=before)
    again = embed(cached, one_worker.path, *of_products, ["watch"], earlier)
    counts = json.loads((again.path / "report.json").read_text())["products"]
    assert counts == {"new": 0, "changed": 1, "as_before": len(inputs) - 1, "gone": 0}
    assert not (tmp_path / "node").exists()


@pytest.mark.slow
def test_four_workers_train_as_one_does(
    one_worker: Stage, settings: Settings, stages: dict[str, Stage], tmp_path: Path
):
    """Gathered negatives, adversary and validation over gloo: the same curves."""
    settings = with_train(settings, num_workers=4, threads_per_worker=1, cpus_per_worker=0.4)
    more = finetune(settings.model_copy(update={"workdir": tmp_path}), **stages)
    assert more.digest == one_worker.digest  # how a model is trained is not what it is
    one, many = (pq.read_table(s.path / "history.parquet") for s in (one_worker, more))
    for name in ("loss", "adversary"):
        np.testing.assert_allclose(one[name], many[name], rtol=2e-3, err_msg=name)
    # A count of ranks: rounding may swap two that are nearly tied, in one of the 32 rows.
    np.testing.assert_allclose(one["accuracy"], many["accuracy"], atol=1.5 / 32)
    one, many = (pq.read_table(s.path / "valid.parquet") for s in (one_worker, more))
    np.testing.assert_allclose(one["gauc"], many["gauc"], rtol=2e-3)


def test_a_stage_that_is_there_is_not_trained_again(
    one_worker: Stage, settings: Settings, stages: dict[str, Stage]
):
    again = finetune(settings, **stages)
    assert again.reused
    assert again.path == one_worker.path


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_workers": 64, "batch_size": 64, "use_gpu": True}, "GPUs.*use_gpu false"),
        ({"cpus_per_worker": 50.0}, "cpus_per_worker 50.*do not fit"),
    ],
)
def test_more_than_the_cluster_has_is_refused(
    settings: Settings, stages: dict[str, Stage], tmp_path: Path, values: dict, words: str
):
    settings = settings.model_copy(update={"workdir": tmp_path})
    with pytest.raises(UserError, match=words):
        finetune(with_train(settings, **values), **stages)


def test_a_diverging_run_ends_with_its_reason_and_no_restart(
    settings: Settings, stages: dict[str, Stage], tmp_path: Path
):
    with pytest.raises(UserError, match=r"not finite"):
        finetune(with_train(settings, lr=1e30, warmup_steps=0, max_steps=5), **stages)


@pytest.mark.slow
def test_a_full_disk_ends_two_workers_with_a_message(
    settings: Settings, stages: dict[str, Stage], tmp_path: Path
) -> None:
    disk = tmp_path / "train"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs privileges")
    settings = settings.model_copy(update={"workdir": tmp_path})
    often = with_train(settings, num_workers=2, cpus_per_worker=0.4, checkpoint_every=2)
    try:
        with pytest.raises(UserError, match="the disk is full, a checkpoint takes"):
            finetune(often, **stages)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert not list((tmp_path / "finetune").glob("[!.]*"))
