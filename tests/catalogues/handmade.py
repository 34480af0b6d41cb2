"""A catalogue made by hand, as the stages before training leave it on disk.

Product p's title is one word of its own, repeated; its photo is one colour. So whatever a batch
made of them, a row tells which product's title and which product's photo it has.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from acebert.data.features import Shard, write_shard, write_shard_list
from acebert.data.tokens import Ragged, train_wordpiece
from acebert.models.pretraining import PretrainInputs
from acebert.training.pairs import StagePaths

PRODUCTS, QUERIES, CATEGORIES = 160, 40, 8
REPEATS = 12  # of a query's word, and of a title's at most
D1, SIDE = 8, 7
TWINS = {21: 20, 22: 20, 60: 40, 100: 40}
"""product → the product whose photo is the same"""
NO_PHOTO, NO_TITLE, SAME_TITLE = (5, 15, 95), (7,), (30, 31, 32)


def category(products: np.ndarray) -> np.ndarray:
    return np.asarray(products) % CATEGORIES


def picture(products: np.ndarray) -> np.ndarray:
    """What a product's photo shows: a number of 1 … 255."""
    return 1 + np.array([TWINS.get(int(p), int(p)) for p in np.atleast_1d(products)])


def build(root: Path) -> StagePaths:
    products = np.arange(PRODUCTS)
    titles = [[_title(p)] * repeats(p) for p in range(PRODUCTS)]
    colour = np.where(np.isin(products, NO_PHOTO), 0, picture(products))
    return _write(root, [f"w{i}" for i in range(PRODUCTS + QUERIES)], titles, colour)


COLOURS, SHAPES = 8, 40


def build_coloured(root: Path) -> StagePaths:
    """Products whose titles say a shape, a thing and a colour, a word each; the photo shows the
    colour and nothing else. A title is of any category."""
    rng = np.random.default_rng(0)
    shape, thing = rng.integers(SHAPES, size=(2, PRODUCTS))
    colour = rng.integers(COLOURS, size=PRODUCTS)
    words = [f"w{i}" for i in range(2 * SHAPES + COLOURS + QUERIES)]
    titles = np.stack([shape, SHAPES + thing, 2 * SHAPES + colour], axis=1)
    return _write(root, words, titles.tolist(), 1 + colour * (255 // COLOURS))


def _write(root: Path, words: list[str], titles: list[list[int]], colour: np.ndarray) -> StagePaths:
    """`titles` in numbers of `words`, whose last are the queries; `colour` 0 is no photo."""
    for name in ("ingest/products", "tokens", "features"):
        (root / name).mkdir(parents=True)
    tokenizer = train_wordpiece([word for word in words for _ in range(5)], vocab_size=2000)
    tokenizer.save_pretrained(root / "tokens" / "tokenizer")
    ids = [tokenizer.get_vocab()[word] for word in words]
    Ragged.from_rows([[ids[i] for i in title] for title in titles]).save(root / "tokens", "titles")
    queries = [[word] * REPEATS for word in ids[-QUERIES:]]
    Ragged.from_rows(queries).save(root / "tokens", "queries")
    (root / "ids.txt").write_text(" ".join(map(str, ids)))

    products = np.arange(PRODUCTS)
    ingest = root / "ingest"
    columns = {
        "product": pa.array(products, pa.int32()),
        "title": [" ".join(words[i] for i in dict.fromkeys(title)) for title in titles],
        "category": [f"c{code}" for code in category(products)],
        "category_code": pa.array(category(products), pa.int32()),
    }
    pq.write_table(pa.table(columns), ingest / "products" / "part-00000.parquet")
    clicks = [q % 4 for q in range(QUERIES)]  # every fourth was never clicked in training
    pq.write_table(
        pa.table({"query": pa.array(range(QUERIES), pa.int32()), "clicks": clicks}),
        ingest / "queries.parquet",
    )
    (ingest / "lookups").mkdir()
    for name in ("pair_hot_list", "product_hot_lists", "product_pairs"):
        np.save(ingest / "lookups" / f"{name}.npy", np.zeros(1, np.int32))
    for name in ("clicked", "hot_lists"):
        Ragged.from_rows([[0]]).save(ingest / "lookups", name)

    has_image = colour > 0
    patches = np.random.default_rng(0).random((256, 16, D1))[colour] * 3 * has_image[:, None, None]
    pixels = np.broadcast_to(colour[:, None, None, None], (PRODUCTS, SIDE, SIDE, 3))
    shard = Shard(
        products.astype(np.int32),
        has_image,
        np.zeros((PRODUCTS, 4), np.int32),
        patches.astype(np.float16),
        np.ascontiguousarray(pixels, np.uint8),
    )
    entry = write_shard(root / "features", "part-0.arrow", shard)
    write_shard_list(root / "features", [entry], D1, SIDE)
    return StagePaths(ingest, root / "tokens", root / "features")


def repeats(product: int) -> int:
    """Words of a title: 6 to 12, of its own for each product."""
    return 0 if product in NO_TITLE else REPEATS - _title(product) % 7


def _title(product: int) -> int:
    return SAME_TITLE[0] if product in SAME_TITLE else product


def titles_of(paths: StagePaths, inputs: PretrainInputs) -> np.ndarray:
    """The product whose title a row has (the first, where products share it), or PRODUCTS + the
    query's row: the word that is there most often, for 15 % of them at most are masked."""
    ids = [int(word) for word in (paths.tokens.parent / "ids.txt").read_text().split()]
    number = {word: i for i, word in enumerate(ids)}
    return np.array(
        [
            Counter(number[int(i)] for i in row[mask] if int(i) in number).most_common(1)[0][0]
            for row, mask in zip(inputs.text.input_ids, inputs.text.attention_mask, strict=True)
        ]
    )


def pictures_of(inputs: PretrainInputs) -> np.ndarray:
    """What the photo of a row shows, or 0."""
    assert inputs.image is not None
    assert inputs.image.pixels is not None
    shown = inputs.image.pixels[inputs.photo, 0, 0, 0]
    return torch.where(inputs.has_photo, shown, 0).numpy().astype(int)
