"""Pre-training in plain torch on a catalogue made by hand."""

import copy
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import handmade
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from acebert.config import Settings, load_settings
from acebert.errors import UserError
from acebert.models.encoder import ImageInputs, TextInputs
from acebert.training.checkpoint import Progress
from acebert.training.pairs import StagePaths
from acebert.training.pretrain import new_model
from acebert.training.pretrain_batches import PretrainBatch, PretrainBatches
from acebert.training.pretrain_loop import run
from acebert.training.pretrain_pairs import NO_PHOTO
from acebert.training.pretrain_validation import Answers, HeldOut, _gain
from acebert.training.pretrainer import Pretrainer
from acebert.training.steps import Rank

CPU = torch.device("cpu")
SMALL = [
    *["--recipe", "cebert_tiny", "--train.precision", "fp32", "--model.dropout", "0.1"],
    *["--model.width", "32", "--model.heads", "2", "--model.layers", "1"],
    *["--model.image_attention_bias", "0", "--pretrain.batch_size", "16"],
    *["--pretrain.held_out", "0.25", "--pretrain.warmup_steps", "5", "--pretrain.lr", "3e-3"],
    *["--pretrain.validate_every", "6", "--train.checkpoint_every", "4"],
    *["--pretrain.valid_products", "80", "--pretrain.negatives", "3"],
    *["--pretrain.same_category_negatives", "0", "--pretrain.patch_temperature", "1"],
]


@pytest.fixture
def settings() -> Settings:
    return load_settings(SMALL)


def with_pretrain(settings: Settings, **values: object) -> Settings:
    own = settings.pretrain.model_copy(update=values)
    return settings.model_copy(update={"pretrain": own})


def train(settings: Settings, paths: StagePaths, save: Any = lambda *_: None, resume: Any = None):
    model = new_model(settings, paths)
    state = run(settings, paths, model, Rank(0, 1, CPU, save, resume and (lambda: resume)))
    return model, state


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_batch_is_learned_until_each_loss_is_near_its_floor(
    settings: Settings, handmade_paths: StagePaths, adaptive: bool
) -> None:
    """Floors are zero: the words, the patches and the label of each row are fixed."""
    settings = with_pretrain(settings, adaptive_loss=adaptive, warmup_steps=1, lr=1e-2)
    settings = settings.model_copy(
        update={"model": settings.model.model_copy(update={"dropout": 0.0})}
    )
    batch = PretrainBatches(settings, handmade_paths, rank=0, world=1).batch(0)
    trainer = Pretrainer(settings, new_model(settings, handmade_paths), CPU, 0, 1)
    first = trainer.step(batch, 0, 0.0)
    for _ in range(250):
        last = trainer.step(batch, 0, 0.0)
    assert first["mlm"] > 3
    assert last["mlm"] < 0.1
    assert last["tip"] < 0.05 * first["tip"]
    assert last["mpm"] < 0.15 * first["mpm"]
    assert last["mlm_accuracy"] == 1
    assert last["tip_accuracy"] == 1
    weights = [float(last[f"{name}_weight"]) for name in ("mlm", "mpm", "tip")] if adaptive else [1]
    assert sum(weights) == pytest.approx(1)


def blanked(batch: PretrainBatch, mask: int) -> PretrainBatch:
    """All words the same but [MASK], all patches ones but the masked, all photos black."""
    text, image = batch.inputs.text, batch.inputs.image
    assert image is not None
    assert image.patches is not None
    assert image.pixels is not None
    ids = torch.where(text.input_ids == mask, mask, 5 * text.attention_mask)
    nothing = ImageInputs(
        image.has_image, torch.ones_like(image.patches), torch.zeros_like(image.pixels)
    )
    text = TextInputs(ids, text.attention_mask, text.segment_ids)
    return replace(batch, inputs=replace(batch.inputs, text=text, image=nothing))


def test_masks_and_lengths_alone_do_not_tell_which_pairs_match(
    settings: Settings, handmade_paths: StagePaths
) -> None:
    """With mismatched photos of both kinds, as the tiny recipes have them."""
    settings = with_pretrain(settings, batch_size=32, same_category_negatives=0.25)
    batches = PretrainBatches(settings, handmade_paths, rank=0, world=1)
    trainer = Pretrainer(settings, new_model(settings, handmade_paths), CPU, 0, 1)
    mask = batches.vocabulary.mask
    for step in range(120):
        trainer.step(blanked(batches.batch(step), mask), step, step / 120)
    trainer.model.eval()
    scores, labels = [], []
    for step in range(200, 230):
        batch = blanked(batches.batch(step), mask)
        with torch.inference_mode():
            scores.append(trainer.model(batch.inputs).match[batch.paired.bool()])
        labels.append(batch.matched[batch.paired.bool()])
    label, score = torch.cat(labels).numpy(), torch.cat(scores).numpy()
    n, m = label.sum(), (1 - label).sum()
    deviation = np.sqrt((n + m + 1) / (12 * n * m))  # of the AUC of scores that tell nothing
    assert abs(roc_auc_score(label, score) - 0.5) < 4 * deviation
    assert len(np.unique(score)) > 100


def test_the_mean_of_the_ranks_gradients_is_the_gradient_of_the_whole_batch(
    settings: Settings, handmade_paths: StagePaths
) -> None:
    """What DDP averages; ranks have different numbers of masked words, patches and pairs."""
    settings = settings.model_copy(
        update={"model": settings.model.model_copy(update={"dropout": 0.0})}
    )

    def gradients(world: int) -> list[dict[str, torch.Tensor]]:
        """By rank; the ranks are no processes here, so the mean over them is taken by hand."""
        batches = [
            PretrainBatches(settings, handmade_paths, rank, world).batch(3) for rank in range(world)
        ]
        pairs = torch.stack([batch.paired.sum() for batch in batches]).mean()
        found = []
        for batch in batches:
            trainer = Pretrainer(settings, new_model(settings, handmade_paths), CPU, 0, 1)
            trainer.world, trainer._global = world, lambda _: pairs
            losses, _ = trainer._losses(trainer.model(batch.inputs), batch)
            sum(losses.values()).backward()
            found.append({name: p.grad for name, p in trainer.model.named_parameters()})
        return found

    (whole,), ranks = gradients(1), gradients(4)
    for name, grad in whole.items():
        mean = torch.stack([rank[name] for rank in ranks]).mean(dim=0)
        torch.testing.assert_close(mean, grad, atol=1e-5, rtol=1e-3, msg=name)


def test_a_run_resumed_in_the_middle_of_an_epoch_has_the_same_losses_and_weights(
    settings: Settings, handmade_paths: StagePaths
) -> None:
    settings = with_pretrain(settings, epochs=2)
    kept: list[tuple[dict, Progress]] = []

    def save(tensors: Any, progress: Progress) -> None:
        if progress.step == 8:
            kept.append((copy.deepcopy(tensors), copy.deepcopy(progress)))
            raise KeyboardInterrupt

    whole, state = train(settings, handmade_paths)
    with pytest.raises(KeyboardInterrupt):
        train(settings, handmade_paths, save)
    resumed, again = train(settings, handmade_paths, resume=kept[0])
    assert again.step == state.step > 10
    for name in ("loss", "mlm", "mpm", "tip", "tip_accuracy", "lr"):
        assert again.history[name].to_pylist() == state.history[name].to_pylist(), name
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in s.validations]
        for s in (state, again)
    ]
    np.testing.assert_equal(timeless[0], timeless[1])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_losses_fall_and_every_validation_measures_each_task(
    settings: Settings, handmade_paths: StagePaths
) -> None:
    _, state = train(with_pretrain(settings, epochs=12), handmade_paths)
    for name in ("mlm", "mpm"):
        losses = state.history[name].to_numpy()
        assert losses[-5:].mean() < 0.9 * losses[:5].mean(), name
    steps = [row["step"] for row in state.validations]
    assert steps == sorted({*range(6, state.step, 6), state.step})
    for row in state.validations:
        assert 0 <= row["tip_auc_random"] <= 1
        assert 0 <= row["tip_auc_same_category"] <= 1
        # Means over all patches, read on those that are masked: nearly the best constants.
        assert row["mpm_kl_position"] < 1.01 * row["mpm_kl_mean"]
        assert row["mpm_kl_mean"] < 1.01 * row["mpm_kl_uniform"]
        assert {"mlm_accuracy_other_photo", "mlm_accuracy_no_photo", "mpm_kl"} <= set(row)


def test_a_catalogue_without_categories_is_pre_trained_and_what_needs_them_is_not_a_number(
    settings: Settings, handmade_paths: StagePaths, tmp_path: Path
) -> None:
    ingest = tmp_path / "ingest"
    shutil.copytree(handmade_paths.ingest, ingest)
    for part in (ingest / "products").glob("part-*.parquet"):
        table = pq.read_table(part)
        column = table.column_names.index("category")
        table = table.set_column(column, "category", pa.nulls(len(table), pa.string()))
        pq.write_table(table, part)
    _, state = train(settings, replace(handmade_paths, ingest=ingest))
    told = state.validations[-1]
    assert np.isnan(told["tip_auc_same_category"])
    assert np.isnan(told["tip_accuracy_same_category"])
    assert 0 <= told["tip_auc_random"] <= 1


@pytest.fixture(scope="module")
def coloured_paths(tmp_path_factory: pytest.TempPathFactory) -> StagePaths:
    return handmade.build_coloured(tmp_path_factory.mktemp("coloured"))


def test_a_colour_that_only_the_photo_tells_is_learned_and_measured_on_unread_titles(
    settings: Settings, coloured_paths: StagePaths
) -> None:
    """A third of the words are colours, of which the right photo can tell all and another none."""
    settings = with_pretrain(settings, epochs=80, validate_every=5000, valid_products=800)
    _, state = train(settings, coloured_paths)
    told = state.validations[-1]
    assert told["mlm_accuracy"] > 0.25
    assert told["mlm_gain"] == pytest.approx(
        told["mlm_accuracy"] - told["mlm_accuracy_other_photo"], abs=1e-9
    )
    assert told["mlm_gain"] > 0.2
    assert told["mlm_accuracy_no_photo"] < 0.15
    assert told["tip_auc_random"] > 0.85
    assert told["tip_auc_same_category"] > 0.85
    assert told["tip_accuracy_same_category"] > 0.75
    assert told["mpm_kl"] < 0.8 * told["mpm_kl_position"]


def test_the_error_of_the_gain_is_that_of_products_drawn_again() -> None:
    rng = np.random.default_rng(0)
    n, masks = 200, 3
    products = np.tile(rng.permutation(n), masks)
    words = rng.integers(0, 4, n * masks)
    kind = rng.random(n)[products]  # products differ, so their rows are alike
    own = rng.binomial(words, kind)
    other = rng.binomial(words, 0.5 * kind)
    rows, none = np.arange(n * masks), np.zeros(0, np.float32)
    empty = np.zeros(n * masks)
    order = rng.permutation(n * masks)
    found = _gain(
        products,
        Answers(rows, words, own, empty, none, none),
        Answers(rows[order], words[order], other[order], empty, none, none),
    )
    total = words.sum()
    assert found["mlm_gain"] == pytest.approx((own - other).sum() / total)
    by_product = [np.bincount(products, x) for x in (own - other, words)]
    drawn = rng.integers(n, size=(5000, n))
    again = by_product[0][drawn].sum(axis=1) / by_product[1][drawn].sum(axis=1)
    assert found["mlm_gain_error"] == pytest.approx(again.std(), rel=0.05)


def test_a_model_without_images_is_asked_the_same_words(
    settings: Settings, handmade_paths: StagePaths
) -> None:
    text = settings.model.model_copy(update={"patches": False, "pixels": False})
    alone = settings.model_copy(update={"model": text})
    both = []
    for own, paths in (
        (settings, handmade_paths),
        (alone, replace(handmade_paths, features=None)),
    ):
        batches = PretrainBatches(own, paths, rank=0, world=1)
        held_out = HeldOut(batches)
        asked = set()
        for i, product in enumerate(held_out.products):
            row = np.array([i])
            arrays = batches.texts.arrays(held_out.products[row])
            inputs, _ = batches.inputs(
                arrays, np.array([NO_PHOTO]), None, held_out.draws[row], np.ones(1, bool)
            )
            asked.add((int(product), *inputs.word_columns.tolist()))
        both.append((set(held_out.products.tolist()), asked))
    (pictured, with_photos), (titled, without) = both
    assert with_photos == {row for row in without if row[0] in pictured}
    assert len(pictured) > 10
    assert titled >= pictured


def test_text_alone_is_pre_trained_on_titles_and_queries(
    settings: Settings, handmade_paths: StagePaths
) -> None:
    settings = with_pretrain(settings, queries=True, epochs=2)
    text = settings.model.model_copy(update={"patches": False, "pixels": False})
    settings = settings.model_copy(update={"model": text})
    paths = replace(handmade_paths, features=None)
    model, state = train(settings, paths)
    assert not model.ce_bert.config.reads_images
    assert {"mpm", "tip"}.isdisjoint(state.history.column_names)
    assert set(state.validations[-1]) == {"step", "seconds", "mlm_loss", "mlm_accuracy"}


@pytest.mark.parametrize("cache", ["none", "device"])
def test_features_on_the_device_are_said_to_be_fine_tunings_alone(
    settings: Settings, handmade_paths: StagePaths, caplog: pytest.LogCaptureFixture, cache: str
) -> None:
    image = settings.image.model_copy(update={"feature_cache": cache})
    cached = with_pretrain(settings, max_steps=1).model_copy(update={"image": image})
    with caplog.at_level(logging.WARNING, "acebert"):
        train(cached, handmade_paths)
    said = "feature_cache device is for fine-tuning; here photos are read from the work directory"
    assert caplog.text.count(said) == (cache == "device")


def test_a_loss_that_is_not_finite_ends_the_run_with_what_to_do(
    settings: Settings, handmade_paths: StagePaths
) -> None:
    with pytest.raises(UserError, match=r"loss is not finite after step \d+.*--pretrain\.lr"):
        train(with_pretrain(settings, lr=1e30, warmup_steps=0), handmade_paths)
