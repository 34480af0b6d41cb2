"""`held_out.png`: photos that the CNN has not seen, their titles, and the words it says of them."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from acebert.data.cnn_labels import PhotoLabels
from acebert.training.cnn_validation import HeldOutPhotos, Predictions

ROWS, COLUMNS = 4, 6
WORDS = 5


def draw_held_out(
    held_out: HeldOutPhotos, said: Predictions, labels: PhotoLabels, titles: list[str], path: Path
) -> None:
    """Draw photos from all over the held-out ones: the title above, below it the category that the
    CNN says (green where it is right) and its likeliest words, those of the title in brackets."""
    figure = Figure(figsize=(15, 14), layout="constrained")
    axes = figure.subplots(ROWS, COLUMNS).ravel()
    count = min(len(axes), len(titles))
    for axis, i in zip(axes, np.linspace(0, len(titles) - 1, count).astype(int), strict=False):
        axis.imshow(held_out.photos(slice(i, i + 1))[0])
        axis.set_title(textwrap.fill(titles[i] or "(no title)", 28), fontsize=8)
        lines, colour = [], "black"
        if labels.categories:
            own, guess = labels.category[held_out.products[i]], said.category[i].argmax()
            lines.append(labels.categories[guess])
            if own >= 0:
                colour = "green" if own == guess else "red"
                lines[0] += "" if own == guess else f" (is {labels.categories[own]})"
        words = _words(labels.tags, said.tags[i], held_out.named[i])
        axis.text(0.5, -0.03, "\n".join(lines), color=colour, **_below(axis))
        axis.text(0.5, -0.12 if lines else -0.03, textwrap.fill(words, 34), **_below(axis))
    for axis in axes:
        axis.set_axis_off()
    figure.suptitle(
        "Held-out photos: title; category said; likeliest words, [those of the title]", fontsize=12
    )
    figure.savefig(path, dpi=90)


def _words(tags: list[str], logits: NDArray[np.float32], named: NDArray[np.bool_]) -> str:
    likeliest = np.argsort(-logits, kind="stable")[:WORDS]
    chances = 1 / (1 + np.exp(-logits[likeliest]))
    return ", ".join(
        f"{f'[{tags[tag]}]' if named[tag] else tags[tag]} {chance:.0%}"
        for tag, chance in zip(likeliest, chances, strict=True)
    )


def _below(axis: object) -> dict[str, object]:
    return {"transform": axis.transAxes, "ha": "center", "va": "top", "fontsize": 8}  # type: ignore[attr-defined]
