"""Which pairs make which mini-batch: mixed negative sampling (paper section 4.3, Fig. 4) as plain
arithmetic on numpy arrays.

    deal      position → pair      a keyed permutation of [0, n): consecutive positions are a
                                   random sample, so partitions are runs of positions
    cluster   within a partition   sort by (keyed rank of the category, position)
    cut       every W in a row     one mini-batch
    shuffle   step → batch         a random permutation of the batches of the epoch

The deal is a format-preserving cipher, computed pair by pair: partitions have exact sizes, and any
one of them is made without looking at the others, on whatever machine. All randomness comes from
(seed, epoch).

n pairs, W pairs in a mini-batch, P partitions, C categories.
"""

from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from acebert.errors import UserError

UInts = NDArray[np.uint64]
Ints = NDArray[np.int64]

PAPER_BATCHES_PER_PARTITION = 65
"""25 M pairs in 1,000 partitions and batches of 384 (paper sections 4.1 and 4.3)."""

ROUNDS = 6  # from n = 100 on, two values of `permute` pass for uniform in 200,000 draws (4 do not)
CHUNK = 1 << 15  # elements worked on at a time: the temporaries stay in the L2 cache
DEAL, SHUFFLE, CLUSTER = range(3)  # what a key is for
MIN_RANK_SIDE = 256  # ranks of categories are drawn from at least 256², however few there are


@dataclass(frozen=True)
class Layout:
    """The shape of an epoch. Partitions hold ⌊full/P⌋ or ⌈full/P⌉ batches, the larger ones first;
    the last n mod W positions belong to none and make the epoch's short batch."""

    pairs: int
    batch_size: int
    partitions: int
    seed: int

    @property
    def full_batches(self) -> int:
        return self.pairs // self.batch_size

    @property
    def remainder(self) -> int:
        """Pairs in the short batch, 0 ≤ remainder < W."""
        return self.pairs % self.batch_size

    def first_batch(self, partition: int) -> int:
        """Number of the partition's first batch, counted through the partitions of an epoch."""
        size, larger = divmod(self.full_batches, self.partitions)
        return partition * size + min(partition, larger)

    def partition_of(self, batch: UInts) -> UInts:
        """Partition of each batch number; the inverse of `first_batch`."""
        size, larger = divmod(self.full_batches, self.partitions)
        edge = larger * (size + 1)
        late = larger + (batch - np.minimum(batch, np.uint64(edge))) // np.uint64(size)
        return np.where(batch < edge, batch // np.uint64(size + 1), late)


def layout_of(
    pairs: int,
    batch_size: int,
    partitions: int | None,
    seed: int,
    batches_per_partition: float = PAPER_BATCHES_PER_PARTITION,
) -> Layout:
    """The layout for these settings; `partitions` None is one for `batches_per_partition` batches.

    Raises:
        UserError: fewer pairs than one batch (train.batch_size), or more partitions than full
            batches (plan.partitions).
    """
    if batch_size > pairs:
        raise UserError(
            f"--train.batch_size {batch_size:,}: there are only {pairs:,} training pairs, which do "
            f"not fill one batch; at most {pairs:,}"
        )
    full = pairs // batch_size
    if partitions is None:
        partitions = min(full, max(1, round(pairs / (batches_per_partition * batch_size))))
    if not 1 <= partitions <= full:
        raise UserError(
            f"--plan.partitions {partitions:,}: {pairs:,} training pairs make {full:,} batches of "
            f"--train.batch_size {batch_size:,}, and a partition needs at least one: 1 to {full:,}"
        )
    return Layout(pairs, batch_size, partitions, seed)


def order_partitions(
    layout: Layout,
    epoch: int,
    categories: NDArray[np.int32],
    num_categories: int,
    first: int,
    last: int,
) -> tuple[Ints, int]:
    """The pairs of partitions [first, last), in batches.

    Takes 16 bytes a pair of these partitions, and what it touches of `categories`.

    Args:
        categories: int32 [n], category code of each pair, 0 ≤ code < C; may be memory-mapped.
        num_categories: C.

    Returns:
        pairs: int64 [batches, W]; a row is a mini-batch, rows in the order of partitions.
        same_category: ordered pairs of slots in one batch with the same category, over all rows
            (the numerator of `hard_share`).

    Raises:
        UserError: so many categories and partitions that the sort key exceeds 64 bits.
    """
    W = layout.batch_size
    start, stop = layout.first_batch(first) * W, layout.first_batch(last) * W
    side = max(MIN_RANK_SIDE, isqrt(max(num_categories - 1, 0)) + 1)
    rank_bits = (side * side - 1).bit_length()
    offset_bits = (stop - start - 1).bit_length()
    if (last - first - 1).bit_length() + rank_bits + offset_bits > 64:
        raise UserError(
            f"--plan.partitions {layout.partitions:,}: too many for {num_categories:,} categories"
        )
    deal = round_keys(layout.seed, epoch, DEAL)
    cluster = round_keys(layout.seed, epoch, CLUSTER)

    # One word sorts a pair: partition | rank of its category in that partition | position.
    words = np.empty(stop - start, np.uint64)
    pairs = np.empty(stop - start, np.int64)
    for low in range(start, stop, CHUNK):
        position = np.arange(low, min(low + CHUNK, stop), dtype=np.uint64)
        here = slice(low - start, low - start + len(position))
        pairs[here] = permute(position, layout.pairs, deal)
        partition = layout.partition_of(position // np.uint64(W))
        code = categories[pairs[here]].astype(np.uint64)
        # A permutation of the categories per partition; holes between ranks do no harm.
        rank = _feistel(code, side, side, cluster, tweak=_mix(partition + np.uint64(1)))
        word = ((partition - np.uint64(first)) << np.uint64(rank_bits)) | rank
        words[here] = (word << np.uint64(offset_bits)) | (position - np.uint64(start))
    words.sort()

    same_category = 0
    mask = np.uint64((1 << offset_bits) - 1)
    step = max(1, CHUNK // W) * W
    for low in range(0, len(words), step):
        run = words[low : low + step]
        same_category += same_category_pairs((run >> np.uint64(offset_bits)).reshape(-1, W))
        run[:] = pairs[(run & mask).astype(np.int64)].astype(np.uint64)
    return words.view(np.int64).reshape(-1, W), same_category


def short_batch(layout: Layout, epoch: int) -> Ints:
    """int64 [n mod W]: the pairs of the epoch's short last batch."""
    position = np.arange(layout.pairs - layout.remainder, layout.pairs, dtype=np.uint64)
    return permute(position, layout.pairs, round_keys(layout.seed, epoch, DEAL)).astype(np.int64)


def batch_of_step(layout: Layout, epoch: int) -> Ints:
    """int64 [full batches]: the batch, counted through the partitions, that each step trains on."""
    return np.random.default_rng(_entropy(layout.seed, epoch, SHUFFLE)).permutation(
        layout.full_batches
    )


def hard_share(category_codes: NDArray[np.integer]) -> float:
    """Share of in-batch negatives that are of the positive's category (paper section 4.3).

    Args:
        category_codes: integers [steps, W], W ≥ 2, in any order within a row.

    Returns:
        The mean over steps and slots of (slots of the same category − 1) / (W − 1), in [0, 1].
    """
    steps, W = category_codes.shape
    return same_category_pairs(category_codes) / (steps * W * (W - 1))


def same_category_pairs(category_codes: NDArray[np.integer]) -> int:
    """Σ m (m − 1) over the categories of each row of [steps, W], m being a category's slots."""
    codes = np.sort(category_codes, axis=1)
    starts = np.ones(codes.shape, bool)
    starts[:, 1:] = codes[:, 1:] != codes[:, :-1]
    edges = np.append(np.flatnonzero(starts), codes.size)
    m = np.diff(edges)
    return int(np.sum(m * (m - 1)))


def random_hard_share(pairs_of_category: Ints) -> float:
    """The hard share of batches drawn at random: the floor under any number of partitions.

    Args:
        pairs_of_category: int64 [C], how many of the n ≥ 2 pairs each category has.
    """
    m = pairs_of_category
    n = int(m.sum())
    return float(np.sum(m / n * (m - 1)) / (n - 1))


def permute(x: UInts, n: int, keys: UInts) -> UInts:
    """A keyed pseudo-random permutation of [0, n), element by element.

    The generalised Feistel cipher with cycle walking of Black & Rogaway, 'Ciphers with arbitrary
    finite domains' (CT-RSA 2002), method 3. Not for secrets: its round function is a hash.

    Args:
        x: uint64 [m], each below n ≤ 2⁶³.
        keys: uint64 [ROUNDS].

    Returns:
        uint64 [m], each below n; x ↦ permute(x) is one to one.
    """
    a = isqrt(n - 1) + 1
    b = -(-n // a)  # a·b is n or little more, so hardly an element walks
    y = np.empty_like(x)
    for low in range(0, len(x), CHUNK):
        y[low : low + CHUNK] = _feistel(x[low : low + CHUNK], a, b, keys)
    outside = np.flatnonzero(y >= n)
    while outside.size:
        y[outside] = _feistel(y[outside], a, b, keys)
        outside = outside[y[outside] >= n]
    return y


def _feistel(x: UInts, a: int, b: int, keys: UInts, tweak: UInts | None = None) -> UInts:
    """A permutation of [0, a·b), another one for each value of the tweak (uint64 [m])."""
    right = x // np.uint64(a)
    left = x - right * np.uint64(a)
    for number, key in enumerate(keys):
        size = np.uint64(b if number % 2 else a)
        hashed = right + key
        if tweak is not None:
            hashed += tweak
        hashed = _mix(hashed)
        hashed >>= np.uint64(32)
        hashed *= size
        hashed >>= np.uint64(32)  # uniform in [0, size), by multiplication instead of division
        hashed += left
        np.minimum(hashed, hashed - size, out=hashed)  # mod size: below it, hashed − size wraps
        left, right = right, hashed
    return right * np.uint64(a) + left


def _mix(x: UInts) -> UInts:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014), in place: every bit depends on all."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def round_keys(seed: int, epoch: int, purpose: int) -> UInts:
    """uint64 [ROUNDS], independent for each (seed, epoch, purpose)."""
    state = _entropy(seed, epoch, purpose).generate_state(ROUNDS, np.uint64)
    return state.astype(np.uint64, copy=False)


def _entropy(seed: int, epoch: int, purpose: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, epoch, purpose])
