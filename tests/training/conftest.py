"""A small catalogue, the demo's, through the real stages, once a session."""

import handmade
import pytest

from acebert.config import Settings, load_settings
from acebert.data.demo import build_demo
from acebert.data.ingest import ingest
from acebert.data.partitions import plan
from acebert.data.preprocess import preprocess
from acebert.data.tokens import tokenize
from acebert.training.pairs import StagePaths
from acebert.workdir import Stage

SMALL = [
    *["--demo.products", "120", "--demo.searches_per_day", "300", "--demo.days", "4"],
    *["--model.width", "32", "--model.heads", "2", "--model.layers", "1", "--model.dropout", "0"],
    *["--image.pixel_side", "35", "--text.vocab_size", "400"],
    *["--train.batch_size", "32", "--train.validate_every", "5", "--train.epochs", "2"],
    *["--train.precision", "fp32", "--train.warmup_steps", "3", "--train.valid_products", "120"],
]


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    workdir = tmp_path_factory.mktemp("workdir")
    return load_settings(["--recipe", "acebert_tiny", "--workdir", str(workdir), *SMALL])


@pytest.fixture(scope="session")
def stages(settings: Settings, ray_cluster: None) -> dict[str, Stage]:
    """ingest, tokens, features and plan, as `finetune` takes them."""
    demo = build_demo(settings, processes=1)
    ingested = ingest(settings, str(demo.path / "products.parquet"), str(demo.path / "impressions"))
    return {
        "ingested": ingested,
        "tokens": tokenize(settings, ingested),
        "features": preprocess(settings, ingested),
        "plan": plan(settings, ingested),
    }


@pytest.fixture(scope="session")
def paths(stages: dict[str, Stage]) -> StagePaths:
    return StagePaths(*(stages[name].path for name in ("ingested", "tokens", "features", "plan")))


@pytest.fixture(scope="session")
def handmade_paths(tmp_path_factory: pytest.TempPathFactory) -> StagePaths:
    return handmade.build(tmp_path_factory.mktemp("handmade"))
