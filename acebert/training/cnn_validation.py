"""What the CNN in training knows of photos that it has not seen.

* Category: share of the held-out photos whose most likely category is their own.
* Tags: average precision of each word's order of the photos, a mean over the words; recall of a
  title's words among the ten most likely ones. Only words of titles count: clicks err.
  A product that shows a word which its title does not name counts against both.
* Colour words alone: whether the most likely colour is one that the title names. It is asked of the
  photo alone, so it tells what the photo adds to titles that do not name the colour. Colour words
  are those tags that CSS knows by name; other languages than English have none.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.colors import CSS4_COLORS
from numpy.typing import NDArray
from torch.nn import functional as F

from acebert.data.cnn_labels import PhotoLabels
from acebert.data.features import FeatureStore
from acebert.models.tagging import TaggingCNN

MOST = 2000  # held-out photos that are measured on
AMONG = 10  # most likely words in which those of a title are looked for
FEWEST = 5  # titles that name a word, for its average precision to count
BATCH = 64


@dataclass(frozen=True)
class Predictions:
    """Logits of P photos.

    Attributes:
        category: float32 [P, C]
        tags: float32 [P, T]
    """

    category: NDArray[np.float32]
    tags: NDArray[np.float32]


class HeldOutPhotos:
    """The held-out photos (P, at most MOST) with their labels.

    Attributes:
        products: product rows, int64 [P]
    """

    def __init__(self, store: FeatureStore, labels: PhotoLabels) -> None:
        held_out = labels.held_out
        every = np.linspace(0, len(held_out) - 1, min(MOST, len(held_out))).astype(int)
        self.products: NDArray[np.int64] = held_out[every]
        self._store, self._labels = store, labels
        self._category = labels.category[self.products]
        self.named = labels.named_in_title(self.products)  # bool [P, T]

    def photos(self, rows: slice) -> NDArray[np.uint8]:
        """RGB uint8 [b, S, S, 3]"""
        return self._store.pixels(self.products[rows])

    def predict(self, model: TaggingCNN, side: int, *, bf16: bool) -> Predictions:
        """What the model says of whole crops at `side`, as preprocessing shows them to it."""
        model.eval()
        parts = list(self._logits(model, side, bf16))
        model.train()
        category, tags = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        return Predictions(category, tags)

    def _logits(
        self, model: TaggingCNN, side: int, bf16: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device = model.mean.device
        for start in range(0, len(self.products), BATCH):
            pixels = torch.from_numpy(self.photos(slice(start, start + BATCH))).to(device)
            crops = F.interpolate(
                pixels.permute(0, 3, 1, 2).float(), side, mode="bilinear", antialias=True
            )
            with (
                torch.inference_mode(),
                torch.autocast(device.type, torch.bfloat16, enabled=bf16),
            ):
                yield model(crops)

    def measure(self, said: Predictions) -> dict[str, float]:
        """Metrics by name; one that nothing can be measured on is left out."""
        out: dict[str, float] = {}
        known = self._category >= 0
        if known.any() and said.category.shape[1]:
            right = said.category.argmax(1)[known] == self._category[known]
            out["category_accuracy"] = float(right.mean())
        precision = word_precision(said.tags, self.named)
        if len(precision):
            values = np.array(list(precision.values()))
            out["tag_map"] = float(values.mean())
            out["tag_map_random"] = float(self.named[:, list(precision)].mean())
            out[f"tag_recall_{AMONG}"] = recall_among(said.tags, self.named, AMONG)
        colours = [i for i, word in enumerate(self._labels.tags) if word in CSS4_COLORS]
        if self.named[:, colours].any():
            for k in (1, 3):
                out[f"colour_recall_{k}"] = recall_among(
                    said.tags[:, colours], self.named[:, colours], k
                )
            often = np.broadcast_to(
                self._labels.tag_products[colours], (len(self.named), len(colours))
            )
            out["colour_recall_1_of_the_commonest"] = recall_among(often, self.named[:, colours], 1)
        return out


def word_precision(scores: NDArray[np.floating], named: NDArray[np.bool_]) -> dict[int, float]:
    """Average precision of the order of the photos for each tag that FEWEST titles name.

    Scores and labels [P, T] → {tag: average precision}.
    """
    tags = np.flatnonzero(named.sum(0) >= FEWEST)
    return {int(tag): average_precision(scores[:, tag], named[:, tag]) for tag in tags}


def average_precision(scores: NDArray[np.floating], relevant: NDArray[np.bool_]) -> float:
    """Mean over the relevant ones of the precision at their rank: [P], [P]; ties as they lie."""
    hits = relevant[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def recall_among(scores: NDArray, named: NDArray[np.bool_], k: int) -> float:
    """Share of a photo's named words that are among its k most likely, a mean over the photos that
    have any; with k fewer than a photo's words, of k. Scores and labels [P, T]."""
    rows = named.any(1)
    k = min(k, scores.shape[1])
    top = np.argsort(-scores[rows], axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(named[rows], top, axis=1).sum(1)
    return float((found / np.minimum(named[rows].sum(1), k)).mean())
