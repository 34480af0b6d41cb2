"""Pre-training through a real Ray Train, the look inside, and fine-tuning that starts from it."""

import html
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from acebert.config import Settings
from acebert.data.features import FeatureStore
from acebert.data.preprocess import crop_spec
from acebert.evaluation.look_inside import EXAMPLES, SUSPECTS, draw_examples, look_inside
from acebert.evaluation.look_inside_page import Example, Guess, PagePhotos, write_page
from acebert.models.encoder import HOT_QUERY, TITLE, ImageInputs, TextInputs, load_backbone
from acebert.models.pretraining import CEBertForPreTraining
from acebert.tracking import client
from acebert.training.finetune import finetune, new_model
from acebert.training.pairs import StagePaths
from acebert.training.pretrain import pretrain
from acebert.training.pretrain_batches import PretrainBatches
from acebert.workdir import Stage


@pytest.fixture(scope="module")
def pretrain_settings(settings: Settings) -> Settings:
    own = {"batch_size": 16, "held_out": 0.2, "epochs": 2, "validate_every": 4, "warmup_steps": 3}
    return settings.model_copy(
        update={
            "pretrain": settings.pretrain.model_copy(update=own),
            "model": settings.model.model_copy(update={"start": "pretrain"}),
        }
    )


@pytest.fixture(scope="module")
def catalogue(stages: dict[str, Stage]) -> dict[str, Stage]:
    return {name: stages[name] for name in ("ingested", "tokens", "features")}


@pytest.fixture(scope="module")
def pretrained(pretrain_settings: Settings, catalogue: dict[str, Stage]) -> Stage:
    return pretrain(pretrain_settings, **catalogue)


def test_the_directory_is_whole_and_a_backbone_with_its_own_tokenizer(
    pretrained: Stage, pretrain_settings: Settings, catalogue: dict[str, Stage]
) -> None:
    names = {path.name for path in pretrained.path.iterdir()}
    assert {
        *("config.json", "model.safetensors", "tokenizer.json", "settings.yaml"),
        *("history.parquet", "valid.parquet", "report.json", "stage.json"),
    } <= names
    features = FeatureStore(catalogue["features"].path)
    tokenizer = AutoTokenizer.from_pretrained(pretrained.path)
    encoder = load_backbone(
        str(pretrained.path),
        layers=pretrain_settings.model.layers,
        dropout=0.0,
        vocab_size=len(tokenizer),
        sep_token_id=tokenizer.sep_token_id,
        patch_dim=features.patch_dim,
        pixel_side=features.pixel_side,
    )
    assert encoder.new_parameters == frozenset()
    segments = encoder.embeddings.token_type_embeddings.weight
    assert torch.equal(segments[HOT_QUERY], segments[TITLE])  # no query was read
    model = CEBertForPreTraining.from_pretrained(pretrained.path)
    weights = load_file(pretrained.path / "model.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_segment_of_hot_queries_that_the_backbone_learned_outlives_a_run_without_queries(
    pretrained: Stage, pretrain_settings: Settings, catalogue: dict[str, Stage], tmp_path: Path
) -> None:
    shutil.copytree(pretrained.path, tmp_path, dirs_exist_ok=True)
    learned = CEBertForPreTraining.from_pretrained(pretrained.path)
    with torch.no_grad():
        learned.ce_bert.embeddings.token_type_embeddings.weight[HOT_QUERY] += 1
    learned.save_pretrained(tmp_path)
    model = pretrain_settings.model.model_copy(update={"backbone": str(tmp_path)})
    own = pretrain_settings.pretrain.model_copy(update={"max_steps": 1})
    again = pretrain(
        pretrain_settings.model_copy(update={"model": model, "pretrain": own}), **catalogue
    )
    encoder = CEBertForPreTraining.from_pretrained(again.path).ce_bert
    segments = encoder.embeddings.token_type_embeddings.weight
    torch.testing.assert_close(segments[HOT_QUERY], segments[TITLE] + 1, atol=0.01, rtol=0)


def test_a_segment_of_hot_queries_that_no_backbone_learned_is_the_titles_after_every_run(
    pretrained: Stage, pretrain_settings: Settings, catalogue: dict[str, Stage]
) -> None:
    model = pretrain_settings.model.model_copy(update={"backbone": str(pretrained.path)})
    own = pretrain_settings.pretrain.model_copy(update={"max_steps": 1})
    again = pretrain(
        pretrain_settings.model_copy(update={"model": model, "pretrain": own}), **catalogue
    )
    before, after = (
        CEBertForPreTraining.from_pretrained(stage.path).ce_bert.embeddings.token_type_embeddings
        for stage in (pretrained, again)
    )
    assert not torch.equal(after.weight[TITLE], before.weight[TITLE])
    assert torch.equal(after.weight[HOT_QUERY], after.weight[TITLE])


def test_every_step_and_validation_is_in_mlflow_once(
    pretrained: Stage, pretrain_settings: Settings
) -> None:
    history = pq.read_table(pretrained.path / "history.parquet")
    report = json.loads((pretrained.path / "report.json").read_text())
    assert report["steps"] == history.num_rows == history["step"].to_pylist()[-1]
    mlflow = client(pretrain_settings)
    for name in ("loss", "mlm", "mpm", "tip", "mlm_accuracy", "tip_accuracy"):
        logged = mlflow.get_metric_history(report["mlflow_run"], f"train/{name}")
        assert sorted(m.step for m in logged) == history["step"].to_pylist()
    valid = pq.read_table(pretrained.path / "valid.parquet")
    for name in ("mpm_kl_position", "tip_auc_same_category", "mlm_accuracy_other_photo"):
        logged = mlflow.get_metric_history(report["mlflow_run"], f"valid/{name}")
        assert sorted(m.step for m in logged) == valid["step"].to_pylist()


@pytest.mark.slow
def test_two_workers_pre_train_as_one_does(
    pretrained: Stage, pretrain_settings: Settings, catalogue: dict[str, Stage]
) -> None:
    """Another seed of nothing: only the workers differ, so the stage has to be made elsewhere."""
    train = pretrain_settings.train.model_copy(update={"num_workers": 2, "threads_per_worker": 1})
    elsewhere = pretrain_settings.workdir / "two"
    both = pretrain(
        pretrain_settings.model_copy(update={"train": train, "workdir": elsewhere}), **catalogue
    )
    one, two = (pq.read_table(s.path / "history.parquet") for s in (pretrained, both))
    for name in ("loss", "mlm", "mpm", "tip", "grad_norm"):
        np.testing.assert_allclose(one[name], two[name], rtol=2e-3, err_msg=name)
    one, two = (pq.read_table(s.path / "valid.parquet") for s in (pretrained, both))
    for name in ("mlm_loss", "mlm_loss_other_photo", "mpm_kl", "tip_loss"):
        np.testing.assert_allclose(one[name], two[name], rtol=2e-3, err_msg=name)
    for name in ("tip_auc_random", "tip_auc_same_category"):
        np.testing.assert_allclose(one[name], two[name], atol=0.01, err_msg=name)


def test_fine_tuning_starts_from_the_pre_trained_weights_and_says_so_in_its_digest(
    pretrained: Stage, pretrain_settings: Settings, stages: dict[str, Stage], paths: StagePaths
) -> None:
    weights = load_file(pretrained.path / "model.safetensors")
    start = new_model(pretrain_settings, paths, pretrained.path)
    for name, parameter in start.tower.encoder.named_parameters():
        assert torch.equal(parameter, weights[f"ce_bert.{name}"]), name
    assert start.new_parameters == {"tower.projection.weight", "tower.projection.bias"}

    short = pretrain_settings.train.model_copy(update={"max_steps": 1})
    settings = pretrain_settings.model_copy(update={"train": short})
    tuned = finetune(settings, **stages, pretrained=pretrained)
    key = json.loads((tuned.path / "stage.json").read_text())["key"]
    assert key["pretrain"] == pretrained.digest
    tuned_words = load_file(tuned.path / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    moved = tuned_words[f"tower.encoder.{name}"] - weights[f"ce_bert.{name}"]
    assert 0 < moved.abs().max() <= 2 * settings.train.lr  # one step of Adam from there
    with pytest.raises(ValueError, match=r"model\.start is 'pretrain', pretrained is None"):
        finetune(settings, **stages)


def test_what_fine_tuning_alone_reads_does_not_pre_train_again(
    pretrained: Stage, pretrain_settings: Settings, catalogue: dict[str, Stage]
) -> None:
    model = pretrain_settings.model.model_copy(
        update={"embedding_dim": 7, "hot_queries": "off", "shared_towers": False}
    )
    train = pretrain_settings.train.model_copy(update={"lr": 0.1, "batch_size": 8})
    other = {"model": model, "train": train, "seed": 5}
    assert pretrain(pretrain_settings.model_copy(update=other), **catalogue).path == pretrained.path


@pytest.fixture(scope="module")
def looked(pretrained: Stage, pretrain_settings: Settings, catalogue: dict[str, Stage]) -> Stage:
    return look_inside(pretrain_settings, pretrained, **catalogue)


@torch.inference_mode()
def test_every_product_with_title_and_photo_is_listed_the_least_fitting_first(
    looked: Stage, pretrained: Stage, paths: StagePaths
) -> None:
    listed = pq.read_table(looked.path / "suspicious.parquet")
    match = listed["match"].to_numpy()
    assert (np.diff(match) >= 0).all()
    products = ds.dataset(paths.ingest / "products").to_table().sort_by("product")
    features = FeatureStore(paths.features)
    pictured = features.has_image(np.arange(len(products)))
    wanted = {
        product_id
        for product_id, title, has in zip(
            products["product_id"].to_pylist(), products["title"].to_pylist(), pictured, strict=True
        )
        if title and has
    }
    assert sorted(listed["product_id"].to_pylist()) == sorted(wanted)

    # Some of them again, one at a time, with the last layer in full.
    model = CEBertForPreTraining.from_pretrained(pretrained.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(pretrained.path)
    row_of = {product_id: row for row, product_id in enumerate(products["product_id"].to_pylist())}
    for i in range(0, listed.num_rows, 25):
        row = np.array([row_of[listed["product_id"][i].as_py()]])
        pieces = tokenizer(listed["title"][i].as_py(), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[tokenizer.cls_token_id, *pieces, tokenizer.sep_token_id]])
        text = TextInputs(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids))
        patches, pixels = features.patches(row), features.pixels(row)
        image = ImageInputs(
            torch.tensor([True]), torch.from_numpy(patches), torch.from_numpy(pixels)
        )
        state = model.ce_bert(text, image)[:, : ids.shape[1]].mean(dim=1)
        assert match[i] == pytest.approx(float(model.match_head(state).sigmoid()), abs=1e-4)


def test_the_page_stands_alone_and_shows_photos_words_and_suspects(looked: Stage) -> None:
    page = (looked.path / "page.html").read_text()
    assert "://" not in page
    assert page.count("data:image/jpeg;base64,") == 2 * EXAMPLES + SUSPECTS
    assert page.count("<h2>") == 3
    suspects = pq.read_table(looked.path / "suspicious.parquet").slice(0, 3)
    for title in suspects["title"].to_pylist():
        assert html.escape(title) in page


def test_no_product_is_an_example_twice_though_few_are_held_out_under_many_masks(
    pretrained: Stage, pretrain_settings: Settings, paths: StagePaths
) -> None:
    batches = PretrainBatches(pretrain_settings, paths, rank=0, world=1)
    masks = EXAMPLES - 1  # every n-th of the masked titles would be one product's
    own = {"valid_products": masks * len(batches.texts.held_out)}
    few = pretrain_settings.pretrain.model_copy(update=own)
    settings = pretrain_settings.model_copy(update={"pretrain": few})
    shown = [e.product for e in draw_examples(settings, pretrained.path, paths)]
    assert len(set(shown)) == len(shown) == EXAMPLES
    assert set(shown) <= set(batches.texts.held_out.tolist())


def test_a_title_with_markup_cannot_put_anything_on_the_page(
    tmp_path: Path, pretrain_settings: Settings, paths: StagePaths
) -> None:
    assert paths.features is not None
    photos = PagePhotos(crop_spec(pretrain_settings), paths.ingest / "products", paths.features)
    evil = "<script>alert(1)</script>"
    guess = [Guess(evil, 0.5, 0.1)]
    words = [dict.fromkeys(("own", "other", "none"), guess)]
    example = Example(0, 1, evil, [evil], words, {"own": 0.9, "other": 0.1})
    write_page(tmp_path / "page.html", {}, [example], [(2, evil, 0.1)], photos)
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") >= 4
