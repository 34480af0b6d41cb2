"""Embed the catalogue and any queries with a trained model, for others to score with.

    python ray_jobs/embed.py --workdir W --model MODEL_DIR --queries FILE --out DIR

writes DIR/products.parquet (product_id, embedding) and DIR/queries.parquet (query, embedding) for
a Parquet file with a `query` column. The score of a query and a product is their inner product.
"""

import argparse
import logging
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from acebert.config import Settings, absolute
from acebert.errors import UserError
from acebert.job import run_job

log = logging.getLogger(__name__)


def read_queries(path: Path) -> list[str]:
    """Distinct queries of a Parquet file, in the order of their first row."""
    try:
        table = pq.read_table(path, columns=["query"])
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"--queries {path}: cannot be read as Parquet: {error}") from error
    if "query" not in table.column_names:
        names = ", ".join(pq.read_schema(path).names)
        raise UserError(f"--queries {path}: it has no column 'query', only: {names}")
    try:
        queries = table["query"].cast(pa.string())
    except pa.ArrowException as error:
        kind = table.schema.field("query").type
        raise UserError(f"--queries {path}: the column 'query' is {kind}, not text") from error
    if queries.null_count:
        first = pc.index(queries.is_null(), True).as_py()
        raise UserError(
            f"--queries {path}: {queries.null_count} rows have no query, the first is row {first}"
        )
    return list(dict.fromkeys(queries.to_pylist()))


def work(_: Settings, arguments: argparse.Namespace) -> None:
    queries = read_queries(arguments.queries)
    try:
        out = absolute(arguments.out)
    except ValueError as error:
        raise UserError(f"--out: {error}") from error
    from acebert.pipeline import embed_stage, settings_for

    settings = settings_for(arguments.model, arguments.settings)
    stage = embed_stage(settings, arguments.model, queries)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("products.parquet", "queries.parquet"):
            aside = out / f".{name}.partial"
            shutil.copy2(stage.path / name, aside)
            aside.replace(out / name)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    print(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", type=Path, required=True, help="directory that finetune printed")
    parser.add_argument("--queries", type=Path, required=True, help="Parquet with a query column")
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    run_job(work, __doc__, parser)
