"""Image features held on the device that trains: no photo crosses the bus in a step.

For a catalogue that fits: 0.2 MB a product at the paper's sizes, so 100,000 products on a card of
24 GB and half a million on one of 141 GB, beside what training takes. Each worker fills its own.
"""

import logging
import time

import numpy as np
import torch
from numpy.typing import NDArray

from acebert.data.feature_cache import free_memory
from acebert.data.features import FeatureStore
from acebert.errors import UserError
from acebert.models.encoder import ImageInputs

log = logging.getLogger(__name__)

ROWS = 1024  # copied at a time
SHARE = 0.8  # of the free memory at most: the rest is for weights, activations and optimisers


class DeviceFeatures:
    """A `FeatureStore`'s patches and pixels as tensors on a device."""

    def __init__(
        self, store: FeatureStore, device: torch.device, patches: bool, pixels: bool
    ) -> None:
        """Copy them there; JPEGs are stored decoded.

        Raises:
            UserError: they take more than 80 % of the memory that is free on the device.
        """
        n, S = store.n_products, store.pixel_side
        self._store = store
        row_bytes = 2 * 16 * store.patch_dim * patches + 3 * S * S * pixels
        _check_room(n * row_bytes, device)
        self._patches = self._pixels = None
        if patches:
            self._patches = torch.empty(n, 16, store.patch_dim, dtype=torch.float16, device=device)
        if pixels:
            self._pixels = torch.empty(n, S, S, 3, dtype=torch.uint8, device=device)
        start = time.perf_counter()
        for first in range(0, n, ROWS):
            rows = np.arange(first, min(first + ROWS, n))
            part = slice(first, first + ROWS)
            if self._patches is not None:
                self._patches[part] = torch.from_numpy(store.patches(rows))
            if self._pixels is not None:
                self._pixels[part] = torch.from_numpy(store.pixels(rows))
        seconds = time.perf_counter() - start
        log.info("features: %.2f GB on %s in %.1f s", n * row_bytes / 1e9, device, seconds)

    def images(self, products: NDArray[np.integer]) -> ImageInputs:
        """Product rows [B] → image tokens; `has_image` on the host, the rest on the device."""

        def pick(held: torch.Tensor | None) -> torch.Tensor | None:
            return None if held is None else held[torch.from_numpy(products).to(held.device)]

        has_image = torch.from_numpy(self._store.has_image(products))
        return ImageInputs(has_image, pick(self._patches), pick(self._pixels))


def _check_room(size: int, device: torch.device) -> None:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if size > SHARE * free:
        raise UserError(
            f"--image.feature_cache device: {size / 1e9:.1f} GB of features leave no room on "
            f"{device}, which has {free / 1e9:.1f} GB free; use node_memory or node_disk"
        )
