"""Requests and answers of the search API, as OpenAPI describes them."""

import base64
from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import (
    Base64Encoder,
    BaseModel,
    ConfigDict,
    EncodedBytes,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_QUERY = 256
MAX_K = 500
MAX_BATCH = 256  # queries, or products, in one request
MAX_PHOTOS = 16  # of one request: so many large ones are read and encoded in the time that it has
MAX_HITS = 10_000  # of a batch: they are made into JSON while nobody else is served

Query = Annotated[str, Field(min_length=1, max_length=MAX_QUERY)]
"""what a shopper types"""
PRODUCT_ID = r"^[^\x00-\x1f\x7f]+$"
ProductId = Annotated[str, Field(min_length=1, max_length=200, pattern=PRODUCT_ID)]
K = Annotated[int, Field(ge=1, le=MAX_K)]
Price = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Score = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Category = Annotated[str, Field(min_length=1, max_length=200)]


class Base64(Base64Encoder):
    """Pydantic's own passes over characters that are no base64."""

    @classmethod
    def decode(cls, data: bytes) -> bytes:
        try:
            return base64.b64decode(b"".join(data.split()), validate=True)
        except ValueError as error:
            raise PydanticCustomError("base64", "is no base64") from error


Photo = Annotated[bytes, EncodedBytes(encoder=Base64)]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class FilterIn(Request):
    category: Category | None = None
    min_price: Price | None = None
    max_price: Price | None = None
    in_stock: bool | None = None


class SearchIn(FilterIn):
    q: Query
    k: K = 10
    min_score: Score | None = None
    hybrid: bool = False
    clicks: bool = False


class BatchIn(Request):
    queries: list[Query] = Field(min_length=1, max_length=MAX_BATCH)
    k: K = 10
    filter: FilterIn = FilterIn()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (hits := len(self.queries) * self.k) > MAX_HITS:
            raise ValueError(f"queries times k is {hits:,}, {MAX_HITS:,} at most")
        return self


class PhotoIn(Request):
    photo: Photo
    """JPEG, PNG, WebP, GIF, BMP or TIFF, in base64"""
    text: str = Field("", max_length=MAX_QUERY)
    """what the photo does not say"""
    k: K = 10
    filter: FilterIn = FilterIn()


class ProductIn(Request):
    title: str = Field(max_length=2000)
    category: Category | None = None
    price: Price | None = None
    in_stock: bool = True
    photo: Photo | None = None
    """JPEG, PNG, WebP, GIF, BMP or TIFF, in base64 (none: the one that the product has)"""


class PatchIn(Request):
    """At least one of them; none: as before."""

    price: Price | None = None
    in_stock: bool | None = None


class NamedProductIn(ProductIn):
    product_id: ProductId


class ProductsIn(Request):
    products: list[NamedProductIn] = Field(min_length=1, max_length=MAX_BATCH)
    """at most 16 of them with a photo"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        photos = sum(product.photo is not None for product in self.products)
        if photos > MAX_PHOTOS:
            raise ValueError(f"{photos} products have a photo, {MAX_PHOTOS} at most")
        ((name, times),) = Counter(product.product_id for product in self.products).most_common(1)
        if times > 1:
            raise ValueError(f"the product {name!r} is there {times} times")
        return self


class ProductOut(BaseModel):
    product_id: str
    title: str
    category: str | None
    price: float | None
    in_stock: bool
    photo: str
    """address of its photo, below this server"""


class HitOut(ProductOut):
    score: float


class Answer(BaseModel):
    hits: list[HitOut]
    path: str
    """how the query's vector was found: hot, tail, product or photo"""
    no_good_match: bool
    version: str
    """of the model"""
    took_ms: float
    search_id: str | None = None
    """of a search that an experiment logged: what `/events` names"""
    arm: str | None = None
    """of the experiment, that answered; none where lists are interleaved"""


class Answers(BaseModel):
    answers: list[Answer]


SEARCH_ID = r"^[A-Za-z0-9_-]{8,64}$"
UserId = Annotated[str, Field(min_length=1, max_length=200)]
SearchId = Annotated[str, Field(pattern=SEARCH_ID)]


class ShopperIn(BaseModel):
    """Headers of a search; its others say nothing here."""

    x_user_id: UserId | None = Field(None, alias="x-user-id")
    x_search_id: SearchId | None = Field(None, alias="x-search-id")


class EventIn(Request):
    search_id: SearchId
    action: Literal["click", "purchase"]
    product_id: ProductId
    revenue: Price | None = None
    """of a purchase (none: the product's price)"""


class Comparison(BaseModel):
    """Two arms of the experiment; which is which is not said."""

    search_id: str
    left: list[ProductOut]
    right: list[ProductOut]


class VoteIn(Request):
    search_id: SearchId
    better: Literal["left", "right", "neither"]


class Accepted(BaseModel):
    """The change is on the disk; replicas have it within seconds."""

    seq: int


class Version(BaseModel):
    model: str
    bundle: str
    products: int
    dimensions: int
    hot_queries: int
    changes: int
    """`seq` of the last change that this replica has"""
    behind_s: float
    refused: str | None
    """why the bundle that is published now is not taken over"""


class Status(BaseModel):
    status: str


class Categories(BaseModel):
    categories: list[str]


class Problem(BaseModel):
    error: str
