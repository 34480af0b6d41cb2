"""Batches of pre-training: titles with their own photos and with others', masked (section 2.2).

A batch has W texts (titles; queries too, by setting). Each title whose product has a photo comes
1 + r times: with that photo, and with r photos that are another product's and not the same picture.
Decisions:
* A batch is a function of (seed, epoch, step): the order of the texts, the masks and the
  mismatched photos. A rank takes its share of the texts, so a run that is resumed, or has another
  number of workers, sees the same rows.
* Mismatched photos are those of the next titles of the batch, which are in random order. Every
  photo so comes once matched and r times mismatched, every title too: neither alone tells which it
  is, and no photo is read twice.
* All rows are masked alike: a [MASK], or a patch of zeros, must not tell which it is either.
* The same picture is told by what the model reads of it. Photos that are equal byte for byte have
  equal pixels and patch features.
* Products of one title are held out together, so no title is on both sides.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.data.batches import TextArrays, TextStore
from acebert.data.feature_cache import open_features
from acebert.data.features import FeatureStore
from acebert.data.masking import Vocabulary, mask_patches, mask_words
from acebert.data.tokens import load_tokenizer
from acebert.errors import UserError
from acebert.models.encoder import NUM_PATCHES, ImageInputs, TextInputs
from acebert.models.pretraining import PretrainInputs
from acebert.training.pairs import StagePaths
from acebert.training.prefetch import prefetched

SPARE = 4  # titles further on that may lend a photo where one is the same picture
NO_PHOTO = -1


@dataclass(frozen=True)
class PretrainBatch:
    """One rank's rows of a batch (B of them).

    Attributes:
        inputs: what the model reads, and where it has to predict
        words: the masked words [M]
        matched: 1 where the photo is the title's own, float32 [B]
        paired: 1 where that is a question at all, else 0, float32 [B]
        all_words, all_patches, all_pairs: how many of each the ranks have together
    """

    inputs: PretrainInputs
    words: torch.Tensor
    matched: torch.Tensor
    paired: torch.Tensor
    all_words: int
    all_patches: int
    all_pairs: int

    def to(self, device: torch.device) -> "PretrainBatch":
        return PretrainBatch(
            self.inputs.to(device),
            self.words.to(device, non_blocking=True),
            self.matched.to(device, non_blocking=True),
            self.paired.to(device, non_blocking=True),
            self.all_words,
            self.all_patches,
            self.all_pairs,
        )


class Texts:
    """What there is to read: products with a title, and queries of the training days.

    A text has one number: a product's row, or n_products + a query's row.

    Attributes:
        n_products: rows of the catalogue
        train: texts to train on [n]
        held_out: product rows kept back [h], ascending
        category: category code of each product, int32 [n_products]
    """

    def __init__(self, settings: Settings, paths: StagePaths) -> None:
        self.store = TextStore.open(paths.tokens, paths.ingest)
        hashes, categories = [], []
        parts = sorted((paths.ingest / "products").glob("part-*.parquet"))
        for batch in ds.dataset(parts).scanner(columns=["title", "category_code"]).to_batches():
            titles = pc.utf8_lower(pc.utf8_trim_whitespace(batch["title"]))
            hashes.append(pd.util.hash_array(titles.to_numpy(zero_copy_only=False)))
            categories.append(batch["category_code"].to_numpy())
        rows = np.arange(len(self.store.titles))
        self.n_products = len(rows)
        self.category: NDArray[np.int32] = np.concatenate(categories)
        titled = self.store.titles.lengths(rows) > 0
        kept_back = np.concatenate(hashes) / 2.0**64 < settings.pretrain.held_out
        self.held_out = rows[titled & kept_back]
        self.train = rows[titled & ~kept_back]
        if settings.pretrain.queries:
            clicks = pq.read_table(paths.ingest / "queries.parquet", columns=["clicks"])["clicks"]
            queries = np.flatnonzero(clicks.to_numpy() > 0)
            self.train = np.concatenate([self.train, self.n_products + queries])

    def arrays(self, texts: NDArray[np.int64]) -> TextArrays:
        """Tokens of these texts [W], in this order."""
        query = texts >= self.n_products
        order = np.argsort(query, kind="stable")
        made = self.store.single_batch(texts[~query], texts[query] - self.n_products)
        back = np.argsort(order)
        return TextArrays(made.input_ids[back], made.attention_mask[back], made.segment_ids[back])


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


@dataclass(frozen=True)
class Draws:
    """Uniform random numbers behind the masks of B rows: words [B, L] twice, patches [B, N]."""

    u: NDArray[np.float32]
    v: NDArray[np.float32]
    patches: NDArray[np.float32]

    @classmethod
    def of(cls, rng: np.random.Generator, shape: tuple[int, ...], L: int) -> "Draws":
        def draw(width: int) -> NDArray[np.float32]:
            return rng.random((*shape, width), np.float32)

        return cls(draw(L), draw(L), draw(NUM_PATCHES))

    def __getitem__(self, rows: Any) -> "Draws":
        return Draws(self.u[rows], self.v[rows], self.patches[rows])


class PretrainBatches:
    """Batches as one rank trains on them.

    Raises:
        UserError: fewer texts than one batch, or a batch that the ranks cannot share evenly.
    """

    def __init__(self, settings: Settings, paths: StagePaths, rank: int, world: int) -> None:
        self.settings = settings.pretrain
        self.patches, self.pixels = settings.model.patches, settings.model.pixels
        self.texts = Texts(settings, paths)
        self.features = open_features(settings.image, paths.features) if paths.features else None
        tokenizer = load_tokenizer(paths.tokens / "tokenizer")
        assert isinstance(tokenizer.mask_token_id, int)  # load_tokenizer has looked
        self.vocabulary = Vocabulary.of(
            len(tokenizer), tokenizer.mask_token_id, tokenizer.all_special_ids
        )
        self.max_length = 2 + max(settings.text.title_tokens, settings.text.query_tokens)
        W, n = self.settings.batch_size, len(self.texts.train)
        if W % world:
            raise UserError(
                f"--pretrain.batch_size {W}: not divisible by the {world} workers "
                "(--train.num_workers)"
            )
        if n < W:
            raise UserError(f"--pretrain.batch_size {W}: there are {n:,} texts to train on")
        self.rows = slice(rank * W // world, (rank + 1) * W // world)
        self.steps_per_epoch = n // W
        self._order: tuple[int, NDArray[np.int64]] = (-1, self.texts.train)
        everything = np.arange(self.texts.n_products)
        self.has_image: NDArray[np.bool_] = (
            np.zeros(self.texts.n_products, bool)
            if self.features is None
            else self.features.has_image(everything)
        )
        self.neighbours = Neighbours(
            self.texts.category, self.texts.train[self.pictured(self.texts.train)]
        )

    def pictured(self, texts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these texts are of a product with a photo."""
        product = texts < self.texts.n_products
        return product & self.has_image[np.where(product, texts, 0)]

    def stream(self, start: int, stop: int) -> Iterator[PretrainBatch]:
        """Batches of steps start … stop − 1."""
        return prefetched(self.batch, start, stop)

    def batch(self, step: int) -> PretrainBatch:
        """This rank's rows of step `step`, counted from 0 over all epochs."""
        epoch, i = divmod(step, self.steps_per_epoch)
        W, r = self.settings.batch_size, self.settings.negatives
        texts = self._epoch(epoch)[i * W : (i + 1) * W]
        rng = np.random.default_rng((self.settings.seed, epoch, i))
        arrays = self.texts.arrays(texts)
        draws = Draws.of(rng, (1 + r, W), self.max_length)
        pictured = np.flatnonzero(self.pictured(texts))

        own = np.arange(W)[self.rows]
        pairs = np.flatnonzero((pictured >= self.rows.start) & (pictured < self.rows.stop))
        text, copy = own, np.zeros(len(own), np.int64)
        product = np.where(self.pictured(texts[own]), texts[own], NO_PHOTO)
        lent = np.zeros((0, r), np.int64), np.zeros((0, r), bool)
        photos = None
        if self.features is not None:
            likely = self._lenders(texts[pictured], pairs)
            alike = self.neighbours.draw(rng.random((len(pictured), r)), texts[pictured])[pairs]
            alike_wanted = rng.random((len(pictured), r))[pairs]
            close = np.where(alike_wanted < self.settings.same_category_negatives, alike, NO_PHOTO)
            photos = self.photos(np.concatenate([product, likely.ravel(), close.ravel()]))
            lent = _lend(texts[pictured[pairs]], likely, close, photos)
            text = np.concatenate([own, np.repeat(pictured[pairs], r)])
            copy = np.concatenate([copy, np.tile(np.arange(1, r + 1), len(pairs))])
            product = np.concatenate([product, lent[0].ravel()])
        paired = np.concatenate([product[: len(own)] != NO_PHOTO, lent[1].ravel()])
        order = np.argsort(arrays.attention_mask.sum(axis=1)[text], kind="stable")
        text, copy, product, paired = text[order], copy[order], product[order], paired[order]

        inputs, words = self.inputs(
            rows_of(arrays, text), product, photos, draws[copy, text], predicted=copy == 0
        )
        L = arrays.input_ids.shape[1]
        first = draws[0]
        _, all_words = mask_words(
            arrays.input_ids,
            arrays.attention_mask,
            self.vocabulary,
            first.u[:, :L],
            first.v[:, :L],
        )
        all_patches = mask_patches(self.pictured(texts), first.patches)
        return PretrainBatch(
            inputs,
            words,
            torch.from_numpy((copy == 0).astype(np.float32)),
            torch.from_numpy(paired.astype(np.float32)),
            int(all_words.sum()),
            int(all_patches.sum()),
            len(pictured) * (1 + r),
        )

    def photos(self, products: NDArray[np.int64]) -> Photos:
        """The photos of these products, NO_PHOTO passed over; never none, so that every parameter
        takes part in every step."""
        assert self.features is not None
        products = products[products != NO_PHOTO]
        if not len(products):
            products = np.zeros(1, np.int64)
        return Photos(self.features, products, self.patches, self.pixels)

    def inputs(
        self,
        arrays: TextArrays,
        product: NDArray[np.int64],
        photos: Photos | None,
        draws: Draws,
        predicted: NDArray[np.bool_],
    ) -> tuple[PretrainInputs, torch.Tensor]:
        """Rows of texts and photos, masked; and the masked words [M].

        Args:
            arrays: texts [B, L]
            product: whose photo a row takes, or NO_PHOTO [B]
            photos: holds these photos; None for a text-only model
            draws: for the masks
            predicted: rows whose words and patches are predicted [B]; the others are masked alike
        """
        L = arrays.input_ids.shape[1]
        masked, chosen = mask_words(
            arrays.input_ids,
            arrays.attention_mask,
            self.vocabulary,
            draws.u[:, :L],
            draws.v[:, :L],
        )
        has_photo = product != NO_PHOTO
        patches = mask_patches(has_photo, draws.patches)
        words = np.nonzero(chosen & predicted[:, None])
        where = np.nonzero(patches & predicted[:, None] & self.patches)
        photo = np.zeros(len(product), np.int64)
        if photos is not None:
            photo[has_photo] = photos.row(product[has_photo])
        arrays_out = (photo, has_photo, patches, *words, *where)
        inputs = PretrainInputs(
            TextInputs(
                torch.from_numpy(masked),
                torch.from_numpy(arrays.attention_mask),
                torch.from_numpy(arrays.segment_ids),
            ),
            None if photos is None else photos.image,
            *(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays_out),
        )
        return inputs, torch.from_numpy(arrays.input_ids[words])

    def masked_patches(self, draws: Draws) -> NDArray[np.bool_]:
        """Which patches of rows with a photo these draws mask, bool [B, N]."""
        return mask_patches(np.ones(len(draws.patches), bool), draws.patches)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.settings.seed, epoch))
            self._order = epoch, rng.permutation(self.texts.train)
        return self._order[1]

    def _lenders(self, pictured: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Products that may lend the `pairs`-th of the batch's photos theirs [pairs, r + SPARE]."""
        ahead = np.arange(1, self.settings.negatives + SPARE + 1)
        return pictured[(pairs[:, None] + ahead) % len(pictured)]


class Neighbours:
    """Products with a photo by category, to draw one of a product's own category."""

    def __init__(self, category: NDArray[np.int32], products: NDArray[np.int64]) -> None:
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


def _lend(
    products: NDArray[np.int64],
    likely: NDArray[np.int64],
    close: NDArray[np.int64],
    photos: Photos,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Another picture for each pair of a product.

    Args:
        products: whose titles they are [p]
        likely: products that may lend their photo, the first ones first [p, r + SPARE]
        close: a product of the same category that is to lend it instead, or NO_PHOTO [p, r]
        photos: holds all of them

    Returns:
        The lenders [p, r], and whether it is another picture at all [p, r]: a batch of one picture
        has no other.
    """
    own = photos.picture[photos.row(products)][:, None]

    def differs(lenders: NDArray[np.int64]) -> NDArray[np.bool_]:
        found = np.where(lenders == NO_PHOTO, products[:, None], lenders)
        return photos.picture[photos.row(found)] != own

    valid = differs(likely)
    first = np.argsort(~valid, axis=1, kind="stable")[:, : close.shape[1]]
    lenders, good = np.take_along_axis(likely, first, 1), np.take_along_axis(valid, first, 1)
    takes = differs(close)
    return np.where(takes, close, lenders), good | takes


def rows_of(arrays: TextArrays, rows: NDArray[np.int64]) -> TextArrays:
    """Rows [B] of padded texts."""
    return TextArrays(arrays.input_ids[rows], arrays.attention_mask[rows], arrays.segment_ids[rows])
