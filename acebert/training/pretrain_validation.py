"""What pre-training has learned, on products whose titles it has never seen.

Each held-out title is read four times under the same masks: with its own photo, with another
product's, with one of its own category's, and with none. The first three make TIP's AUCs, and that
words are guessed better with the right photo than with another is how one sees that it is used.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from acebert.errors import UserError
from acebert.evaluation.gauc import gauc
from acebert.models.encoder import NUM_PATCHES
from acebert.models.pretraining import mlm_loss, mpm_loss, tip_loss
from acebert.training.pretrain_batches import Draws, PretrainBatches
from acebert.training.pretrain_pairs import NO_PHOTO, SPARE
from acebert.training.pretrainer import Pretrainer

ROWS = 128  # rows of a forward
OWN, OTHER, SAME_CATEGORY, NONE = "own", "other", "same_category", "none"


@dataclass(frozen=True)
class Answers:
    """What the model says to some rows.

    Attributes:
        words: masked words asked for
        hits: words guessed right
        word_loss: sum of Eq. 1 over the words
        match: TIP's logit of each row [B], empty for a text-only model
        patch_loss: Eq. 2 of each masked patch, empty for a model without patches
    """

    words: int
    hits: int
    word_loss: float
    match: NDArray[np.float32]
    patch_loss: NDArray[np.float32]


class HeldOut:
    """A fixed sample of the held-out products, with a photo each where the model reads photos.

    Attributes:
        products: rows [h]
        photos: by kind, the product whose photo a row takes, or NO_PHOTO [h]
        baselines: KL of Eq. 2 for the uniform, the mean and the per-position mean distribution;
            the means are those of the sample itself, so no constant does better
    """

    def __init__(self, batches: PretrainBatches) -> None:
        settings = batches.settings
        held_out = batches.texts.held_out
        if batches.features is not None:
            held_out = held_out[batches.pictured(held_out)]
        if len(held_out) < 2:
            raise UserError(
                f"--pretrain.held_out {settings.held_out}: {len(held_out)} products with a title "
                "(and a photo) are held out, at least 2 are needed; raise it"
            )
        rng = np.random.default_rng((settings.seed, 2))
        self.products = np.sort(rng.permutation(held_out)[: settings.valid_products])
        self.draws = Draws.of(rng, (len(self.products),), batches.max_length)
        none = np.full(len(self.products), NO_PHOTO)
        self.photos = {NONE: none}
        self.baselines: dict[str, float] = {}
        if batches.features is not None:
            pictures = self._pictures(batches)
            everywhere = np.zeros(len(self.products), np.int32)
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
        right = [float(np.mean(own.match > 0)), float(np.mean(other.match <= 0))]
        loss = [_tip(own.match, 1), _tip(other.match, 0)]
        return {
            **_words("", own),
            **_words("_other_photo", other),
            **_words("_no_photo", answers[NONE]),
            **({"mpm_kl": float(own.patch_loss.mean())} if len(own.patch_loss) else {}),
            **self.baselines,
            "tip_loss": (loss[0] + r * loss[1]) / (1 + r),
            "tip_accuracy": (right[0] + r * right[1]) / (1 + r),
            "tip_auc_random": _auc(own.match, other.match),
            "tip_auc_same_category": _auc(own.match, alike.match),
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
            match, patch_loss = outputs.match, torch.zeros(0)
            if kind == OWN and outputs.patches is not None:
                T = batches.settings.patch_temperature
                patch_loss = mpm_loss(outputs.patches, outputs.features, T).cpu()
            parts.append(
                Answers(
                    len(words),
                    int((outputs.words.argmax(dim=-1) == words).sum()),
                    float(mlm_loss(outputs.words, words).sum()),
                    np.zeros(0, np.float32) if match is None else match.float().cpu().numpy(),
                    patch_loss.numpy(),
                )
            )
        if trainer.world > 1:
            shares: list[list[Answers]] = [parts] * trainer.world
            dist.all_gather_object(shares, parts)
            parts = [part for share in shares for part in share]
        return Answers(
            sum(part.words for part in parts),
            sum(part.hits for part in parts),
            sum(part.word_loss for part in parts),
            np.concatenate([part.match for part in parts] or [np.zeros(0, np.float32)]),
            np.concatenate([part.patch_loss for part in parts] or [np.zeros(0, np.float32)]),
        )


def _chunks(n: int) -> Iterator[slice]:
    return (slice(start, start + ROWS) for start in range(0, n, ROWS))


def _others(
    rng: np.random.Generator,
    products: NDArray[np.int64],
    pictures: NDArray[np.uint64],
    titles: NDArray[np.uint64],
    group: NDArray[np.int32],
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
    words = max(1, answers.words)
    return {
        f"mlm_loss{suffix}": answers.word_loss / words,
        f"mlm_accuracy{suffix}": answers.hits / words,
    }


def _tip(logits: NDArray[np.float32], label: int) -> float:
    x = torch.from_numpy(logits)
    return float(tip_loss(x, torch.full_like(x, label)).mean()) if len(x) else float("nan")


def _auc(matched: NDArray[np.float32], mismatched: NDArray[np.float32]) -> float:
    """Chance that a matched pair scores above a mismatched one; nan where there is none."""
    scores = np.concatenate([matched, mismatched])
    labels = np.arange(len(scores)) < len(matched)
    value = gauc(np.zeros(len(scores), np.int64), scores, labels).value
    return float("nan") if value is None else value
