"""Products → vectors, one at a time or a few: for upserts, and for search by photo.

A bundle's product side by itself: title and photo as they are sent, with the hot queries that the
bundle knows of the product. In fp32; the catalogue's own vectors may have been made in bf16.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from acebert.config import read_recipe, settings_from
from acebert.data.batches import TextStore
from acebert.data.image import Box, crop_resize, decode, find_roi
from acebert.data.tokens import Ragged, encode, load_tokenizer
from acebert.models.dual import DualEncoder
from acebert.models.encoder import ImageInputs
from acebert.serving.bundle import CNN_WEIGHTS, ProductTable
from acebert.serving.changes import Source
from acebert.serving.query_encoder import product_side_version
from acebert.training.pairs import as_inputs

CHUNK = 32  # products of one forward, so that many take no more memory than a few


class ProductEncoder:
    """The product side of a bundle.

    Attributes:
        version: of the model.
    """

    def __init__(self, bundle: Path, threads: int, max_megapixels: float) -> None:
        """
        Raises:
            UserError: the bundle's model or CNN cannot be loaded.
        """
        torch.set_num_threads(threads)
        directory = bundle / "model"
        self._settings = settings_from(read_recipe(str(directory / "settings.yaml")))
        self._model = DualEncoder.load(directory).eval()
        self._tokenizer = load_tokenizer(directory / "tokenizer")
        self._products = ProductTable(bundle)
        self._max_megapixels = max_megapixels
        self.version = product_side_version(directory)
        self._cnn = None
        if self._settings.model.patches:
            from acebert.data.patches import PatchCNN

            image, own = self._settings.image, bundle / CNN_WEIGHTS
            weights = str(own) if own.is_file() else image.cnn_weights
            self._cnn = PatchCNN(image.cnn, weights, image.cnn_side, image.cnn_batch)

    def encode(self, sources: Sequence[Source]) -> NDArray[np.float32]:
        """Vectors of n > 0 products, float32 [n, d] of length 1.

        Raises:
            BrokenImage: a photo is none, or too large.
        """
        starts = range(0, len(sources), CHUNK)
        return np.concatenate([self._forward(sources[i : i + CHUNK]) for i in starts])

    def _forward(self, sources: Sequence[Source]) -> NDArray[np.float32]:
        limits, rows = self._settings.text, np.arange(len(sources))
        titles = [source.product.title for source in sources]
        hot = [self._products.hot_queries(source.product.product_id) for source in sources]
        first = np.cumsum([0, *map(len, hot)]).tolist()
        pieces = encode(self._tokenizer, titles, limits.title_tokens)
        queries = encode(self._tokenizer, [text for of in hot for text in of], limits.query_tokens)
        lists = Ragged.from_rows([list(range(*some)) for some in pairwise(first)])
        special = (
            self._tokenizer.cls_token_id,
            self._tokenizer.sep_token_id,
            self._tokenizer.pad_token_id,
        )
        text = as_inputs(TextStore(pieces, queries, lists, *special).product_batch(rows, rows))
        images = self._images([source.photo for source in sources])
        with torch.inference_mode():
            return self._model.encode_products(text, images).numpy()

    def _images(self, photos: Sequence[bytes | None]) -> ImageInputs | None:
        """What the model reads of the photos, or None for a text-only model; broken photos are
        refused all the same."""
        image, model = self._settings.image, self._settings.model
        n, side = len(photos), image.cnn_side
        crops = np.zeros((n, side, side, 3) if self._cnn else (0,), np.uint8)
        S = image.pixel_side
        pixels = np.zeros((n, S, S, 3), np.uint8) if model.pixels else None
        for i, data in enumerate(photos):
            if data is None:
                continue
            photo = decode(data, self._max_megapixels)
            whole: Box = (0, 0, photo.shape[1], photo.shape[0])
            box = find_roi(photo)[0] if image.roi else whole
            if self._cnn:
                crops[i] = crop_resize(photo, box, side)
            if pixels is not None:
                shown = box if image.pixel_source == "roi" else whole
                pixels[i] = crop_resize(photo, shown, S)
        if not self._settings.reads_images:
            return None
        return ImageInputs(
            torch.tensor([data is not None for data in photos]),
            torch.from_numpy(self._cnn(crops)) if self._cnn else None,
            None if pixels is None else torch.from_numpy(pixels),
        )
