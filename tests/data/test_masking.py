"""Masks counted on many tokens: a share is right within five standard deviations."""

import numpy as np
import pytest

from acebert.data.masking import Vocabulary, mask_patches, mask_words

PAD, CLS, SEP, MASK, UNK = range(5)
WORDS = np.arange(5, 200)
VOCABULARY = Vocabulary.of(200, MASK, [PAD, CLS, SEP, MASK, UNK])


def some_rows(B: int, L: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] words, some [UNK], [SEP] padding."""
    length = rng.integers(3, L + 1, B)
    ids = rng.integers(5, 200, (B, L))
    ids[rng.random((B, L)) < 0.1] = UNK
    ids[:, 0] = CLS
    ids[np.arange(B), length - 1] = SEP
    mask = np.arange(L) < length[:, None]
    return np.where(mask, ids, PAD), mask


@pytest.fixture(scope="module")
def masked() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids, mask = some_rows(20_000, 30, rng)
    out, chosen = mask_words(ids, mask, VOCABULARY, rng.random(ids.shape), rng.random(ids.shape))
    return {"ids": ids, "mask": mask, "out": out, "chosen": chosen}


def deviations(hits: np.ndarray, expected: float) -> float:
    """How far the share of hits is from the expected one, in standard deviations."""
    return float(abs(hits.mean() - expected) / np.sqrt(expected * (1 - expected) / hits.size))


def test_15_percent_of_the_words_are_chosen(masked: dict[str, np.ndarray]) -> None:
    assert deviations(masked["chosen"][masked["ids"] >= 5], 0.15) < 5


def test_special_tokens_and_padding_are_never_chosen_or_changed(
    masked: dict[str, np.ndarray],
) -> None:
    never = masked["ids"] < 5
    assert never.any()
    assert not masked["chosen"][never].any()
    np.testing.assert_array_equal(masked["out"][never], masked["ids"][never])


def test_chosen_words_become_mask_random_or_stay_at_80_10_10(masked: dict[str, np.ndarray]) -> None:
    before, after = (masked[name][masked["chosen"]] for name in ("ids", "out"))
    assert deviations(after == MASK, 0.8) < 5
    kept = after == before
    # A random word is the old one once in 195 draws.
    assert deviations(kept, 0.1 + 0.1 / len(WORDS)) < 5
    assert masked["chosen"][masked["out"] != masked["ids"]].all()


def test_random_words_are_uniform_over_the_ordinary_ones(masked: dict[str, np.ndarray]) -> None:
    changed = masked["chosen"] & (masked["out"] != MASK) & (masked["out"] != masked["ids"])
    counts = np.bincount(masked["out"][changed], minlength=200)
    assert not counts[:5].any()
    mean = counts[5:].mean()
    assert np.abs(counts[5:] - mean).max() < 5 * np.sqrt(mean)


def test_positions_are_masked_alike(masked: dict[str, np.ndarray]) -> None:
    for column in range(1, 28):
        assert deviations(masked["chosen"][:, column][masked["ids"][:, column] >= 5], 0.15) < 5


def test_15_percent_of_the_patches_of_rows_with_a_photo_are_masked() -> None:
    rng = np.random.default_rng(1)
    has_image = rng.random(20_000) < 0.7
    chosen = mask_patches(has_image, rng.random((20_000, 16)))
    assert deviations(chosen[has_image], 0.15) < 5
    assert not chosen[~has_image].any()
