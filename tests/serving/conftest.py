"""A bundle of an untrained model on 160 drawn products, and a service over it in this process: made
without Ray, asked without a socket."""

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uvicorn
from playwright.sync_api import Browser, sync_playwright
from untrained import untrained

from acebert.config import Settings, load_settings
from acebert.data.demo import build_demo
from acebert.data.ingest import ingest
from acebert.data.tokens import tokenize
from acebert.evaluation import embed
from acebert.models.dual import DualEncoder
from acebert.serving.api import make_api
from acebert.serving.bundle import build_bundle, bundle_queries, publish, published
from acebert.serving.catalogue import Catalogue
from acebert.serving.changes import ChangeLog, Source
from acebert.serving.product_encoder import ProductEncoder
from acebert.serving.query_encoder import QueryEncoder, product_side_version
from acebert.serving.service import SearchService
from acebert.training.pairs import StagePaths
from acebert.workdir import Stage

SMALL = [
    *["--demo.products", "160", "--demo.searches_per_day", "200", "--demo.days", "4"],
    *["--demo.image_side", "64", "--model.width", "32", "--model.heads", "2"],
    *["--model.layers", "1", "--text.vocab_size", "400", "--train.precision", "fp32"],
    *["--serve.hot_queries", "20", "--serve.follow_seconds", "0.1"],
    *["--model.hot_queries", "as_is"],
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


def make_bundle(settings: Settings, ingested: Stage, paths: StagePaths, model: Path) -> Stage:
    out = settings.workdir / f"embed-{model.name}"
    out.mkdir()
    actor = embed._Embedder(settings, model, partial(embed._Products, paths=paths), 1)
    table = pq.read_table(ingested.path / "products", columns=["product", "product_id"])
    ids = table.sort_by("product")["product_id"]
    found = actor({"start": np.array([0]), "stop": np.array([len(ids)])})
    vectors = np.empty_like(found["embedding"])
    vectors[found["row"]] = found["embedding"]
    embed._write(out / "products.parquet", "product_id", iter(ids.chunks), vectors)
    queries = bundle_queries(ingested, settings.serve.hot_queries)
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
    model, other = (untrained(settings, paths, settings.workdir / f"model{i}", i) for i in range(2))
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


class LocalEncoder:
    """`catalogue.Encode` in this process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.serve
        self._known: dict[Path, ProductEncoder] = {}

    async def __call__(self, bundle: Path, sources: Sequence[Source]) -> np.ndarray:
        if bundle not in self._known:
            self._known[bundle] = ProductEncoder(bundle, 1, self._settings.max_megapixels)
        return self._known[bundle].encode(sources)


def local_catalogue(settings: Settings) -> Catalogue:
    def bundle() -> tuple[Path, str]:
        path = published(settings.workdir)
        return path, product_side_version(path / "model")

    log = ChangeLog(settings.workdir / "serving" / "changes.sqlite")
    return Catalogue(log, LocalEncoder(settings), bundle, settings.serve.max_megapixels)


class LocalService:
    """`async with LocalService(settings) as client`: requests to a service in this process."""

    def __init__(self, settings: Settings, key: str | None = None) -> None:
        self.catalogue = local_catalogue(settings)
        self.service = SearchService(settings, self.catalogue)
        self._key = key

    async def __aenter__(self) -> httpx.AsyncClient:
        await self.service.start()
        self.app = make_api(self.service, self._key)
        transport = httpx.ASGITransport(app=self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://service")
        return self.client

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()
        await self.service.stop()
        self.catalogue._log.close()


Test = Callable[[httpx.AsyncClient, LocalService], Awaitable[None]]


@pytest.fixture
def with_service(world: World) -> Callable[..., None]:
    """`with_service(test, key=None, experiment={}, **serve)`: awaits test(client, local) beside a
    service with these settings."""

    def run(
        test: Test, key: str | None = None, experiment: Mapping[str, object] = {}, **serve: object
    ) -> None:
        changed = {
            "serve": world.settings.serve.model_copy(update=serve),
            "experiment": world.settings.experiment.model_copy(update=experiment),
        }
        settings = world.settings.model_copy(update=changed)

        async def beside() -> None:
            local = LocalService(settings, key)
            async with local as client:
                await test(client, local)

        asyncio.run(beside())

    return run


@pytest.fixture
def address(world: World, request: pytest.FixtureRequest) -> Iterator[str]:
    """A service on a socket of 127.0.0.1, by uvicorn in a thread; its parameter is the API key."""
    ready = threading.Event()
    made: dict[str, Any] = {}

    async def serve() -> None:
        local = LocalService(world.settings, getattr(request, "param", None))
        async with local:
            config = uvicorn.Config(local.app, port=0, log_level="error", lifespan="off")
            made["server"] = server = uvicorn.Server(config)
            running = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.02)
            made["port"] = server.servers[0].sockets[0].getsockname()[1]
            ready.set()
            await running

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(120)
    yield f"http://127.0.0.1:{made['port']}"
    made["server"].should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on the PATH (apt-get install chromium)")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium)
        yield launched
        launched.close()
