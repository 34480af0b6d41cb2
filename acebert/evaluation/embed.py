"""Vectors of the whole catalogue and of any queries, by actors on Ray Data.

Rows go to the actors by length, so that a batch is padded little, and come back by row number.
The product side is put together as the model's own settings say (hot queries, patches, pixels).
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.data.batches import TextStore
from acebert.data.schema import normalize_query
from acebert.data.tokens import encode, load_tokenizer
from acebert.errors import UserError
from acebert.models.dual import DualEncoder
from acebert.training.pairs import InputStore, StagePaths, as_inputs
from acebert.workdir import Stage, run_stage

log = logging.getLogger(__name__)

VERSION = 1
ROWS_A_TASK = 4096


def embed(
    settings: Settings,
    model: Path,
    ingested: Stage,
    tokens: Stage,
    features: Stage | None,
    queries: list[str],
) -> Stage:
    """The 'embed' stage: products.parquet and queries.parquet for `queries`, as they are given.

    `settings` are the model's own. Hot lists end before the test day.
    """
    key = {
        "version": VERSION,
        "model": [model.name, (model / "model.safetensors").stat().st_size],
        "ingest": ingested.digest,
        "tokens": tokens.digest,
        "features": features.digest if features else None,
        "queries": queries,
        "precision": settings.train.precision,
    }
    paths = StagePaths(ingested.path, tokens.path, features.path if features else None)

    def build(out: Path) -> None:
        embed_products(settings, model, paths, out)
        embed_queries(settings, model, queries, out)

    return run_stage(settings.workdir, "embed", key, build)


def embed_products(settings: Settings, model: Path, paths: StagePaths, out: Path) -> None:
    """Write `out`/products.parquet: product_id, embedding (float32 [d], length 1)."""
    text = TextStore.open(paths.tokens, paths.ingest)
    lists = pq.read_table(paths.ingest / "product_hot_lists.parquet", columns=["test"])
    hot_lists = lists["test"].to_numpy() if settings.model.hot_queries != "off" else None
    rows = np.arange(len(text.titles))
    lengths = text.titles.lengths(rows)
    if hot_lists is not None:
        hot, per_row = text.hot_lists.take(hot_lists)
        total = np.concatenate([[0], np.cumsum(text.queries.lengths(hot) + 1)])
        ends = np.cumsum(per_row)
        lengths = lengths + total[ends] - total[ends - per_row]

    def of(settings: Settings, paths: StagePaths) -> Callable[[DualEncoder, Any], torch.Tensor]:
        inputs = InputStore(settings, paths)

        def call(encoder: DualEncoder, batch: dict[str, NDArray[Any]]) -> torch.Tensor:
            products = batch["row"]
            lists = None if hot_lists is None else hot_lists[products]
            tokens, image = inputs.products(products, lists)
            device = encoder.device
            return encoder.encode_products(
                tokens.to(device), None if image is None else image.to(device)
            )

        return call

    vectors = _run(
        settings, model, "products", np.argsort(lengths), {}, lambda: of(settings, paths)
    )
    parts = sorted((paths.ingest / "products").glob("part-*.parquet"))
    ids = ds.dataset(parts).to_table(columns=["product", "product_id"]).sort_by("product")
    _write(out / "products.parquet", "product_id", ids["product_id"], vectors)


def embed_queries(settings: Settings, model: Path, queries: list[str], out: Path) -> None:
    """Write `out`/queries.parquet: query (as given), embedding (float32 [d], length 1)."""
    texts = np.array([normalize_query(query) for query in queries], dtype=object)
    empty = [query for query, text in zip(queries, texts, strict=True) if not text]
    if empty:
        raise UserError(f"{len(empty)} queries are empty after normalisation, e.g. {empty[0]!r}")
    order = np.argsort([len(text) for text in texts], kind="stable")

    def of() -> Callable[[DualEncoder, Any], torch.Tensor]:
        tokenizer = load_tokenizer(model / "tokenizer")

        def call(encoder: DualEncoder, batch: dict[str, NDArray[Any]]) -> torch.Tensor:
            pieces = encode(tokenizer, list(batch["text"]), settings.text.query_tokens)
            return encoder.encode_queries(query_inputs(tokenizer, pieces).to(encoder.device))

        return call

    vectors = _run(settings, model, "queries", order, {"text": texts}, of)
    _write(out / "queries.parquet", "query", pa.array(queries), vectors)


def query_inputs(tokenizer: Any, pieces: Any) -> Any:
    """Word pieces of queries → the encoder's tokens, as in training."""
    empty = type(pieces).from_rows([])
    store = TextStore(
        empty,
        pieces,
        empty,
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
        tokenizer.pad_token_id,
    )
    return as_inputs(store.query_batch(np.arange(len(pieces))))


class _Embedder:
    """One actor: the model and a way to put its inputs together."""

    def __init__(self, settings: Settings, model: Path, make: Callable[[], Any]) -> None:
        use_gpu = torch.cuda.is_available()
        if not use_gpu:
            cores = int(ray.cluster_resources()["CPU"])
            torch.set_num_threads(max(1, cores // settings.eval.num_actors))
        self.encoder = DualEncoder.load(model).to("cuda" if use_gpu else "cpu").eval()
        self.bf16 = settings.train.precision == "bf16"
        self.call = make()

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        device = self.encoder.device.type
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            vectors = self.call(self.encoder, batch)
        return {"row": batch["row"], "embedding": vectors.float().cpu().numpy()}


def _run(
    settings: Settings,
    model: Path,
    what: str,
    order: NDArray[np.int64],
    columns: dict[str, NDArray[Any]],
    make: Callable[[], Any],
) -> NDArray[np.float32]:
    """Embed rows in `order`; float32 [n, d] by row number."""
    blocks = [
        pa.table(
            {"row": rows, **{name: pa.array(values[rows]) for name, values in columns.items()}}
        )
        for rows in np.array_split(order, max(1, len(order) // ROWS_A_TASK))
    ]
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    cpus = 0.5 * ray.cluster_resources()["CPU"] / settings.eval.num_actors
    embedded = ray.data.from_arrow(blocks).map_batches(
        _Embedder,
        fn_constructor_args=(settings, model, make),
        batch_size=settings.eval.batch_size,
        compute=ray.data.ActorPoolStrategy(size=settings.eval.num_actors),
        num_gpus=gpus,
        num_cpus=None if gpus else cpus,
    )
    log.info("embed: %d %s", len(order), what)
    vectors: NDArray[np.float32] | None = None
    for batch in embedded.iter_batches(batch_size=ROWS_A_TASK):
        if vectors is None:
            vectors = np.empty((len(order), batch["embedding"].shape[1]), np.float32)
        vectors[batch["row"]] = batch["embedding"]
    if vectors is None:
        raise UserError(f"embed: there are no {what} to embed")
    return vectors


def _write(path: Path, name: str, ids: Any, vectors: NDArray[np.float32]) -> None:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    pq.write_table(pa.table({name: ids, "embedding": flat}), path)
