"""What the demo's products are, before anything is drawn or searched.

All attributes of all products are a few NumPy arrays, drawn in one go from the seed: every process
can make them again, and a million products take well under a second. What a title says is drawn
here too, because the demo's search engine reads titles and nothing else.
"""

from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache

import numpy as np

from acebert.config import DemoSettings
from acebert.data.demo_pictures import BACKGROUNDS, COLOURS, PATTERNS

FIRST_DAY = date(2026, 1, 1)
MISSING = -1


@dataclass(frozen=True)
class Kind:
    """A product type: its place in the catalogue and what merchants and shoppers call it."""

    path: str
    title_words: tuple[str, ...]
    query_words: tuple[str, ...]
    price: float


KINDS: dict[str, Kind] = {
    "shirt": Kind("Clothing > Tops", ("Shirt", "Camp Shirt"), ("shirt", "button up", "tee"), 29),
    "shoe": Kind("Footwear > Casual", ("Sneaker", "Shoe"), ("shoes", "sneakers", "trainers"), 69),
    "dress": Kind("Clothing > Dresses", ("Dress", "Midi Dress"), ("dress", "gown", "frock"), 59),
    "bag": Kind("Accessories > Bags", ("Handbag", "Satchel"), ("bag", "handbag", "purse"), 79),
    "trousers": Kind("Clothing > Bottoms", ("Trousers", "Chinos"), ("trousers", "pants"), 49),
    "mug": Kind("Home > Kitchen", ("Mug", "Coffee Mug"), ("mug", "cup", "coffee cup"), 12),
    "boot": Kind("Footwear > Boots", ("Boot", "Lace Boot"), ("boots", "winter boots"), 99),
    "lamp": Kind("Home > Lighting", ("Table Lamp", "Lamp"), ("lamp", "bedside light"), 39),
    "watch": Kind("Accessories > Watches", ("Watch", "Wristwatch"), ("watch", "wrist watch"), 119),
    "chair": Kind("Home > Furniture", ("Chair", "Dining Chair"), ("chair", "kitchen chair"), 89),
    "hat": Kind("Accessories > Hats", ("Hat", "Fedora"), ("hat", "fedora"), 25),
    "glasses": Kind(
        "Accessories > Eyewear", ("Sunglasses", "Shades"), ("sunglasses", "shades", "glasses"), 35
    ),
}  # fmt: skip
BRANDS = (
    "Alder", "Norvik", "Calluna", "Brisa", "Tamsin", "Ostra", "Kestrel", "Lumen", "Pallas",
    "Quill", "Rowan", "Sable", "Tidewater", "Umbra", "Velden", "Wren",
)  # fmt: skip
LINES = (
    "Classic", "Everyday", "Harbour", "Studio", "Weekend", "Heritage", "City", "Meadow", "Nord",
    "Atlas", "Signature", "Essential", "Coast", "Monday", "Field", "Terrace",
)  # fmt: skip


@dataclass(frozen=True)
class Catalogue:
    """Arrays of one value a product; codes index the tuples above, MISSING (-1) is none."""

    kind: np.ndarray
    colour: np.ndarray
    pattern: np.ndarray
    brand: np.ndarray
    background: np.ndarray
    says_kind: np.ndarray
    """bool: the title says it; likewise below"""
    says_colour: np.ndarray
    says_pattern: np.ndarray
    says_brand: np.ndarray
    appeal: np.ndarray
    """float32 in (0, 1]: what shoppers who see it think of it"""
    listed: np.ndarray
    """int32: days after FIRST_DAY, negative for what was there before"""
    has_image: np.ndarray
    broken: np.ndarray
    """bool: the photo's bytes are damaged"""
    has_category: np.ndarray
    has_title: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)


@lru_cache(maxsize=1)
def catalogue(settings: DemoSettings) -> Catalogue:
    """The demo's products. Six percent are new on the last two days, some of them have no photo,
    no title or no category, and at least one photo is broken."""
    rng = np.random.default_rng([settings.seed, 0])
    n = settings.products

    def codes(shares: np.ndarray) -> np.ndarray:
        return rng.choice(len(shares), n, p=shares / shares.sum()).astype(np.int8)

    def true(share: float) -> np.ndarray:
        return rng.random(n) < share

    pattern = codes(np.array([55, 18, 14, 13]))
    has_image = true(0.98)
    broken = np.zeros(n, bool)
    photos = np.flatnonzero(has_image)
    broken[rng.choice(photos, max(1, n // 500), replace=False)] = True
    listed = -rng.integers(1, 700, n, dtype=np.int32)
    new = true(0.06)
    listed[new] = settings.days - 1 - rng.integers(0, 2, n, dtype=np.int32)[new]
    return Catalogue(
        kind=codes(skewed(len(KINDS), 0.4)),
        colour=codes(skewed(len(COLOURS), 0.3)),
        pattern=pattern,
        brand=codes(skewed(len(BRANDS), 0.5)),
        background=codes(np.array([45, 30, 25])),
        says_kind=true(0.92),
        says_colour=true(0.5),
        says_pattern=true(0.4) & (pattern > 0),  # nobody writes 'plain'
        says_brand=true(0.85),
        appeal=rng.beta(4, 2, n).astype(np.float32),
        listed=listed,
        has_image=has_image,
        broken=broken,
        has_category=true(0.97),
        has_title=true(0.99),
    )


def skewed(n: int, power: float) -> np.ndarray:
    """Zipf's weights (r + 1)^-power of ranks r = 0 … n-1, float64 [n]."""
    return np.arange(1, n + 1) ** -power


def product_id(row: int) -> str:
    return f"P{row:07d}"


def titles(cat: Catalogue, rows: range, rng: np.random.Generator) -> list[str]:
    """Titles as the merchant wrote them: brand, line, and each attribute only if it 'says' it."""
    kinds, colours = list(KINDS.values()), list(COLOURS)
    line = rng.integers(0, len(LINES), len(rows))
    word = rng.random(len(rows))
    out = []
    for i, row in enumerate(rows):
        if not cat.has_title[row]:
            out.append("")
            continue
        names = kinds[cat.kind[row]].title_words
        parts = [
            BRANDS[cat.brand[row]] if cat.says_brand[row] else "",
            LINES[line[i]],
            colours[cat.colour[row]].capitalize() if cat.says_colour[row] else "",
            PATTERNS[cat.pattern[row]].capitalize() if cat.says_pattern[row] else "",
            names[int(word[i] * len(names))] if cat.says_kind[row] else "",
        ]
        out.append(" ".join(part for part in parts if part))
    return out


def day(number: int) -> date:
    """Day `number` of the log, from 0."""
    return FIRST_DAY + timedelta(days=number)


def background(cat: Catalogue, row: int) -> str:
    return BACKGROUNDS[cat.background[row]]
