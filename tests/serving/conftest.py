"""A bundle of an untrained model on 80 drawn products, made without Ray."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from acebert.config import Settings, load_settings
from acebert.data.demo import build_demo
from acebert.data.ingest import ingest
from acebert.data.tokens import tokenize
from acebert.evaluation import embed
from acebert.models.dual import DualEncoder
from acebert.serving.bundle import build_bundle, hot_queries, publish
from acebert.serving.query_encoder import QueryEncoder
from acebert.training.finetune import new_model
from acebert.training.pairs import StagePaths
from acebert.workdir import Stage

SMALL = [
    *["--demo.products", "80", "--demo.searches_per_day", "200", "--demo.days", "4"],
    *["--demo.image_side", "64", "--model.width", "32", "--model.heads", "2"],
    *["--model.layers", "1", "--text.vocab_size", "400", "--train.precision", "fp32"],
    *["--serve.hot_queries", "20", "--serve.follow_seconds", "0.1"],
]


@dataclass(frozen=True)
class World:
    """What a service is asked about, and what its answers come from."""

    settings: Settings
    ingested: Stage
    model: Path
    bundle: Path
    other_bundle: Path
    """of the same catalogue by another model"""
    ids: list[str]
    vectors: np.ndarray
    """float32 [n, d], by the embed stage's own code"""


def make_model(settings: Settings, paths: StagePaths, name: str, seed: int) -> Path:
    directory = settings.workdir / name
    model = new_model(settings, paths)
    torch.manual_seed(seed)
    for parameter in model.parameters():  # untrained vectors lie too close to be told apart
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.save(directory)
    shutil.copytree(paths.tokens / "tokenizer", directory / "tokenizer")
    tree = settings.model_dump(mode="json")
    (directory / "settings.yaml").write_text(yaml.safe_dump(tree))
    return directory


def make_bundle(settings: Settings, ingested: Stage, paths: StagePaths, model: Path) -> Stage:
    out = settings.workdir / f"embed-{model.name}"
    out.mkdir()
    actor = embed._Embedder(settings, model, partial(embed._Products, settings, paths))
    table = pq.read_table(ingested.path / "products", columns=["product", "product_id"])
    ids = table.sort_by("product")["product_id"]
    found = actor({"start": np.array([0]), "stop": np.array([len(ids)])})
    vectors = np.empty_like(found["embedding"])
    vectors[found["row"]] = found["embedding"]
    embed._write(out / "products.parquet", "product_id", iter(ids.chunks), vectors)
    queries = hot_queries(ingested, settings.serve.hot_queries)
    hot = QueryEncoder.load(model).encode(queries)
    embed._write(out / "queries.parquet", "query", iter([pa.array(queries)]), hot)
    embedded = Stage("embed", out, model.name, 0.0, reused=False)
    return build_bundle(settings, model, model, ingested, embedded)


@pytest.fixture(scope="session")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    work = str(tmp_path_factory.mktemp("serving"))
    settings = load_settings(["--recipe", "twinbert_tiny", "--workdir", work, *SMALL])
    demo = build_demo(settings, processes=1)
    ingested = ingest(settings, str(demo.path / "products.parquet"), str(demo.path / "impressions"))
    paths = StagePaths(ingested.path, tokenize(settings, ingested).path, None)
    model, other = (make_model(settings, paths, f"model{i}", i) for i in range(2))
    bundle, second = (make_bundle(settings, ingested, paths, m).path for m in (model, other))
    table = pq.read_table(settings.workdir / f"embed-{model.name}" / "products.parquet")
    vectors = np.array(table["embedding"].to_pylist(), np.float32)
    assert DualEncoder.load(model).tower.projection.out_features == vectors.shape[1]
    return World(
        settings, ingested, model, bundle, second, table["product_id"].to_pylist(), vectors
    )


@pytest.fixture
def world(shared_world: World, tmp_path: Path) -> World:
    """The shared bundles under a work directory of the test's own, the first one published."""
    settings = shared_world.settings.model_copy(update={"workdir": tmp_path})
    publish(tmp_path, shared_world.bundle)
    return World(**{**vars(shared_world), "settings": settings})
