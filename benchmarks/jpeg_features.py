"""JPEG features decoded by one thread and by one a core: photos a second, in turns.

    python benchmarks/jpeg_features.py [--photos 3000] [--batch 384] [--turns 3]

Drawn photos of 224 px, read through `FeatureStore.pixels` in batches of random rows.
"""

import argparse
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from acebert.data import features
from acebert.data.features import FeatureStore, Shard, write_shard, write_shard_list

SIDE = 224


def drawn(n: int) -> list[bytes]:
    """Smooth colours with noise on them: about as many bytes as a shop's photo of this size."""
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(n):
        smooth = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (SIDE, SIDE))
        noisy = smooth.astype(np.int16) + rng.integers(-12, 13, smooth.shape, np.int16)
        jpegs.append(cv2.imencode(".jpg", noisy.clip(0, 255).astype(np.uint8))[1].tobytes())
    return jpegs


def main(arguments: argparse.Namespace) -> None:
    n, threads = arguments.photos, features.DECODERS
    pixels = drawn(n)
    print(f"{n} photos of {sum(map(len, pixels)) / n / 1000:.1f} KB; photos/s by threads")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        shard = Shard(
            product=np.arange(n, dtype=np.int32),
            has_image=np.ones(n, bool),
            roi=np.zeros((n, 4), np.int32),
            patches=None,
            pixels=pixels,
        )
        entry = write_shard(directory, "0.arrow", shard)
        write_shard_list(directory, [entry], patch_dim=0, pixel_side=SIDE)
        rng = np.random.default_rng(1)
        for _ in range(arguments.turns):
            for features.DECODERS in (1, threads):
                store = FeatureStore(directory)
                store.pixels(np.arange(min(n, 64)))
                start, read = time.perf_counter(), 0
                while read < n:
                    store.pixels(rng.integers(0, n, arguments.batch))
                    read += arguments.batch
                rate = read / (time.perf_counter() - start)
                print(f"{features.DECODERS:3} {rate:8.0f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--turns", type=int, default=3)
    main(parser.parse_args())
