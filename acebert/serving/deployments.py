"""The service on Ray Serve.

    Search (ingress, N replicas: HTTP, hot queries, index, query encoder)
      ├─ Changes (one: the change log)
      │    └─ ProductEncoding (N)
      ├─ ProductEncoding, for search by photo
      └─ QueryEncoding (N), only where `serve.encoder_apart`

A search makes no hop (`benchmarks/serve.py` measures what one costs). Changes, which may wait some
milliseconds, go to the one writer.
"""

import asyncio
import logging
import os
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from acebert.config import Settings
from acebert.data.image import BrokenImage
from acebert.errors import UserError
from acebert.job import set_up_logging
from acebert.serving.api import make_api
from acebert.serving.bundle import Bundle, published
from acebert.serving.catalogue import Catalogue, Unavailable
from acebert.serving.changes import ChangeLog, Source
from acebert.serving.product_encoder import ProductEncoder
from acebert.serving.products import Change, Patch
from acebert.serving.query_encoder import (
    QueryEncoder,
    product_side_version,
    refuse_without_runtime,
)
from acebert.serving.service import SearchService
from acebert.serving.threads import to_its_end
from acebert.serving.wanted import WantedBundle

log = logging.getLogger(__name__)

KEY_VARIABLE = "ACEBERT_API_KEY"
BUNDLES = 2  # whose encoders are kept: the old and the new one of a swap
# So that all of it fits on two cores; serve/config.yaml gives a cluster's replicas whole ones.
SOME, LITTLE = {"num_cpus": 0.5}, {"num_cpus": 0.2}
ONE_LOOP = {"env_vars": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}}
"""A runtime environment of Search: no hand-over between Ray's event loop and a second one, for each
message of each request. What takes long runs in threads of the service."""
QUICK, ENCODING = 5.0, 60.0  # seconds to wait for an answer, and for one that may encode products
"""request_timeout_s of the proxies is longer, so that a request ends with our 503 and its reason"""
ONGOING = 1000  # by Serve's default of 5, slow photos keep replicas from what changed
QUIET = {"enable_access_log": False}
"""No line in Ray's log for each request, of which replicas alone send two a second; requests are
counted and timed by `acebert.serving.metrics`."""


@serve.deployment(ray_actor_options=LITTLE, logging_config=QUIET, max_ongoing_requests=ONGOING)
class ProductEncoding:
    """Products → vectors, by the model of the bundle that is asked for."""

    def __init__(self, settings: Settings) -> None:
        options = settings.serve.threads, settings.serve.max_megapixels
        bundles = BUNDLES + len(settings.experiment.arms)
        self._encoder = lru_cache(bundles)(lambda bundle: ProductEncoder(bundle, *options))
        self._one = asyncio.Lock()  # torch's threads are there for one batch

    async def encode(
        self, bundle: Path, sources: Sequence[Source]
    ) -> NDArray[np.float32] | BrokenImage:
        async with self._one:
            try:
                return await to_its_end(lambda: self._encoder(bundle).encode(sources))
            except BrokenImage as error:  # raised, Serve would log a traceback
                return error


@serve.deployment(ray_actor_options=SOME, logging_config=QUIET, max_ongoing_requests=ONGOING)
class QueryEncoding:
    """Queries → vectors, with the version of the model that made them."""

    def __init__(self, settings: Settings) -> None:
        options = settings.serve.runtime, settings.serve.threads
        self._encoder = lru_cache(BUNDLES + len(settings.experiment.arms))(
            lambda bundle: QueryEncoder.load(bundle / "query_encoder", *options)
        )
        batched: Any = self._batched
        batched.set_max_batch_size(settings.serve.batch_size)
        batched.set_batch_wait_timeout_s(settings.serve.batch_wait_ms / 1000)

    @serve.batch
    async def _batched(self, asked: list[tuple[Path, str]]) -> list[tuple[str, Any]]:
        return await asyncio.to_thread(self._encode, asked)

    def _encode(self, asked: list[tuple[Path, str]]) -> list[tuple[str, Any]]:
        answers: list[Any] = [None] * len(asked)
        for bundle in {bundle for bundle, _ in asked}:
            rows = [i for i, (of, _) in enumerate(asked) if of == bundle]
            encoder = self._encoder(bundle)
            vectors = encoder.encode([asked[i][1] for i in rows])
            for i, vector in zip(rows, vectors, strict=True):
                answers[i] = encoder.version, vector
        return answers

    async def encode(self, bundle: Path, text: str) -> tuple[str, NDArray[np.float32]]:
        return await self._batched((bundle, text))


@serve.deployment(ray_actor_options=LITTLE, logging_config=QUIET, max_ongoing_requests=ONGOING)
class Changes:
    """The one writer: `Catalogue` behind a handle."""

    def __init__(self, settings: Settings, encoding: DeploymentHandle) -> None:
        set_up_logging()
        wanted = WantedBundle(settings)

        def bundle() -> tuple[Path, str]:
            path = wanted()
            return path, self._version(path)

        async def encode(*arguments: Any) -> NDArray[np.float32]:
            return await _asked(encoding.encode.remote(*arguments), ENCODING)

        bundles = BUNDLES + len(settings.experiment.arms)
        self._version = lru_cache(bundles)(lambda path: product_side_version(path / "model"))
        self._log = ChangeLog(settings.workdir / "serving" / "changes.sqlite")
        self._catalogue = Catalogue(self._log, encode, bundle, settings.serve.max_megapixels)

    async def put(self, sources: Sequence[Source]) -> int | BrokenImage:
        try:
            return await self._catalogue.put(sources)
        except BrokenImage as error:  # as above
            return error

    async def patch(self, product_id: str, patch: Patch) -> int | None:
        return await self._catalogue.patch(product_id, patch)

    async def delete(self, product_id: str) -> int:
        return await self._catalogue.delete(product_id)

    async def changes(self, since: int, bundle: Path, version: str) -> list[Change]:
        return await self._catalogue.changes(since, bundle, version)

    async def begin(self, catalogue: datetime | None) -> tuple[int, list[str]]:
        return await self._catalogue.begin(catalogue)

    async def photo(self, product_id: str) -> bytes | None:
        return await self._catalogue.photo(product_id)

    def __del__(self) -> None:
        self._log.close()


class RemoteProducts:
    """`catalogue.Products` by deployments."""

    def __init__(self, changes: DeploymentHandle, encoding: DeploymentHandle) -> None:
        self._changes, self._encoding = changes, encoding

    async def put(self, sources: Sequence[Source]) -> int:
        return await _asked(self._changes.put.remote(sources), ENCODING)

    async def patch(self, product_id: str, patch: Patch) -> int | None:
        return await _asked(self._changes.patch.remote(product_id, patch))

    async def delete(self, product_id: str) -> int:
        return await _asked(self._changes.delete.remote(product_id))

    async def changes(self, since: int, bundle: Path, version: str) -> list[Change]:
        return await _asked(self._changes.changes.remote(since, bundle, version), ENCODING)

    async def begin(self, catalogue: datetime | None) -> tuple[int, list[str]]:
        return await _asked(self._changes.begin.remote(catalogue))

    async def photo(self, product_id: str) -> bytes | None:
        return await _asked(self._changes.photo.remote(product_id))

    async def encode(self, bundle: Path, sources: Sequence[Source]) -> NDArray[np.float32]:
        return await _asked(self._encoding.encode.remote(bundle, sources), ENCODING)


async def _asked(response: Any, seconds: float = QUICK) -> Any:
    """What a deployment answered, with its own exceptions and not Ray's around them.

    Raises:
        BrokenImage: as the deployment returned it.
        Unavailable: it is not there (a handle would wait for it), has too much to do, or cannot
            read its bundle, which no client can mend.
    """
    try:
        answer = await asyncio.wait_for(response, seconds)
    except TimeoutError as error:
        raise Unavailable(f"a part of the service did not answer in {seconds:g} s") from error
    except RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, RayTaskError) and cause.cause is not None:
            cause = cause.cause
        if isinstance(cause, UserError):
            log.warning("a part of the service fails: %s", cause)
            raise Unavailable("a part of the service cannot read its bundle: try again") from cause
        if isinstance(cause, Unavailable):
            raise cause from None
        raise
    except (RayError, RayServeException, BackPressureError) as error:
        raise Unavailable("a part of the service restarts: try again") from error
    if isinstance(answer, BrokenImage):
        raise answer
    return answer


@serve.deployment(ray_actor_options={**SOME, "runtime_env": ONE_LOOP}, logging_config=QUIET)
@serve.ingress()
class Search:
    """The ingress: HTTP, and all that a search needs."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        settings: Settings,
        changes: DeploymentHandle,
        encoding: DeploymentHandle,
        queries: DeploymentHandle | None,
    ) -> None:
        set_up_logging()
        logging.getLogger("acebert").info("starts in process %d", os.getpid())

        async def encode(bundle: Path, texts: Sequence[str]) -> tuple[str, NDArray[np.float32]]:
            assert queries is not None
            asked = [_asked(queries.encode.remote(bundle, text)) for text in texts]
            answers = await asyncio.gather(*asked)
            return answers[0][0], np.stack([vector for _, vector in answers])

        products = RemoteProducts(changes, encoding)
        self.service = SearchService(settings, products, encode if queries else None)
        await self.service.start()

    async def __del__(self) -> None:
        """Ray awaits it when a replica is shut down: its log is moved, its lease ends."""
        await self.service.stop()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return make_api(self.service, api_key())


def api_key() -> str | None:
    """The key that requests have to carry; None: the environment has none, which is told.

    Raises:
        UserError: it is empty, as of a secret that was not filled in.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key == "":
        raise UserError(f"{KEY_VARIABLE} is empty: give it a key, or take it away")
    if key is None:
        log.warning("no %s: whoever reaches the service may change products", KEY_VARIABLE)
    return key


def build(settings: Settings, replicas: int = 1) -> serve.Application:
    """The application with so many Search replicas; serve/config.yaml sets them, and resources, for
    a cluster.

    Raises:
        UserError: there is no bundle to serve, or it is broken, or lacks what `serve.runtime` runs.
    """
    arms = settings.experiment.arms if settings.experiment.name is not None else ()
    served = [WantedBundle(settings)(), *(published(settings.workdir, arm) for arm in arms)]
    for directory in served:  # an error here, not in a replica
        Bundle(directory)
        refuse_without_runtime(directory / "query_encoder", settings.serve.runtime)
    encoding = ProductEncoding.bind(settings)  # type: ignore[attr-defined]
    changes = Changes.bind(settings, encoding)  # type: ignore[attr-defined]
    apart = settings.serve.encoder_apart
    queries = QueryEncoding.bind(settings) if apart else None  # type: ignore[attr-defined]
    # The gate refuses what is too much, with Retry-After; Serve lets it come that far.
    slots = 2 * settings.serve.max_requests
    search = Search.options(  # type: ignore[attr-defined]
        num_replicas=replicas, max_ongoing_requests=slots, max_queued_requests=slots
    )
    return search.bind(settings, changes, encoding, queries)
