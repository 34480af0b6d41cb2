"""Oracles: torch's own losses, closed forms, and patch features."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from acebert.data.patches import PatchCNN, dead_leaves
from acebert.models.tagging import TaggingCNN, category_loss, tag_loss

torch.manual_seed(0)
LOGITS = torch.randn(6, 4)
TARGETS = torch.tensor([[1, 0, 0.5, 0], [0, 0, 0, 0], [0, 1, 0, 0]] * 2)


def test_category_loss_is_cross_entropy_with_label_smoothing():
    category = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = F.cross_entropy(LOGITS, category, label_smoothing=0.1)
    assert category_loss(LOGITS, category, 0.1) == pytest.approx(float(expected))


def test_a_photo_without_category_adds_nothing_but_counts():
    category = torch.tensor([0, -1, 2, -1, 0, 1])
    known = category >= 0
    expected = F.cross_entropy(LOGITS[known], category[known], reduction="sum") / 6
    assert category_loss(LOGITS, category, 0.0) == pytest.approx(float(expected))
    assert category_loss(LOGITS, torch.full((6,), -1), 0.1) == 0
    assert category_loss(torch.empty(6, 0), torch.full((6,), -1), 0.1) == 0


def test_tag_loss_is_binary_cross_entropy_of_photos_that_words_are_known_of():
    named = TARGETS.sum(1) > 0
    expected = F.binary_cross_entropy_with_logits(LOGITS[named], TARGETS[named], reduction="sum")
    assert tag_loss(LOGITS, TARGETS, 1.0, 2.5) == pytest.approx(float(expected) / (6 * 2.5))


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_unnamed_weight_moves_the_best_logit_by_a_constant(weight: float):
    """Least where σ'(z) = 0: z = logit(share) − ln(weight), whatever the share."""
    share = torch.tensor([[0.1, 0.4, 0.8]])
    best = (torch.logit(share) - np.log(weight)).requires_grad_(True)
    tag_loss(best, share, weight, 1.0).backward()
    assert best.grad is not None
    torch.testing.assert_close(best.grad, torch.zeros(1, 3), atol=1e-6, rtol=0)


def test_two_halves_of_a_batch_average_to_the_whole():
    whole = tag_loss(LOGITS, TARGETS, 0.5, 2.0)
    halves = [tag_loss(LOGITS[r], TARGETS[r], 0.5, 2.0) for r in (slice(0, 3), slice(3, 6))]
    assert sum(halves) / 2 == pytest.approx(float(whole))
    category = torch.tensor([0, -1, 2, -1, 0, 1])
    whole = category_loss(LOGITS, category, 0.1)
    halves = [category_loss(LOGITS[r], category[r], 0.1) for r in (slice(0, 3), slice(3, 6))]
    assert sum(halves) / 2 == pytest.approx(float(whole))


def test_the_heads_read_the_mean_of_the_patch_features_and_tags_start_at_their_share():
    cnn = PatchCNN("resnet18", "random", 128)
    cnn.autocast = torch.autocast("cpu", enabled=False)
    crops = dead_leaves(2, 128)
    patches = torch.from_numpy(cnn(crops)).float()  # [2, 16, 512]
    share = np.array([0.5, 0.01, 0.2])
    model = TaggingCNN(cnn, categories=5, tag_share=share).eval()
    with torch.inference_mode():
        category, tags = model(torch.from_numpy(crops).permute(0, 3, 1, 2).float())
        expected = model.category(patches.mean(1)), model.tags(patches.mean(1))
    torch.testing.assert_close(category, expected[0], atol=5e-3, rtol=1e-3)
    torch.testing.assert_close(tags, expected[1], atol=5e-3, rtol=1e-3)
    np.testing.assert_allclose(torch.sigmoid(model.tags.bias).detach(), share, rtol=1e-4)


def test_a_share_of_all_or_none_starts_at_a_finite_bias():
    model = TaggingCNN(PatchCNN("resnet18", "random", 128), 0, np.array([0.0, 1.0]))
    assert torch.isfinite(model.tags.bias).all()
    assert model.head_parameters() == {
        "category.weight",
        "category.bias",
        "tags.weight",
        "tags.bias",
    }
