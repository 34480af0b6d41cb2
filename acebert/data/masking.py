"""Which words and patches are masked (paper section 2.2, after BERT: Devlin et al. 2019).

Functions of uniform random numbers, one a token, so that whoever draws them decides what repeats:
the rows of a batch are masked alike however many ranks share it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MASK_SHARE = 0.15  # of the words, and of the patches
TO_MASK, TO_RANDOM = 0.8, 0.1  # of the chosen words; the others stay as they are


@dataclass(frozen=True)
class Vocabulary:
    """Attributes:
    mask: id of [MASK]
    special: ids that are never chosen and never put in, int64 [s]
    ordinary: all other ids, int64 [v]
    """

    mask: int
    special: NDArray[np.int64]
    ordinary: NDArray[np.int64]

    @classmethod
    def of(cls, size: int, mask: int, special: Iterable[int]) -> "Vocabulary":
        """A vocabulary of ids 0 … size − 1 of which `special` are no words."""
        never = np.unique(np.fromiter(special, np.int64))
        return cls(mask, never, np.setdiff1d(np.arange(size), never))


def mask_words(
    ids: NDArray[np.int64],
    attention_mask: NDArray[np.bool_],
    vocabulary: Vocabulary,
    u: NDArray[np.floating],
    v: NDArray[np.floating],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Choose 15 % of the words: 80 % of them become [MASK], 10 % a random word, 10 % stay.

    Args:
        ids: tokens [B, L]
        attention_mask: False on padding [B, L]
        u: uniform on [0, 1) [B, L], decides what happens to a token
        v: uniform on [0, 1) [B, L], says which random word it becomes

    Returns:
        The masked tokens [B, L], and which of them have to be predicted, bool [B, L].
    """
    chosen = (u < MASK_SHARE) & attention_mask & ~np.isin(ids, vocabulary.special)
    kind = u / MASK_SHARE  # uniform on [0, 1) where chosen
    word = vocabulary.ordinary[(v * len(vocabulary.ordinary)).astype(np.int64)]
    masked = np.where(chosen & (kind < TO_MASK), vocabulary.mask, ids)
    random = chosen & (kind >= TO_MASK) & (kind < TO_MASK + TO_RANDOM)
    return np.where(random, word, masked), chosen


def mask_patches(has_image: NDArray[np.bool_], u: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Choose 15 % of the patches of rows that have a photo: [B], uniform [B, N] → bool [B, N]."""
    return (u < MASK_SHARE) & has_image[:, None]
