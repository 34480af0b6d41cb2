"""The page of `look_inside`: plain HTML with its pictures inside, so that it can be sent around."""

import base64
import html
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

from acebert.data.crops import CropSpec
from acebert.data.features import FeatureStore
from acebert.data.image import decode, draw_roi
from acebert.data.photos import Rows

HEIGHT = 180  # of a photo on the page [px]

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 }
td, th { padding: .15em .7em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
th { font-weight: 600 } .true { color: #0a7a2f; font-weight: 600 } .p { color: #777 }
.row { display: flex; gap: 1.5em; align-items: flex-start; margin: 1.5em 0 }
.grid { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0; width: 11em }
figcaption { font-size: 12px } img { height: 11em; object-fit: contain; background: #f4f4f4 }
"""

EXPLAINED = {
    "mlm_accuracy": "masked words guessed right, with the right photo",
    "mlm_accuracy_other_photo": "the same words, with another product's photo",
    "mlm_accuracy_no_photo": "the same words, without a photo",
    "mpm_kl": "masked patches: KL to the true distribution [nats]",
    "mpm_kl_position": "the same for the mean distribution of the patch's position",
    "mpm_kl_mean": "the same for the mean distribution",
    "mpm_kl_uniform": "the same for the uniform distribution",
    "tip_auc_random": "chance that a title fits its own photo better than another product's fits",
    "tip_auc_same_category": "the same among photos of one category",
}


@dataclass(frozen=True)
class Guess:
    """A word that the model would put, its probability, and the true word's."""

    word: str
    probability: float
    true_probability: float


@dataclass(frozen=True)
class Example:
    """A held-out product.

    Attributes:
        product, other: rows of the product and of the one whose photo it is shown with
        title: as its word pieces give it back
        words: its word pieces
        guesses: for each, by photo ('own', 'other', 'none'), the likeliest words
        match: TIP's probability with 'own' and with 'other'
    """

    product: int
    other: int
    title: str
    words: list[str]
    guesses: list[dict[str, list[Guess]]]
    match: dict[str, float]


class PagePhotos:
    """Photos of single products, read where ingest left them."""

    def __init__(self, spec: CropSpec, products: Path, features: Path) -> None:
        self._spec = spec
        self._features = FeatureStore(features)
        self._groups: list[Rows] = []
        for path in sorted(products.glob("part-*.parquet")):
            metadata = pq.read_metadata(path)
            self._groups += [
                Rows(str(path), group, 0, metadata.row_group(group).num_rows)
                for group in range(metadata.num_row_groups)
            ]
        self._ends = np.cumsum([rows.count for rows in self._groups])

    def tag(self, product: int, *, roi: bool = False) -> str:
        """An <img> of the product's photo, with its RoI and patches where `roi` says so."""
        group = int(np.searchsorted(self._ends, product, side="right"))
        rows = self._groups[group]
        start = product - int(self._ends[group] - rows.count)
        (photo,) = self._spec.storage.read(Rows(rows.path, rows.row_group, start, 1))
        if photo.data is None:
            return "<i>no photo</i>"
        image = decode(photo.data, self._spec.max_megapixels)
        scale = HEIGHT / image.shape[0]
        box = self._features.rois(np.array([product]))[0] * scale
        width = max(1, round(image.shape[1] * scale))
        image = cv2.resize(image, (width, HEIGHT), interpolation=cv2.INTER_AREA)
        if roi:
            x0, y0, x1, y1 = np.round(box).astype(int).tolist()
            image = draw_roi(image, (x0, y0, x1, y1))
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        data = base64.b64encode(jpeg.tobytes()).decode()
        return f'<img alt="product {product}" src="data:image/jpeg;base64,{data}">'


def write_page(
    path: Path,
    held_out: dict[str, float],
    examples: list[Example],
    suspects: list[tuple[int, str, float]],
    photos: PagePhotos,
) -> None:
    """Write the page. Titles are the catalogue's own and are escaped."""
    numbers = [
        f"<tr><td>{held_out[name]:.3f}</td><td>{meaning}</td></tr>"
        for name, meaning in EXPLAINED.items()
        if name in held_out
    ]
    listed = [
        f"<figure>{photos.tag(product)}<figcaption>{match:.3f} {html.escape(title)}</figcaption>"
        "</figure>"
        for product, title, match in suspects
    ]
    parts = [
        "<!doctype html><meta charset='utf-8'><title>A look inside CE-BERT</title>",
        f"<style>{STYLE}</style><h1>A look inside CE-BERT</h1>",
        "<h2>On held-out titles</h2>",
        f"<table>{''.join(numbers)}</table>",
        "<h2>Each word masked by itself</h2>",
        "<p>The likeliest words with the right photo, with another product's and with none; the "
        "true word is green, its probability follows in brackets.</p>",
        *(_example(example, photos) for example in examples),
        "<h2>Titles that fit their photos least</h2>",
        "<p>By title-image matching, out of the whole catalogue; suspicious.parquet lists all.</p>",
        f"<div class='grid'>{''.join(listed)}</div>",
    ]
    path.write_text("\n".join(parts) + "\n")


def _example(example: Example, photos: PagePhotos) -> str:
    rows = "".join(
        f"<tr><td class='true'>{html.escape(word)}</td>{_cells(word, guesses)}</tr>"
        for word, guesses in zip(example.words, example.guesses, strict=True)
    )
    return (
        "<div class='row'>"
        f"<figure>{photos.tag(example.product, roi=True)}<figcaption>{html.escape(example.title)}"
        f"<br>matches: {example.match['own']:.3f}</figcaption></figure>"
        f"<figure>{photos.tag(example.other)}<figcaption>another product's photo"
        f"<br>matches: {example.match['other']:.3f}</figcaption></figure>"
        "<table><tr><th>word</th><th>right photo</th><th>other photo</th><th>no photo</th></tr>"
        f"{rows}</table></div>"
    )


def _cells(word: str, guesses: dict[str, list[Guess]]) -> str:
    return "".join(f"<td>{_guesses(word, guesses[name])}</td>" for name in ("own", "other", "none"))


def _guesses(word: str, guesses: Iterable[Guess]) -> str:
    guesses = list(guesses)
    shown = ", ".join(
        f"<span class='true'>{html.escape(guess.word)}</span>"
        if guess.word == word
        else html.escape(guess.word)
        for guess in guesses
    )
    return f"{shown} <span class='p'>({guesses[0].true_probability:.2f})</span>"
