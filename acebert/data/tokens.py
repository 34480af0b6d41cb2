"""Titles and queries as word pieces, tokenised once and memory-mapped from then on.

The vocabulary is the backbone's, or a WordPiece vocabulary trained on the catalogue's titles and
the queries clicked on training days: words of validation and test days stay out of it.
"""

import hashlib
import json
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from acebert.config import Settings
from acebert.errors import UserError
from acebert.workdir import Stage, run_stage

log = logging.getLogger(__name__)

VERSION = 3
BATCH = 10_000  # texts tokenised at a time
MAX_CHARACTERS = 1000  # in a vocabulary trained here
SPECIAL = ("cls", "sep", "pad", "mask")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Ragged:
    """Rows of different length in one flat array: row r is `values[offsets[r]:offsets[r + 1]]`.

    Attributes:
        values: int32 [total]
        offsets: int64 [rows + 1]
    """

    values: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def lengths(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Lengths of `rows` [B] → int64 [B]."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def take(self, rows: NDArray[np.integer]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Values of `rows`, one after the other, int32 [sum of lengths], and lengths, int64 [B]."""
        lengths = self.lengths(rows)
        return self.values[ranges(self.offsets[rows], lengths)], lengths

    def save(self, directory: Path, name: str) -> None:
        np.save(directory / f"{name}.ids.npy", self.values)
        np.save(directory / f"{name}.offsets.npy", self.offsets)

    @classmethod
    def load(cls, directory: Path, name: str) -> "Ragged":
        """Memory-maps what `save` wrote."""
        return cls(
            np.load(directory / f"{name}.ids.npy", mmap_mode="r", allow_pickle=False),
            np.load(directory / f"{name}.offsets.npy", mmap_mode="r", allow_pickle=False),
        )

    @classmethod
    def from_rows(cls, rows: Iterable[list[int]]) -> "Ragged":
        lists = list(rows)
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(row) for row in lists], out=offsets[1:])
        values = np.fromiter((v for row in lists for v in row), np.int32, int(offsets[-1]))
        return cls(values, offsets)


def ranges(starts: NDArray[np.integer], lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """[s0, s0+1, … (l0 of them), s1, s1+1, … (l1 of them), …], int64."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def tokenize(settings: Settings, ingested: Stage, tokenizer_dir: Path | None = None) -> Stage:
    """The 'tokens' stage: titles and queries in word pieces (docs/architecture.md, tokens).

    Args:
        tokenizer_dir: a trained model's, whose vocabulary no other can stand in for, or that of
            `vocabulary`; none: the backbone's, or one trained on this catalogue

    Raises:
        UserError: the tokenizer cannot be loaded, or is no WordPiece one.
    """
    source = tokenizer_dir or settings.model.backbone or vocabulary(settings, ingested).path
    tokenizer = load_tokenizer(source)
    key = {
        "version": VERSION,
        "ingest": ingested.digest,
        "title_tokens": settings.text.title_tokens,
        "query_tokens": settings.text.query_tokens,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    }

    def build(out: Path) -> None:
        tokenizer.save_pretrained(out / "tokenizer")
        titles = _tokenise_all(_titles(ingested), tokenizer, settings.text.title_tokens)
        titles.save(out, "titles")
        queries = pq.read_table(ingested.path / "queries.parquet", columns=["text"])["text"]
        encoded = _tokenise_all(_batches(queries), tokenizer, settings.text.query_tokens)
        encoded.save(out, "queries")
        unknown = float(np.mean(encoded.values == tokenizer.unk_token_id)) if len(queries) else 0.0
        log.info(
            "tokens: %d titles (%.1f word pieces), %d queries (%.1f), vocabulary %d, "
            "%.2f %% of the queries' pieces unknown",
            len(titles),
            len(titles.values) / max(1, len(titles)),
            len(encoded),
            len(encoded.values) / max(1, len(encoded)),
            len(tokenizer),
            100 * unknown,
        )

    return run_stage(settings.workdir, "tokens", key, build)


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerFast:
    """The fast WordPiece tokenizer of a model directory or hub name.

    Raises:
        UserError: it is not there, or has no [CLS], [SEP], [PAD] and [MASK].
    """
    try:
        loaded = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model.backbone {directory}: no tokenizer could be loaded from there, neither as a "
            f"local directory nor from the model hub: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise UserError(f"--model.backbone {directory}: its tokenizer is not a fast (Rust) one")
    tokenizer: PreTrainedTokenizerFast = loaded
    tokenizer.backend_tokenizer.no_padding()  # some models' files ask for it
    tokenizer.backend_tokenizer.no_truncation()
    known = tokenizer.get_added_vocab()
    for token in map(_special, SPECIAL):
        if token not in known:
            raise UserError(f"--model.backbone {directory}: its tokenizer has no {token}")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], max_tokens: int) -> Ragged:
    """Word pieces of `texts` without special tokens, at most `max_tokens` each."""
    backend = tokenizer.backend_tokenizer
    return Ragged.from_rows(
        encoding.ids[:max_tokens]
        for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
    )


def backbone_digest(name: str) -> Any:
    """What identifies start weights: the hub name, or digests of a directory's files, whenever
    they were put there."""
    directory = Path(name)
    if not directory.is_dir():
        return name
    files = sorted(p for p in directory.glob("*") if p.suffix in {".json", ".safetensors", ".txt"})
    return [[p.name, _digest(p, p.stat().st_size, p.stat().st_mtime_ns)] for p in files]


@cache
def _digest(path: Path, size: int, time_ns: int) -> str:
    """SHA-256 of a file; a process that asks again for one of this size and time reads nothing."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def vocabulary(settings: Settings, ingested: Stage) -> Stage:
    """The 'vocabulary' stage: a tokenizer trained on the catalogue."""
    size = settings.text.vocab_size
    key = {"version": VERSION, "ingest": ingested.digest, "vocab_size": size}

    def build(out: Path) -> None:
        train_wordpiece(_vocabulary_texts(ingested), size).save_pretrained(out)

    return run_stage(settings.workdir, "vocabulary", key, build)


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer trained on `texts`, lower-casing as bert-base-uncased does.

    The same texts give the same vocabulary. The trainer settles ties by ids, which it hands out to
    the characters within words in the random order of a hash map, unless they are there before: so
    they are given as special tokens, in the order of their code points, and made ordinary ones
    afterwards.
    """
    from tokenizers.implementations import BertWordPieceTokenizer

    trained = BertWordPieceTokenizer(lowercase=True)
    normalizer, splitter = trained.normalizer, trained.pre_tokenizer
    words = Counter(
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    frequent = sorted(characters, key=lambda c: (-characters[c], c))[:MAX_CHARACTERS]
    within = sorted({c for word in words for c in word[1:]}.intersection(frequent))
    trained.train_from_iterator(
        chain.from_iterable(repeat(word, count) for word, count in words.items()),
        vocab_size=vocab_size,
        min_frequency=2,
        limit_alphabet=len(frequent),
        initial_alphabet=sorted(frequent),
        special_tokens=[*SPECIAL_TOKENS, *(f"##{character}" for character in within)],
        show_progress=False,
    )
    ordinary = BertWordPieceTokenizer(vocab=trained.get_vocab(), lowercase=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=ordinary._tokenizer,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
    )


def _vocabulary_texts(ingested: Stage) -> Iterator[str]:
    for titles in _titles(ingested):
        yield from titles
    queries = pq.read_table(ingested.path / "queries.parquet", filters=[("clicks", ">", 0)])
    yield from queries.sort_by("query")["text"].to_pylist()


def _titles(ingested: Stage) -> Iterator[list[str]]:
    """Titles in the order of product rows."""
    parts = sorted((ingested.path / "products").glob("part-*.parquet"))
    scanner = ds.dataset(parts).scanner(columns=["product", "title"], batch_size=BATCH)
    expected = 0
    for batch in scanner.to_batches():
        products = batch["product"].to_numpy()
        if not np.array_equal(products, np.arange(expected, expected + len(products))):
            raise RuntimeError(f"{ingested.path}/products: rows are not in order")
        expected += len(products)
        yield batch["title"].to_pylist()


def _batches(texts: pa.ChunkedArray) -> Iterator[list[str]]:
    for start in range(0, len(texts), BATCH):
        yield texts.slice(start, BATCH).to_pylist()


def _tokenise_all(
    batches: Iterable[list[str]], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> Ragged:
    parts = deque(encode(tokenizer, batch, max_tokens) for batch in batches)
    lengths = np.concatenate([np.diff(part.offsets) for part in parts] or [np.zeros(0, np.int64)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values, end = np.empty(offsets[-1], np.int32), 0
    while parts:  # each goes when it is copied, or memory would hold all twice
        part = parts.popleft().values
        values[end : end + len(part)] = part
        end += len(part)
    return Ragged(values, offsets)


def special_ids(tokenizer_dir: Path) -> dict[str, int]:
    """cls, sep, pad and mask ids without loading transformers' tokenizer classes."""
    tokenizer = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    return {name: ids[_special(name)] for name in SPECIAL}


def _special(name: str) -> str:
    return f"[{name.upper()}]"
