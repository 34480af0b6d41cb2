"""Seconds of a daily refresh against the same day from nothing, and how far their vectors differ.

    python benchmarks/refresh.py --recipe acebert_tiny --data.products P --data.impressions DIR

The first day lacks the last 1 % of the products and the log's last day; on the second, that day
shows 5 % of the products. DIR holds a Parquet file a day. The model is untrained: the work is the
same. Both runs start in work directories of their own, Ray runs already.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml

from acebert.cluster import connect, leave
from acebert.config import Settings, load_settings
from acebert.data.earlier import Earlier, stage_key
from acebert.data.ingest import ingest
from acebert.data.tokens import tokenize
from acebert.pipeline import Refresh, bundle_stage
from acebert.serving.bundle import Bundle
from acebert.training.finetune import new_model
from acebert.training.pairs import StagePaths

NEW, SHOWN = 0.01, 0.05  # of the products
STAGES = ("ingest", "tokens", "features", "embed", "bundle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    arguments, argv = parser.parse_known_args()
    del arguments
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        given = load_settings(argv)
        _write_days(given, root)

        def on(day: int, workdir: str) -> Settings:
            data = {"products": f"{root}/products{day}.parquet", "impressions": f"{root}/log{day}"}
            changed = given.data.model_copy(update=data)
            return given.model_copy(update={"data": changed, "workdir": root / workdir})

        first = on(1, "refreshed")
        model = _untrained(first, root / "model")
        connect()
        yesterday = bundle_stage(first, model, model, Refresh(None)).path
        earlier = Earlier.of_bundle(yesterday)
        refreshed = bundle_stage(on(2, "refreshed"), model, model, Refresh(earlier)).path
        scratch = bundle_stage(on(2, "scratch"), model, model, Refresh(None)).path
        leave()
        _report(refreshed, scratch, given)


def _write_days(given: Settings, root: Path) -> None:
    assert given.data.products is not None
    assert given.data.impressions is not None
    products = pq.read_table(given.data.products)
    n = products.num_rows
    pq.write_table(products, root / "products2.parquet")
    pq.write_table(products.slice(0, n - round(NEW * n)), root / "products1.parquet")
    logs = sorted(Path(given.data.impressions).glob("*.parquet"))
    few = products["product_id"].take(
        pa.array(np.sort(np.random.default_rng(0).choice(n, round(SHOWN * n), replace=False)))
    )
    for day, files in ((1, logs[:-1]), (2, logs)):
        (root / f"log{day}").mkdir()
        for file in files:
            rows = pq.read_table(file)
            if file == logs[-1]:
                rows = rows.filter(pc.is_in(rows["product_id"], few))
            pq.write_table(rows, root / f"log{day}" / file.name)


def _untrained(settings: Settings, directory: Path) -> Path:
    data = settings.data
    ingested = ingest(settings, str(data.products), str(data.impressions), hold_out=False)
    paths = StagePaths(ingested.path, tokenize(settings, ingested).path, None)
    torch.manual_seed(0)
    new_model(settings, paths).save(directory)
    shutil.copytree(paths.tokens / "tokenizer", directory / "tokenizer")
    (directory / "settings.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return directory


def _report(refreshed: Path, scratch: Path, settings: Settings) -> None:
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
    print(json.loads((new["embed"] / "report.json").read_text()))
    print(f"{'stage':10} {'from nothing [s]':>17} {'refresh [s]':>12} {'share':>6}")
    for name in new:
        whole, part = seconds(old[name]), seconds(new[name])
        print(f"{name:10} {whole:17.1f} {part:12.1f} {part / max(whole, 1e-3):6.2f}")
    a, b = Bundle(refreshed).vectors, Bundle(scratch).vectors
    largest = np.abs(a - b).max()
    cosine = np.sum(a * b, axis=1).min()
    print(f"vectors ({settings.train.precision}): largest difference {largest:.1e}, ", end="")
    print(f"smallest cosine {cosine:.6f}")


if __name__ == "__main__":
    main()
