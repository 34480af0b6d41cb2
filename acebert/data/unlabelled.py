"""The texts that a query encoder is distilled on: no clicks are needed, only what people type."""

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from acebert.data.schema import normalized, valid_text
from acebert.errors import UserError

log = logging.getLogger(__name__)


def unlabelled_texts(ingested: Path, titles: bool, more: str | None) -> list[str]:
    """Distinct normalised texts: queries clicked on training days, then titles and `more`.

    A query that the log has on validation or test days alone is left out wherever it comes from:
    on these the student is measured.

    Args:
        ingested: directory of the 'ingest' stage
        titles: whether the catalogue's titles are among them
        more: a Parquet file with a column `text`

    Raises:
        UserError: `more` cannot be read or has no such column.
    """
    log_queries = pq.read_table(ingested / "queries.parquet", columns=["text", "clicks"])
    trained = pc.greater(log_queries["clicks"], 0)
    columns = {"queries": log_queries["text"].filter(trained)}
    if titles:
        columns["titles"] = ds.dataset(ingested / "products").to_table(columns=["title"])["title"]
    if more is not None:
        columns["texts"] = _text_column(more)
    seen = set(log_queries["text"].filter(pc.invert(trained)).to_pylist()) | {""}
    texts: list[str] = []
    for name, column in columns.items():
        found = normalized(column.combine_chunks().drop_null()).unique().to_pylist()
        new = [text for text in found if text not in seen]
        log.info("distill: %d of %d %s", len(new), len(column), name)
        texts += new
        seen.update(new)
    return texts


def _text_column(path: str) -> pa.ChunkedArray:
    try:
        names = pq.read_schema(path).names
        if "text" not in names:
            raise UserError(
                f"--distill.texts {path}: it has no column 'text', only: {', '.join(names)}"
            )
        read = pq.read_table(path, columns=["text"])["text"].cast(pa.string())
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"--distill.texts {path}: cannot be read as Parquet: {error}") from error
    texts, broken = valid_text(read.combine_chunks())
    if broken.any():
        raise UserError(f"--distill.texts {path}: row {int(broken.argmax())} is no UTF-8")
    return pa.chunked_array([texts])
