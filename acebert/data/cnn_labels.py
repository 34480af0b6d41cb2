"""What a photo shows, as far as the catalogue says: its category, and words as tags.

    labels = PhotoLabels(label_photos(settings, ingested, crops).path)

* A tag is a frequent word of titles and of queries that were clicked on training days. No other
  day's queries are read.
* A word of the title is there: 1. A word of n clicks' queries is there with n/(n + 1): a click may
  be a mistake (docs/decisions.md, 'Patch CNN').
* Words that neither names are unknown, not absent; a product that nothing names has no word labels.
* Which photos are held out is told by their own bytes: equal photos are on one side, and the same
  ones in every run.
* Products whose titles pre-training holds out train no CNN: its features would know their words.
* DuckDB joins and counts, so the log may be larger than memory; a product takes some 60 bytes.
"""

import json
import logging
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
from bm25s.stopwords import STOPWORDS_EN
from numpy.typing import NDArray
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from acebert.config import Settings
from acebert.data.database import feed, open_database, read
from acebert.data.features import read_shard_list
from acebert.data.held_out import held_out as held_out_titles
from acebert.data.held_out import title_hashes
from acebert.data.tokens import Ragged, ranges
from acebert.errors import UserError
from acebert.workdir import Stage, run_stage

log = logging.getLogger(__name__)

VERSION = 2
MIN_HELD_OUT = 2
BATCH = 10_000  # texts cut in words at a time
WORDS = pa.schema([("row", pa.int32()), ("word", pa.string())])


class PhotoLabels:
    """The labels of all products, memory-mapped.

    Attributes:
        train, held_out: products to train and to measure on, int64, ascending: those with a photo
            and a label
        category: int32 [products], -1 where there is none
        categories: their names [C]; one of them alone is no label, and the list is empty then
        words: tags of each product (row = product)
        tags: their words [T], the most frequent first
        tag_products: products that each tag is named for, int64 [T]
    """

    def __init__(self, directory: Path) -> None:
        def mapped(name: str) -> NDArray:
            return np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)

        self.train, self.held_out = mapped("train"), mapped("held_out")
        self.category: NDArray[np.int32] = mapped("category")
        self.words = Ragged.load(directory, "words")
        self._target: NDArray[np.float32] = mapped("words.target")
        self.categories: list[str] = json.loads((directory / "categories.json").read_text())
        tags = pq.read_table(directory / "tags.parquet")
        self.tags: list[str] = tags["word"].to_pylist()
        self.tag_products: NDArray[np.int64] = tags["products"].to_numpy()

    def tag_targets(self, products: NDArray[np.integer]) -> NDArray[np.float32]:
        """How surely each tag is there, 0 where nothing names it: [B] → float32 [B, T]."""
        out = np.zeros((len(products), len(self.tags)), np.float32)
        values, lengths = self.words.take(products)
        rows = np.repeat(np.arange(len(products)), lengths)
        out[rows, values] = self._target[ranges(self.words.offsets[products], lengths)]
        return out

    def named_in_title(self, products: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which tags the titles name: [B] → [B, T]."""
        return self.tag_targets(products) == 1

    def words_per_product(self) -> float:
        """Mean sum of the targets of a product that has any."""
        named = int((np.diff(self.words.offsets) > 0).sum())
        return float(self._target.sum(dtype=np.float64)) / max(1, named)


def label_photos(settings: Settings, ingested: Stage, crops: Stage) -> Stage:
    """The stage 'cnn_labels' (docs/architecture.md); `crops` is a 'features' stage with JPEGs.

    Raises:
        UserError: there is no label to learn from, or hardly a photo.
    """
    own = settings.cnn
    key = {
        "version": VERSION,
        "ingest": ingested.digest,
        "crops": crops.digest,
        **own.model_dump(include={"tags", "tag_products", "held_out"}),
        "titles_held_out": settings.pretrain.held_out,
    }
    return run_stage(
        settings.workdir, "cnn_labels", key, lambda out: _build(settings, ingested, crops, out)
    )


def _build(settings: Settings, ingested: Stage, crops: Stage, out: Path) -> None:
    own = settings.cnn
    category, categories = _categories(ingested)
    n = len(category)
    with open_database(out / "scratch", settings.data.memory_limit) as con:
        tags = _write_words(con, ingested, own.tags, own.tag_products, n, out)
    if not categories and not len(tags):
        raise UserError(
            f"{ingested.path}: nothing to train the patch CNN on: fewer than two categories, and "
            f"no word names {own.tag_products} products (--cnn.tag_products), or --cnn.tags is 0. "
            "--image.cnn_weights takes hub, random or a file too"
        )
    np.save(out / "category.npy", category)
    (out / "categories.json").write_text(json.dumps(categories, ensure_ascii=False) + "\n")
    pq.write_table(tags, out / "tags.parquet")

    has_photo, drawn = _photos(crops.path, n)
    words = Ragged.load(out, "words")
    labelled = has_photo & ((category >= 0) | (np.diff(words.offsets) > 0))
    held_out = np.flatnonzero(labelled & (drawn < own.held_out))
    unread = held_out_titles(title_hashes(ingested.path), settings.pretrain.held_out)
    train = np.flatnonzero(labelled & (drawn >= own.held_out) & ~unread)
    if len(held_out) < MIN_HELD_OUT or not len(train):
        raise UserError(
            f"{ingested.path}: {labelled.sum():,} products have a photo and a label, "
            f"{len(held_out)} of them held out by --cnn.held_out {own.held_out}: too few to train "
            "and to measure the patch CNN on"
        )
    np.save(out / "train.npy", train)
    np.save(out / "held_out.npy", held_out)
    report = {
        "train": len(train),
        "held_out": len(held_out),
        "categories": len(categories),
        "tags": len(tags),
        "without_category": int((category < 0).sum()),
        "without_words": int((np.diff(words.offsets) == 0).sum()),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    log.info(
        "cnn_labels: %s photos to train on and %s to measure on, %d categories, %d words (%s, …)",
        f"{len(train):,}",
        f"{len(held_out):,}",
        len(categories),
        len(tags),
        ", ".join(tags["word"].to_pylist()[:6]),
    )


def _categories(ingested: Stage) -> tuple[NDArray[np.int32], list[str]]:
    """Category of each product, int32 [products] with -1 for none, and the names."""
    table = ds.dataset(_parts(ingested)).to_table(columns=["category", "category_code"])
    code = table["category_code"].to_numpy()
    known = table["category"].is_valid().to_numpy()
    names = table["category"].drop_null().unique().sort().to_pylist()  # ingest codes them so
    if len(names) < 2:
        return np.full(len(code), -1, np.int32), []
    return np.where(known, code, -1).astype(np.int32), names


def _write_words(
    con: duckdb.DuckDBPyConnection, ingested: Stage, tags: int, least: int, n: int, out: Path
) -> pa.Table:
    """Write the Ragged `words` and `words.target.npy`; returns tag, word, products a tag."""
    for table, texts in (("title_words", _titles(ingested)), ("query_words", _queries(ingested))):
        feed(con, f"CREATE TABLE {table} AS FROM incoming", _words(texts), WORDS)
    con.register("pairs", ds.dataset(ingested.path / "pairs.parquet"))
    con.sql(_NAMED)
    con.sql(_TAGS.format(least=least, tags=tags))
    rows = read(con, _PRODUCT_TAGS)
    per_product = np.bincount(rows["product"].to_numpy(), minlength=n)
    offsets = np.concatenate([[0], np.cumsum(per_product)])
    Ragged(rows["tag"].to_numpy(), offsets).save(out, "words")
    np.save(out / "words.target.npy", rows["target"].to_numpy())
    return read(con, "SELECT tag, word, products FROM tags ORDER BY tag")


_NAMED = """
CREATE TABLE named AS
SELECT product, word, max(target) AS target FROM (
    SELECT row AS product, word, 1.0 AS target FROM title_words
    UNION ALL
    SELECT product, word, sum(clicks) / (sum(clicks) + 1) AS target
    FROM pairs JOIN query_words ON pairs.query = query_words.row
    GROUP BY product, word
) GROUP BY product, word
"""

_TAGS = """
CREATE TABLE tags AS
SELECT CAST(row_number() OVER (ORDER BY products DESC, word) - 1 AS INTEGER) AS tag, *
FROM (SELECT word, count(*) AS products FROM named GROUP BY word HAVING count(*) >= {least})
ORDER BY tag LIMIT {tags}
"""

_PRODUCT_TAGS = """
SELECT product, tag, CAST(target AS REAL) AS target
FROM named JOIN tags USING (word) ORDER BY product, tag
"""


def _titles(ingested: Stage) -> Iterator[pa.RecordBatch]:
    scanner = ds.dataset(_parts(ingested)).scanner(columns=["product", "title"], batch_size=BATCH)
    yield from scanner.to_batches()


def _queries(ingested: Stage) -> Iterator[pa.RecordBatch]:
    """Those that were clicked on training days."""
    yield from (
        ds.dataset(ingested.path / "queries.parquet")
        .scanner(columns=["query", "text"], filter=ds.field("clicks") > 0, batch_size=BATCH)
        .to_batches()
    )


def _parts(ingested: Stage) -> list[Path]:
    return sorted((ingested.path / "products").glob("part-*.parquet"))


def _words(texts: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Rows and texts → their words, each once a row."""
    for batch in texts:
        found = [words_of(text) for text in batch[1].to_pylist()]
        rows = np.repeat(batch[0].to_numpy(), [len(words) for words in found])
        flat = pa.array([word for words in found for word in words], pa.string())
        yield pa.record_batch([pa.array(rows, pa.int32()), flat], schema=WORDS)


def words_of(text: str) -> list[str]:
    """Distinct words in lower case, cut as BERT's tokenizers cut them (a Chinese character is one),
    without numbers, single letters, punctuation and English stop words."""
    plain = BertNormalizer(lowercase=True, strip_accents=False).normalize_str(
        unicodedata.normalize("NFKC", text)
    )
    cut = [word for word, _ in BertPreTokenizer().pre_tokenize_str(plain)]
    return [word for word in dict.fromkeys(cut) if _tells_something(word)]


def _tells_something(word: str) -> bool:
    if word in STOPWORDS_EN or not word.isalpha():
        return False
    return len(word) > 1 or unicodedata.category(word) == "Lo"  # a script without upper case


def _photos(crops: Path, n: int) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Of each product: whether it has a photo, and a number in [0, 1) drawn by its bytes."""
    has_photo, drawn = np.zeros(n, bool), np.zeros(n)
    for shard in read_shard_list(crops)["shards"]:
        batch = ipc.open_file(pa.memory_map(str(crops / shard["file"]))).get_batch(0)
        products = batch["product"].to_numpy()
        has_photo[products] = batch["has_image"].to_numpy().astype(bool)
        sums = [zlib.crc32(jpeg.as_buffer()) for jpeg in batch["pixels"]]
        drawn[products] = np.array(sums) / 2.0**32
    return has_photo, drawn
