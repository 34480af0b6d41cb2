"""The patch CNN with two heads while it is trained: category, and words as tags.

The heads read the mean of the last feature map, which is the mean of the 16 patch features that the
CNN is trained for (`acebert.data.patches`): what tells a category or a word from the whole photo
tells it from a patch.
"""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acebert.data.patches import PatchCNN


class TaggingCNN(nn.Module):
    """A timm CNN [B, 3, h, w] → logits of categories [B, C] and tags [B, T], either may be empty.

    Attributes:
        backbone: timm's model without its head; all that is kept of the training
        patch_dim: D1, channels of its last feature map
    """

    mean: Tensor
    std: Tensor

    def __init__(self, cnn: PatchCNN, categories: int, tag_share: np.ndarray) -> None:
        """
        Args:
            cnn: start weights; its model is trained in place
            categories: C
            tag_share: share of the photos that each tag is named for, where its bias starts [T]
        """
        super().__init__()
        self.backbone: Any = cnn.model.requires_grad_(True)
        self.patch_dim = cnn.patch_dim
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an empty head
            self.category = nn.Linear(self.patch_dim, categories)
            self.tags = nn.Linear(self.patch_dim, len(tag_share))
        with torch.no_grad():
            self.tags.bias.copy_(torch.logit(torch.from_numpy(tag_share), eps=1e-4))
        config = cnn.model.pretrained_cfg
        for name in ("mean", "std"):
            value = 255 * torch.tensor(config[name], dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        """float32 from 0 to 255 [B, 3, h, w] → logits [B, C] and [B, T], float32."""
        x = ((photos - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        pooled = self.backbone.forward_features(x).float().mean((2, 3))  # [B, D1]
        with torch.autocast(pooled.device.type, enabled=False):
            return self.category(pooled), self.tags(pooled)

    def head_parameters(self) -> set[str]:
        """Names of the parameters that no start weights are for."""
        return {name for name, _ in self.named_parameters() if not name.startswith("backbone.")}


def category_loss(logits: Tensor, category: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing, a mean over the B photos: [B, C], int64 [B] → scalar.

    A photo without a category (-1) adds nothing.
    """
    if not logits.shape[1]:
        return logits.new_zeros(())
    loss = F.cross_entropy(
        logits, category, ignore_index=-1, label_smoothing=smoothing, reduction="sum"
    )
    return loss / len(logits)


def tag_loss(
    logits: Tensor, targets: Tensor, unnamed_weight: float, words_per_product: float
) -> Tensor:
    """Binary cross-entropy per named word, a mean over the B photos: [B, T], [B, T] → scalar.

    Labels are positive or unknown: half of the titles that could name a colour do not. Where a
    title's wording does not depend on the look of the product, σ(logit) tends to c·P(word | photo),
    c one constant a word, so that the order of products for a word is the true one (Elkan and Noto,
    2008). A smaller `unnamed_weight` changes the logits by a constant too; it makes a named word
    count more in the gradient. A photo that no word is named for adds nothing.
    """
    named = targets.sum(dim=1, keepdim=True) > 0
    each = targets * F.softplus(-logits) + unnamed_weight * (1 - targets) * F.softplus(logits)
    return (each * named).sum() / (len(logits) * max(1.0, words_per_product))
