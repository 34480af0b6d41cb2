import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from acebert.config import (
    RECIPES,
    Settings,
    computes_in_bf16,
    flatten,
    load_settings,
    print_help,
    read_recipe,
    settings_from,
    settings_reference,
)
from acebert.errors import UserError
from acebert.job import run_job


def test_command_line_wins_over_recipe_and_recipe_over_default():
    settings = load_settings(["--recipe", "acebert_tiny", "--train.lr", "0.5"])
    assert settings.train.lr == 0.5
    assert settings.train.batch_size == 128  # acebert/recipes/_tiny.yaml
    assert settings.train.max_grad_norm == 1.0  # config.py


def test_later_include_wins_and_own_keys_win_over_includes(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("train: {lr: 1.0, epochs: 7}\n")
    (tmp_path / "b.yaml").write_text("train: {lr: 2.0}\n")
    own = tmp_path / "own.yaml"
    own.write_text(f"include: [{tmp_path}/a.yaml, {tmp_path}/b.yaml]\nmodel: {{layers: 3}}\n")
    assert read_recipe(str(own)) == {"train": {"lr": 2.0, "epochs": 7}, "model": {"layers": 3}}


@pytest.mark.parametrize("recipe", sorted(p.stem for p in RECIPES.glob("[!_]*.yaml")))
def test_every_recipe_loads_and_survives_a_round_trip_through_yaml(recipe: str, tmp_path: Path):
    settings = load_settings(["--recipe", recipe])
    saved = tmp_path / "settings.yaml"
    saved.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert load_settings(["--recipe", str(saved)]) == settings
    assert settings_from(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("recipe", "patches", "pixels", "roi", "hot", "adversary"),
    [
        ("twinbert", False, False, True, "off", "off"),
        ("fashionbert", True, False, False, "off", "off"),
        ("cebert", True, True, True, "off", "off"),
        ("acebert", True, True, True, "as_is", "minimax"),
    ],
)
def test_paper_recipes_are_the_rows_of_table_1(recipe, patches, pixels, roi, hot, adversary):
    s = load_settings(["--recipe", recipe])
    assert (s.model.patches, s.model.pixels) == (patches, pixels)
    assert s.model.hot_queries == hot
    assert s.adversary.form == adversary
    assert not patches or s.image.roi == roi
    assert (s.train.batch_size, s.model.embedding_dim, s.train.lr) == (
        384,
        128,
        5e-5,
    )  # section 4.4
    assert s.loss.false_negatives == "keep"
    assert s.train.weight_decay == 0  # section 4.4: Adam
    assert s.pretrain.weight_decay == 0.01  # section 4.4: as BERT's pre-training
    tiny = load_settings(["--recipe", f"{recipe}_tiny"])
    assert tiny.model.backbone is None
    assert tiny.model.hot_queries == hot
    assert tiny.adversary.form == adversary


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--train.lrr", "1"],
            ["unrecognized arguments: --train.lrr 1 (did you mean --train.lr?)"],
        ),
        (["--train.maxsteps=4"], ["did you mean --train.max_steps?"]),
        (["--train.lr", "fast"], ["train.lr", "number", "fast"]),
        (["--train.batch_size", "128", "--train.num_workers", "3"], ["128", "num_workers 3"]),
        (["--recipe", "nonesuch"], ["nonesuch", "acebert_tiny"]),
        (["--data.products", "p.parquet"], ["data.impressions"]),
        (["--data.test_from", "yesterday"], ["data.test_from", "yesterday"]),
        (["--model.backbone", "none", "--model.width", "10", "--model.heads", "3"], ["10", "3"]),
        (["--image.pixel_side", "100"], ["pixel_side", "100"]),
        (["--image.cnn_side", "100"], ["cnn_side", "128"]),
        (["--adversary.form", "maximin"], ["adversary.form", "minimax"]),
        (["--seed", "-1"], ["--seed", "greater than or equal to 0", "-1"]),
        (["--seed", str(2**32)], ["--seed", "4294967296"]),
        (["--tracking.tag", "men's"], ["--tracking.tag", "men's has an apostrophe"]),
        (["--loss.gamma", "200", "--loss.gamma_learned", "true"], ["gamma 200", "100 at most"]),
        (["stray"], ["stray"]),
    ],
)
def test_wrong_settings_are_refused_by_name(argv: list[str], words: list[str]):
    with pytest.raises(UserError) as error:
        load_settings(argv)
    for word in words:
        assert word in str(error.value)


def test_every_seed_is_one_that_numpy_and_torch_take():
    seeds = [leaf for leaf in flatten(Settings.model_construct().model_dump()) if "seed" in leaf]
    assert len(seeds) == 5
    for leaf in seeds:
        with pytest.raises(UserError, match=leaf):
            load_settings([f"--{leaf}", "-1"])
    largest = load_settings(["--seed", str(2**32 - 1)]).seed
    np.random.RandomState(largest)
    np.random.default_rng((largest, 0))
    torch.Generator().manual_seed(largest)


def test_unknown_key_in_a_recipe_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("train: {learning_rate: 1}\n")
    with pytest.raises(UserError, match=r"train\.learning_rate"):
        load_settings(["--recipe", str(path)])


def test_help_names_every_leaf_with_its_default(capsys: pytest.CaptureFixture[str]):
    print_help("What the job does.")
    first, *options = re.split(r"\n  --", capsys.readouterr().out)
    assert "What the job does." in first
    said = {option.split()[0]: re.sub(r"\s", "", option) for option in options}
    defaults = flatten(Settings.model_construct().model_dump())
    assert said.keys() == defaults.keys()
    defaults["workdir"] = "$ACEBERT_HOME, else ~/.acebert"
    for leaf, default in defaults.items():
        assert re.sub(r"\s", "", f"(default: {default})") in said[leaf]


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("loss.matryoshka_dims", ["64", "32"]),
        ("loss.hard_negative_ranks", ["500", "900"]),
        ("distill.layers", ["1", "2"]),
        ("eval.ks", ["7", "9", "11"]),
        ("experiment.arms", ["old", "new"]),
        ("experiment.shares", ["0.5", "0.5"]),
        ("data.columns", ["product_id=sku", "query=term"]),
    ],
)
def test_a_list_is_given_with_spaces_commas_or_the_flag_again(flag: str, values: list[str]):
    section, leaf = flag.split(".")
    expected: Any = dict(value.split("=") for value in values) if "=" in values[0] else values
    in_a_recipe = getattr(getattr(settings_from({section: {leaf: expected}}), section), leaf)
    assert len(in_a_recipe) == len(values)
    ways = (
        [f"--{flag}", *values],
        [f"--{flag}={values[0]}", *values[1:]],
        [f"--{flag}", ",".join(values)],
        [word for value in values for word in (f"--{flag}", value)],
    )
    for argv in ways:
        got = load_settings([*argv, "--seed", "3"])
        assert getattr(getattr(got, section), leaf) == in_a_recipe
        assert got.seed == 3


def test_a_list_with_spaces_survives_a_jobs_own_arguments():
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--model")
    seen: list[argparse.Namespace] = []
    argv = ["--eval.ks", "7", "9", "--model", "m", "--distill.layers", "1", "2", "--seed", "3"]
    with pytest.raises(SystemExit):
        run_job(seen.append, "A job.", own, argv)
    assert seen[0].model == "m"
    settings = load_settings(seen[0].settings)
    assert (settings.eval.ks, settings.distill.layers, settings.seed) == ((7, 9), (1, 2), 3)


def test_a_job_that_is_stopped_says_in_a_line_how_it_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(settings: Settings) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_job(work, "A job.", argv=[])
    assert stopped.value.code == 130  # 128 + SIGINT, as shells have it
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "stopped; give the same command again, what is done is reused"


def test_a_second_value_of_what_is_no_list_is_refused():
    with pytest.raises(UserError, match="unrecognized arguments: 2"):
        load_settings(["--train.lr", "1", "2"])


def test_workdir_is_absolute_and_defaults_to_acebert_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACEBERT_HOME", str(tmp_path))
    assert load_settings([]).workdir == tmp_path
    monkeypatch.chdir(tmp_path)
    assert load_settings(["--workdir", "w"]).workdir == tmp_path / "w"


def test_the_settings_reference_in_docs_is_the_codes():
    written = (RECIPES.parents[1] / "docs" / "settings.md").read_text()
    assert written == settings_reference(), "run: python -m acebert.config > docs/settings.md"


def test_paths_are_absolute_and_uris_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    data = ["--data.products", "p.csv", "--data.impressions", "s3://bucket/log"]
    settings = load_settings([*data, "--workdir", "w", "--model.backbone", "bert"])
    assert settings.data.products == str(tmp_path / "p.csv")
    assert settings.data.impressions == "s3://bucket/log"
    assert settings.workdir == tmp_path / "w"
    assert settings.model.backbone == str(tmp_path / "bert")
    hub = load_settings(["--model.backbone", "bert-base-uncased"])
    assert hub.model.backbone == "bert-base-uncased"


def test_the_words_for_a_cnns_weights_name_no_file_of_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for word in ("hub", "random", "trained"):
        (tmp_path / word).mkdir()
        assert load_settings(["--image.cnn_weights", word]).image.cnn_weights == word
    settings = load_settings(["--image.cnn_weights", "c.safetensors", "--cnn.start", "hub"])
    assert settings.image.cnn_weights == str(tmp_path / "c.safetensors")
    assert settings.cnn.start == "hub"


@pytest.mark.parametrize(
    "argv",
    [
        ["--workdir", "w"],
        ["--data.products", "p.csv", "--data.impressions", "/i.csv"],
        ["--model.backbone", "bert"],
        ["--image.cnn_weights", "c.safetensors"],
        ["--cnn.start", "c.safetensors"],
        ["--loss.hard_negatives_from", "finetune/1"],
    ],
)
def test_a_relative_path_in_the_copied_source_of_a_submitted_job_is_refused(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copied = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    (copied / "bert").mkdir(parents=True)  # it came along with the source
    monkeypatch.chdir(copied)
    with pytest.raises(UserError, match=rf"{argv[0][2:]}: .*{argv[1]} is relative"):
        load_settings(argv)


def test_two_columns_are_mapped_as_the_guide_says():
    argv = ["--data.columns", "product_id=sku,query=term"]
    assert load_settings(argv).data.columns == {"product_id": "sku", "query": "term"}


def test_a_cut_off_below_one_is_refused():
    with pytest.raises(UserError, match=r"^--eval\.ks must be 1 or more"):
        load_settings(["--eval.ks", "10,0"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 sha", True),  # Zen 4, Cooper Lake
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile", True),  # Sapphire Rapids
        ("Features\t: fp asimd bf16 i8mm", True),  # Graviton 3
        ("flags\t\t: fpu avx avx2 avx512f avx512_vnni", False),
        ("", False),
    ],
)
def test_bf16_is_chosen_where_the_processor_computes_in_it(flags: str, expected: bool) -> None:
    cpuinfo = f"processor\t: 0\nmodel name\t: bf16 in a name\n{flags}\n\nprocessor\t: 1\n{flags}\n"
    assert computes_in_bf16(cpuinfo) is expected


def test_the_image_bias_is_the_one_that_is_trained_with() -> None:
    def bias(recipe: str, *given: str) -> float:
        return load_settings(["--recipe", recipe, *given]).model.image_attention_bias

    assert bias("cebert_tiny") == -4
    assert bias("cebert_tiny", "--model.start", "pretrain") == 0
    assert bias("acebert_plus") == 0
    assert bias("acebert_plus", "--model.start", "backbone") == -4


def test_a_recipe_holds_the_precision_that_was_chosen() -> None:
    assert load_settings(["--recipe", "acebert_tiny"]).train.precision in ("fp32", "bf16")
    assert load_settings(["--recipe", "acebert"]).train.precision == "bf16"
    chosen = load_settings(["--recipe", "acebert_tiny", "--train.precision", "fp32"])
    assert chosen.train.precision == "fp32"


def test_workers_that_cannot_share_the_batches_of_pre_training_are_refused():
    elastic = ["--train.num_workers", "4", "--train.min_workers", "1", "--train.batch_size", "384"]
    fits = [*elastic, "--recipe", "cebert_tiny", "--pretrain.batch_size", "32"]
    load_settings(fits)
    with pytest.raises(UserError, match=r"pretrain\.batch_size 32 .*by 3 workers .*; 12 and its"):
        load_settings([*fits, "--model.start", "pretrain"])


def test_a_mapping_without_an_equals_sign_is_told_how_one_is_given():
    with pytest.raises(UserError, match=r"^--data\.columns: cannot be read\. .*product_id=sku"):
        load_settings(["--data.columns", "a"])


def test_an_empty_path_is_refused_by_its_setting():
    with pytest.raises(UserError, match=r"--data\.impressions: it is empty: a path or URI"):
        load_settings(["--data.products", "", "--data.impressions", ""])


def test_no_feature_cache_can_be_asked_for_where_the_recipe_has_one(tmp_path: Path):
    recipe = tmp_path / "cached.yaml"
    recipe.write_text("image: {feature_cache: node_disk}")
    settings = load_settings(["--recipe", str(recipe), "--image.feature_cache", "none"])
    assert settings.image.feature_cache == "none"
