"""What is searched: products as the service knows them, filters on them, hits."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Product:
    """A product as it is found and shown."""

    product_id: str
    title: str
    category: str | None = None
    price: float | None = None
    in_stock: bool = True


@dataclass(frozen=True)
class Filter:
    """What a hit has to be; None: whatever."""

    category: str | None = None
    min_price: float | None = None
    max_price: float | None = None
    """a product without a price passes no bound"""
    in_stock: bool | None = None

    def __bool__(self) -> bool:
        return self != Filter()

    def allows(self, product: Product) -> bool:
        bounded = self.min_price is not None or self.max_price is not None
        if bounded and product.price is None:
            return False
        return not (
            (self.category is not None and product.category != self.category)
            or (self.in_stock is not None and product.in_stock != self.in_stock)
            or (self.min_price is not None and (product.price or 0) < self.min_price)
            or (self.max_price is not None and (product.price or 0) > self.max_price)
        )


@dataclass(frozen=True)
class Hit:
    product: Product
    score: float
    """inner product of the unit vectors, raised where clicks are asked for; a fused score in hybrid
    search"""


@dataclass(frozen=True)
class Patch:
    """A change that no vector depends on; None: as before."""

    price: float | None = None
    in_stock: bool | None = None

    def of(self, product: Product) -> Product:
        """The product with this change."""
        price = product.price if self.price is None else self.price
        in_stock = product.in_stock if self.in_stock is None else self.in_stock
        return replace(product, price=price, in_stock=in_stock)


@dataclass(frozen=True)
class Change:
    """The last thing that happened to a product, or to its price or stock."""

    seq: int
    """grows with every change"""
    product_id: str
    product: Product | None
    """None: deleted, or only patched"""
    vector: NDArray[np.float32] | None
    """[d], by the model of the bundle that was asked for"""
    patch: Patch | None = None
    """of the product as it then is, if there is one"""
