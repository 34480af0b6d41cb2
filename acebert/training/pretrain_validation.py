"""What pre-training has learned, on products whose titles it has never seen.

Each held-out title is read four times under the same masks: with its own photo, with another
product's, with one of its own category's, and with none. The first three make TIP's AUCs, and that
words are guessed better with the right photo than with another is how one sees that it is used.
A model without images is asked the same words, so that the two can be compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from acebert.errors import UserError
from acebert.evaluation.gauc import gauc
from acebert.models.encoder import NUM_PATCHES
from acebert.models.pretraining import PretrainInputs, mlm_loss, mpm_loss, tip_loss
from acebert.training.pretrain_batches import Draws, PretrainBatches
from acebert.training.pretrain_pairs import NO_PHOTO, SPARE
from acebert.training.pretrainer import Pretrainer

ROWS = 128  # rows of a forward
OWN, OTHER, SAME_CATEGORY, NONE = "own", "other", "same_category", "none"


@dataclass(frozen=True)
class Answers:
    """What the model says to some rows (B of them).

    Attributes:
        row: which row of the sample each is [B]
        words: its masked words [B]
        hits: how many of them are guessed right [B]
        word_loss: sum of Eq. 1 over them [B]
        match: TIP's logit of each row [B], empty for a text-only model
        patch_loss: Eq. 2 of each masked patch, empty for a model without patches
    """

    row: NDArray[np.int64]
    words: NDArray[np.int64]
    hits: NDArray[np.int64]
    word_loss: NDArray[np.float64]
    match: NDArray[np.float32]
    patch_loss: NDArray[np.float32]

    def by_row(self, rows: NDArray[np.int64]) -> "Answers":
        """Words of these rows, in this order."""
        at = np.argsort(self.row)[np.searchsorted(np.sort(self.row), rows)]
        return replace(
            self, row=rows, words=self.words[at], hits=self.hits[at], word_loss=self.word_loss[at]
        )


class HeldOut:
    """A fixed sample of the held-out products, with a photo each where the model reads photos.

    Where fewer are held out than `pretrain.valid_products`, each is there several times, under
    other masks.

    Attributes:
        products: rows [h]
        photos: by kind, the product whose photo a row takes, or NO_PHOTO [h]
        baselines: KL of Eq. 2 for the uniform, the mean and the per-position mean distribution;
            the means are those of the sample itself, so no constant does better
    """

    def __init__(self, batches: PretrainBatches) -> None:
        settings = batches.settings
        rng = np.random.default_rng((settings.seed, 2))
        products = rng.permutation(batches.texts.held_out)[: settings.valid_products]
        masks = max(1, settings.valid_products // max(1, len(products)))
        draws = Draws.of(rng, (masks, len(products)), batches.max_length)
        if batches.features is not None:
            pictured = batches.pictured(products)
            products, draws = products[pictured], draws[:, pictured]
        if len(products) < 2:
            raise UserError(
                f"--pretrain.held_out {settings.held_out}: {len(products)} products with a title "
                "(and a photo) are held out, at least 2 are needed; raise it"
            )
        self.products = np.tile(products, masks)
        self.draws = draws.flat()
        none = np.full(len(self.products), NO_PHOTO)
        self.photos = {NONE: none}
        self.baselines: dict[str, float] = {}
        if batches.features is not None:
            pictures = self._pictures(batches)
            everywhere = np.zeros(len(self.products), np.int64)
            category = batches.texts.category[self.products]
            titles = batches.texts.title[self.products]
            self.photos = {
                OWN: self.products,
                OTHER: _others(rng, self.products, pictures, titles, everywhere),
                SAME_CATEGORY: _others(rng, self.products, pictures, titles, category),
                NONE: none,
            }
            if batches.patches:
                self.baselines = self._patch_baselines(batches)

    def _pictures(self, batches: PretrainBatches) -> NDArray[np.uint64]:
        return np.concatenate(
            [
                photos.picture[photos.row(self.products[rows])]
                for rows in _chunks(len(self.products))
                for photos in [batches.photos(self.products[rows])]
            ]
        )

    def _patch_baselines(self, batches: PretrainBatches) -> dict[str, float]:
        assert batches.features is not None
        T = batches.settings.patch_temperature
        total: NDArray[np.float64] = np.zeros((NUM_PATCHES, batches.features.patch_dim))

        def targets(rows: slice) -> NDArray[np.float64]:
            features = batches.features.patches(self.products[rows])  # type: ignore[union-attr]
            x = features.astype(np.float64) / T
            x = np.exp(x - x.max(axis=-1, keepdims=True))
            return x / x.sum(axis=-1, keepdims=True)

        for rows in _chunks(len(self.products)):
            total += targets(rows).sum(axis=0)
        position = total / len(self.products)
        constant = {
            "mpm_kl_uniform": np.full_like(position, 1 / position.shape[1]),
            "mpm_kl_mean": np.broadcast_to(position.mean(axis=0), position.shape),
            "mpm_kl_position": position,
        }
        sums = dict.fromkeys(constant, 0.0)
        masked = 0
        for rows in _chunks(len(self.products)):
            chosen = batches.masked_patches(self.draws[rows])
            p, where = targets(rows)[chosen], np.nonzero(chosen)[1]
            masked += len(p)
            for name, q in constant.items():
                with np.errstate(divide="ignore", invalid="ignore"):
                    terms = np.where(p > 0, p * (np.log(p) - np.log(q[where])), 0)
                sums[name] += float(terms.sum())
        return {name: value / max(1, masked) for name, value in sums.items()}

    def measure(self, trainer: Pretrainer, batches: PretrainBatches) -> dict[str, float]:
        """Losses, accuracies and AUCs of the whole sample; every rank answers a share of it and
        gets all."""
        trainer.model.eval()
        answers = {kind: self._answers(trainer, batches, kind) for kind in self.photos}
        trainer.model.train()
        if OWN not in answers:
            return _words("", answers[NONE])
        own, other, alike = answers[OWN], answers[OTHER], answers[SAME_CATEGORY]
        r = batches.settings.negatives
        asked = own.match[np.isin(own.row, alike.row)]  # of those whose category has another photo
        right = [float(np.mean(own.match > 0)), _mean(other.match <= 0)]
        right_alike = [_mean(asked > 0), _mean(alike.match <= 0)]
        loss = [_tip(own.match, 1), _tip(other.match, 0)]
        return {
            **_words("", own),
            **_words("_other_photo", other),
            **_words("_no_photo", answers[NONE]),
            **_gain(self.products, own, other),
            **({"mpm_kl": float(own.patch_loss.mean())} if len(own.patch_loss) else {}),
            **self.baselines,
            "tip_loss": (loss[0] + r * loss[1]) / (1 + r),
            "tip_accuracy": (right[0] + r * right[1]) / (1 + r),
            "tip_accuracy_same_category": (right_alike[0] + r * right_alike[1]) / (1 + r),
            "tip_auc_random": _auc(own.match, other.match),
            "tip_auc_same_category": _auc(asked, alike.match),
        }

    @torch.inference_mode()
    def _answers(self, trainer: Pretrainer, batches: PretrainBatches, kind: str) -> Answers:
        """To the sample with photos of this kind; rows without such a photo are left out."""
        asked = np.flatnonzero((self.photos[kind] != NO_PHOTO) | (kind == NONE))
        device, bf16 = trainer.device, trainer.settings.train.precision == "bf16"
        parts = []
        for rows in _chunks(len(asked)):
            mine = asked[rows][trainer.rank :: trainer.world]
            if not len(mine):  # fewer rows than ranks
                continue
            arrays = batches.texts.arrays(self.products[mine])
            photo = self.photos[kind][mine]
            photos = None if kind == NONE else batches.photos(photo)
            everything = np.ones(len(mine), bool)
            inputs, words = batches.inputs(arrays, photo, photos, self.draws[mine], everything)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                outputs = trainer.model(inputs.to(device))
            words = words.to(device)

            def by_row(
                values: torch.Tensor, inputs: PretrainInputs = inputs
            ) -> NDArray[np.float64]:
                sums = np.zeros(len(inputs.photo))
                np.add.at(sums, inputs.word_rows.numpy(), values.double().cpu().numpy())
                return sums

            match, patch_loss = outputs.match, torch.zeros(0)
            if kind == OWN and outputs.patches is not None:
                T = batches.settings.patch_temperature
                patch_loss = mpm_loss(outputs.patches, outputs.features, T).cpu()
            parts.append(
                Answers(
                    mine,
                    by_row(torch.ones(len(words))).astype(np.int64),
                    by_row(outputs.words.argmax(dim=-1) == words).astype(np.int64),
                    by_row(mlm_loss(outputs.words, words)),
                    np.zeros(0, np.float32) if match is None else match.float().cpu().numpy(),
                    patch_loss.numpy(),
                )
            )
        if trainer.world > 1:
            shares: list[list[Answers]] = [parts] * trainer.world
            dist.all_gather_object(shares, parts)
            parts = [part for share in shares for part in share]
        columns = zip(*(vars(p).values() for p in [_NOBODY, *parts]), strict=True)
        return Answers(*(np.concatenate(column) for column in columns))


_NO_ROW, _NO_LOGIT = np.zeros(0, np.int64), np.zeros(0, np.float32)
_NOBODY = Answers(_NO_ROW, _NO_ROW, _NO_ROW, np.zeros(0), _NO_LOGIT, _NO_LOGIT)
"""to a kind of photo that no row has, as another one of its category where there are none"""


def _chunks(n: int) -> Iterator[slice]:
    return (slice(start, start + ROWS) for start in range(0, n, ROWS))


def _others(
    rng: np.random.Generator,
    products: NDArray[np.int64],
    pictures: NDArray[np.uint64],
    titles: NDArray[np.uint64],
    group: NDArray[np.int64],
) -> NDArray[np.int64]:
    """For each product [h] another of its group with another picture and another title, or
    NO_PHOTO [h]: the next one in a random order."""
    order = np.lexsort((rng.random(len(products)), group))
    _, start, count = np.unique(group[order], return_index=True, return_counts=True)
    first, size = np.repeat(start, count), np.repeat(count, count)
    place = np.arange(len(order)) - first
    chosen = np.full(len(products), NO_PHOTO)
    for ahead in range(SPARE, 0, -1):
        other = order[first + (place + ahead) % size]
        differs = (pictures[other] != pictures[order]) & (titles[other] != titles[order])
        chosen[order[differs]] = products[other[differs]]
    return chosen


def _words(suffix: str, answers: Answers) -> dict[str, float]:
    words = max(1, answers.words.sum())
    return {
        f"mlm_loss{suffix}": float(answers.word_loss.sum() / words),
        f"mlm_accuracy{suffix}": float(answers.hits.sum() / words),
    }


def _gain(products: NDArray[np.int64], own: Answers, other: Answers) -> dict[str, float]:
    """What the right photo adds to MLM accuracy, and its standard error over products: that of a
    ratio of sums (Cochran 1977, Sampling Techniques, section 6.4)."""
    both = np.intersect1d(own.row, other.row)
    with_own, with_other = (a.by_row(both) for a in (own, other))
    _, product = np.unique(products[both], return_inverse=True)
    words = np.bincount(product, with_own.words)
    gained = np.bincount(product, with_own.hits - with_other.hits)
    if not words.sum():
        return {}
    gain, n = gained.sum() / words.sum(), len(words)
    spread = np.sqrt(n / max(1, n - 1) * ((gained - gain * words) ** 2).sum())
    return {"mlm_gain": float(gain), "mlm_gain_error": float(spread / words.sum())}


def _mean(right: NDArray[np.bool_]) -> float:
    return float(right.mean()) if len(right) else float("nan")


def _tip(logits: NDArray[np.float32], label: int) -> float:
    x = torch.from_numpy(logits)
    return float(tip_loss(x, torch.full_like(x, label)).mean()) if len(x) else float("nan")


def _auc(matched: NDArray[np.float32], mismatched: NDArray[np.float32]) -> float:
    """Chance that a matched pair scores above a mismatched one; nan where there is none."""
    scores = np.concatenate([matched, mismatched])
    labels = np.arange(len(scores)) < len(matched)
    value = gauc(np.zeros(len(scores), np.int64), scores, labels).value
    return float("nan") if value is None else value
