"""A bundle: all that the service needs of one model and one catalogue, in one directory.

| file | holds |
|---|---|
| `bundle.json` | `version` (of the model: `product_side_version`), numbers, expected hit rate |
| `vectors.npy` | product vectors, float32 [n, d], mapped |
| `index/` | the FAISS index of these (`acebert.index.ProductIndex`) |
| `products.sqlite` | `product` (id, title, category, price, photo, digest, hot queries), `words`, |
| | `clicked` (query, products and their clicks on the days of the hot lists) |
| `hot.npy`, `hot_queries.parquet` | vectors of the most frequent queries, float32 [h, d]; texts |
| `query_mean.npy` | mean vector of what drawn clicks asked for, float32 [d]; a refresh keeps it |
| `model/`, `query_encoder/` | model directory (products are encoded by it), query encoder |

Vectors of products, hot queries and the query encoder are of one model: `version` says which, and
what does not carry it is refused. A bundle never changes; what happens to products later is in the
change log (`acebert.serving.changes`): later than the catalogue was written (`made` in bundle.json
says when, and as of when its other parts are).
"""

import json
import logging
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.config import Settings, read_recipe, settings_from
from acebert.data.database import READ_ROWS, open_database
from acebert.data.earlier import stage_key
from acebert.data.features import photo_digest
from acebert.data.image import BrokenImage, decode
from acebert.data.lookups import Lookups
from acebert.data.photos import Photo, PhotoStorage, Rows
from acebert.errors import UserError
from acebert.index import TUNE_QUERIES, IndexInfo, Kind, ProductIndex
from acebert.serving.products import Product
from acebert.serving.query_encoder import dimensions, product_side_version
from acebert.workdir import Stage, digest_of, file_digests, run_stage, sync

log = logging.getLogger(__name__)

VERSION = 8
FLAT_UP_TO = 10_000  # products up to which exact search takes less than a millisecond
OF_HOT_LISTS = ("train", "valid")  # days whose clicks are in the lists that are served
PHOTO_SIDE = 320  # photos of hits are not shown larger [px]
PHOTO_BYTES = 40_000  # smaller files are kept as they are
CNN_WEIGHTS = "cnn.safetensors"
CLICKED = 100  # products of a query whose clicks are kept, the most clicked
DRAWN = 2_000
"""clicks of the log, whose queries stand for what is searched for"""
TOKENS = "porter unicode61 remove_diacritics 2"


def build_bundle(
    settings: Settings,
    model: Path,
    query_encoder: Path,
    ingested: Stage,
    embedded: Stage,
    earlier: Path | None = None,
) -> Stage:
    """The 'bundle' stage, from a model's vectors of the catalogue and of the hot queries.

    Args:
        settings: the model's own, with this machine's `serve`.
        model: model directory.
        query_encoder: directory of a query encoder of the same version, e.g. `model`.
        embedded: products in catalogue order, and `bundle_queries`.
        earlier: a bundle whose photos are taken where they have not changed.

    Raises:
        UserError: the query encoder is another model's.
    """
    version = product_side_version(model)
    if product_side_version(query_encoder) != version:
        raise UserError(
            f"{query_encoder}: the query encoder of another model than {model}; distil it from "
            "this one, or leave it out"
        )
    serve = settings.serve
    key = {
        "version": VERSION,
        "model": version,
        "query_encoder": file_digests(query_encoder),
        "embed": embedded.digest,
        "ingest": ingested.digest,
        "index": [serve.index, serve.codec, serve.target_recall, settings.eval.ann_from],
        "hot_queries": serve.hot_queries,
    }

    def build(out: Path) -> None:
        ids, vectors = _read_vectors(embedded.path / "products.parquet", "product_id")
        np.save(out / "vectors.npy", vectors)
        queries, hot = _read_vectors(embedded.path / "queries.parquet", "query")
        known_hot = min(serve.hot_queries, _clicked(ingested.path))
        mean = _query_mean(ingested.path, queries, hot, version, earlier)
        np.save(out / "query_mean.npy", mean)
        index = ProductIndex.build(
            vectors,
            ids,
            hot[: max(TUNE_QUERIES, known_hot)],
            ann_from=settings.eval.ann_from,
            target_recall=serve.target_recall,
            kind=_kind(settings, len(ids)),
            codec=serve.codec,
        )
        index.save(out / "index")
        queries, hot = queries[:known_hot], hot[:known_hot]
        np.save(out / "hot.npy", hot)
        pq.write_table(pa.table({"query": queries}), out / "hot_queries.parquet")
        storage = PhotoStorage(settings.data.products, int(settings.image.max_megapixels * 3e6))
        known = earlier if earlier and _is_one_of_ours(earlier) else None
        photos = _write_products(ingested.path, storage, settings, out, known)
        _write_clicked(ingested.path, settings.data.memory_limit, out)
        shutil.copytree(model, out / "model")
        weights = Path(settings.image.cnn_weights)
        if settings.model.patches and weights.is_file():
            shutil.copyfile(weights, out / CNN_WEIGHTS)
        shutil.copytree(query_encoder, out / "query_encoder")
        info = {
            "version": version,
            "products": len(ids),
            "dimensions": vectors.shape[1],
            "photos": photos,
            "hot_queries": len(queries),
            "hot_share_of_test_searches": _hit_rate(ingested.path, set(queries)),
            "index_recall_at_100": round(index.info.tuned_recall, 4),
            "made": _times(model, ingested.path),
        }
        (out / "bundle.json").write_text(json.dumps(info, indent=2) + "\n")
        log.info("bundle: %s", info)

    return run_stage(settings.workdir, "bundle", key, build)


def _times(model: Path, ingested: Path) -> dict[str, str]:
    """Part of a bundle → as of when it is, where that is known (ISO 8601, UTC)."""
    report = json.loads((ingested / "report.json").read_text())
    trained = datetime.fromtimestamp((model / "model.safetensors").stat().st_mtime, UTC)
    now = datetime.now(UTC).isoformat()
    times = {
        "bundle": now,
        # A file of the future would supersede all changes until then.
        "catalogue": min(report.get("products_written") or "", now),  # "": not known
        "model": trained.isoformat(),
    }
    if report.get("log_until"):  # its days are days of the calendar
        last = max(report["splits"][split]["last"] or "" for split in OF_HOT_LISTS)
        end = date.fromisoformat(last) + timedelta(days=1)  # the log holds all of that day
        times["hot_lists"] = datetime.combine(end, datetime.min.time(), UTC).isoformat()
    return {part: time for part, time in times.items() if time}


def _query_mean(
    ingested: Path,
    queries: list[str],
    vectors: NDArray[np.float32],
    version: str,
    earlier: Path | None,
) -> NDArray[np.float32]:
    """What live queries are compared with: the mean of when the model was first published."""
    if earlier and _is_one_of_ours(earlier) and stage_key(earlier)["model"] == version:
        return np.load(earlier / "query_mean.npy", allow_pickle=False)
    rows = pc.index_in(pa.array(_drawn(ingested)), pa.array(queries))
    return vectors[rows.to_numpy()].mean(axis=0)


def bundle_queries(ingested: Stage, count: int) -> list[str]:
    """The queries whose vectors a bundle needs, each once. First the `count` with most clicks in
    the training days, most clicked first, a few hundred at least, for the index's effort is set on
    them: after those that were clicked come others, which are not hot. Then those that were drawn.
    """
    table = pq.read_table(ingested.path / "queries.parquet")
    ranked = table.sort_by([("clicks", "descending"), ("query", "ascending")])
    wanted = min(count, _clicked(ingested.path))
    first = ranked["text"].slice(0, max(TUNE_QUERIES, wanted)).to_pylist()
    return list(dict.fromkeys([*first, *_drawn(ingested.path)]))


def _drawn(ingested: Path) -> list[str]:
    """Queries of DRAWN clicks of the training days, drawn with replacement, by one seed."""
    table = pq.read_table(ingested / "queries.parquet", columns=["text", "clicks"])
    clicks = table["clicks"].to_numpy()
    rows = np.random.default_rng(0).choice(len(clicks), DRAWN, p=clicks / clicks.sum())
    texts: list[str] = table["text"].take(rows).to_pylist()
    return texts


def _clicked(ingested: Path) -> int:
    """How many queries were clicked in the training days."""
    return pq.read_table(
        ingested / "queries.parquet", columns=["query"], filters=[("clicks", ">", 0)]
    ).num_rows


def publish(workdir: Path, bundle: Path, arm: str | None = None) -> None:
    """Make `bundle` the one that services of this work directory serve, from their next look on; or
    the one that they serve to an arm of an experiment. It is on the disk when this returns."""
    pointer = _pointer(workdir, arm)
    pointer.parent.mkdir(parents=True, exist_ok=True)
    aside = pointer.with_suffix(f".{os.getpid()}")
    inside = bundle.is_relative_to(workdir)  # so that a copy of the work directory serves its own
    named = bundle.relative_to(workdir) if inside else bundle
    aside.write_text(json.dumps({"bundle": str(named)}) + "\n")
    sync(aside)
    aside.replace(pointer)
    sync(pointer.parent)


def published(workdir: Path, arm: str | None = None) -> Path:
    """The bundle that `publish` named last, for all or for an arm.

    Raises:
        UserError: there is none, or its file cannot be read.
    """
    try:
        return _bundle_of(_pointer(workdir, arm))
    except FileNotFoundError as error:
        raise UserError(
            f"{workdir}: nothing to serve{f' as arm {arm}' if arm else ''} there; "
            f"`python ray_jobs/publish.py --model MODEL_DIR --workdir {workdir}"
            f"{f' --arm {arm}' if arm else ''}` makes a bundle of a model"
        ) from error


def published_or_none(workdir: Path, arm: str | None) -> Path | None:
    """`published`; None where nothing is, or its file cannot be read, which is told."""
    try:
        return published(workdir, arm)
    except UserError as error:
        log.info("nothing published before: %s", error)
        return None


def same_encoders(a: Path, b: Path) -> bool:
    """Whether two bundles are of the same model and the same query encoder."""
    if not (_is_one_of_ours(a) and _is_one_of_ours(b)):
        return False
    one, other = stage_key(a), stage_key(b)
    return all(one[part] == other[part] for part in ("model", "query_encoder"))


def all_published(workdir: Path) -> list[Path]:
    """The bundles that `publish` named last, for all and for every arm.

    Raises:
        UserError: a file that names one cannot be read.
    """
    return [_bundle_of(pointer) for pointer in (workdir / "serving").glob("*.json")]


def _bundle_of(pointer: Path) -> Path:
    try:
        return pointer.parent.parent / json.loads(pointer.read_text())["bundle"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{pointer}: does not say which bundle is published ({error!r}); publish.py or "
            "refresh.py writes it anew"
        ) from error


def _pointer(workdir: Path, arm: str | None) -> Path:
    name = "published.json" if arm is None else f"arm-{arm}.json"
    return workdir / "serving" / name


class ProductTable:
    """The products of a bundle, without its model, vectors and index.

    Attributes:
        directory: where it lies.
        info: bundle.json.
        made: part (bundle, catalogue, hot_lists, model) → as of when it is.
    """

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            UserError: no bundle.
        """
        self.directory = directory
        try:
            self.info = json.loads((directory / "bundle.json").read_text())
            made = self.info["made"].items()
            self.made = {part: datetime.fromisoformat(time) for part, time in made}
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(directory, error) from error
        self._connections = threading.local()

    @property
    def _db(self) -> sqlite3.Connection:
        """The thread's own connection, so that none waits for another's query."""
        if not hasattr(self._connections, "db"):
            self._connections.db = sqlite3.connect(_address(self.directory), uri=True)
        return self._connections.db

    def columns(self) -> tuple[list[str | None], NDArray[np.float64]]:
        """Category and price (NaN: none) of every row [n]."""
        rows = self._db.execute("SELECT category, price FROM product ORDER BY row").fetchall()
        prices = np.array([row[1] for row in rows], np.float64)
        return [row[0] for row in rows], prices

    def products(self, rows: Sequence[int]) -> list[Product]:
        """The products of `rows`, in this order."""
        marks = ",".join("?" * len(rows))
        found = self._db.execute(
            f"SELECT row, product_id, title, category, price FROM product WHERE row IN ({marks})",
            [int(row) for row in rows],
        )
        by_row = {row: Product(*values) for row, *values in found}
        return [by_row[row] for row in rows]

    def row_of(self, product_id: str) -> int | None:
        found = self._db.execute("SELECT row FROM product WHERE product_id = ?", (product_id,))
        return next((row for (row,) in found), None)

    def product_ids(self) -> list[str]:
        """In no order."""
        return [name for (name,) in self._db.execute("SELECT product_id FROM product")]

    def photo_of(self, product_id: str) -> bytes | None:
        found = self._db.execute("SELECT photo FROM product WHERE product_id = ?", (product_id,))
        return next((photo for (photo,) in found), None)

    def hot_queries(self, product_id: str) -> list[str]:
        """What the product is found by most, most clicked first; for a model that reads this."""
        found = self._db.execute("SELECT hot FROM product WHERE product_id = ?", (product_id,))
        return next((json.loads(hot) for (hot,) in found), [])

    def clicked(self, query: str) -> dict[str, int]:
        """What was clicked for a normalised query: product_id → clicks."""
        found = self._db.execute("SELECT products FROM clicked WHERE query = ?", (query,))
        return next((json.loads(products) for (products,) in found), {})

    def by_words(self, query: str) -> Iterator[tuple[int, float]]:
        """Rows whose titles share a word with `query` and their BM25 scores, best first."""
        return match_words(self._db, query_words(query))

    def titles_with(self, word: str) -> int:
        """How many titles hold a word of `query_words`."""
        found = self._db.execute("SELECT count(*) FROM words WHERE words MATCH ?", (word,))
        return found.fetchone()[0]


class Bundle(ProductTable):
    """A bundle that is read.

    Attributes:
        version: of the model, see the module's docstring.
        reads_photos: whether the model does; photos say nothing to one of titles alone.
        query_mean: of the log's queries, float32 [d].
        encoder: of its query encoder, 8 hex digits.
        vectors: float32 [n, d], mapped.
        index_info: of the index.
        hot: text of a hot query → its row of `hot_vectors`.
        hot_vectors: float32 [h, d], mapped.
    """

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            UserError: no bundle, or files that do not belong together.
        """
        super().__init__(directory)
        if not _is_one_of_ours(directory):
            raise UserError(
                f"{directory}: a bundle of another version of acebert; publish the model again"
            )
        try:
            self.vectors = np.load(directory / "vectors.npy", mmap_mode="r", allow_pickle=False)
            self.hot_vectors = np.load(directory / "hot.npy", mmap_mode="r", allow_pickle=False)
            texts = pq.read_table(directory / "hot_queries.parquet")["query"].to_pylist()
            self.query_mean = np.load(directory / "query_mean.npy", allow_pickle=False)
            self.version: str = self.info["version"]
            self.encoder = digest_of(stage_key(directory)["query_encoder"])[:8]
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(directory, error) from error
        of_model = product_side_version(directory / "model")
        if of_model != self.version:
            raise UserError(f"{directory}: model {of_model} in a bundle of model {self.version}")
        of_training = settings_from(read_recipe(str(directory / "model" / "settings.yaml")))
        self.reads_photos = of_training.reads_images
        self.hot = {text: row for row, text in enumerate(texts)}
        self.index_info = IndexInfo.read(directory / "index")
        n = len(self.vectors)
        if not n == self.index_info.products == self.info["products"]:
            raise UserError(
                f"{directory}: {n} vectors, an index of {self.index_info.products} and "
                f"{self.info['products']} products do not belong together"
            )
        if len(texts) != len(self.hot_vectors):
            raise UserError(
                f"{directory}: {len(texts)} hot queries and {len(self.hot_vectors)} vectors of "
                "such do not belong together"
            )
        of = {
            "products": self.vectors.shape[1],
            "index": self.index_info.dimensions,
            "hot queries": self.hot_vectors.shape[1],
            "mean query": len(self.query_mean),
            "model": dimensions(directory / "model"),
            "query encoder": dimensions(directory / "query_encoder"),
        }
        if len(set(of.values())) > 1:
            each = ", ".join(f"{part} {d}" for part, d in of.items())
            raise UserError(
                f"{directory}: vectors of different dimensions ({each}); publish the model again"
            )

    @cached_property
    def index(self) -> ProductIndex:
        """The FAISS index of `vectors`; read when it is first asked for, for Milvus needs none.

        Raises:
            UserError: it cannot be read.
        """
        return ProductIndex.load(self.directory / "index", self.vectors)


def _unreadable(directory: Path, error: Exception) -> UserError:
    return UserError(
        f"{directory}: no bundle that can be read ({error!r}); publish the model again"
    )


def _address(bundle: Path) -> str:
    return f"file:{bundle / 'products.sqlite'}?mode=ro&immutable=1"


def create_words(db: sqlite3.Connection) -> None:
    db.execute(f"CREATE VIRTUAL TABLE words USING fts5(title, content='', tokenize='{TOKENS}')")


def query_words(query: str) -> list[str]:
    """The words of a query, as phrases of FTS5, which reads "t-shirt" as it does in titles."""
    words = query.replace("\0", "").replace('"', '""').split()
    return [f'"{word}"' for word in words if any(c.isalnum() for c in word)]


def match_words(db: sqlite3.Connection, words: Sequence[str]) -> Iterator[tuple[int, float]]:
    """Rowids of the FTS5 table `words` and BM25 scores (higher is better), best first."""
    wanted = " OR ".join(words)
    if not wanted:
        return iter(())
    found = db.execute("SELECT rowid, rank FROM words WHERE words MATCH ? ORDER BY rank", (wanted,))
    return ((row, -rank) for row, rank in found)


def _kind(settings: Settings, n: int) -> Kind:
    if settings.serve.index != "auto":
        return settings.serve.index
    return "flat" if n <= FLAT_UP_TO else "hnsw" if n < settings.eval.ann_from else "ivf"


def _read_vectors(path: Path, name: str) -> tuple[list[str], NDArray[np.float32]]:
    table = pq.read_table(path)
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    return table[name].to_pylist(), flat.reshape(table.num_rows, -1)


def _hit_rate(ingested: Path, hot: set[str]) -> float | None:
    """Share of the test day's searches whose query is hot, where one is held out."""
    shown = pq.read_table(ingested / "test_impressions.parquet", columns=["search", "query"])
    searches = shown.group_by(["search", "query"]).aggregate([])
    texts = pq.read_table(ingested / "queries.parquet")["text"].take(searches["query"])
    if not len(texts):
        return None
    return round(float(np.mean([text in hot for text in texts.to_pylist()])), 4)


def _is_one_of_ours(bundle: Path) -> bool:
    """Whether `bundle` is there, written as this code writes one."""
    try:
        return bool(stage_key(bundle)["version"] == VERSION)
    except OSError:
        return False


def _write_products(
    ingested: Path, storage: PhotoStorage, settings: Settings, out: Path, earlier: Path | None
) -> int:
    """Write products.sqlite; returns how many products have a photo to show."""
    db = sqlite3.connect(out / "products.sqlite")
    db.execute(
        "CREATE TABLE product (row INTEGER PRIMARY KEY, product_id TEXT NOT NULL, "
        "title TEXT NOT NULL, category TEXT, price REAL, photo BLOB, digest BLOB, "
        "hot TEXT NOT NULL)"
    )
    known = sqlite3.connect(_address(earlier), uri=True) if earlier else None
    create_words(db)
    photos = 0
    columns = ["product", "product_id", "title", "category", "price"]
    hot_of = _hot_queries_of(ingested, settings)
    for path in sorted((ingested / "products").glob("part-*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                run = Rows(str(path), group, 0, table.num_rows)
                shown = [_shown(photo, known, settings) for photo in storage.read(run)]
                photos += sum(small is not None for small, _ in shown)
                # 48.91, and not its float32's 48.90999984741211.
                price = table["price"].cast(pa.string()).cast(pa.float64())
                table = table.set_column(columns.index("price"), "price", price)
                rows = (
                    (*fields, *photo, json.dumps(hot_of(fields[0])))
                    for fields, photo in zip(
                        zip(*(table[name].to_pylist() for name in columns), strict=True),
                        shown,
                        strict=True,
                    )
                )
                db.executemany("INSERT INTO product VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
                texts = zip(table["product"].to_pylist(), table["title"].to_pylist(), strict=True)
                db.executemany("INSERT INTO words (rowid, title) VALUES (?, ?)", texts)
    db.execute("CREATE UNIQUE INDEX by_id ON product (product_id)")
    db.commit()
    db.close()
    if known:
        known.close()
    return photos


def _write_clicked(ingested: Path, memory_limit: str, out: Path) -> None:
    """The table `clicked`: for each query CLICKED products at most, with their clicks."""
    days = [str(ingested / f"{name}.parquet") for name in ("pairs", "valid_pairs")]
    ids = [str(path) for path in sorted((ingested / "products").glob("part-*.parquet"))]
    texts = str(ingested / "queries.parquet")
    db = sqlite3.connect(out / "products.sqlite")
    db.execute("CREATE TABLE clicked (query TEXT PRIMARY KEY, products TEXT NOT NULL)")
    with open_database(out / "scratch", memory_limit) as con:
        ranked = con.execute(
            """
            WITH pair AS (
                SELECT query, product, sum(clicks)::BIGINT AS clicks
                FROM read_parquet($days) GROUP BY query, product
            ), kept AS (
                SELECT * FROM pair QUALIFY
                    row_number() OVER (PARTITION BY query ORDER BY clicks DESC, product) <= $most
            )
            SELECT text, product_id, kept.clicks
            FROM kept
            JOIN (SELECT query, text FROM read_parquet($texts)) USING (query)
            JOIN (SELECT product, product_id FROM read_parquet($ids)) USING (product)
            ORDER BY text, kept.clicks DESC, product
            """,
            {"days": days, "texts": texts, "ids": ids, "most": CLICKED},
        )
        rows = chain.from_iterable(iter(lambda: ranked.fetchmany(READ_ROWS), []))
        db.executemany(
            "INSERT INTO clicked VALUES (?, ?)",
            (
                (text, json.dumps({name: clicks for _, name, clicks in own}))
                for text, own in groupby(rows, itemgetter(0))
            ),
        )
    db.commit()
    db.close()


def _hot_queries_of(ingested: Path, settings: Settings) -> Callable[[int], list[str]]:
    """Product → texts of the hot queries that the model reads with it."""
    if settings.model.hot_queries == "off":
        return lambda product: []
    texts = pq.read_table(ingested / "queries.parquet", columns=["text"])["text"].combine_chunks()
    lookups = Lookups.open(ingested)
    lists = lookups.product_hot_lists[:, 1]  # of all days before the test day
    return lambda product: texts.take(pa.array(lookups.hot_lists[lists[product]])).to_pylist()


def _shown(
    photo: Photo, known: sqlite3.Connection | None, settings: Settings
) -> tuple[bytes | None, bytes | None]:
    """A photo as it is shown: a JPEG of at most PHOTO_SIDE, `known` or made here, None where it
    cannot be read; and the digest of its bytes."""
    if photo.data is None:
        return None, None
    digest = photo_digest(photo.data).tobytes()
    if known is not None:
        same = "SELECT photo FROM product WHERE product_id = ? AND digest = ?"
        found = known.execute(same, (photo.product_id, digest)).fetchone()
        if found:
            return found[0], digest
    try:
        return small_photo(photo.data, settings.image.max_megapixels), digest
    except BrokenImage:
        return None, digest


def small_photo(data: bytes, max_megapixels: float) -> bytes:
    """JPEG with a longest side of at most PHOTO_SIDE; a small JPEG is kept as it is.

    Raises:
        BrokenImage: `data` is no photo.
    """
    image = decode(data, max_megapixels)
    scale = PHOTO_SIDE / max(image.shape[:2])
    if scale >= 1 and len(data) <= PHOTO_BYTES and data[:2] == b"\xff\xd8":
        return data
    if scale < 1:
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    encoded: Any = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
    return encoded.tobytes()
