"""Titles that nothing learns from, so that pre-training is measured on what it has not seen.

By the title alone: products of one title are held out together, and pre-training and the patch
CNN, whose tags are words of titles, leave out the same ones.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray


def title_hashes(ingest: Path) -> NDArray[np.uint64]:
    """A number a product [n_products], equal for titles that are equal but for case and blanks."""
    parts = sorted((ingest / "products").glob("part-*.parquet"))
    return np.concatenate(
        [
            pd.util.hash_array(
                pc.utf8_lower(pc.utf8_trim_whitespace(batch["title"])).to_numpy(
                    zero_copy_only=False
                )
            )
            for batch in ds.dataset(parts).scanner(columns=["title"]).to_batches()
        ]
    )


def held_out(titles: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Which products' titles are held out, about `share` of the distinct ones
    (pretrain.held_out)."""
    return titles / 2.0**64 < share
