"""Batches of pre-training: titles with their own photos and with others', masked (section 2.2).

A batch has W texts (titles; queries too, by setting). Each title whose product has a photo comes
1 + r times: with that photo, and with r photos that are another product's and not the same picture.
Decisions:
* A batch is a function of (seed, epoch, step): the order of the texts, the masks and the
  mismatched photos. A rank takes its share of the texts, so a run that is resumed, or has another
  number of workers, sees the same rows.
* All rows are masked alike: a [MASK], or a patch of zeros, must not tell whether the photo matches.
* Products of one title are held out together, so no title is on both sides.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.data.batches import TextArrays, TextStore
from acebert.data.feature_cache import open_features
from acebert.data.held_out import held_out, title_hashes
from acebert.data.masking import Vocabulary, mask_patches, mask_words
from acebert.data.tokens import load_tokenizer
from acebert.errors import UserError
from acebert.models.encoder import NUM_PATCHES, TextInputs
from acebert.models.pretraining import PretrainInputs
from acebert.training.pairs import StagePaths, pinned
from acebert.training.prefetch import prefetched
from acebert.training.pretrain_pairs import NO_PHOTO, Neighbours, Photos, lend, lenders_ahead


@dataclass
class PretrainBatch:
    """One rank's rows of a batch (B of them).

    Attributes:
        inputs: what the model reads, and where it has to predict
        words: the masked words [M]
        matched: 1 where the photo is the title's own, float32 [B]
        paired: 1 where that is a question at all, else 0, float32 [B]: a title without a photo, or
            whose neighbours in the batch all show the same picture, asks nothing
        all_words, all_patches: how many of each the ranks have together
        tokens, has_photo: of the rows, on the host: word pieces [B], whether it takes a photo [B]
        waited: how long training waited for this batch [s]
    """

    inputs: PretrainInputs
    words: torch.Tensor
    matched: torch.Tensor
    paired: torch.Tensor
    all_words: int
    all_patches: int
    tokens: NDArray[np.int64]
    has_photo: NDArray[np.bool_]
    waited: float = 0.0

    def to(self, device: torch.device) -> "PretrainBatch":
        return PretrainBatch(
            self.inputs.to(device),
            self.words.to(device, non_blocking=True),
            self.matched.to(device, non_blocking=True),
            self.paired.to(device, non_blocking=True),
            self.all_words,
            self.all_patches,
            self.tokens,
            self.has_photo,
            self.waited,
        )


class Texts:
    """What there is to read: products with a title, and queries of the training days.

    A text has one number: a product's row, or n_products + a query's row.

    Attributes:
        n_products: rows of the catalogue
        train: texts to train on [n]
        held_out: product rows kept back [h], ascending
        category: category code of each product, one of its own where it has none [n_products]
        title: hash of each product's title, uint64 [n_products]
    """

    def __init__(self, settings: Settings, paths: StagePaths) -> None:
        self.store = TextStore.open(paths.tokens, paths.ingest)
        rows = np.arange(len(self.store.titles))
        self.n_products = len(rows)
        parts = sorted((paths.ingest / "products").glob("part-*.parquet"))
        table = ds.dataset(parts).to_table(columns=["category", "category_code"])
        code, known = table["category_code"].to_numpy(), table["category"].is_valid().to_numpy()
        self.category: NDArray[np.int64] = np.where(known, code, code.max(initial=0) + 1 + rows)
        titled = self.store.titles.lengths(rows) > 0
        self.title: NDArray[np.uint64] = title_hashes(paths.ingest)
        kept_back = held_out(self.title, settings.pretrain.held_out)
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


@dataclass(frozen=True)
class Rows:
    """Rows of a batch (B of them): a text with a photo.

    Attributes:
        text: which of the batch's texts [B]
        copy: 0 with its own photo, 1 … r with another [B]
        product: whose photo, or NO_PHOTO [B]
        paired: whether 'does it match?' is a question [B]
    """

    text: NDArray[np.int64]
    copy: NDArray[np.int64]
    product: NDArray[np.int64]
    paired: NDArray[np.bool_]

    def take(self, rows: NDArray[np.int64]) -> "Rows":
        return Rows(*(column[rows] for column in vars(self).values()))

    def and_those(self, others: "Rows") -> "Rows":
        columns = zip(vars(self).values(), vars(others).values(), strict=True)
        return Rows(*(np.concatenate(pair) for pair in columns))


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

    def flat(self) -> "Draws":
        """Of [A, B] rows, as A · B rows."""
        return Draws(*(x.reshape(-1, x.shape[-1]) for x in (self.u, self.v, self.patches)))


class PretrainBatches:
    """Batches as one rank trains on them.

    Raises:
        UserError: fewer texts than one batch, or a batch that the ranks cannot share evenly.
    """

    def __init__(
        self,
        settings: Settings,
        paths: StagePaths,
        rank: int,
        world: int,
        device: torch.device | None = None,
    ) -> None:
        """`device`: that of the training (none: the CPU)."""
        self.settings = settings.pretrain
        self._device = device
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
        """Batches of steps start … stop − 1, each made while the one before trains."""
        return prefetched(lambda step: pinned(self.batch(step), self._device), start, stop)

    def batch(self, step: int) -> PretrainBatch:
        """This rank's rows of step `step`, counted from 0 over all epochs."""
        epoch, i = divmod(step, self.steps_per_epoch)
        W, r = self.settings.batch_size, self.settings.negatives
        texts = self._epoch(epoch)[i * W : (i + 1) * W]
        rng = np.random.default_rng((self.settings.seed, epoch, i))
        arrays = self.texts.arrays(texts)
        draws = Draws.of(rng, (1 + r, W), self.max_length)
        rows, photos = self._rows(texts, rng)
        lengths = arrays.attention_mask.sum(axis=1)
        rows = rows.take(np.argsort(lengths[rows.text], kind="stable"))
        matched = rows.copy == 0
        inputs, words = self.inputs(
            rows_of(arrays, rows.text), rows.product, photos, draws[rows.copy, rows.text], matched
        )
        # What all ranks together have to predict: the masks of all matched rows.
        _, all_words = self._masked(arrays, draws[0])
        all_patches = mask_patches(self.pictured(texts), draws[0].patches)
        return PretrainBatch(
            inputs,
            words,
            torch.from_numpy(matched.astype(np.float32)),
            torch.from_numpy(rows.paired.astype(np.float32)),
            int(all_words.sum()),
            int(all_patches.sum()),
            lengths[rows.text],
            rows.product != NO_PHOTO,
        )

    def _rows(
        self, texts: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[Rows, Photos | None]:
        """This rank's rows of the batch's texts [W], and the photos that they take."""
        own = np.arange(len(texts))[self.rows]
        product = np.where(self.pictured(texts[own]), texts[own], NO_PHOTO)
        matched = Rows(own, np.zeros(len(own), np.int64), product, product != NO_PHOTO)
        if self.features is None:
            return matched, None
        r = self.settings.negatives
        pictured = np.flatnonzero(self.pictured(texts))  # of all ranks
        mine = np.flatnonzero((pictured >= self.rows.start) & (pictured < self.rows.stop))
        next_ones = lenders_ahead(texts[pictured], mine, r)
        alike = self.neighbours.draw(rng.random((len(pictured), r)), texts[pictured])
        wanted = rng.random((len(pictured), r)) < self.settings.same_category_negatives
        alike = np.where(wanted, alike, NO_PHOTO)[mine]
        photos = self.photos(np.concatenate([product, next_ones.ravel(), alike.ravel()]))
        lent, differs = lend(texts[pictured[mine]], next_ones, alike, photos, self.texts.title)
        matched.paired[pictured[mine] - self.rows.start] &= differs.any(axis=1)
        copies = np.tile(np.arange(1, r + 1), len(mine))
        mismatched = Rows(np.repeat(pictured[mine], r), copies, lent.ravel(), differs.ravel())
        return matched.and_those(mismatched), photos

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
        masked, chosen = self._masked(arrays, draws)
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

    def _masked(
        self, arrays: TextArrays, draws: Draws
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        L = arrays.input_ids.shape[1]
        return mask_words(
            arrays.input_ids,
            arrays.attention_mask,
            self.vocabulary,
            draws.u[:, :L],
            draws.v[:, :L],
        )

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.settings.seed, epoch))
            self._order = epoch, rng.permutation(self.texts.train)
        return self._order[1]


def rows_of(arrays: TextArrays, rows: NDArray[np.int64]) -> TextArrays:
    """Rows [B] of padded texts."""
    return TextArrays(arrays.input_ids[rows], arrays.attention_mask[rows], arrays.segment_ids[rows])
