"""sentence-transformers on the same pairs and the same test: as a model comes, and fine-tuned.

MultipleNegativesRankingLoss on (query, title) of random training pairs, by its own trainer; then
every title and test query is embedded and measured by the code that measures our rows.
"""

import json
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.errors import UserError
from acebert.evaluation.testset import evaluation_queries
from acebert.workdir import Stage, digest_of, run_stage

VERSION = 3


def sentence_transformers_stage(
    settings: Settings, ingested: Stage, start: Path, pairs: int, lr: float
) -> Stage:
    """products.parquet and queries.parquet as the embed stage has them, and report.json (pairs,
    train_seconds).

    Args:
        settings: seed, the judged queries, and of `train` batch size and precision
        start: directory of a sentence-transformers model
        pairs: training pairs, drawn at random (0: the model as it comes)
        lr: peak learning rate

    Raises:
        UserError: sentence-transformers is not installed, or `start` is no directory.
    """
    if not start.is_dir():
        raise UserError(f"{start}: no directory of a sentence-transformers model")
    files = ((p.relative_to(start), p.stat()) for p in sorted(start.rglob("*")) if p.is_file())
    key = {
        "version": VERSION,
        "ingest": ingested.digest,
        "start": [[path, found.st_size, found.st_mtime_ns] for path, found in files],
        "queries": digest_of(evaluation_queries(settings, ingested)),
        "precision": settings.train.precision,
        "pairs": pairs,
    }
    if pairs:
        key |= {"seed": settings.seed, "lr": lr, "batch_size": settings.train.batch_size}

    def build(out: Path) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise UserError(
                "sentence-transformers is not installed: pip install 'sentence-transformers[train]'"
            ) from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = SentenceTransformer(str(start), device=device)
        rows = _pairs(ingested, settings.seed, pairs) if pairs else []
        seconds = _train(model, rows, settings, lr, out) if rows else 0.0
        titles = duckdb.execute(
            f"SELECT product_id, title FROM '{ingested.path}/products/*.parquet' ORDER BY product"
        ).fetchall()
        ids, texts = [row[0] for row in titles], [row[1] for row in titles]
        queries = evaluation_queries(settings, ingested)
        bf16 = settings.train.precision == "bf16"
        _write(out / "products.parquet", "product_id", ids, _embed(model, texts, device, bf16))
        _write(out / "queries.parquet", "query", queries, _embed(model, queries, device, bf16))
        report = {"pairs": len(rows), "train_seconds": seconds}
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")

    return run_stage(settings.workdir, "sentence_transformers", key, build)


def _pairs(ingested: Stage, seed: int, pairs: int) -> list[tuple[str, str]]:
    """(query, title) of random training pairs; more than there are: several passes."""
    root = ingested.path
    rows = duckdb.execute(
        f"""SELECT text, title FROM '{root}/pairs.parquet'
        JOIN '{root}/queries.parquet' USING (query)
        JOIN '{root}/products/*.parquet' USING (product)
        WHERE title <> '' ORDER BY hash(pair, {seed})"""
    ).fetchall()
    return (rows * -(-pairs // max(1, len(rows))))[:pairs]


def _train(
    model: Any, rows: list[tuple[str, str]], settings: Settings, lr: float, out: Path
) -> float:
    """Fine-tune in place; seconds."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    data = Dataset.from_dict({"anchor": [q for q, _ in rows], "positive": [t for _, t in rows]})
    arguments = Arguments(
        output_dir=str(out / "trainer"),
        num_train_epochs=1,
        per_device_train_batch_size=settings.train.batch_size,
        learning_rate=lr,
        warmup_ratio=0.1,
        bf16=settings.train.precision == "bf16",
        save_strategy="no",
        report_to=[],
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1  # as many as there are would make batches so many times as large
    loss = MultipleNegativesRankingLoss(model)
    began = time.perf_counter()
    SentenceTransformerTrainer(model, arguments, data, loss=loss).train()
    return time.perf_counter() - began


def _embed(model: Any, texts: list[str], device: str, bf16: bool) -> NDArray[np.float32]:
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        return model.encode(texts, batch_size=256, normalize_embeddings=True).astype(np.float32)


def _write(path: Path, name: str, ids: list[str], vectors: NDArray[np.float32]) -> None:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    pq.write_table(pa.table({name: ids, "embedding": flat}), path)
