"""Embed the catalogue and any queries with a trained model, for others to score with.

    python ray_jobs/embed.py --workdir W --model MODEL_DIR --queries FILE --out DIR

writes DIR/products.parquet (product_id, embedding) and DIR/queries.parquet (query, embedding) for
a file or directory of Parquet, CSV or JSON lines with a column `query`. The score of a query and a
product is their inner product.
"""

import argparse
import logging
import shutil

from acebert.data.source import distinct_queries
from acebert.errors import UserError
from acebert.job import model_arguments, path, run_job
from acebert.model_settings import settings_for

log = logging.getLogger(__name__)


def work(arguments: argparse.Namespace) -> None:
    settings = settings_for(arguments.model, arguments.settings)
    queries = distinct_queries(arguments.queries, "queries", "query")
    from acebert.pipeline import embed_stage

    stage = embed_stage(settings, arguments.model, queries)
    out = arguments.out
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
    parser = model_arguments()
    parser.add_argument(
        "--queries", required=True, help="Parquet, CSV or JSON lines with a query column"
    )
    parser.add_argument("--out", type=path, required=True, help="directory to write to")
    run_job(work, __doc__, parser)
