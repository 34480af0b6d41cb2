"""The demo's shoppers, search engine and clicks.

* A shopper wants a type and often a colour, a pattern or a brand. Wants are few and skewed
  (Zipf); each is worded in several ways, with synonyms and a few misspellings, so that every day
  brings queries that were never seen before.
* The engine reads titles: it draws candidates from lists it keeps for each type, type with colour
  and type with brand, sorts them by what their titles say, and shows 16. It never looks at the
  whole catalogue, so a search costs the same among a thousand products or a million.
* A click needs a look and a liking: P(click) = look(position) · (liking(product, want) + noise).
  The look falls with the position; the liking sees the product as it is, not as its title says.

All of it is vectorised over a block of searches, which depends on (seed, day, block) only.
"""

import random
from dataclasses import dataclass
from datetime import datetime, time
from functools import lru_cache

import numpy as np
import pyarrow as pa

from acebert.config import DemoSettings
from acebert.data.demo_catalogue import (
    BRANDS,
    KINDS,
    MISSING,
    Catalogue,
    catalogue,
    day,
    product_id,
    skewed,
)
from acebert.data.demo_pictures import COLOURS, PATTERNS

SHOWN = 16
CANDIDATES = 48
BLOCK = 10_000  # searches made at once
WANTS = 4_000
WORDINGS = 8  # ways of wording one want, the first ones much more usual
MISSPELT = 0.04  # share of the searches
EMPTY = 0.001  # share of the searches without any words
ROBOT_SEARCHES = 3  # a day, by one user who clicks everything within a minute
LOOK_POWER = 0.5  # P(look) = position^-power
NOISE = 0.005  # clicks on anything
PURCHASE = 0.08  # share of the clicks that end in one

SCHEMA = pa.schema(
    {
        "search_id": pa.string(),
        "user_id": pa.string(),
        "timestamp": pa.timestamp("ms"),
        "query": pa.dictionary(pa.int32(), pa.string()),
        "product_id": pa.string(),
        "position": pa.int8(),
        "clicked": pa.bool_(),
        "purchased": pa.bool_(),
    }
)

COLOUR_WORDS = {"grey": ("grey", "gray"), "red": ("red", "crimson"), "blue": ("blue", "navy"),
                "purple": ("purple", "violet"), "white": ("white", "ivory")}  # fmt: skip
PATTERN_WORDS = {"plain": ("plain", "solid"), "striped": ("striped", "stripy", "with stripes"),
                 "checked": ("checked", "plaid", "gingham"),
                 "dotted": ("dotted", "polka dot", "with dots")}  # fmt: skip


@dataclass(frozen=True)
class Wants:
    """What shoppers look for, by falling frequency: codes, MISSING where they do not care."""

    kind: np.ndarray
    colour: np.ndarray
    pattern: np.ndarray
    brand: np.ndarray
    frequency: np.ndarray
    """float64 [WANTS], cumulated to 1"""


@lru_cache(maxsize=1)
def wants(seed: int) -> Wants:
    rng = np.random.default_rng([seed, 1])

    def asked(n: int, power: float, share: float) -> np.ndarray:
        codes = rng.choice(n, WANTS, p=skewed(n, power) / skewed(n, power).sum())
        return np.where(rng.random(WANTS) < share, codes, MISSING)

    codes = np.stack(
        [
            asked(len(KINDS), 0.4, 1.0),
            asked(len(COLOURS), 0.3, 0.85),
            asked(len(PATTERNS), 0.2, 0.35),
            asked(len(BRANDS), 0.5, 0.15),
        ]
    )
    # A pattern or a brand is seldom asked among the usual wants, often in the tail.
    picky = (codes[2:] != MISSING).sum(axis=0) + rng.gumbel(0, 1, WANTS)
    kind, colour, pattern, brand = codes[:, np.argsort(picky, kind="stable")]
    frequency = np.cumsum(skewed(WANTS, 0.8) / skewed(WANTS, 0.8).sum())
    return Wants(kind, colour, pattern, brand, frequency)


def draw_wants(seed: int, S: int, rng: np.random.Generator) -> np.ndarray:
    """What S searches are for: codes of kind, colour, pattern and brand, int [S, 4]."""
    want = wants(seed)
    chosen = np.searchsorted(want.frequency, rng.random(S)).clip(max=WANTS - 1)
    return np.stack([want.kind, want.colour, want.pattern, want.brand], axis=1)[chosen]


def wording(want: tuple[int, int, int, int], variant: int, slip: int) -> str:
    """The query for a want (kind, colour, pattern, brand); `slip` > 0 misspells it."""
    rng = random.Random(f"{want}/{variant}")
    kind, colour, pattern, brand = want
    name = rng.choice(list(KINDS.values())[kind].query_words)
    before: list[str] = []
    after: list[str] = []
    if brand != MISSING:
        (before if rng.random() < 0.7 else after).append(BRANDS[brand].lower())
    if colour != MISSING:
        word = list(COLOURS)[colour]
        words = COLOUR_WORDS.get(word, (word,))
        place = rng.random()
        text = words[0] if rng.random() < 0.75 else words[-1]
        before.append(text) if place < 0.8 else after.append(f"in {text}")
    if pattern != MISSING:
        text = rng.choice(PATTERN_WORDS[PATTERNS[pattern]])
        (after if text.startswith("with") else before).append(text)
    query = " ".join([*before, name, *after])
    return _misspell(query, random.Random(f"{query}/{slip}")) if slip else query


def _misspell(query: str, rng: random.Random) -> str:
    """One letter inside a word is dropped, doubled, or swapped with the next."""
    inner = [i for i in range(1, len(query) - 2) if query[i - 1 : i + 3].isalpha()]
    if not inner:
        return query
    i = rng.choice(inner)
    a, b = query[i], query[i + 1]
    return query[:i] + rng.choice((b, a + a + b, b + a)) + query[i + 2 :]


@dataclass(frozen=True)
class Lists:
    """Products by a key, the ones with most appeal first: rows[start[k]:start[k + 1]]."""

    rows: np.ndarray
    start: np.ndarray

    @classmethod
    def by(cls, keys: np.ndarray, n_keys: int, appeal: np.ndarray, listed: np.ndarray) -> "Lists":
        """Of the products with listed[row] True."""
        rows = np.flatnonzero(listed)
        order = np.lexsort((-appeal[rows], keys[rows]))
        counts = np.bincount(keys[rows], minlength=n_keys)
        return cls(rows[order].astype(np.int32), np.concatenate([[0], np.cumsum(counts)]))

    def sample(self, keys: np.ndarray, u: np.ndarray) -> np.ndarray:
        """One product each of the lists `keys` at the quantiles `u` in [0, 1); MISSING where the
        list is empty."""
        size = self.start[keys + 1] - self.start[keys]
        at = self.start[keys] + (u**1.5 * size).astype(np.int64)
        last = max(len(self.rows) - 1, 0)
        return np.where(size > 0, self.rows[np.minimum(at, last)], MISSING)


@dataclass(frozen=True)
class Engine:
    """The inverted lists of one day, over what the titles say."""

    by_kind: Lists
    by_colour: Lists
    by_brand: Lists
    everything: Lists


@lru_cache(maxsize=2)
def engine(settings: DemoSettings, day_number: int) -> Engine:
    cat = catalogue(settings)
    there = cat.listed <= day_number
    kind = cat.kind.astype(np.int64)

    def lists(keys: np.ndarray, n_keys: int, said: np.ndarray) -> Lists:
        return Lists.by(keys, n_keys, cat.appeal, there & said)

    return Engine(
        by_kind=lists(kind, len(KINDS), cat.says_kind | cat.has_category),
        by_colour=lists(
            kind * len(COLOURS) + cat.colour, len(KINDS) * len(COLOURS), cat.says_colour
        ),
        by_brand=lists(kind * len(BRANDS) + cat.brand, len(KINDS) * len(BRANDS), cat.says_brand),
        everything=lists(np.zeros(len(cat), np.int64), 1, np.ones(len(cat), bool)),
    )


def blocks(settings: DemoSettings) -> list[tuple[int, int]]:
    """(day, block) of the whole log, in order of time."""
    a_day = -(-settings.searches_per_day // BLOCK)
    return [(number, block) for number in range(settings.days) for block in range(a_day)]


def impressions(settings: DemoSettings, day_number: int, block: int) -> pa.Table:
    """The impressions (SCHEMA) of up to BLOCK searches of a day, in order of time."""
    rng = np.random.default_rng([settings.seed, 2, day_number, block])
    cat = catalogue(settings)
    first = block * BLOCK
    S = min(BLOCK, settings.searches_per_day - first)
    asked = draw_wants(settings.seed, S, rng)
    shown = _search(engine(settings, day_number), cat, asked, rng)

    robot = np.zeros(S, bool)
    if first + S == settings.searches_per_day and S > 10 * ROBOT_SEARCHES:
        robot[-ROBOT_SEARCHES:] = True
    clicked = rng.random((S, SHOWN)) < click_chances(cat, asked, shown)
    clicked |= robot[:, None]
    purchased = clicked & (rng.random((S, SHOWN)) < PURCHASE) & ~robot[:, None]

    there = shown != MISSING
    search, place = np.nonzero(there)
    position = np.cumsum(there, axis=1)[search, place]
    texts, text = queries(asked, rng)
    return pa.table(
        {
            "search_id": _take([f"{day(day_number)}-{first + s:07d}" for s in range(S)], search),
            "user_id": _take(_users(settings, robot, rng), search),
            "timestamp": pa.array(_times(settings, day_number, first, robot, rng)[search]),
            "query": pa.DictionaryArray.from_arrays(pa.array(text[search]), pa.array(texts)),
            "product_id": pa.array([product_id(int(row)) for row in shown[there]]),
            "position": pa.array(position.astype(np.int8)),
            "clicked": pa.array(clicked[there]),
            "purchased": pa.array(purchased[there]),
        },
        schema=SCHEMA,
    )


def _search(
    lists: Engine, cat: Catalogue, asked: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The engine's answer to `asked` int [S, 4]: product rows int [S, SHOWN], best first, each
    once; MISSING where it ran out."""
    S = len(asked)
    kind, colour, _, brand = (asked[:, [i]] for i in range(4))
    source, u = rng.random((S, CANDIDATES)), rng.random((S, CANDIDATES))
    found = lists.by_kind.sample(np.broadcast_to(kind, u.shape), u)
    by_colour = lists.by_colour.sample(kind * len(COLOURS) + colour.clip(0), u)
    found = np.where((source < 0.20) & (colour != MISSING), by_colour, found)
    by_brand = lists.by_brand.sample(kind * len(BRANDS) + brand.clip(0), u)
    found = np.where((source > 0.75) & (brand != MISSING), by_brand, found)
    stray = lists.everything.sample(np.zeros_like(found), u)
    found = np.where((source > 0.20) & (source < 0.30), stray, found)

    order = np.argsort(found, axis=1, kind="stable")
    in_order = np.take_along_axis(found, order, 1)
    again = np.zeros_like(found, bool)
    np.put_along_axis(again, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], 1)
    out = again | (found == MISSING)

    _, colour_fits, pattern_fits, brand_fits = _fits(cat, asked, found)
    score = (
        0.7 * (cat.says_colour[found] & colour_fits & (colour != MISSING))
        + 1.0 * (cat.says_pattern[found] & pattern_fits & (asked[:, [2]] != MISSING))
        + 1.5 * (cat.says_brand[found] & brand_fits & (brand != MISSING))
        + 1.0 * (cat.says_kind[found] & (cat.kind[found] == kind))
        + cat.appeal[found]
        + rng.gumbel(0, 1, found.shape)  # the rest of what an engine goes by
    )
    score[out] = -np.inf
    best = np.argsort(-score, axis=1, kind="stable")[:, :SHOWN]
    return np.take_along_axis(np.where(out, MISSING, found), best, 1)


def _fits(
    cat: Catalogue, asked: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Whether kind, colour, pattern and brand of `rows` int [S, C] are as asked, or not asked."""
    attributes = (cat.kind, cat.colour, cat.pattern, cat.brand)
    kind, colour, pattern, brand = (
        (asked[:, [i]] == MISSING) | (values[rows] == asked[:, [i]])
        for i, values in enumerate(attributes)
    )
    return kind, colour, pattern, brand


def click_chances(cat: Catalogue, asked: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """P(click) of the products `rows` int [S, C] of a list, best first, float [S, C]."""
    look = np.arange(1, rows.shape[1] + 1) ** -LOOK_POWER
    return look * (liking(cat, asked, rows) + NOISE)


def liking(cat: Catalogue, asked: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """P(click | look) without the noise, float [S, C]: the product's appeal, times a factor for
    each thing asked that it is not. Rows MISSING get some value."""
    kind, colour, pattern, brand = _fits(cat, asked, rows)
    return (
        0.9
        * cat.appeal[rows]
        * np.where(kind, 1, 0.03)
        * np.where(colour, 1, 0.05)
        * np.where(pattern, 1, 0.15)
        * np.where(brand, 1, 0.2)
    )


def queries(asked: np.ndarray, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Distinct texts, and the one of each search (int32)."""
    S = len(asked)
    usual = skewed(WORDINGS, 1.5)
    variant = rng.choice(WORDINGS, S, p=usual / usual.sum())
    slip = np.where(rng.random(S) < MISSPELT, rng.integers(1, 10, S), 0)
    silent = rng.random(S) < EMPTY
    keys = np.column_stack([asked, variant, slip, silent])
    distinct, which = np.unique(keys, axis=0, return_inverse=True)
    texts: dict[str, int] = {}
    code = np.empty(len(distinct), np.int32)
    for i, (kind, colour, pattern, brand, v, s, quiet) in enumerate(distinct.tolist()):
        text = "" if quiet else wording((kind, colour, pattern, brand), v, s)
        code[i] = texts.setdefault(text, len(texts))
    return list(texts), code[which.ravel()]


def shoppers(n: int, S: int, rng: np.random.Generator) -> np.ndarray:
    """Who of n shoppers makes each of S searches: most search a few times, some often; int [S]."""
    return (n * rng.random(S) ** 1.5).astype(int)


def _users(settings: DemoSettings, robot: np.ndarray, rng: np.random.Generator) -> list[str]:
    n = max(10, settings.searches_per_day)
    rank = shoppers(n, len(robot), rng)
    return ["robot" if bad else f"u{r:06d}" for r, bad in zip(rank.tolist(), robot, strict=True)]


def _times(
    settings: DemoSettings,
    day_number: int,
    first: int,
    robot: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """datetime64[ms] of each search, ascending, in the block's share of its day. The robot comes
    last, all in one minute."""
    midnight = np.datetime64(datetime.combine(day(day_number), time()), "ms")
    a_day = 24 * 60 * 60 * 1000
    share = (np.array([first, first + len(robot)]) * a_day) // settings.searches_per_day
    at = np.sort(rng.integers(share[0], share[1], len(robot)))
    at[robot] = share[1] - 60_000 + np.arange(robot.sum()) * 10_000
    return midnight + np.sort(at).astype("timedelta64[ms]")


def _take(values: list[str], index: np.ndarray) -> pa.Array:
    return pa.array(values).take(pa.array(index))
