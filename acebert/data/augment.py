"""Random views of photos, a whole batch at a time, on the device that trains.

    views = Views.draw(rng, B)
    random_views(photos, views, side)  # uint8 [B, S, S, 3] → float32 [B, 3, side, side]

Random resized crop, flip, and a little brightness, contrast and saturation. No hue, and little of
the others: colours are what the words name. The random numbers are drawn apart from the pixels, on
the CPU for a whole batch, so that a view does not depend on the device or the number of ranks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

SMALLEST = 0.4  # share of the photo's area that a crop keeps at least
ASPECT = 4 / 3  # of a crop to that of the photo, at most, either way
COLOUR = 0.15  # brightness, contrast and saturation change by this share at most
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Views:
    """How each photo of a batch is seen.

    Attributes:
        boxes: x0, y0, x1, y1 of the crop as shares of the side, x0 > x1 where it is flipped,
            float32 [B, 4]
        colours: factors on brightness, contrast and saturation, float32 [B, 3]
    """

    boxes: NDArray[np.float32]
    colours: NDArray[np.float32]

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int) -> "Views":
        area = rng.uniform(SMALLEST, 1, count)
        aspect = np.exp(rng.uniform(-1, 1, count) * np.log(ASPECT))
        width = np.minimum(1, np.sqrt(area * aspect))
        height = np.minimum(1, np.sqrt(area / aspect))
        x0, y0 = rng.random(count) * (1 - width), rng.random(count) * (1 - height)
        left, right = x0, x0 + width
        flipped = rng.random(count) < 0.5
        x = np.where(flipped, right, left), np.where(flipped, left, right)
        boxes = np.stack([x[0], y0, x[1], y0 + height], axis=1)
        colours = rng.uniform(1 - COLOUR, 1 + COLOUR, (count, 3))
        return cls(boxes.astype(np.float32), colours.astype(np.float32))

    def rows(self, rows: slice) -> "Views":
        return Views(self.boxes[rows], self.colours[rows])


def random_views(photos: torch.Tensor, views: Views, side: int) -> torch.Tensor:
    """RGB uint8 [B, S, S, 3] → float32 [B, 3, side, side] from 0 to 255."""
    pixels = photos.permute(0, 3, 1, 2).float()
    x0, y0, x1, y1 = torch.from_numpy(views.boxes).to(pixels.device).unbind(1)
    theta = torch.zeros(len(pixels), 2, 3, device=pixels.device)  # from [-1, 1]² to the box in it
    theta[:, 0, 0], theta[:, 0, 2] = x1 - x0, x0 + x1 - 1
    theta[:, 1, 1], theta[:, 1, 2] = y1 - y0, y0 + y1 - 1
    grid = F.affine_grid(theta, [len(pixels), 3, side, side], align_corners=False)
    seen = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return _recoloured(seen, torch.from_numpy(views.colours).to(seen.device))


def _recoloured(pixels: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """[B, 3, h, w] by `factors` [B, 3] of brightness, contrast and saturation, in this order."""
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    luma = pixels.new_tensor(LUMA).view(1, 3, 1, 1)
    pixels = (pixels * brightness).clamp(0, 255)
    mean = (pixels * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    pixels = (mean + (pixels - mean) * contrast).clamp(0, 255)
    grey = (pixels * luma).sum(1, keepdim=True)
    return (grey + (pixels - grey) * saturation).clamp(0, 255)
