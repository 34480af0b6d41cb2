"""Take a new day's catalogue and log into the service: hot lists of all days, new products.

    python ray_jobs/refresh.py --workdir W --model MODEL_DIR --data.products P --data.impressions L

As publish.py, with two differences. No day of the log is held out. And what the bundle that is
published has already, of the same model, is taken over: photos that are the same are not put
through the CNN again, and products are embedded again only where their title, photo or hot queries
changed. A run that is stopped leaves the old bundle published; the same command goes on.

The arms of an experiment are refreshed together, so that none has newer products than another: all
bundles are made before the first is published. What is published to all, for searches without a
user, is refreshed with them where it is of one of their models.

    python ray_jobs/refresh.py --workdir W --arm old --model OLD --arm new --model NEW ...

What earlier refreshes made is deleted, but for the `--keep` newest and what is published or in use.
A catalogue that lacks more than `--max_gone_share` of the products that are published, or of their
photos, is refused, and so is a log that lacks more than that of the clicks.
"""

import argparse
import json
import logging
import time

from acebert.errors import UserError
from acebert.job import bundle_arguments, run_job
from acebert.model_settings import settings_for, without_the_models
from acebert.workdir import Stage

log = logging.getLogger("acebert.refresh")


def work(arguments: argparse.Namespace) -> None:
    from acebert.tracking import model_directory

    if arguments.keep < 2:
        raise UserError(
            f"--keep {arguments.keep}: two at least, for services serve the one before until they "
            "have taken over the new one"
        )
    arms = arguments.arm or [None]
    encoders = arguments.query_encoder or [None] * len(arms)
    if not len(arms) == len(arguments.model) == len(encoders):
        raise UserError("--arm, --model and --query_encoder: give each once for every arm")
    start = time.perf_counter()
    where = without_the_models(arguments.settings)
    models = [model_directory(where, model) for model in arguments.model]
    chosen = [settings_for(model, arguments.settings) for model in models]
    from acebert.cluster import leave
    from acebert.pipeline import refreshed_bundle_stage
    from acebert.serving.bundle import publish, published_or_none, same_encoders
    from acebert.serving.old_days import remove_old_days

    stages = []
    for arm, model, encoder, settings in zip(arms, models, encoders, chosen, strict=True):
        before = published_or_none(settings.workdir, arm)
        share = arguments.max_gone_share
        stages.append(refreshed_bundle_stage(settings, model, encoder or model, before, share))
    if arms[0] is not None and (old := published_or_none(where.workdir, None)) is not None:
        new = next((stage.path for stage in stages if same_encoders(stage.path, old)), None)
        if new is None:
            log.warning(
                "refresh: %s, which is published to all, is of no arm's model and stays as old as "
                "it is; give its --model, without --arm, in a refresh of its own",
                old,
            )
        else:  # first, for the writer of changes asks it which products there are
            publish(where.workdir, new)
    for arm, stage in zip(arms, stages, strict=True):
        publish(where.workdir, stage.path, arm)
    removed = remove_old_days(settings.workdir, arguments.keep, settings.serve.bundle)
    if settings.serve.milvus_uri is not None:
        from acebert.serving.milvus import drop_collections

        bundles = [path for path in removed if path.parent.name == "bundle"]
        drop_collections(settings.serve.milvus_uri, bundles)
    leave()
    for arm, stage in zip(arms, stages, strict=True):
        _tell(arm, stage)
    log.info("refresh: published after %.0f s", time.perf_counter() - start)
    for stage in stages:
        print(stage.path)


def _tell(arm: str | None, bundle: Stage) -> None:
    from acebert.data.earlier import stage_key

    embedded = bundle.path.parents[1] / "embed" / stage_key(bundle.path)["embed"]
    products = json.loads((embedded / "report.json").read_text())["products"]
    log.info(
        "refresh: %s%s products new, %s changed, %s as before, %s gone",
        f"arm {arm}: " if arm else "",
        *(f"{products[name]:,}" for name in ("new", "changed", "as_before", "gone")),
    )


if __name__ == "__main__":
    parser = bundle_arguments("append")
    parser.add_argument(
        "--keep", type=int, default=3, help="refreshes whose stages stay (default: 3)"
    )
    parser.add_argument(
        "--max_gone_share",
        type=float,
        default=0.2,
        help="of published products, photos and clicks, that may be gone (default: 0.2)",
    )
    run_job(work, __doc__, parser)
