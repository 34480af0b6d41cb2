"""The search API over HTTP (FastAPI), and the page at `/`."""

import asyncio
from collections.abc import Callable, Coroutine, Set
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

from fastapi import FastAPI, Header
from fastapi import Path as InPath
from fastapi import Query as InQuery
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from acebert import __version__
from acebert.data.image import BrokenImage
from acebert.errors import UserError
from acebert.serving import schema
from acebert.serving.catalogue import Unavailable
from acebert.serving.changes import Source
from acebert.serving.gate import OPEN, RETRY_SECONDS, Gate
from acebert.serving.products import Filter, Patch, Product
from acebert.serving.request_log import RequestLog
from acebert.serving.service import Found, How, SearchService

PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
SAFE = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": schema.Problem, "description": "The body cannot be read"},
    401: {"model": schema.Problem, "description": "The API key is missing or wrong"},
    408: {"description": "Ray's proxy waited as long as it may: the same may be sent again"},
    413: {"model": schema.Problem, "description": "The body is too large"},
    422: {"model": schema.Problem, "description": "The request is not what it should be"},
    503: {"model": schema.Problem, "description": "Overloaded, or a part restarts: try again"},
}
MISSING: dict[int | str, dict[str, Any]] = {
    404: {
        "model": schema.Problem,
        "description": "There is no such product, or it is no product's id",
    }
}
BYTES = {"schema": {"type": "string", "format": "binary"}}
Read = TypeVar("Read", bound=BaseModel)
ProductId = Annotated[str, InPath(min_length=1, max_length=200, pattern=schema.PRODUCT_ID)]


class Json(JSONResponse):
    """Written by pydantic's core, which is faster than Python's encoder."""

    def render(self, content: object) -> bytes:
        return to_json(content)


def make_api(service: SearchService, key: str | None) -> ASGIApp:
    """The routes of `service`; requests have to carry `key` unless it is None."""
    app = FastAPI(
        title="ACE-BERT search",
        version=__version__,
        description="Products by text, by photo, by example; changes of products.",
        responses=PROBLEMS,
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
    )
    app.router.route_class = _Route
    _searches(app, service)
    _products(app, service)
    _states(app, service)
    _page(app)
    _problems(app)
    if key is not None:
        _declare_key(app)
    settings = service.settings
    body = int(settings.max_body_mb * 2**20)
    gate = Gate(app, settings.max_requests, body, key, service.metrics)
    if settings.request_log == "off":
        return gate
    return RequestLog(gate, texts=settings.request_log == "texts")


class _Route(APIRoute):
    """Refuses parameters that a route does not know: a misspelt filter would filter nothing. Routes
    without any, as that of a photo, take what a cache may have added."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        known = {field.alias for field in self.dependant.query_params}
        if not known and self.body_field is None:
            return handle

        async def checked(request: HttpRequest) -> Response:
            _check_known(request, known)
            return await handle(request)

        return checked


def _check_known(request: HttpRequest, known: Set[str]) -> None:
    if unknown := request.query_params.keys() - known:
        names = f"known are {', '.join(sorted(known))}" if known else "they are in the body"
        raise UserError(f"{min(unknown)}: there is no such parameter; {names}")


class _SearchRoute(APIRoute):
    """Reads a search's parameters and headers by a validator each. FastAPI, which describes them
    from the same models, finds out for each request anew what each of them is: a fifth of a hot
    search's time (docs/decisions.md)."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        search = self.endpoint

        known = schema.SearchIn.model_fields.keys()

        async def handle(request: HttpRequest) -> Response:
            _check_known(request, known)
            asked = _read(schema.SearchIn, dict(request.query_params), "query")
            return await search(asked, _read(schema.ShopperIn, dict(request.headers), "header"))

        return handle


def _read(model: type[Read], given: dict[str, Any], place: str) -> Read:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        items = [item | {"loc": (place, *item["loc"])} for item in error.errors()]
        raise RequestValidationError(items) from error


def _searches(app: FastAPI, service: SearchService) -> None:
    async def search(
        asked: Annotated[schema.SearchIn, InQuery()],
        shopper: Annotated[schema.ShopperIn, Header()],
    ) -> Response:
        """Products for a query, best first. `min_score` leaves out hits whose vectors score worse;
        `clicks` raises the scores of what was clicked for the very query before; `hybrid` fuses the
        ranks with those of BM25 on titles, and shows the fused score. With `X-User-Id` the search
        is part of the experiment that runs, if one does; `X-Search-Id`, the client's own id of the
        search, makes one search of it however often it is sent."""
        q, k = asked.q, asked.k
        how = How(asked.hybrid, asked.clicks, asked.min_score)
        where = Filter(asked.category, asked.min_price, asked.max_price, asked.in_stock)
        user, search_id = shopper.x_user_id, shopper.x_search_id
        if service.trial is None or user is None:
            found = await service.search(q, k, where, how)
        else:
            found = await service.trial.search(user, search_id, q, k, where, how)
        return Json(_answer(found))

    app.router.add_api_route(
        "/search",
        search,
        responses={200: {"model": schema.Answer}},
        operation_id="search",
        methods=["GET"],
        route_class_override=_SearchRoute,
    )

    @app.post("/events", status_code=202, response_model=schema.Status, operation_id="event")
    async def event(body: schema.EventIn) -> Any:
        """What a shopper did with a product of an answer with a `search_id`; it is in the log with
        the answer, and no kill of the service loses it. The same once more counts once."""
        if service.trial is None:
            raise UserError("no experiment runs here, so there is no log of events")
        await service.trial.act(body.search_id, body.action, body.product_id, body.revenue)
        return {"status": "ok"}

    @app.get("/compare", response_model=schema.Comparison, operation_id="compare")
    async def compare(
        q: Annotated[str, InQuery(min_length=1, max_length=schema.MAX_QUERY)],
        x_user_id: Annotated[schema.UserId, Header()],
        k: schema.K = 10,
        category: schema.Category | None = None,
    ) -> Any:
        """The control and a treatment of the experiment side by side, on sides drawn anew for each
        search, for a reviewer to vote on."""
        if service.trial is None:
            raise UserError("no experiment runs here, so there is nothing to compare")
        search_id, *sides = await service.trial.compare(x_user_id, q, k, Filter(category))
        left, right = ([_shown(hit.product) for hit in hits] for hits in sides)
        return {"search_id": search_id, "left": left, "right": right}

    @app.post("/votes", status_code=202, response_model=schema.Status, operation_id="vote")
    async def vote(body: schema.VoteIn) -> Any:
        """Which side of a comparison was better; the first vote on it counts."""
        if service.trial is None:
            raise UserError("no experiment runs here, so there is nothing to vote on")
        service.trial.vote(body.search_id, body.better)
        return {"status": "ok"}

    @app.post(
        "/search/batch", responses={200: {"model": schema.Answers}}, operation_id="search_batch"
    )
    async def search_batch(body: schema.BatchIn) -> Response:
        """As many searches in one request."""
        where = Filter(**body.filter.model_dump())
        answers = await service.search_many(body.queries, body.k, where)
        return Json({"answers": [_answer(found) for found in answers]})

    @app.post(
        "/search/photo", responses={200: {"model": schema.Answer}}, operation_id="search_photo"
    )
    async def search_photo(body: schema.PhotoIn) -> Response:
        """Products that look like a photo, and fit a text; where the model reads no photos, 422."""
        where = Filter(**body.filter.model_dump())
        return Json(_answer(await service.search_photo(body.photo, body.text, body.k, where)))

    @app.get(
        "/similar/{product_id:path}",
        responses={200: {"model": schema.Answer}, **MISSING},
        operation_id="similar",
    )
    async def similar(
        product_id: ProductId,
        k: schema.K = 10,
        category: schema.Category | None = None,
        min_price: schema.Price | None = None,
        max_price: schema.Price | None = None,
        in_stock: bool | None = None,
    ) -> Response:
        """The products nearest to a product."""
        where = Filter(category, min_price, max_price, in_stock)
        found = await service.similar(product_id, k, where)
        return _no_product(product_id) if found is None else Json(_answer(found))


def _products(app: FastAPI, service: SearchService) -> None:
    def source(product_id: str, body: schema.ProductIn) -> Source:
        product = Product(product_id, body.title, body.category, body.price, body.in_stock)
        return Source(product, body.photo)

    @app.get(
        "/products/{product_id:path}",
        responses={200: {"model": schema.ProductOut}, **MISSING},
        operation_id="get_product",
    )
    async def get_product(product_id: ProductId) -> Response:
        product = await service.product(product_id)
        return _no_product(product_id) if product is None else Json(_shown(product))

    @app.put(
        "/products/{product_id:path}",
        status_code=202,
        response_model=schema.Accepted,
        responses=MISSING,
        operation_id="put_product",
    )
    async def put_product(
        product_id: ProductId,
        body: schema.ProductIn,
    ) -> Any:
        """Add a product, or replace its title, category, price and stock, what is left out too; its
        photo where one is sent. For price or stock alone there is PATCH."""
        return {"seq": await service.products.put([source(product_id, body)])}

    @app.patch(
        "/products/{product_id:path}",
        status_code=202,
        response_model=schema.Accepted,
        responses=MISSING,
        operation_id="patch_product",
    )
    async def patch_product(product_id: ProductId, body: schema.PatchIn) -> Any:
        """Change price or stock of a product, and nothing else of it."""
        patch = Patch(body.price, body.in_stock)
        if patch == Patch():
            raise UserError("price or in_stock, or both, have to be given")
        seq = await service.products.patch(product_id, patch)
        return _no_product(product_id) if seq is None else {"seq": seq}

    @app.post(
        "/products", status_code=202, response_model=schema.Accepted, operation_id="put_products"
    )
    async def put_products(body: schema.ProductsIn) -> Any:
        """Add or replace products, each as PUT does: all of them, or none."""
        sources = [source(product.product_id, product) for product in body.products]
        return {"seq": await service.products.put(sources)}

    @app.delete(
        "/products/{product_id:path}",
        status_code=202,
        response_model=schema.Accepted,
        responses=MISSING,
        operation_id="delete_product",
    )
    async def delete_product(product_id: ProductId) -> Any:
        """Delete a product; nothing happens where there is none."""
        return {"seq": await service.products.delete(product_id)}

    @app.get(
        "/photos/{product_id:path}",
        responses={200: {"content": {"image/jpeg": BYTES}, "description": "The photo"}, **MISSING},
        response_class=Response,
        operation_id="photo",
    )
    async def photo(product_id: ProductId) -> Response:
        found = await service.photo(product_id)
        if found is None:
            return Json({"error": f"no photo of {product_id!r}"}, 404)
        cached = {"cache-control": "public, max-age=300"}
        return Response(found, media_type="image/jpeg", headers=SAFE | cached)


def _states(app: FastAPI, service: SearchService) -> None:
    @app.get("/categories", response_model=schema.Categories, operation_id="categories")
    async def categories() -> Any:
        return {"categories": await asyncio.to_thread(service.current().index.categories)}

    @app.get("/health", response_model=schema.Status, operation_id="health")
    async def health() -> Any:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/ready", response_model=schema.Status, operation_id="ready")
    async def ready() -> Any:
        """A bundle is loaded, with all changes that there were then, if the writer told them."""
        if service.loaded is None:
            raise Unavailable("no bundle is loaded yet")
        return {"status": "ok"}

    @app.get("/version", response_model=schema.Version, operation_id="version")
    async def version() -> Any:
        loaded = service.current()
        info = loaded.bundle.info
        return {
            "model": loaded.version,
            "bundle": loaded.bundle.directory.name,
            "products": info["products"],
            "dimensions": info["dimensions"],
            "hot_queries": info["hot_queries"],
            "changes": loaded.seq,
            "behind_s": round(loaded.behind, 3),
            "refused": service.refused,
        }


def _page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response((PAGE / "index.html").read_bytes(), media_type="text/html", headers=SAFE)

    files = {path.name: path for path in PAGE.iterdir() if path.suffix in PAGE_TYPES}

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in files:
            return Json({"error": "no such file"}, 404)
        kind = PAGE_TYPES[files[name].suffix]
        return Response(files[name].read_bytes(), media_type=kind, headers=SAFE)


def _problems(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: HttpRequest, error: RequestValidationError) -> Response:
        """The place and the reason; not the input, which may be what JSON cannot say."""
        reasons = [
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
            for item in error.errors()[:5]
        ]
        text = "; ".join(reasons).encode(errors="replace").decode()
        return Json({"error": text[:1000]}, 422)

    @app.exception_handler(HTTPException)
    async def http(request: HttpRequest, error: HTTPException) -> Response:
        return Json({"error": error.detail}, error.status_code, headers=error.headers)

    @app.exception_handler(BrokenImage)
    async def broken(request: HttpRequest, error: BrokenImage) -> Response:
        return Json({"error": f"photo: {error}"}, 422)

    @app.exception_handler(UserError)
    async def refused(request: HttpRequest, error: UserError) -> Response:
        return Json({"error": str(error)}, 422)

    @app.exception_handler(Exception)
    async def failed(request: HttpRequest, error: Exception) -> Response:
        """The server logs the traceback."""
        return Json({"error": "the service failed"}, 500)

    @app.exception_handler(Unavailable)
    async def unavailable(request: HttpRequest, error: Unavailable) -> Response:
        return Json({"error": str(error)}, 503, headers={"retry-after": str(RETRY_SECONDS)})


def _declare_key(app: FastAPI) -> None:
    """Say in the description which requests have to carry the key, as `Gate` asks for it."""
    described = app.openapi()  # kept by the app
    scheme = {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    described["components"]["securitySchemes"] = {"key": scheme}
    for path, operations in described["paths"].items():
        if not path.startswith(OPEN):
            for operation in operations.values():
                operation["security"] = [{"key": []}]


def _no_product(product_id: str) -> Response:
    return Json({"error": f"there is no product {product_id!r}"}, 404)


def _answer(found: Found) -> dict[str, Any]:
    return {
        "hits": [_shown(hit.product) | {"score": round(hit.score, 6)} for hit in found.hits],
        "path": found.path,
        "no_good_match": found.no_good_match,
        "version": found.version,
        "took_ms": round(1000 * found.seconds, 3),
        "search_id": found.search_id,
        "arm": found.arm,
    }


def _shown(product: Product) -> dict[str, Any]:
    return {
        "product_id": product.product_id,
        "title": product.title,
        "category": product.category,
        "price": product.price,
        "in_stock": product.in_stock,
        "photo": "/photos/" + quote(product.product_id, safe=""),
    }
