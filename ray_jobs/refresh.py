"""Take a new day's catalogue and log into the service: hot lists of all days, new products.

    python ray_jobs/refresh.py --workdir W --model MODEL_DIR --data.products P --data.impressions L

As publish.py, with two differences. No day of the log is held out. And what the bundle that is
published has already, of the same model, is taken over: photos that are the same are not put
through the CNN again, and products are embedded again only where their title, photo or hot queries
changed. A run that is stopped leaves the old bundle published; the same command goes on.

What earlier refreshes made is deleted, but for the `--keep` newest and what is published.
"""

import argparse
import json
import logging
import time

from acebert.errors import UserError
from acebert.job import bundle_arguments, run_job
from acebert.model_settings import settings_for, without_the_models

log = logging.getLogger("acebert.refresh")


def work(arguments: argparse.Namespace) -> None:
    from acebert.tracking import model_directory

    if arguments.keep < 2:
        raise UserError(
            f"--keep {arguments.keep}: two at least, for services serve the one before until they "
            "have taken over the new one"
        )
    start = time.perf_counter()
    directory = model_directory(without_the_models(arguments.settings), arguments.model)
    settings = settings_for(directory, arguments.settings)
    from acebert.cluster import leave
    from acebert.data.earlier import Earlier, stage_key
    from acebert.pipeline import Refresh, bundle_stage
    from acebert.serving.bundle import publish, published
    from acebert.serving.old_days import remove_old_days

    try:
        earlier = Earlier.of_bundle(published(settings.workdir, arguments.arm))
    except UserError:  # nothing is published: all is new
        earlier = None
    query_encoder = arguments.query_encoder or directory
    stage = bundle_stage(settings, directory, query_encoder, Refresh(earlier))
    publish(settings.workdir, stage.path, arguments.arm)
    removed = remove_old_days(settings.workdir, arguments.keep)
    if settings.serve.milvus_uri is not None:
        from acebert.serving.milvus import drop_collections

        bundles = [path for path in removed if path.parent.name == "bundle"]
        drop_collections(settings.serve.milvus_uri, bundles)
    leave()
    embedded = settings.workdir / "embed" / stage_key(stage.path)["embed"]
    products = json.loads((embedded / "report.json").read_text())["products"]
    log.info(
        "refresh: %s products new, %s changed, %s as before, %s gone; published after %.0f s",
        *(f"{products[name]:,}" for name in ("new", "changed", "as_before", "gone")),
        time.perf_counter() - start,
    )
    print(stage.path)


if __name__ == "__main__":
    parser = bundle_arguments()
    parser.add_argument(
        "--keep", type=int, default=3, help="refreshes whose stages stay (default: 3)"
    )
    run_job(work, __doc__, parser)
