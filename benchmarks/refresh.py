"""Seconds of a daily refresh against the same day from nothing, and how far their vectors differ.

    python benchmarks/refresh.py --recipe acebert_tiny --data.products P --data.impressions DIR
    python benchmarks/refresh.py --recipe acebert_tiny --demo.products 2000    # the demo's

Of the second day's catalogue the last `--new` of the products are new, and its log has one day
more, on which `--changed` of the others get a hot query that they did not have, by as many clicks
as that takes. DIR holds a Parquet file a day, with columns under our names. The model is untrained:
the work is the same. Both runs start in work directories of their own, Ray runs already.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml

from acebert.cluster import connect, leave
from acebert.config import Settings, load_settings
from acebert.data.demo import build_demo
from acebert.data.earlier import Earlier, stage_key
from acebert.data.ingest import ingest
from acebert.data.schema import normalize_query
from acebert.data.tokens import tokenize
from acebert.pipeline import Refresh, bundle_stage
from acebert.serving.bundle import Bundle
from acebert.training.finetune import new_model
from acebert.training.pairs import StagePaths

STAGES = ("ingest", "tokens", "features", "embed", "bundle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--new", type=float, default=0.01, help="share of the products")
    parser.add_argument("--changed", type=float, default=0.05, help="share of the others")
    arguments, argv = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        given = load_settings(argv).model_copy(update={"workdir": root})
        _write_days(given, root, arguments.new, arguments.changed)

        def on(day: int, workdir: str) -> Settings:
            data = {"products": f"{root}/products{day}.parquet", "impressions": f"{root}/log{day}"}
            changed = given.data.model_copy(update=data)
            return given.model_copy(update={"data": changed, "workdir": root / workdir})

        first = on(1, "refreshed")
        model = _untrained(first, root / "model")
        connect()
        yesterday = bundle_stage(first, model, model, Refresh(None)).path
        earlier = Earlier.of_bundle(yesterday)
        start = time.perf_counter()
        refreshed = bundle_stage(on(2, "refreshed"), model, model, Refresh(earlier)).path
        between = time.perf_counter()
        scratch = bundle_stage(on(2, "scratch"), model, model, Refresh(None)).path
        seconds = between - start, time.perf_counter() - between
        leave()
        _report(refreshed, scratch, *seconds, given)


def _write_days(given: Settings, root: Path, new: float, changed: float) -> None:
    if given.data.products is None or given.data.impressions is None:
        demo = build_demo(given).path
        catalogue, directory = demo / "products.parquet", demo / "impressions"
    else:
        catalogue, directory = Path(given.data.products), Path(given.data.impressions)
    products = pq.read_table(catalogue)
    kept = products.num_rows - round(new * products.num_rows)
    pq.write_table(products, root / "products2.parquet")
    pq.write_table(products.slice(0, kept), root / "products1.parquet")
    old = products["product_id"].slice(0, kept).combine_chunks()
    days = []
    for file in sorted(directory.glob("*.parquet")):
        rows = pq.read_table(file)
        days.append(rows.filter(pc.is_in(rows["product_id"], old)))
    *before, last = days
    days[-1] = _new_hot_queries(before, last, old.to_pylist(), changed, given.data.hot_queries)
    for day, some in ((1, before), (2, days)):
        (root / f"log{day}").mkdir()
        for number, rows in enumerate(some):
            pq.write_table(rows, root / f"log{day}" / f"{number:04}.parquet")


def _new_hot_queries(
    before: list[pa.Table], last: pa.Table, ids: list[Any], share: float, most: int
) -> pa.Table:
    """A day on which `share` of the products are clicked for a query that is then in their lists of
    `most` queries, and was not; its rows are otherwise like those of `last`, of no user."""
    clicks: dict[Any, Counter[str]] = defaultdict(Counter)
    for rows in before:
        clicked = rows.filter(rows["clicked"])
        queries = map(normalize_query, clicked["query"].to_pylist())
        for product_id, query in zip(clicked["product_id"].to_pylist(), queries, strict=True):
            clicks[product_id][query] += 1
    texts = sorted({query for known in clicks.values() for query in known})
    rng = np.random.default_rng(0)
    (like,) = last.slice(0, 1).to_pylist()
    if "user_id" in like:
        like["user_id"] = None  # or it would be a robot's
    made = []
    for row in np.sort(rng.choice(len(ids), round(share * len(ids)), replace=False)):
        known = clicks[ids[row]]
        query = next(text for text in rng.permutation(texts).tolist() if text not in known)
        in_list = [count for _, count in known.most_common(most)]
        enough = in_list[-1] + 1 if len(in_list) == most else 1
        made += [like | {"product_id": ids[row], "query": query, "clicked": True}] * enough
    return pa.Table.from_pylist(made, schema=last.schema)


def _untrained(settings: Settings, directory: Path) -> Path:
    data = settings.data
    ingested = ingest(settings, str(data.products), str(data.impressions), hold_out=False)
    paths = StagePaths(ingested.path, tokenize(settings, ingested).path, None)
    torch.manual_seed(0)
    new_model(settings, paths).save(directory)
    shutil.copytree(paths.tokens / "tokenizer", directory / "tokenizer")
    (directory / "settings.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return directory


def _report(
    refreshed: Path, scratch: Path, refresh_s: float, scratch_s: float, settings: Settings
) -> None:
    def stages(bundle: Path) -> dict[str, Path]:
        workdir = bundle.parents[1]
        embed = workdir / "embed" / stage_key(bundle)["embed"]
        key = stage_key(embed)
        names = (name for name in STAGES[:3] if key[name])
        return {name: workdir / name / key[name] for name in names} | {
            "embed": embed,
            "bundle": bundle,
        }

    def seconds(stage: Path) -> float:
        return json.loads((stage / "stage.json").read_text())["seconds"]

    new, old = stages(refreshed), stages(scratch)
    told = json.loads((new["embed"] / "report.json").read_text())["products"]
    print(f"{sum(told.values()) - told['gone']} products: {told}")
    print(f"{'stage':10} {'from nothing [s]':>17} {'refresh [s]':>12} {'share':>6}")
    for name in new:
        whole, part = seconds(old[name]), seconds(new[name])
        print(f"{name:10} {whole:17.1f} {part:12.1f} {part / max(whole, 1e-3):6.2f}")
    print(f"{'all':10} {scratch_s:17.1f} {refresh_s:12.1f} {refresh_s / scratch_s:6.2f}")
    a, b = Bundle(refreshed).vectors, Bundle(scratch).vectors
    largest = np.abs(a - b).max()
    cosine = np.sum(a * b, axis=1).min()
    print(f"vectors ({settings.train.precision}): largest difference {largest:.1e}, ", end="")
    print(f"smallest cosine {cosine:.6f}")


if __name__ == "__main__":
    main()
