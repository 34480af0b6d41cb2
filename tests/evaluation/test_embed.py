"""What an actor makes of its runs, against the encoder on one row at a time; no cluster."""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from acebert.config import Settings, load_settings
from acebert.data.demo import build_demo
from acebert.data.ingest import ingest
from acebert.data.tokens import tokenize
from acebert.errors import UserError
from acebert.evaluation import embed
from acebert.models.dual import DualEncoder
from acebert.training.finetune import new_model
from acebert.training.pairs import InputStore, StagePaths
from acebert.workdir import Stage

SMALL = [
    *["--demo.products", "60", "--demo.searches_per_day", "200", "--demo.days", "4"],
    *[
        "--demo.image_side",
        "32",
        "--model.width",
        "32",
        "--model.heads",
        "2",
        "--model.layers",
        "1",
    ],
    *["--text.vocab_size", "300", "--train.precision", "fp32", "--eval.batch_size", "7"],
    *["--model.hot_queries", "other_days"],
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    work = str(tmp_path_factory.mktemp("work"))
    return load_settings(["--recipe", "twinbert_tiny", "--workdir", work, *SMALL])


@pytest.fixture(scope="module")
def paths(settings: Settings) -> StagePaths:
    demo = build_demo(settings, processes=1)
    ingested = ingest(settings, str(demo.path / "products.parquet"), str(demo.path / "impressions"))
    return StagePaths(ingested.path, tokenize(settings, ingested).path, None)


@pytest.fixture(scope="module")
def model(settings: Settings, paths: StagePaths) -> Path:
    directory = settings.workdir / "model"
    new_model(settings, paths).save(directory)
    return directory


def test_rows_of_a_run_have_the_vectors_of_one_row_at_a_time(
    settings: Settings, paths: StagePaths, model: Path
) -> None:
    actor = embed._Embedder(settings, model, partial(embed._Products, paths=paths), 1)
    found = actor({"start": np.array([10]), "stop": np.array([40])})
    assert sorted(found["row"].tolist()) == list(range(10, 40))
    inputs, encoder = InputStore(settings, paths), DualEncoder.load(model).eval()
    lists = pq.read_table(paths.ingest / "product_hot_lists.parquet")["test"].to_numpy()
    for row, vector in zip(found["row"], found["embedding"], strict=True):
        text, _ = inputs.products(np.array([row]), lists[[row]])
        with torch.inference_mode():
            np.testing.assert_allclose(vector, encoder.encode_products(text, None)[0], atol=1e-5)


def test_actors_and_this_process_write_the_same_vectors(
    settings: Settings,
    paths: StagePaths,
    model: Path,
    tmp_path: Path,
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = []
    for few in (0, 10**6):
        monkeypatch.setattr(embed, "FEW_ROWS", few)
        monkeypatch.setattr(embed, "FEW_ROWS_ALONE", few)
        out = tmp_path / str(few)
        out.mkdir()
        embed.embed_products(settings, model, paths, out, "no photos", None)
        tables.append(pq.read_table(out / "products.parquet"))
    by_actors, here = tables
    assert by_actors["product_id"] == here["product_id"]
    np.testing.assert_allclose(
        *(np.array(table["embedding"].to_pylist()) for table in tables), atol=1e-5
    )


def test_lengths_are_those_of_the_tokens_that_the_encoder_reads(
    settings: Settings, paths: StagePaths
) -> None:
    products = embed._Products(settings, paths)
    rows = np.arange(60)
    lists = pq.read_table(paths.ingest / "product_hot_lists.parquet")["test"].to_numpy()
    tokens = products._inputs.text.product_batch(rows, lists).attention_mask.sum(axis=1)
    np.testing.assert_array_equal(products.lengths(rows) + 2, tokens)  # [CLS] and [SEP]


def test_ids_and_vectors_are_written_side_by_side_in_row_groups(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    ids = [pa.array(["a", "b", "c", "d"]), pa.array(["e", "f", "g"])]
    embed._write(tmp_path / "v.parquet", "product_id", iter(ids), vectors)
    table = pq.read_table(tmp_path / "v.parquet")
    assert table["product_id"].to_pylist() == list("abcdefg")
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), vectors)
    assert pq.read_metadata(tmp_path / "v.parquet").num_row_groups == 2


def test_models_of_one_name_and_size_are_told_apart_and_copies_are_not(
    settings: Settings, paths: StagePaths, tmp_path: Path
) -> None:
    made = []
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        directory = tmp_path / name / "model"
        new_model(settings.model_copy(update={"seed": seed}), paths).save(directory)
        shutil.copytree(paths.tokens / "tokenizer", directory / "tokenizer")
        (directory / "settings.yaml").write_text("seed: 0")
        made.append(directory)
    a, b, c = made
    assert len({(model / "model.safetensors").stat().st_size for model in made}) == 1
    assert embed.model_digests(a) == embed.model_digests(c) != embed.model_digests(b)
    (c / "settings.yaml").write_text("seed: 1")
    assert embed.model_digests(a) != embed.model_digests(c)


def test_a_model_directory_that_lacks_a_file_or_has_broken_weights_is_told_by_its_name(
    settings: Settings, paths: StagePaths, model: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "model"
    shutil.copytree(model, whole)
    shutil.copytree(paths.tokens / "tokenizer", whole / "tokenizer")
    (whole / "settings.yaml").write_text("seed: 0")
    stages = [
        Stage(p.parent.name, p, p.name, 0.0, reused=True) for p in (paths.ingest, paths.tokens)
    ]

    def refused(model: Path) -> str:
        with pytest.raises(UserError) as caught:
            embed.embed(settings, model, *stages, None, ["shoe"])
        return str(caught.value)

    for name in embed.MODEL_FILES:
        lacking = tmp_path / f"no {Path(name).name}"
        shutil.copytree(whole, lacking)
        (lacking / name).unlink()
        assert (
            refused(lacking) == f"--model {lacking}: not the directory of a model, it has no {name}"
        )
    weights = whole / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refused(whole).startswith(f"{weights}: not the weights that config.json beside it")
    assert not list((settings.workdir / "embed").glob("[!.]*"))


def test_fewer_dimensions_are_the_first_ones_brought_to_length_one(
    settings: Settings, paths: StagePaths, model: Path
) -> None:
    short = settings.model_copy(update={"eval": settings.eval.model_copy(update={"dimensions": 5})})
    make = partial(embed._Products, paths=paths)
    run = {"start": np.array([10]), "stop": np.array([40])}
    found, whole = (embed._Embedder(s, model, make, 1)(run)["embedding"] for s in (short, settings))
    first = whole[:, :5]
    expected = first / np.linalg.norm(first, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


VECTORS_ON_A_SMALL_DISK = """
import sys
from pathlib import Path
import numpy as np
from acebert.config import load_settings
from acebert.errors import UserError
from acebert.evaluation import embed
from acebert.workdir import run_stage

n = 600_000

def embedded(*_):
    yield {"row": np.arange(n), "embedding": np.ones((n, 16), np.float32)}

def build(out):
    with embed._vectors(load_settings([]), Path(), "products", n, None, out):
        print("mapped")

embed._embedded = embedded
try:
    run_stage(Path(sys.argv[1]), "embed", {}, build)
except UserError as error:
    print("USER ERROR", error)
"""


@pytest.mark.slow
def test_vectors_that_the_disk_has_no_room_for_are_said(small_disk: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", VECTORS_ON_A_SMALL_DISK, str(small_disk)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "USER ERROR embed: the disk under" in done.stdout, (done.returncode, done.stderr[-3000:])
    assert "mapped" not in done.stdout
    assert not list(small_disk.rglob("*.npy"))
