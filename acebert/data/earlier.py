"""Stages of an earlier catalogue, from which a new day's take what has not changed.

A row is taken where it would be computed from the same inputs by the same settings: features where
the photo's bytes are the same, vectors where the word pieces and the photo are. Its product is
found by its id. What is not there any more, or was made otherwise, is computed anew.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.workdir import STAGE_FILE, digest_of

log = logging.getLogger(__name__)

OF_CATALOGUE = ("ingest", "photos")
"""entries of the key of features that say which catalogue's they are, not how they are made"""


@dataclass(frozen=True)
class Earlier:
    """Where the stages lie; some may be gone."""

    bundle: Path
    embed: Path

    @classmethod
    def of_bundle(cls, bundle: Path) -> "Earlier | None":
        """The stages that `bundle` was made of; None, with a line in the log, where it does not
        lie in its work directory or the stage of its vectors is gone."""
        try:
            embed = bundle.parents[1] / "embed" / stage_key(bundle)["embed"]
            stage_key(embed)  # there is none where it is gone
        except (OSError, LookupError) as error:
            log.warning("refresh: nothing can be taken over from %s: %s", bundle, error)
            return None
        return cls(bundle, embed)


def stage_key(stage: Path) -> dict[str, Any]:
    """What a finished stage was made of.

    Raises:
        OSError: it is not there.
    """
    return json.loads((stage / STAGE_FILE).read_text())["key"]


def same_key(stage: Path, key: dict[str, Any], *but: str) -> bool:
    """Whether `stage` is there and has `key`, but for the entries `but`."""
    try:
        found = stage_key(stage)
    except OSError:
        return False
    drop = set(but)
    first, second = ({k: v for k, v in one.items() if k not in drop} for one in (found, key))
    return digest_of(first) == digest_of(second)


def product_ids(ingested: Path) -> pa.ChunkedArray:
    """Of ingest's products, in the order of rows."""
    parts = sorted((ingested / "products").glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(part, columns=["product_id"]) for part in parts]).column(
        0
    )


def earlier_rows(now: pa.ChunkedArray, before: pa.ChunkedArray) -> NDArray[np.int32]:
    """Row in `before` of each of the ids `now` → int32 [n]; -1: it is not there."""
    return pc.index_in(now, before).fill_null(-1).to_numpy()
