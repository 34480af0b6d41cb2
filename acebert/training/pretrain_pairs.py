"""Which photos are shown with a title that is not theirs (paper section 2.2, TIP).

* They are those of the next titles of the batch, which are in random order. Every photo so comes
  once matched and r times mismatched, every title too: neither alone tells which it is, and no
  photo is read twice. By setting, a share is drawn from the title's own category instead.
* The same picture is told by what the model reads of it. Photos that are equal byte for byte have
  equal pixels and patch features.
* Products of one title lend each other no photo: it would fit.
"""

import zlib

import numpy as np
import torch
from numpy.typing import NDArray

from acebert.data.features import FeatureStore
from acebert.models.encoder import ImageInputs

SPARE = 4  # titles further on that may lend a photo where one is the same picture
NO_PHOTO = -1


class Photos:
    """The photos of some products, each read once.

    Attributes:
        image: what the model reads of them
        picture: a number a photo, equal for the same picture [n]
    """

    def __init__(
        self, features: FeatureStore, products: NDArray[np.int64], patches: bool, pixels: bool
    ) -> None:
        self._products = np.unique(products)
        seen = [
            read(self._products)
            for read, wanted in ((features.patches, patches), (features.pixels, pixels))
            if wanted
        ]
        self.picture = np.array([zlib.crc32(content) for content in seen[-1]], np.uint64)
        self.image = ImageInputs(
            torch.from_numpy(features.has_image(self._products)),
            torch.from_numpy(seen[0]) if patches else None,
            torch.from_numpy(seen[-1]) if pixels else None,
        )

    def row(self, products: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the photos of these products [B] are in `image`."""
        return np.searchsorted(self._products, products)


class Neighbours:
    """Products with a photo by category, to draw one of a product's own category."""

    def __init__(self, category: NDArray[np.int64], products: NDArray[np.int64]) -> None:
        self._category = category
        self._members = products[np.argsort(category[products], kind="stable")]
        count = np.bincount(category[products], minlength=int(category.max(initial=0)) + 1)
        self._start = np.concatenate([[0], np.cumsum(count)])

    def draw(self, u: NDArray[np.floating], products: NDArray[np.int64]) -> NDArray[np.int64]:
        """For products [B] and uniform numbers [B, r]: a product of the same category each, which
        may be the product itself; NO_PHOTO where the category has none."""
        start = self._start[self._category[products]][:, None]
        count = self._start[self._category[products] + 1][:, None] - start
        if not len(self._members):
            return np.full(u.shape, NO_PHOTO)
        place = np.minimum(start + (u * count).astype(np.int64), len(self._members) - 1)
        return np.where(count > 0, self._members[place], NO_PHOTO)


def lenders_ahead(
    pictured: NDArray[np.int64], places: NDArray[np.int64], r: int
) -> NDArray[np.int64]:
    """Products that may lend theirs to the photos at `places` [p] of the batch's [n]: the next
    r + SPARE in its order, round and round [p, r + SPARE]."""
    return pictured[(places[:, None] + np.arange(1, r + SPARE + 1)) % len(pictured)]


def lend(
    products: NDArray[np.int64],
    likely: NDArray[np.int64],
    close: NDArray[np.int64],
    photos: Photos,
    titles: NDArray[np.uint64],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Another picture for each pair of a product, of a product with another title.

    Args:
        products: whose titles they are [p]
        likely: products that may lend their photo, the first ones first [p, r + SPARE]
        close: a product of the same category that is to lend it instead, or NO_PHOTO [p, r]
        photos: holds all of them
        titles: a number a product of the catalogue, equal for the same title

    Returns:
        The lenders [p, r], and whether it is such a picture at all [p, r]: a batch of one picture
        has no other.
    """
    own = photos.picture[photos.row(products)][:, None]

    def differs(lenders: NDArray[np.int64]) -> NDArray[np.bool_]:
        found = np.where(lenders == NO_PHOTO, products[:, None], lenders)
        other_title = titles[found] != titles[products][:, None]
        return other_title & (photos.picture[photos.row(found)] != own)

    valid = differs(likely)
    first = np.argsort(~valid, axis=1, kind="stable")[:, : close.shape[1]]
    lenders, good = np.take_along_axis(likely, first, 1), np.take_along_axis(valid, first, 1)
    takes = differs(close)
    return np.where(takes, close, lenders), good | takes
