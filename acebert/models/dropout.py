"""Dropout by 16 random bits an element on CPUs, where torch's own takes several times as long.

torch draws a Bernoulli number for each element and multiplies bf16 by bool; this draws 64 bits for
four elements, and multiplies by a mask of the element's own type.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 2**16


class Dropout(nn.Dropout):
    """As `nn.Dropout`, by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape and dtype."""
        return dropout(x, self.p) if self.training else x


def dropout(x: Tensor, p: float) -> Tensor:
    """As `torch.nn.functional.dropout`; on a CPU `p` is rounded to 1 / 65,536, and what is kept
    scaled by the rounded one, so that the mean stays. What the compiler sees is torch's own."""
    dropped = round(p * LEVELS)
    if x.device.type != "cpu" or not 0 < dropped < LEVELS or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    drawn = bits.view(torch.int16)[: x.numel()].view(x.shape)
    keep = (drawn >= dropped - LEVELS // 2).to(x.dtype)
    return (x * keep).mul_(LEVELS / (LEVELS - dropped))


def use_dropout(model: nn.Module) -> None:
    """Put `Dropout` in the place of every `nn.Dropout` of a model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))
