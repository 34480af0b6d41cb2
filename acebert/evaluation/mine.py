"""The 'hard_negatives' stage: products near a query for a trained model, never clicked for it.

In-batch negatives are mostly far away (paper section 4.3 makes them harder by category). Here a
model's own vectors say which products it confuses with what was clicked (ANCE, Xiong et al. 2021,
with one round of mining). Nothing but the training days is read: queries clicked there, hot lists
of those days, and the exclusion is by all clicks of those days.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.data.hard_negatives import HardNegatives
from acebert.data.lookups import Lookups
from acebert.data.tokens import Ragged
from acebert.errors import UserError
from acebert.evaluation.embed import model_digests, product_vectors, query_vectors
from acebert.index import ProductIndex
from acebert.training.pairs import StagePaths
from acebert.workdir import Stage, run_stage

log = logging.getLogger(__name__)

VERSION = 1
CHUNK = 1024  # queries searched at a time


def mine(
    settings: Settings,
    model: Path,
    ingested: Stage,
    tokens: Stage,
    features: Stage | None,
    ranks: tuple[int, int],
) -> Stage:
    """Write the files of `acebert.data.hard_negatives`.

    Args:
        settings: the model's own
        ranks: first and last to be kept, among the products never clicked for the query

    Raises:
        UserError: the catalogue has fewer products than the last rank asks for, or the model's
            directory lacks a file.
    """
    key: dict[str, Any] = {
        "version": VERSION,
        "model": [model.name, model_digests(model)],
        "ingest": ingested.digest,
        "tokens": tokens.digest,
        "features": features.digest if features else None,
        "ranks": ranks,
        "precision": settings.train.precision,
        "ann_from": settings.eval.ann_from,
    }
    settings = settings.model_copy(
        update={"eval": settings.eval.model_copy(update={"dimensions": None})}
    )
    paths = StagePaths(ingested.path, tokens.path, features.path if features else None)

    def build(out: Path) -> None:
        log_texts = pq.read_table(ingested.path / "queries.parquet", columns=["text"])["text"]
        clicked = Lookups.open(ingested.path).clicked
        asked = np.flatnonzero(np.diff(clicked.offsets))
        texts = log_texts.take(pa.array(asked)).to_pylist()
        with (
            product_vectors(settings, model, paths, out, lists="train") as products,
            query_vectors(settings, model, texts, out) as queries,
        ):
            found = nearest_unclicked(
                np.asarray(queries), np.asarray(products), clicked, asked, ranks, settings
            )
        mined = np.zeros((len(clicked), found.shape[1]), np.int32)
        mined[asked] = found
        pairs = pq.read_table(ingested.path / "pairs.parquet", columns=["query"])["query"]
        drawn = np.bincount(pairs.to_numpy(), minlength=len(clicked))
        HardNegatives.save(out, mined, drawn, len(products))

    return run_stage(settings.workdir, "hard_negatives", key, build)


def nearest_unclicked(
    queries: NDArray[np.float32],
    products: NDArray[np.float32],
    clicked: Ragged,
    asked: NDArray[np.integer],
    ranks: tuple[int, int],
    settings: Settings,
) -> NDArray[np.int32]:
    """Products of the ranks first … last among those that were not clicked: int32 [Q, M].

    By the approximate index; exactly where that finds too few.

    Args:
        queries, products: vectors of length 1 [Q, d], [n, d]
        clicked: row = query of the log, values = products clicked for it
        asked: the queries' rows in `clicked` [Q]

    Raises:
        UserError: a query has fewer than `last` products left.
    """
    first, last = ranks
    n = len(products)
    clicks = clicked.lengths(asked)
    if last + clicks.max() > n:
        raise UserError(
            f"--loss.hard_negative_ranks {first} {last}: of {n} products up to {clicks.max()} were "
            "clicked for a query; take smaller ranks"
        )
    index = ProductIndex.build(
        products,
        [str(row) for row in range(n)],
        queries,
        ann_from=settings.eval.ann_from,
        k=last,
    )
    out = np.empty((len(asked), last - first + 1), np.int32)
    order = np.argsort(clicks, kind="stable")  # those with many clicks have to be searched deeper
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK]
        k = int(last + clicks[rows].max())
        for exact in (False, True):
            _, found = index.search(queries[rows], k, exact=exact)
            for row, best in zip(rows, found, strict=True):
                free = best[(best >= 0) & ~np.isin(best, clicked[asked[row]])][:last]
                out[row] = -1
                out[row, : max(0, len(free) - first + 1)] = free[first - 1 :]
            rows = rows[(out[rows] < 0).any(axis=1)]
            if not len(rows):
                break
        if start % (100 * CHUNK) == 0:
            log.info("hard negatives: %d of %d queries", start + len(rows), len(order))
    return out
