"""Vectors of the whole catalogue and of any queries, by actors on Ray Data.

Ray Data hands the actors addresses, runs of rows; what a row holds they read themselves. An actor
takes the rows of its run by length, so that a batch is padded little. The product side is put
together as the model's own settings say (hot queries, patches, pixels).

Beside the vectors stands a digest of what each was made from. So a later stage of the same model
takes those whose inputs have not changed, and hands only the others to the actors.

Memory: of an actor the model and a batch, of the driver a few runs. Vectors are gathered in a
mapped file, from which the Parquet file is written.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray

from acebert.cluster import bring_workers, encoder_pool, is_alone, node_resources
from acebert.config import Settings
from acebert.data.batches import query_arrays
from acebert.data.earlier import (
    OF_CATALOGUE,
    Earlier,
    earlier_rows,
    product_ids,
    same_key,
    stage_key,
)
from acebert.data.feature_cache import without_copy
from acebert.data.lookups import Lookups
from acebert.data.mapped import new_array
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
FEW_ROWS = 500
"""embedded without actors, which take longer to start"""
FEW_ROWS_ALONE = 4_000
"""the same where an actor would have the same cores"""
SAY_EVERY = 10.0
INPUTS = "inputs.npy"
DIGEST = 16  # bytes that tell inputs apart
DIGEST_ROWS = 2_048  # put together at once


def embed(
    settings: Settings,
    model: Path,
    ingested: Stage,
    tokens: Stage,
    features: Stage | None,
    queries: list[str],
    earlier: Earlier | None = None,
) -> Stage:
    """The 'embed' stage: products.parquet and queries.parquet for `queries`, as they are given.
    `earlier` saves work and changes no result beyond rounding, so it is not in the key.

    `settings` are the model's own. Hot lists end before the test day.

    Raises:
        UserError: the model's directory lacks a file or its weights are broken;
            `eval.dimensions` is more than the model has; or a query is empty.
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

    image_key = features and {
        k: v for k, v in stage_key(features.path).items() if k not in OF_CATALOGUE
    }
    of_catalogue = ("ingest", "tokens", "features", "queries")

    def build(out: Path) -> None:
        DualEncoder.load(model)  # what is wrong with it is said here; an actor's error is Ray's
        before = earlier.embed if earlier else None
        if before is not None and not same_key(before, key, *of_catalogue):
            log.info("embed: the vectors in %s are gone or another model's", before)
            before = None
        report = {
            "products": embed_products(settings, model, paths, out, digest_of(image_key), before),
            "queries": embed_queries(settings, model, queries, out, before),
        }
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")

    return run_stage(settings.workdir, "embed", key, build)


def model_digests(model: Path) -> dict[str, str]:
    """SHA-256 of each file of a model directory that vectors depend on.

    Raises:
        UserError: one is missing.
    """

    def sha256(name: str) -> str:
        if not (model / name).is_file():
            raise UserError(f"--model {model}: not the directory of a model, it has no {name}")
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

    def digests(self, image_key: str) -> NDArray[np.uint8] | None:
        """Of all that the model reads of each product (its tokens and its photo, as the features
        of `image_key` show it), uint8 [n, 16]; None where the features do not know the photos."""
        text, features = self._inputs.text, self._inputs.features
        if features is not None and not features.knows_photos:
            return None
        n = len(text.titles)
        found = np.empty((n, DIGEST), np.uint8)
        for first in range(0, n, DIGEST_ROWS):
            rows = np.arange(first, min(first + DIGEST_ROWS, n))
            tokens = text.product_batch(rows, self._hot_lists(rows))
            photos = np.zeros((len(rows), 0)) if features is None else features.photos(rows)
            for row, ids, mask, photo in zip(
                rows, tokens.input_ids, tokens.attention_mask, photos, strict=True
            ):
                digest = blake2b(ids[mask].tobytes(), digest_size=DIGEST, key=image_key.encode())
                digest.update(photo.tobytes())
                found[row] = np.frombuffer(digest.digest(), np.uint8)
        return found

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


@dataclass(frozen=True)
class _Kept:
    """Vectors that an earlier stage has: row `rows[i]` here is row `theirs[i]` of its `file`."""

    file: Path
    rows: NDArray[np.int64]
    theirs: NDArray[np.int64]

    def dimensions(self) -> int:
        return pq.read_schema(self.file).field("embedding").type.list_size

    def copy(self, to: NDArray[np.float32]) -> None:
        """Into `to` [n, d], a row group at a time."""
        order = np.argsort(self.theirs)
        rows, theirs = self.rows[order], self.theirs[order]
        first = 0
        with pq.ParquetFile(self.file) as file:
            for group in range(file.num_row_groups):
                vectors = file.read_row_group(group, columns=["embedding"])["embedding"]
                flat = vectors.combine_chunks().flatten().to_numpy()
                low, high = np.searchsorted(theirs, [first, first + len(vectors)])
                to[rows[low:high]] = flat.reshape(len(vectors), -1)[theirs[low:high] - first]
                first += len(vectors)


def embed_products(
    settings: Settings,
    model: Path,
    paths: StagePaths,
    out: Path,
    image_key: str = "",
    before: Path | None = None,
) -> dict[str, int]:
    """Write `out`/products.parquet: product_id, embedding (float32 [d], length 1), and inputs.npy:
    digests of what each was made from, uint8 [n, 16].

    Args:
        image_key: tells features of other settings apart.
        before: an 'embed' stage of the same model, which vectors are taken from.

    Returns:
        Numbers of products that are `new`, `changed`, `as_before` or `gone`.
    """
    ids = product_ids(paths.ingest)
    digests = _Products(without_copy(settings), paths).digests(image_key)
    counts = {"new": len(ids), "changed": 0, "as_before": 0, "gone": 0}
    kept = None
    if digests is not None:
        np.save(out / INPUTS, digests)
    if digests is not None and before is not None and (before / INPUTS).is_file():
        file = before / "products.parquet"
        old_ids = pq.read_table(file, columns=["product_id"]).column(0)
        row = earlier_rows(ids, old_ids).astype(np.int64)
        old = np.load(before / INPUTS, mmap_mode="r", allow_pickle=False)
        same = (row >= 0) & (old[row] == digests).all(axis=1)
        kept = _Kept(file, np.flatnonzero(same), row[same])
        there, as_before = int((row >= 0).sum()), int(same.sum())
        counts = {
            "new": len(ids) - there,
            "changed": there - as_before,
            "as_before": as_before,
            "gone": len(old_ids) - there,
        }
    with product_vectors(settings, model, paths, out, kept=kept) as found:
        _write(out / "products.parquet", "product_id", iter(ids.chunks), found)
    return counts


def embed_queries(
    settings: Settings, model: Path, queries: list[str], out: Path, before: Path | None = None
) -> dict[str, int]:
    """Write `out`/queries.parquet: query (as given), embedding (float32 [d], length 1). `before`
    is a stage of the same model; how many queries are `new` to it, or `as_before`."""
    texts = pa.chunked_array([pa.array(queries, pa.string())])
    kept = None
    if before is not None:
        file = before / "queries.parquet"
        row = earlier_rows(texts, pq.read_table(file, columns=["query"]).column(0)).astype(np.int64)
        kept = _Kept(file, np.flatnonzero(row >= 0), row[row >= 0])
    with query_vectors(settings, model, queries, out, kept) as found:
        _write(out / "queries.parquet", "query", iter(texts.chunks), found)
    as_before = len(kept.rows) if kept else 0
    return {"new": len(queries) - as_before, "as_before": as_before}


def product_vectors(
    settings: Settings,
    model: Path,
    paths: StagePaths,
    out: Path,
    lists: Literal["train", "test"] = "test",
    kept: _Kept | None = None,
) -> AbstractContextManager[NDArray[np.float32]]:
    """Vectors of the catalogue's rows, float32 [n, d], mapped from a file under `out` for as long
    as the block lasts. `lists`: hot queries of the training days, or all before the test day."""
    n = sum(pq.read_metadata(part).num_rows for part in _parts(paths))
    make = partial(_Products, paths=paths, lists=lists)
    return _vectors(settings, model, "products", n, make, out, kept)


def query_vectors(
    settings: Settings, model: Path, queries: list[str], out: Path, kept: _Kept | None = None
) -> AbstractContextManager[NDArray[np.float32]]:
    """The same for queries' texts.

    Raises:
        UserError: a query is empty after normalisation.
    """
    texts = [normalize_query(query) for query in queries]
    empty = [query for query, text in zip(queries, texts, strict=True) if not text]
    if empty:
        raise UserError(f"{len(empty)} queries are empty after normalisation, e.g. {empty[0]!r}")
    make = partial(_Queries, model=model, texts=ray.put(pa.array(texts, pa.string())))
    return _vectors(settings, model, "queries", len(queries), make, out, kept)


def _parts(paths: StagePaths) -> list[Path]:
    return sorted((paths.ingest / "products").glob("part-*.parquet"))


def query_inputs(tokenizer: Any, pieces: Any) -> Any:
    """Word pieces of queries → the encoder's tokens, as in training."""
    special = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    return as_inputs(query_arrays(pieces, *special))


class _Embedder:
    """One actor: the model and a way to put its inputs together. A run is some of `rows`, or of
    all there are."""

    def __init__(
        self,
        settings: Settings,
        model: Path,
        make: Callable[[Settings], Inputs],
        threads: int,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self.rows = rows
        use_gpu = torch.cuda.is_available()
        if not use_gpu:
            torch.set_num_threads(threads)
        self.encoder = DualEncoder.load(model).to("cuda" if use_gpu else "cpu").eval()
        self.bf16 = settings.train.precision == "bf16"
        self.batch_size = settings.eval.batch_size
        self.dimensions = settings.eval.dimensions
        self.inputs = make(settings)

    def __call__(self, run: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        rows = np.arange(run["start"][0], run["stop"][0])
        rows = rows if self.rows is None else self.rows[rows]
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
    settings: Settings,
    model: Path,
    what: str,
    n: int,
    make: Callable[[Settings], Inputs],
    out: Path,
    kept: _Kept | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Vectors of rows 0 … n − 1 as float32 [n, d], in a file under `out` for as long as the block
    lasts: they come in any order, and 100 million of them are 51 GB. Those of `kept` are copied."""
    if not n:
        raise UserError(f"embed: there are no {what} to embed")
    path = out / f".{what}.npy"
    found: NDArray[np.float32] | None = None
    rows = None
    if kept is not None and len(kept.rows):
        found = new_array(path, np.float32, (n, kept.dimensions()))
        kept.copy(found)
        rows = np.setdiff1d(np.arange(n), kept.rows)
    total = n if rows is None else len(rows)
    log.info("embed: %d %s, %d as before", total, what, n - total)
    done, said = 0, time.monotonic()
    try:
        for batch in _embedded(settings, model, make, rows, total) if total else ():
            vectors = batch["embedding"]
            if found is None:
                found = new_array(path, np.float32, (n, vectors.shape[1]))
            found[batch["row"]] = vectors
            done += len(vectors)
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                log.info("embed: %d of %d %s", done, total, what)
        assert found is not None
        yield found
    finally:
        path.unlink(missing_ok=True)


def _embedded(
    settings: Settings,
    model: Path,
    make: Callable[[Settings], Inputs],
    rows: NDArray[np.int64] | None,
    total: int,
) -> Iterator[dict[str, NDArray[Any]]]:
    """Rows and vectors, by actors; `total` is the number of `rows` (none: all). Few are embedded
    here, sooner than actors would start."""
    if total <= (FEW_ROWS_ALONE if is_alone() else FEW_ROWS):
        here = _Embedder(without_copy(settings), model, make, torch.get_num_threads(), rows)
        yield here({"start": np.array([0]), "stop": np.array([total])})
        return
    bring_workers(settings.train)
    pool = encoder_pool(settings.eval.num_actors, node_resources())
    run = min(RUN_ROWS, -(-total // (RUNS_AN_ACTOR * pool.actors)))
    starts = range(0, total, run)
    items = [{"start": start, "stop": min(start + run, total)} for start in starts]
    embedded = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Embedder,
        fn_constructor_args=(settings, model, make, pool.threads, rows),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=pool.actors),
        num_gpus=pool.num_gpus,
        num_cpus=pool.num_cpus,
    )
    yield from embedded.iter_batches(batch_size=None)


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
