"""The CNN in training: plain loop, then the stage through a real Ray Train."""

import json
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from acebert.config import Settings, weights_digest
from acebert.data.cnn_labels import label_photos
from acebert.data.patches import PatchCNN
from acebert.data.preprocess import preprocess
from acebert.errors import UserError
from acebert.pipeline import catalogue_stages, cnn_stage
from acebert.training.checkpoint import Progress
from acebert.training.cnn_batches import CNNPaths, PhotoBatches
from acebert.training.cnn_loop import CNNTrainer, run
from acebert.training.steps import Rank
from acebert.training.train_cnn import WEIGHTS, crop_settings, new_model
from acebert.workdir import Stage

CPU = torch.device("cpu")
SMALL = {
    **{"side": 56, "batch_size": 16, "epochs": 1, "warmup_steps": 2, "lr": 1e-3},
    **{"held_out": 0.2, "tag_products": 5, "tags": 30},
}


def with_cnn(settings: Settings, **values: Any) -> Settings:
    return settings.model_copy(update={"cnn": settings.cnn.model_copy(update=values)})


@pytest.fixture(scope="module")
def small(settings: Settings, stages: dict[str, Stage]) -> Settings:
    return with_cnn(settings, **SMALL)


@pytest.fixture(scope="module")
def paths(small: Settings, stages: dict[str, Stage]) -> CNNPaths:
    crops = preprocess(crop_settings(small), stages["ingested"])
    return CNNPaths(crops.path, label_photos(small, stages["ingested"], crops).path)


@pytest.fixture(scope="module")
def stage(small: Settings, stages: dict[str, Stage]) -> Stage:
    return cnn_stage(small)


def train(settings: Settings, paths: CNNPaths, save=lambda *_: None, resume=None):
    batches = PhotoBatches(settings.cnn, paths, rank=0, world=1)
    model = new_model(settings, batches.labels)
    state = run(settings, batches, model, Rank(0, 1, CPU, save, resume and (lambda: resume)))
    return model, state


def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_weights(
    small: Settings, paths: CNNPaths
):
    every = small.train.model_copy(update={"checkpoint_every": 2})
    settings = with_cnn(small, max_steps=5).model_copy(update={"train": every})
    kept: list[tuple[Mapping[str, Any], Progress]] = []

    def save(tensors: Mapping[str, Any], progress: Progress) -> None:
        if progress.step == 2:
            copied = torch.utils._pytree.tree_map(
                lambda t: t.clone() if isinstance(t, torch.Tensor) else t, dict(tensors)
            )
            kept.append((copied, Progress(step=2, history=progress.history)))

    whole, state = train(settings, paths, save)
    resumed, again = train(settings, paths, resume=kept[0])
    assert again.step == state.step == 5
    assert again.history["loss"].to_pylist() == state.history["loss"].to_pylist()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_one_batch_seen_again_and_again_is_learned_by_heart(small: Settings, paths: CNNPaths):
    settings = with_cnn(small, label_smoothing=0.0, batch_size=8)
    batches = PhotoBatches(settings.cnn, paths, rank=0, world=1)
    model = new_model(settings, batches.labels)
    trainer = CNNTrainer(settings, model, batches.labels.words_per_product(), CPU, 0, 1)
    trainer.model.train()  # as the loop has it: BatchNorm counts on the batch
    batch = batches.batch(0)
    steps = [trainer.step(batch, step, share=0.0) for step in range(60)]
    entropy = torch.special.entr(batch.targets) + torch.special.entr(1 - batch.targets)
    floor = float(entropy.sum()) / (len(entropy) * batches.labels.words_per_product())
    assert steps[0]["category"] > 1.5
    assert steps[-1]["category"] < 0.1
    assert float(steps[-1]["tags"]) - floor < 0.2 * (float(steps[0]["tags"]) - floor)


def test_ranks_together_see_the_batch_that_one_process_sees(small: Settings, paths: CNNPaths):
    whole = PhotoBatches(small.cnn, paths, rank=0, world=1).batch(3)
    halves = [PhotoBatches(small.cnn, paths, rank=r, world=2).batch(3) for r in (0, 1)]
    for name in ("photos", "category", "targets"):
        joined = torch.cat([getattr(half, name) for half in halves])
        assert torch.equal(joined, getattr(whole, name))
    joined = np.concatenate([half.views.boxes for half in halves])
    np.testing.assert_array_equal(joined, whole.views.boxes)


def test_an_epoch_holds_no_photo_twice_and_none_that_is_held_out(small: Settings, paths: CNNPaths):
    batches = PhotoBatches(small.cnn, paths, rank=0, world=1)
    first, second = batches._epoch(0), batches._epoch(1)
    assert sorted(first) == sorted(second) == batches.labels.train.tolist()
    assert first.tolist() != second.tolist()
    assert not set(first.tolist()) & set(batches.labels.held_out.tolist())


@pytest.mark.parametrize(
    ("world", "batch_size", "words"),
    [(3, 16, "16 is not divisible by 3 workers"), (1, 5000, r"there are \d+ photos to train on")],
)
def test_a_batch_that_cannot_be_is_refused(
    small: Settings, paths: CNNPaths, world: int, batch_size: int, words: str
):
    with pytest.raises(UserError, match=words):
        PhotoBatches(with_cnn(small, batch_size=batch_size).cnn, paths, rank=0, world=world)


def test_a_diverging_run_says_what_to_do(small: Settings, paths: CNNPaths):
    wild = with_cnn(small, lr=1e30, warmup_steps=0, max_steps=4)
    with pytest.raises(UserError, match=r"not finite.*--cnn\.lr"):
        train(wild, paths)


def test_start_weights_that_are_not_there_are_named_by_their_setting(
    small: Settings, paths: CNNPaths
):
    with pytest.raises(UserError, match=r"cnn\.start nowhere\.safetensors: no such file"):
        train(with_cnn(small, start="nowhere.safetensors"), paths)


def test_the_stages_weights_are_a_cnn_that_patch_features_can_be_made_with(
    stage: Stage, small: Settings
):
    names = {path.name for path in stage.path.iterdir()}
    assert names == {
        *(WEIGHTS, "report.json", "settings.yaml", "history.parquet", "valid.parquet"),
        *("words.parquet", "held_out.png", "stage.json"),
    }
    path = stage.path / WEIGHTS
    trained = PatchCNN("resnet18", str(path), 128)
    assert set(load_file(path)) == set(trained.model.state_dict())
    start = PatchCNN("resnet18", "random", 128).model.state_dict()
    assert not torch.equal(start["conv1.weight"], trained.model.state_dict()["conv1.weight"])
    report = json.loads((stage.path / "report.json").read_text())
    assert report["steps"] == pq.read_metadata(stage.path / "history.parquet").num_rows > 3
    assert 0 <= report["held_out"]["category_accuracy"] <= 1
    words = pq.read_table(stage.path / "words.parquet").to_pylist()
    assert {"red", "black"} <= {row["word"] for row in words}  # the demo's colours
    assert cv2.imread(str(stage.path / "held_out.png")) is not None
    assert not (small.workdir / "train" / f"cnn-{stage.digest}").exists()
    again = cnn_stage(small)
    assert again.reused
    assert again.path == stage.path


def test_trained_weights_are_made_first_and_features_are_made_anew_when_they_change(
    stage: Stage, small: Settings, stages: dict[str, Stage]
):
    def asking(settings: Settings) -> Settings:
        image = settings.image.model_copy(update={"cnn_weights": "trained"})
        return settings.model_copy(update={"image": image})

    first = catalogue_stages(asking(small)).features
    assert first is not None
    assert first.digest != stages["features"].digest  # random weights
    report = json.loads((first.path / "report.json").read_text())
    assert weights_digest(str(stage.path / WEIGHTS)) in report["cnn_weights"]
    again = catalogue_stages(asking(small)).features
    assert again is not None
    assert again.reused
    other = catalogue_stages(asking(with_cnn(small, seed=1, max_steps=2))).features
    assert other is not None
    assert other.digest not in {first.digest, stages["features"].digest}


@pytest.mark.slow
def test_two_workers_train_each_step_once_and_validate_after_the_last(
    small: Settings, stages: dict[str, Stage], stage: Stage
):
    train = small.train.model_copy(update={"num_workers": 2, "threads_per_worker": 1})
    two = cnn_stage(with_cnn(small, seed=2, max_steps=3).model_copy(update={"train": train}))
    history = pq.read_table(two.path / "history.parquet")
    assert history["step"].to_pylist() == [1, 2, 3]
    assert np.isfinite(history["loss"].to_numpy()).all()
    assert json.loads((two.path / "report.json").read_text())["held_out"]["step"] == 3
