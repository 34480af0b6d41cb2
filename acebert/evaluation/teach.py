"""The 'targets' stage: what a teacher says to texts, for its students to learn.

Texts are embedded by Ray Data, as queries are; the teacher's first products are found exactly.
"""

import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.data.source import find_files
from acebert.data.tokens import backbone_digest, encode, load_tokenizer
from acebert.data.unlabelled import unlabelled_texts
from acebert.errors import UserError
from acebert.evaluation.embed import embed_queries
from acebert.evaluation.recall import DotProduct, search_catalogue
from acebert.training.teacher_targets import TeacherTargets
from acebert.workdir import Stage, digest_of, run_stage

log = logging.getLogger(__name__)

VERSION = 1
K = 100  # products of the score distribution that are the teacher's first


def teach(settings: Settings, teacher: Path, ingested: Stage, embedded: Stage) -> Stage:
    """Write the teacher's answers to `unlabelled_texts` and to the validation day's queries
    (docs/architecture.md, targets).

    Args:
        settings: the teacher's own, with the `distill` section in use
        teacher: its model directory
        embedded: vectors of the catalogue by it

    Raises:
        UserError: no query was clicked on the validation day, or `distill.texts` cannot be read.
    """
    own = settings.distill
    key = {
        "version": VERSION,
        "teacher": digest_of(backbone_digest(str(teacher))),
        "ingest": ingested.digest,
        "embed": embedded.digest,
        "titles": own.titles,
        "texts": own.texts and [f.fingerprint for f in find_files(own.texts, "distill.texts")],
    }

    def build(out: Path) -> None:
        texts = unlabelled_texts(ingested.path, own.titles, own.texts)
        queries, pairs, new = validation_day(ingested.path)
        asked = [*texts, *queries]
        vectors = _vectors(settings, teacher, asked, out)
        products = _matrix(embedded.path / "products.parquet")
        none = np.empty(0, np.int64)
        scorer = DotProduct(vectors, products)
        found = search_catalogue(scorer, len(asked), none, none, min(K, len(products)))
        tokenizer = load_tokenizer(teacher / "tokenizer")
        pieces = encode(tokenizer, asked, settings.text.query_tokens)
        TeacherTargets(pieces, vectors, found.top, products, pairs, new).save(out)

    return run_stage(settings.workdir, "targets", key, build)


def validation_day(ingested: Path) -> tuple[list[str], NDArray[np.int64], NDArray[np.bool_]]:
    """Its clicked queries [m]; sorted pairs of a query (from 0) and a catalogue row clicked for it,
    int64 [T, 2]; which queries have no click on a training day, bool [m]."""
    clicked = pq.read_table(ingested / "valid_pairs.parquet", columns=["query", "product"])
    if not clicked.num_rows:
        raise UserError("distill: nothing was clicked on the validation day to measure students on")
    log_queries = pq.read_table(ingested / "queries.parquet", columns=["text", "clicks"])
    rows, query = np.unique(clicked["query"].to_numpy(), return_inverse=True)
    pairs = np.unique(np.stack([query, clicked["product"].to_numpy()], axis=1), axis=0)
    asked = log_queries.take(rows)
    return asked["text"].to_pylist(), pairs.astype(np.int64), asked["clicks"].to_numpy() == 0


def _vectors(settings: Settings, teacher: Path, texts: list[str], out: Path) -> NDArray[np.float32]:
    """The teacher's, in fp32 whatever it was trained in: float32 [len(texts), d]."""
    train = settings.train.model_copy(update={"precision": "fp32"})
    embed_queries(settings.model_copy(update={"train": train}), teacher, texts, out)
    path = out / "queries.parquet"
    vectors = _matrix(path)
    path.unlink()
    return vectors


def _matrix(path: Path) -> NDArray[np.float32]:
    """The `embedding` column, float32 [rows, d]."""
    table = pq.read_table(path, columns=["embedding"])
    flat = table["embedding"].combine_chunks().flatten()
    return flat.to_numpy().reshape(table.num_rows, -1).copy()  # torch takes no read-only array
