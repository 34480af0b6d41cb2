"""What pre-training pairs, masks and holds out, counted on a catalogue made by hand."""

import dataclasses
from collections import Counter
from pathlib import Path

import handmade
import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from acebert.config import Settings, load_settings
from acebert.errors import UserError
from acebert.training.pairs import StagePaths
from acebert.training.pretrain_batches import PretrainBatch, PretrainBatches
from acebert.training.pretrain_validation import NONE, OTHER, OWN, SAME_CATEGORY, HeldOut

W, R = 16, 3


def settings_with(**values: object) -> Settings:
    settings = load_settings(["--recipe", "cebert_tiny"])
    own = {
        "batch_size": W,
        "negatives": R,
        "same_category_negatives": 0.0,
        "held_out": 0.25,
        **values,
    }
    return settings.model_copy(update={"pretrain": settings.pretrain.model_copy(update=own)})


@pytest.fixture(scope="module")
def paths(handmade_paths: StagePaths) -> StagePaths:
    return handmade_paths


def make(paths: StagePaths, rank: int = 0, world: int = 1, **values: object) -> PretrainBatches:
    return PretrainBatches(settings_with(**values), paths, rank, world)


def epochs(batches: PretrainBatches, n: int) -> list[PretrainBatch]:
    return [batches.batch(step) for step in range(n * batches.steps_per_epoch)]


def test_each_title_with_a_photo_is_matched_once_and_mismatched_three_times(
    paths: StagePaths,
) -> None:
    for batch in epochs(make(paths), 2):
        title = handmade.titles_of(paths, batch.inputs)
        matched, paired = batch.matched.bool().numpy(), batch.paired.bool().numpy()
        assert int(matched.sum()) == W
        pictured = Counter(title[matched & paired])
        assert Counter(title[~matched & paired]) == Counter({t: R * n for t, n in pictured.items()})
        without = title[matched & ~paired]
        assert set(without) <= set(handmade.NO_PHOTO)
        assert not batch.inputs.has_photo[torch.from_numpy(matched & ~paired)].any()


def test_a_title_without_another_picture_in_reach_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A placeholder on most photos must not be learned as what matches."""
    monkeypatch.setattr(handmade, "TWINS", dict.fromkeys(range(1, 150), 0))
    paths = handmade.build(tmp_path)
    placeholders = make(paths, same_category_negatives=0.0)
    asked = []
    for batch in epochs(placeholders, 2):
        title = handmade.titles_of(paths, batch.inputs)
        matched, paired = batch.matched.bool().numpy(), batch.paired.bool().numpy()
        for product in np.setdiff1d(title, [*handmade.SAME_TITLE, *handmade.NO_PHOTO]):
            own = title == product
            asked.append(bool(paired[own & matched].all()))
            assert asked[-1] == bool(paired[own & ~matched].any())
    assert 0 < sum(asked) < len(asked)


def test_a_matched_photo_is_the_titles_own_and_a_mismatched_one_never_shows_the_same(
    paths: StagePaths,
) -> None:
    seen_twins = seen_titles = 0
    for share in (0.0, 1.0):
        for batch in epochs(make(paths, same_category_negatives=share, held_out=0.05), 6):
            title = handmade.titles_of(paths, batch.inputs)
            shown = handmade.pictures_of(batch.inputs)
            matched, paired = batch.matched.bool().numpy(), batch.paired.bool().numpy()
            single = ~np.isin(title, handmade.SAME_TITLE)
            own = handmade.picture(title)
            assert (shown == own)[matched & paired & single].all()
            assert (shown != own)[~matched & paired & single].all()
            assert (shown[paired] > 0).all()
            seen_twins += int(np.isin(title, [20, 21, 22, 40, 60, 100]).sum())
            of_one_title = ~matched & paired & ~single
            assert not np.isin(shown[of_one_title], handmade.picture(handmade.SAME_TITLE)).any()
            seen_titles += int(of_one_title.sum())
    assert seen_twins > 50
    assert seen_titles > 50


def test_held_out_titles_are_asked_about_photos_of_other_titles_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one category, so that half of the neighbours have the same title."""
    monkeypatch.setattr(handmade, "SAME_TITLE", tuple(range(30, 110)))
    monkeypatch.setattr(handmade, "CATEGORIES", 1)
    settings = settings_with(held_out=0.7)
    batches = PretrainBatches(settings, handmade.build(tmp_path), 0, 1)
    sample = HeldOut(batches)
    titles = np.array([handmade._title(product) for product in range(handmade.PRODUCTS)])
    assert np.isin(handmade.SAME_TITLE, sample.products).any()
    for kind in (OTHER, SAME_CATEGORY):
        other = sample.photos[kind]
        asked = other >= 0
        assert asked.sum() > 50
        own, other = sample.products[asked], other[asked]
        assert (titles[own] != titles[other]).all()
        assert (handmade.picture(own) != handmade.picture(other)).all()


def test_every_photo_is_once_matched_and_three_times_mismatched(paths: StagePaths) -> None:
    """Neither a title nor a photo tells by itself; a twin's place is taken by the next photo."""
    for batch in epochs(make(paths), 2):
        shown = handmade.pictures_of(batch.inputs)
        matched, paired = batch.matched.bool().numpy(), batch.paired.bool().numpy()
        if {21, 41, *handmade.picture(handmade.SAME_TITLE)} & set(shown[matched]):
            continue
        once = Counter(shown[matched & paired])
        assert Counter(shown[~matched & paired]) == Counter({p: R * n for p, n in once.items()})


def test_negatives_of_the_own_category_are_of_the_own_category(paths: StagePaths) -> None:
    agree: dict[float, list[bool]] = {0.0: [], 1.0: []}
    for share, found in agree.items():
        for batch in epochs(make(paths, same_category_negatives=share), 4):
            title = handmade.titles_of(paths, batch.inputs)
            shown = handmade.pictures_of(batch.inputs)
            rows = (batch.matched == 0).numpy() & ~np.isin(shown, [21, 41])
            found += (handmade.category(title) == handmade.category(shown - 1))[rows].tolist()
    assert np.mean(agree[0.0]) < 0.25  # 1 of 8 categories
    assert np.mean(agree[1.0]) > 0.9  # but where the product itself or a twin was drawn


def test_matched_and_mismatched_rows_are_masked_alike_and_only_matched_ones_are_predicted(
    paths: StagePaths,
) -> None:
    mask = make(paths).vocabulary.mask
    masked: dict[bool, list[float]] = {True: [], False: []}
    patches: dict[bool, list[float]] = {True: [], False: []}
    for batch in epochs(make(paths), 30):
        inputs = batch.inputs
        for label in masked:
            rows = (batch.matched == label) & batch.paired.bool()
            text = inputs.text.input_ids[rows]
            words = inputs.text.attention_mask[rows].clone()
            words[:, 0] = False
            words[torch.arange(len(words)), words.sum(dim=1)] = False  # [CLS] and [SEP] are neither
            title = handmade.titles_of(paths, inputs)[rows.numpy()]
            assert words.sum(dim=1).tolist() == [handmade.repeats(product) for product in title]
            masked[label] += (text == mask)[words].tolist()
            patches[label] += inputs.masked_patches[rows].flatten().tolist()
        for predicted in (inputs.word_rows, inputs.patch_rows):
            assert batch.matched[predicted].all()
    for kind, rate in ((masked, 0.15 * 0.8), (patches, 0.15)):
        for hits in kind.values():
            assert abs(np.mean(hits) - rate) < 5 * np.sqrt(rate * (1 - rate) / len(hits))


def test_the_words_to_predict_are_those_that_the_titles_had(paths: StagePaths) -> None:
    ids = [int(word) for word in (paths.tokens.parent / "ids.txt").read_text().split()]
    for batch in epochs(make(paths), 2):
        title = handmade.titles_of(paths, batch.inputs)
        assert [ids[t] for t in title[batch.inputs.word_rows]] == batch.words.tolist()


def test_the_ranks_rows_together_are_the_batch_of_one_process(paths: StagePaths) -> None:
    def rows(batch: PretrainBatch) -> list[tuple]:
        text = batch.inputs.text
        shown = handmade.pictures_of(batch.inputs)
        return [
            (
                tuple(text.input_ids[i][text.attention_mask[i]].tolist()),
                int(shown[i]),
                tuple(batch.inputs.masked_patches[i].tolist()),
                float(batch.matched[i]),
                float(batch.paired[i]),
                tuple(batch.inputs.word_columns[batch.inputs.word_rows == i].tolist()),
            )
            for i in range(len(shown))
        ]

    for values in ({}, {"same_category_negatives": 0.5, "queries": True}):
        whole = make(paths, **values)
        parts = [make(paths, rank, 4, **values) for rank in range(4)]
        for step in (0, 3, whole.steps_per_epoch + 1):
            one, four = whole.batch(step), [part.batch(step) for part in parts]
            assert Counter(rows(one)) == Counter(row for part in four for row in rows(part))
            for everywhere, mine in (
                ("all_words", lambda b: len(b.words)),
                ("all_patches", lambda b: len(b.inputs.patch_rows)),
            ):
                assert {getattr(b, everywhere) for b in four} == {getattr(one, everywhere)}
                assert sum(map(mine, four)) == mine(one) == getattr(one, everywhere)


def test_a_step_is_made_again_from_its_number_alone(paths: StagePaths) -> None:
    first, again = make(paths), make(paths)
    step = first.steps_per_epoch + 2
    for s in (0, 5, step):
        first.batch(s)
    a, b = (dataclasses.asdict(x.batch(step)) for x in (first, again))
    flat = [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in _leaves(a, b)]
    assert len(flat) > 10
    assert all(torch.equal(x, y) for x, y in flat)
    other = first.batch(step - first.steps_per_epoch)
    assert not np.array_equal(
        handmade.titles_of(paths, other.inputs), handmade.titles_of(paths, first.batch(step).inputs)
    )


def _leaves(a: object, b: object) -> list[tuple]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [leaf for key in a for leaf in _leaves(a[key], b[key])]
    return [] if a is None else [(a, b)]


def test_an_epoch_has_every_training_title_at_most_once_and_none_that_is_held_out(
    paths: StagePaths,
) -> None:
    batches = make(paths)
    held_out = set(batches.texts.held_out.tolist())
    assert 20 < len(held_out) < 60  # 160 products, a quarter of the titles
    assert not held_out & set(batches.texts.train.tolist())
    assert len(held_out & set(handmade.SAME_TITLE)) in (0, 3)
    for product in (*handmade.NO_TITLE,):
        assert product not in held_out | set(batches.texts.train.tolist())
    seen = Counter(
        title
        for batch in epochs(batches, 1)
        for title in handmade.titles_of(paths, batch.inputs)[batch.matched.bool()]
        if title not in handmade.SAME_TITLE
    )
    assert set(seen.values()) == {1}
    assert not set(seen) & held_out
    assert sum(seen.values()) > len(batches.texts.train) - W - 3


def test_queries_of_the_training_days_are_rows_of_words_alone(paths: StagePaths) -> None:
    batches = make(paths, queries=True)
    seen = set()
    for batch in epochs(batches, 2):
        title = handmade.titles_of(paths, batch.inputs)
        query = title >= handmade.PRODUCTS
        seen |= set(title[query].tolist())
        assert batch.matched[query].all()
        assert not batch.paired[query].any()
        assert not batch.inputs.has_photo[query].any()
        assert (batch.inputs.text.segment_ids[query][:, :5] == 1).all()
        assert (batch.inputs.text.segment_ids[~query] == 0).all()
    clicked = {handmade.PRODUCTS + q for q in range(handmade.QUERIES) if q % 4}
    assert len(seen) > 15
    assert seen <= clicked


def test_held_out_titles_are_read_with_other_pictures_and_baselines_are_kls_by_scipy(
    paths: StagePaths,
) -> None:
    batches = make(paths, patch_temperature=0.5)
    sample = HeldOut(batches)
    own = sample.photos[OWN]
    assert set(own.tolist()) <= set(batches.texts.held_out.tolist())
    assert not set(own.tolist()) & set(handmade.NO_PHOTO)
    other, alike = sample.photos[OTHER], sample.photos[SAME_CATEGORY]
    assert set(other.tolist()) <= set(own.tolist())
    assert (handmade.picture(other) != handmade.picture(own)).all()
    found = alike >= 0
    assert found.mean() > 0.7
    assert (handmade.category(alike) == handmade.category(own))[found].all()
    assert (handmade.picture(alike[found]) != handmade.picture(own[found])).all()
    assert (sample.photos[NONE] == -1).all()

    assert batches.features is not None
    p = softmax(batches.features.patches(own).astype(float) / 0.5, axis=-1)
    chosen = sample.draws.patches < 0.15
    position = np.broadcast_to(p.mean(axis=0), p.shape)
    for name, q in {
        "mpm_kl_uniform": np.full_like(p, 1 / handmade.D1),
        "mpm_kl_mean": np.broadcast_to(p.mean(axis=(0, 1)), p.shape),
        "mpm_kl_position": position,
    }.items():
        expected = rel_entr(p, q).sum(axis=-1)[chosen].mean()
        assert sample.baselines[name] == pytest.approx(expected, rel=1e-4)


def test_batches_that_cannot_be_made_are_refused_with_what_would_be_right(
    paths: StagePaths,
) -> None:
    with pytest.raises(UserError, match=r"batch_size 16: not divisible by the 3 workers"):
        make(paths, 0, 3)
    with pytest.raises(UserError, match=r"batch_size 500: there are \d+ texts to train on"):
        make(paths, batch_size=500)
    with pytest.raises(UserError, match=r"held_out 0\.0001: 0 products.*raise it"):
        HeldOut(make(paths, held_out=0.0001))
