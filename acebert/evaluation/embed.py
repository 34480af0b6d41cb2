"""Vectors of the whole catalogue and of any queries, by actors on Ray Data.

Ray Data hands the actors addresses, runs of rows; what a row holds they read themselves. An actor
takes the rows of its run by length, so that a batch is padded little. The product side is put
together as the model's own settings say (hot queries, patches, pixels).

Memory: of an actor the model and a batch, of the driver a few runs. Vectors are gathered in a
mapped file, from which the Parquet file is written.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray

from acebert.cluster import encoder_pool, node_resources
from acebert.config import Settings
from acebert.data.batches import query_arrays
from acebert.data.lookups import Lookups
from acebert.data.schema import normalize_query
from acebert.data.tokens import encode, load_tokenizer
from acebert.errors import UserError
from acebert.models.dual import DualEncoder, truncated
from acebert.training.pairs import InputStore, StagePaths, as_inputs
from acebert.workdir import Stage, digest_of, run_stage

log = logging.getLogger(__name__)

VERSION = 3
MODEL_FILES = ("model.safetensors", "config.json", "settings.yaml", "tokenizer/tokenizer.json")
RUN_ROWS = 16_384  # 8 MiB of vectors
RUNS_AN_ACTOR = 4  # at least, so that actors end together
SAY_EVERY = 10.0


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

    Raises:
        UserError: `eval.dimensions` is more than the model has, or a query is empty.
    """
    key: dict[str, Any] = {
        "version": VERSION,
        "model": model_digests(model),
        "ingest": ingested.digest,
        "tokens": tokens.digest,
        "features": features.digest if features else None,
        "queries": digest_of(queries),
        "precision": settings.train.precision,
    }
    if settings.eval.dimensions is not None:
        key["dimensions"] = settings.eval.dimensions
        if settings.eval.dimensions > settings.model.embedding_dim:
            raise UserError(
                f"--eval.dimensions {settings.eval.dimensions}: the model has "
                f"{settings.model.embedding_dim}"
            )
    paths = StagePaths(ingested.path, tokens.path, features.path if features else None)

    def build(out: Path) -> None:
        embed_products(settings, model, paths, out)
        embed_queries(settings, model, queries, out)

    return run_stage(settings.workdir, "embed", key, build)


def model_digests(model: Path) -> dict[str, str]:
    """SHA-256 of each file of a model directory that vectors depend on."""

    def sha256(name: str) -> str:
        with (model / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return {name: sha256(name) for name in MODEL_FILES}


class Inputs(Protocol):
    """What an actor embeds: n rows, put together as they are asked for."""

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """About how long the texts of `rows` [B] are; rows of one length share a batch."""
        ...

    def embed(self, encoder: DualEncoder, rows: NDArray[np.int64]) -> torch.Tensor:
        """Vectors of `rows` [B] → [B, d]."""
        ...


class _Products:
    def __init__(
        self, settings: Settings, paths: StagePaths, lists: Literal["train", "test"] = "test"
    ) -> None:
        self._inputs = InputStore(settings, paths)
        self._hot = settings.model.hot_queries != "off"
        column = ("train", "test").index(lists)
        self._lists = Lookups.open(paths.ingest).product_hot_lists[:, column]

    def _hot_lists(self, rows: NDArray[np.int64]) -> NDArray[np.int32] | None:
        return self._lists[rows] if self._hot else None

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        text, hot_lists = self._inputs.text, self._hot_lists(rows)
        lengths = text.titles.lengths(rows)
        if hot_lists is not None:
            queries, per_row = text.hot_lists.take(hot_lists)
            of_row = np.repeat(np.arange(len(rows)), per_row)
            more = np.bincount(of_row, text.queries.lengths(queries) + 1, minlength=len(rows))
            lengths = lengths + more.astype(np.int64)
        return lengths

    def embed(self, encoder: DualEncoder, rows: NDArray[np.int64]) -> torch.Tensor:
        tokens, image = self._inputs.products(rows, self._hot_lists(rows))
        device = encoder.device
        return encoder.encode_products(
            tokens.to(device), None if image is None else image.to(device)
        )


class _Queries:
    def __init__(self, settings: Settings, model: Path, texts: "ray.ObjectRef") -> None:
        self._texts: pa.Array = ray.get(texts)
        self._tokenizer = load_tokenizer(model / "tokenizer")
        self._max_tokens = settings.text.query_tokens

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return pc.utf8_length(self._texts.take(rows)).to_numpy()

    def embed(self, encoder: DualEncoder, rows: NDArray[np.int64]) -> torch.Tensor:
        texts = self._texts.take(rows).to_pylist()
        pieces = encode(self._tokenizer, texts, self._max_tokens)
        return encoder.encode_queries(query_inputs(self._tokenizer, pieces).to(encoder.device))


def embed_products(settings: Settings, model: Path, paths: StagePaths, out: Path) -> None:
    """Write `out`/products.parquet: product_id, embedding (float32 [d], length 1)."""
    with product_vectors(settings, model, paths, out) as found:
        tables = (pq.read_table(part, columns=["product_id"]) for part in _parts(paths))
        ids = (table["product_id"].combine_chunks() for table in tables)  # in row order
        _write(out / "products.parquet", "product_id", ids, found)


def embed_queries(settings: Settings, model: Path, queries: list[str], out: Path) -> None:
    """Write `out`/queries.parquet: query (as given), embedding (float32 [d], length 1)."""
    with query_vectors(settings, model, queries, out) as found:
        _write(out / "queries.parquet", "query", iter([pa.array(queries, pa.string())]), found)


def product_vectors(
    settings: Settings,
    model: Path,
    paths: StagePaths,
    out: Path,
    lists: Literal["train", "test"] = "test",
) -> AbstractContextManager[NDArray[np.float32]]:
    """Vectors of the catalogue's rows, float32 [n, d], mapped from a file under `out` for as long
    as the block lasts. `lists`: hot queries of the training days, or all before the test day."""
    n = sum(pq.read_metadata(part).num_rows for part in _parts(paths))
    make = partial(_Products, settings, paths, lists)
    return _vectors(settings, model, "products", n, make, out)


def query_vectors(
    settings: Settings, model: Path, queries: list[str], out: Path
) -> AbstractContextManager[NDArray[np.float32]]:
    """The same for queries' texts.

    Raises:
        UserError: a query is empty after normalisation.
    """
    texts = [normalize_query(query) for query in queries]
    empty = [query for query, text in zip(queries, texts, strict=True) if not text]
    if empty:
        raise UserError(f"{len(empty)} queries are empty after normalisation, e.g. {empty[0]!r}")
    make = partial(_Queries, settings, model, ray.put(pa.array(texts, pa.string())))
    return _vectors(settings, model, "queries", len(queries), make, out)


def _parts(paths: StagePaths) -> list[Path]:
    return sorted((paths.ingest / "products").glob("part-*.parquet"))


def query_inputs(tokenizer: Any, pieces: Any) -> Any:
    """Word pieces of queries → the encoder's tokens, as in training."""
    special = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    return as_inputs(query_arrays(pieces, *special))


class _Embedder:
    """One actor: the model and a way to put its inputs together."""

    def __init__(
        self, settings: Settings, model: Path, make: Callable[[], Inputs], threads: int
    ) -> None:
        use_gpu = torch.cuda.is_available()
        if not use_gpu:
            torch.set_num_threads(threads)
        self.encoder = DualEncoder.load(model).to("cuda" if use_gpu else "cpu").eval()
        self.bf16 = settings.train.precision == "bf16"
        self.batch_size = settings.eval.batch_size
        self.dimensions = settings.eval.dimensions
        self.inputs = make()

    def __call__(self, run: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        rows = np.arange(run["start"][0], run["stop"][0])
        rows = rows[np.argsort(self.inputs.lengths(rows), kind="stable")]
        device = self.encoder.device.type
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            parts = [
                self.inputs.embed(self.encoder, rows[low : low + self.batch_size]).float().cpu()
                for low in range(0, len(rows), self.batch_size)
            ]
        vectors = torch.cat(parts)
        if self.dimensions is not None:
            vectors = truncated(vectors, self.dimensions)
        return {"row": rows, "embedding": vectors.numpy()}


@contextmanager
def _vectors(
    settings: Settings, model: Path, what: str, n: int, make: Callable[[], Inputs], out: Path
) -> Iterator[NDArray[np.float32]]:
    """Vectors of rows 0 … n − 1 as float32 [n, d], in a file under `out` for as long as the block
    lasts: they come in any order, and 100 million of them are 51 GB."""
    if not n:
        raise UserError(f"embed: there are no {what} to embed")
    log.info("embed: %d %s", n, what)
    pool = encoder_pool(settings.eval.num_actors, node_resources())
    run = min(RUN_ROWS, -(-n // (RUNS_AN_ACTOR * pool.actors)))
    starts = range(0, n, run)
    items = [{"start": start, "stop": min(start + run, n)} for start in starts]
    embedded = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Embedder,
        fn_constructor_args=(settings, model, make, pool.threads),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=pool.actors),
        num_gpus=pool.num_gpus,
        num_cpus=pool.num_cpus,
    )
    path = out / f".{what}.f4"
    found: NDArray[np.float32] | None = None
    done, said = 0, time.monotonic()
    try:
        for batch in embedded.iter_batches(batch_size=None):
            vectors = batch["embedding"]
            if found is None:
                found = np.memmap(path, np.float32, "w+", shape=(n, vectors.shape[1]))
            found[batch["row"]] = vectors
            done += len(vectors)
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                log.info("embed: %d of %d %s", done, n, what)
        assert found is not None
        yield found
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, name: str, ids: Iterator[pa.Array], vectors: NDArray[np.float32]) -> None:
    """Ids in the order of rows, beside their vectors; a row group for each array of ids."""
    d = vectors.shape[1]
    schema = pa.schema([(name, pa.string()), ("embedding", pa.list_(pa.float32(), d))])
    first = 0
    with pq.ParquetWriter(path, schema) as writer:
        for some in ids:
            flat = pa.array(vectors[first : first + len(some)].reshape(-1))
            columns = [some, pa.FixedSizeListArray.from_arrays(flat, d)]
            writer.write_table(pa.table(columns, schema=schema))
            first += len(some)
