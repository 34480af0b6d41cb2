"""Where a row's settings are not the paper's."""

import pytest

from acebert.config import load_settings
from acebert.report.departures import departures, start_weights


def test_the_papers_recipe_departs_in_nothing() -> None:
    assert departures(load_settings(["--recipe", "acebert"])) == []


def test_the_tiny_recipe_departs_in_start_weights_pooling_bias_batches_and_decay() -> None:
    found = departures(load_settings(["--recipe", "acebert_tiny"]))
    assert {
        "model.backbone: none (paper: bert-base-uncased)",
        "model.start: backbone (paper: pretrain)",
        "model.pooling: mean (paper: cls)",
        "model.image_attention_bias: -4.0 (paper: 0.0)",
        "plan.batches_per_partition: 1.0 (paper: 65.0)",
        "train.decay: linear (paper: constant)",
        "train.lr: 0.001 (paper: 5e-05)",
        "image.cnn: resnet18 (paper: resnext101_32x8d)",
    } <= set(found)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--data.hot_queries", "5"], ["data.hot_queries: 5 (paper: 10)"]),
        (["--model.shared_towers", "false"], ["model.shared_towers: false (paper: true)"]),
        (["--pretrain.batch_size", "8"], ["pretrain.batch_size: 8 (paper: 96)"]),
        # Another data set, another number of workers and a path make no other model.
        (["--data.robot_same_click", "9", "--train.num_workers", "2"], []),
        (["--image.feature_cache_dir", "/ramdisk", "--loss.hard_negatives_from", "/model"], []),
    ],
)
def test_a_setting_that_makes_another_model_is_a_departure(
    given: list[str], told: list[str]
) -> None:
    assert departures(load_settings(["--recipe", "acebert", *given])) == told


def test_pre_trainings_settings_count_where_a_row_starts_from_it() -> None:
    given = ["--recipe", "acebert", "--pretrain.batch_size", "8", "--model.start", "backbone"]
    assert departures(load_settings(given)) == ["model.start: backbone (paper: pretrain)"]


def test_a_row_that_starts_from_its_pre_training_does_not_depart_in_the_image_bias() -> None:
    found = departures(load_settings(["--recipe", "acebert_tiny", "--model.start", "pretrain"]))
    assert not [told for told in found if "image_attention_bias" in told]


def test_start_weights_are_told_in_words() -> None:
    told = {
        recipe: start_weights(load_settings(["--recipe", recipe]))
        for recipe in ("twinbert_tiny", "twinbert_mlm_tiny", "twinbert", "cebert")
    }
    assert told == {
        "twinbert_tiny": "random weights",
        "twinbert_mlm_tiny": "its own pre-training from random weights",
        "twinbert": "bert-base-uncased",
        "cebert": "its own pre-training from bert-base-uncased",
    }
